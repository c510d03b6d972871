"""`cachedit bench ulysses`: counts for ranks that do not exist, on a small model; times on two ranks."""

from dataclasses import replace

import pytest
import torch.distributed as dist
from lib.command_line import invoke, plain
from lib.zoo import ZOO

from cachedit_fx.bench.flux import Size
from cachedit_fx.bench.graphs import largest_graph
from cachedit_fx.bench.known_models import MODELS
from cachedit_fx.bench.ulysses import INPUTS, count, table
from cachedit_fx.bench.ulysses_times import ALONE, CACHED, COMPUTED, PEER, SHARED, UNCACHED, Timing, measure, notes
from cachedit_fx.bench.ulysses_times import table as times_table


@pytest.fixture(scope="module")
def captured():
    module, inputs = ZOO["FluxTransformer2DModel"]()
    return module, largest_graph(module, inputs(1))


def share_of(*arguments):
    share = count(*arguments)
    assert share is not None
    return share


def test_two_ranks_exchange_heads_and_keep_half(captured):
    one, more = (share_of("tiny", captured[0], captured[1], ranks) for ranks in (2, 8))
    blocks, width = 8, 16
    assert one.exchanges == 4 * blocks and one.gathers == 1 and one.sums == 0
    assert one.tokens == (1, 8, width) and more.tokens == (1, 2, width)
    assert min(one.divided, more.divided) > 0.9
    tokens = (16 + 6) // 2
    assert one.sent == 4 * blocks * (tokens * width * 4) // 2 + 8 * 4 * 4  # of each exchange one half; and the result
    assert 0 < more.stored < one.stored
    assert not dist.is_initialized()


def test_more_ranks_than_heads_gather_keys_and_values(captured):
    share = share_of("tiny", captured[0], captured[1], 8)
    assert share.exchanges == 0 and share.gathers == 2 * 8 + 1


def test_a_ring_passes_keys_and_values_around(captured):
    two, eight = (share_of("tiny", captured[0], captured[1], ranks, "ring_size") for ranks in (2, 8))
    blocks, width = 8, 16
    assert two.rings == eight.rings == blocks and two.exchanges == 0 and two.gathers == eight.gathers == 1
    tokens = (16 + 6) // 2
    assert two.sent == 2 * blocks * tokens * width * 4 + 8 * 4 * 4  # keys and values of each block; and the result


def test_the_table_has_a_line_for_each_number_of_ranks(captured):
    rows = [share_of("tiny", captured[0], captured[1], ranks) for ranks in (2, 8)]
    assert [line.cells[1] for line in table(rows).lines] == ["2", "8"]
    assert INPUTS.keys() <= MODELS.keys()


# ---------------------------------------------------------------------------------------------------------------------
# Times


@pytest.fixture
def timing():
    """Of two rounds: two ranks take half of one's time, cache-dit three quarters."""
    seconds = {ALONE: [4.0, 8.0], SHARED: [2.0, 4.0], PEER: [3.0, 6.0]}
    cpu = {UNCACHED: seconds, COMPUTED: {who: seconds[who] for who in (ALONE, SHARED)}}
    return Timing(1024, "eager", cpu, cpu, 0.97, {SHARED: 2e-7, PEER: 1e-7})


def test_ratios_are_medians_of_rounds(timing):
    assert timing.ratio(UNCACHED, SHARED, ALONE) == 0.5 and timing.ratio(UNCACHED, SHARED, PEER) == pytest.approx(2 / 3)
    assert timing.wall_ratio(COMPUTED) == 0.5
    busy = replace(timing, share=0.6)
    assert busy.wall_ratio(COMPUTED) is None
    first, second = times_table([busy]).lines
    assert first.cells == ("eager", "1024", UNCACHED, "6.000", "3.000", "0.500", "4.500", "0.667", "")
    assert second.cells[2:] == (COMPUTED, "6.000", "3.000", "0.500", "", "", "")
    (note,) = notes([busy])
    assert "at least 60% of a core" in note and "no wall times" in note and "two ranks 2.0e-07" in note


def test_the_page_has_times_and_says_when_cache_dit_is_missing(captured, timing, monkeypatch, tmp_path):
    requests = []

    def measured(*request):
        requests.append(request)
        return timing

    monkeypatch.setattr("cachedit_fx.bench.ulysses.INPUTS", {"tiny": None})
    monkeypatch.setattr("cachedit_fx.bench.ulysses.capture", lambda name: captured)
    monkeypatch.setattr("cachedit_fx.bench.ulysses_times.measure", measured)
    missing = str(tmp_path / "python")
    words = ("bench", "ulysses", "--ranks", "2", "--tokens", "1024", "--rounds", "2", "--out", str(tmp_path))
    assert invoke(*words, "--peer-python", missing).exit_code == 1 and not requests
    result = invoke(*words, "--inner-backend", "eager")
    assert result.exit_code == 0, result.output
    (size, rounds, backend, _), *_ = requests
    assert (size.blocks, size.width, size.side, rounds, backend) == (6, 512, 32, 2, "eager")
    page = (tmp_path / "ulysses.md").read_text()
    assert "| tiny | 2 |" in page and "| eager | 1024 | no cache |" in page and "Width 512." in page
    assert all(len(line) <= 80 for line in result.output.splitlines()[:-1])


@pytest.mark.parametrize(
    ("words", "error"),
    [(("--tokens", "60"), "60 is no square number, such as 64"), (("--width", "192"), "192 is no multiple of 128")],
)
def test_wrong_words(words, error, tmp_path):
    result = invoke("bench", "ulysses", *words, "--out", str(tmp_path))
    assert result.exit_code == 2 and error in plain(result.output)


@pytest.mark.full("parallel")
@pytest.mark.budget(90, "two ranks import everything, and capture a small model five times")
def test_two_ranks_are_timed():
    timing = measure(Size(1, 1, 128, 8, 64), 2, "eager")
    assert timing.cpu.keys() == {UNCACHED, COMPUTED, CACHED} and 0 < timing.share <= 1.01
    assert all(len(seconds) == 2 and min(seconds) > 0 for kind in timing.cpu.values() for seconds in kind.values())
    assert timing.errors[ALONE] == 0 and timing.errors[SHARED] < 2e-6
