"""`cachedit bench --against`: what its tables claim, on made-up measurements; a run of it; a clean end."""

import json
import os
import signal
import threading
import time

import pytest
from lib.benches import SHARES_SYSTEMS, WorkerHere, measured, stub_python
from lib.command_line import invoke, plain

from cachedit_fx.bench.against import Pair, paired_rows, pairs_of, peer_of, spread, table, verdicts
from cachedit_fx.bench.measure import Settings
from cachedit_fx.bench.pages import markdown
from cachedit_fx.bench.record import Record
from cachedit_fx.bench.rows import Row, RowError

pytestmark = SHARES_SYSTEMS


def rows(steps=(10, 12), psnr=40.0, seconds=0.4):
    """Ours and cache-dit's at one threshold and one prompt, as they would be after two rounds."""
    return [
        measured("R0.12", 0.7, [psnr], seconds=[seconds] * 2, cpu_seconds=[seconds / 2] * 2,
                 cached_by_call=[list(steps)], cached_steps=len(steps)),
        measured("cache-dit R0.12", 0.7, [40.0], "cache-dit", seconds=[0.5] * 2, cpu_seconds=[0.5] * 2,
                 cached_by_call=[[10, 12]]),
        measured("20 steps", 0.71, [20.0], "uncached"),
    ]  # fmt: skip


def test_table():
    (line,) = table(pairs_of(rows())).lines
    assert line.cells == ("R0.12", "2.0", "0 =", "+0.0", "0.80", "0.40")
    (line,) = table(pairs_of(rows(steps=(10, 11), psnr=41.0))).lines
    assert line.cells[2:4] == ("0", "+1.0")
    (line,) = table(pairs_of(rows(psnr=39.99))).lines
    assert line.cells[3] == "+0.0"


@pytest.mark.parametrize(
    ("changed", "held"),
    [
        ({}, [True, True, True]),
        ({"steps": (10,)}, [True, True, True]),
        ({"steps": ()}, [False, True, True]),
        ({"psnr": 39.0}, [True, False, True]),
        ({"psnr": None}, [True, True, True]),
        ({"seconds": 0.51}, [True, True, False]),
    ],
)
def test_verdicts(changed, held):
    assert [holds for holds, _ in verdicts(pairs_of(rows(**changed)))] == held


def test_identical_pictures_in_both_are_no_difference():
    ours, peer, _ = rows(psnr=None)
    peer.psnr = [None]
    assert Pair(ours, peer).more_psnr == 0.0


def test_quartiles_stand_behind_the_median():
    assert spread([]) == "" and spread([1.0, 2.0, 3.0]) == "2.00"
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.00 (1.50-4.50)"


def test_the_page_has_every_row_the_pairs_and_the_verdicts():
    text = markdown(Record(Settings(("a red circle",)), "cachedit bench", "a machine", {}, rows()))
    assert all(f"{row.name}" in text for row in rows())
    assert "| R0.12 | 2.0 | 0 = |" in text and "- yes: R0.12: wall time 0.80 times cache-dit's" in text


def test_a_row_and_its_peer_have_the_same_settings():
    row = Row("a", arguments={"Fn_compute_blocks": 1, "steps_computation_mask": "10", "calibrator": "taylorseer"})
    peer = peer_of(row)
    assert (peer.name, peer.system) == ("cache-dit a", "cache-dit")
    assert peer.arguments == dict(row.arguments) | {"steps_computation_mask": [1, 0]}
    assert all(peer_of(row).arguments == row.arguments for row in paired_rows())


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (Row("a", arguments={"preset": "fast", "steps": 28}), "preset, steps"),
        (Row("a", arguments={"calibrator": {"name": "lagrange"}}), "calibrator='lagrange'"),
        (Row("a", "diffusers"), "system='diffusers'"),
    ],
)
def test_a_row_without_a_counterpart_is_refused(row, told):
    with pytest.raises(RowError, match=told):
        peer_of(row)


def against(*arguments):
    return invoke("bench", "--against", "cache-dit", *arguments, columns=200)


def test_a_run_of_pairs(entry, tmp_path, monkeypatch):
    """Ours stands in for cache-dit, so that all is known beforehand but the times."""
    monkeypatch.setattr("cachedit_fx.bench.measure.Worker", WorkerHere)
    monkeypatch.setattr("cachedit_fx.bench.run.check_peer", lambda python: "1.5.4")
    out = tmp_path / "out"
    options = ("--pipeline", entry, "--prompts", 2, "--steps", 5, "--rounds", 1, "--out", out)
    result = against(*options, "-k", "0.2")
    assert result.exit_code == 0, result.output
    told = plain(result.output)
    assert "yes: F1 R0.2: number of cached steps within 1" in told and "this was written for 1.5.3" in told
    page = json.loads((out / "bench.json").read_text())
    assert [row["name"] for row in page["rows"]][:3] == ["uncached", "F1 R0.2", "cache-dit F1 R0.2"]
    ours, peer = page["rows"][1:3]
    assert ours["cached_by_call"] == peer["cached_by_call"] and ours["psnr"] == peer["psnr"]
    assert len(ours["seconds"]) == len(peer["wall_ratios"]) == page["settings"]["timed"] == 2  # every prompt is timed
    assert "| F1 R0.2 |" in (out / "bench.md").read_text().split("against cache-dit")[1]

    resumed = against(*options, "-k", "0.2", "-k", "0.12", "--resume")
    assert resumed.exit_code == 0, resumed.output
    again = json.loads((out / "bench.json").read_text())["rows"]
    assert again[1:3] == page["rows"][1:3] and "cache-dit F1 R0.12" in [row["name"] for row in again]


def test_without_cache_dit_it_says_what_to_install(entry, tmp_path):
    result = against("--pipeline", entry, "--peer-python", stub_python(tmp_path, "exit 1"), "--out", tmp_path / "out")
    assert result.exit_code == 1 and 'pip install "cachedit-fx[peers]"' in plain(result.output)
    assert not (tmp_path / "out").exists()


def test_rows_that_cache_dit_does_not_have_are_refused(tmp_path):
    path = tmp_path / "rows.toml"
    path.write_text("presets = true")
    result = against(path, "--list")
    assert result.exit_code == 2 and "no counterpart in cache-dit (preset, steps)" in plain(result.output)


def test_interrupt_stops_the_workers(entry, tmp_path):
    pids = tmp_path / "pids"
    python = stub_python(tmp_path, f'[ "$1" = -c ] && echo 1.5.3 && exit; echo $$ >> {pids}; exec sleep 300')

    def interrupt():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not pids.exists() or len(pids.read_text().split()) < 3):
            time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGINT)

    main = threading.get_ident()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        result = against("--pipeline", entry, "--prompts", 1, "--steps", 2, "--peer-python", python,
                         "--out", tmp_path / "out")  # fmt: skip
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert "interrupted with 6 of 6 rows to go; nothing was measured" in plain(result.output)
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 3
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
