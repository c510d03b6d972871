"""`cachedit bench branches`: ratios of rounds, the page, and two ranks."""

from dataclasses import replace

import pytest
from lib.command_line import invoke

from cachedit_fx.bench.branches_times import ALONE, BRANCHES, CACHED, COMPUTED, TOKENS, Timing, measure, notes, table


@pytest.fixture
def timing():
    """Of two rounds: ranks that share branches take half of one's time, and those that share tokens three quarters."""
    seconds = {ALONE: [0.4, 0.8], BRANCHES: [0.2, 0.4], TOKENS: [0.3, 0.6]}
    times = {COMPUTED: seconds, CACHED: seconds}
    return Timing("always", "eager", 1, times, times, 0.97, {BRANCHES: 0.0, TOKENS: 2e-7})


def test_ratios_are_medians_of_rounds(timing):
    assert timing.ratio(COMPUTED, BRANCHES) == 0.5 and timing.ratio(CACHED, TOKENS) == pytest.approx(0.75)
    assert timing.wall_ratio(COMPUTED) == 0.5
    busy = replace(timing, share=0.6)
    assert busy.wall_ratio(COMPUTED) is None
    first, second = table([busy]).lines
    assert first.cells == ("eager", "always", "1", COMPUTED, "600.0", "300.0", "0.500", "450.0", "0.750", "")
    assert second.cells[3] == CACHED
    (note,) = notes([busy])
    assert "at least 60% of a core" in note and "no wall times" in note and "cfg_parallel 0.0e+00" in note


def test_the_page_has_a_line_for_each_kind(timing, monkeypatch, tmp_path):
    requests = []

    def measured(*request):
        requests.append(request)
        return replace(timing, guards=request[2], pictures=request[3])

    monkeypatch.setattr("cachedit_fx.bench.branches_times.measure", measured)
    result = invoke("bench", "branches", "--rounds", "2", "--pictures", "3", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert requests == [(2, "eager", "always", 3), (2, "eager", "generation", 3)]
    page = (tmp_path / "branches.md").read_text()
    assert "| eager | always | 3 | computed |" in page and "| eager | generation | 3 | cached |" in page
    assert all(len(line) <= 80 for line in result.output.splitlines()[:-1])


@pytest.mark.full("parallel")
@pytest.mark.budget(120, "two ranks capture the bundled model six times")
def test_two_ranks_share_branches():
    timing = measure(3, "eager", "always")
    assert timing.errors[BRANCHES] == 0.0 and timing.errors[TOKENS] < 1e-4
    assert timing.ratio(COMPUTED, BRANCHES) < 0.8
