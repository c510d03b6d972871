"""`cachedit bench --peers`: the rows of others, each in a process of its own."""

import json
import sys
from importlib.metadata import version

import pytest
import torch
from lib.benches import SHARES_SYSTEMS, WorkerHere, bench, page_of, shared_system, stub_python
from lib.command_line import plain

from cachedit_fx.bench.errors import BenchmarkError
from cachedit_fx.bench.process import Worker, check_peer, pack, unpack
from cachedit_fx.bench.systems import Drawing, Setup

pytestmark = SHARES_SYSTEMS


def test_peers_that_are_not_installed_are_skipped_with_the_reason(entry, rows_file, tmp_path):
    options = ("--peers", "-k", "mask, T", "-k", "cache-dit 0.2")
    result = bench(rows_file, *options, "--peer-python", "/no/such/python", "--list")
    assert "cache-dit 0.2" not in result.output and "mask" in result.output
    python, out = stub_python(tmp_path, "exit 1"), tmp_path / "out"
    prompts = ("--prompts", 1, "--steps", 4, "--rounds", 0, "--pipeline", entry)
    result = bench(rows_file, *options, "--peer-python", python, *prompts, "--out", out)
    assert result.exit_code == 0, result.output
    assert "cache-dit is not installed in" in plain(result.output)
    assert 'pip install "cachedit-fx[peers]"' in plain(result.output)
    page = page_of(out)
    assert "Rows of cache-dit were skipped" in page["notes"][0]
    assert not any("cache-dit" in row["name"] for row in page["rows"])
    assert all(row["wall"] is None for row in page["rows"][1:])
    alone = bench(rows_file, "--peers", "--peer-python", python, "-k", "cache-dit 0.2", "--out", out)
    assert alone.exit_code == 1 and "not installed" in plain(alone.output)


def test_missing_peer_is_said_before_anything_starts(tmp_path):
    with pytest.raises(BenchmarkError, match=r"cachedit-fx\[peers\]"):
        check_peer(stub_python(tmp_path, "exit 1"))
    with pytest.raises(BenchmarkError, match="--peer-python"):
        check_peer("/no/such/python")


PEER = "[peer]\nsystem = 'diffusers'\nconfig = 'FirstBlockCacheConfig'\nthreshold = 0.1\n"


def test_a_peer_that_fails_does_not_end_the_run(entry, tmp_path):
    path, out = tmp_path / "rows.toml", tmp_path / "out"
    path.write_text(f"{PEER}[ours]\nFn_compute_blocks = 1\n")
    settings = ("--prompts", 1, "--steps", 2, "--rounds", 0, "--pipeline", entry, "--out", out)
    options = (*settings, "--peer-python", stub_python(tmp_path, "exit 3"))
    result = bench(path, *options)
    assert result.exit_code == 0 and "peer failed" in plain(result.output)
    assert [row["name"] for row in page_of(out)["rows"]] == ["uncached", "ours", "2 steps"]
    alone = bench(path, *options, "-k", "peer")
    assert alone.exit_code == 1 and "exit code 3" in plain(alone.output)


def test_a_peer_takes_turns_with_an_uncached_one_of_its_environment(entry, tmp_path, monkeypatch):
    monkeypatch.setattr("cachedit_fx.bench.measure.Worker", WorkerHere)
    path, out = tmp_path / "rows.toml", tmp_path / "out"
    path.write_text(PEER)
    options = ("--prompts", 1, "--steps", 4, "--rounds", 2, "--pipeline", entry, "--out", out)
    result = bench(path, *options)
    assert result.exit_code == 0, result.output
    _, peer, rival = page_of(out)["rows"]
    assert peer["system"] == "diffusers" and peer["cached_by_call"] == [None] and rival["system"] == "uncached"
    assert len(peer["wall_ratios"]) == len(rival["wall_ratios"]) == 2
    assert f"torch is {version('torch')} here and 2 in the peers' environment" in plain(result.output)


PEERS = [
    ({"config": "FirstBlockCacheConfig", "threshold": 10.0}, [0]),
    ({"config": "TaylorSeerCacheConfig", "cache_interval": 2, "use_lite_mode": True}, [0, 1, 2, 4]),
    ({"config": "MagCacheConfig", "threshold": 10.0, "retention_ratio": 0.5}, [0, 1, 2]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "computed"), PEERS)
def test_diffusers_own_caches_run(entry, arguments, computed):
    system = shared_system(Setup("diffusers", arguments, steps=5, entry=entry, calibration=("a red circle",)))
    drawing = system.draw(["a blue square"], 5, 0, count=True)
    whole = shared_system(Setup(entry=entry)).draw(["a blue square"], 5, 0, count=True)
    assert [step for step, flops in enumerate(drawing.flops) if flops == whole.flops[step]] == computed
    assert not torch.equal(drawing.pictures, whole.pictures)


def test_a_worker_draws_what_this_process_draws_and_reports_what_fails(entry):
    setup = Setup(entry=entry)
    worker = Worker("plain", sys.executable, setup)
    try:
        worker.wait_until_ready()
        there = worker.draw(["a red circle", "a blue square"], 2, 5, count=True)
        with pytest.raises(BenchmarkError, match="plain: UnknownWordError.*'circel'"):
            worker.draw(["a red circel"], 2, 5)
    finally:
        worker.stop()
    here = shared_system(setup).draw(["a red circle", "a blue square"], 2, 5, count=True)
    assert torch.equal(there.pictures, here.pictures) and there.flops == here.flops and len(here.flops) == 2
    assert worker.versions["torch"] == version("torch")


def test_worker_that_dies_is_reported(tmp_path):
    worker = Worker("dying", stub_python(tmp_path, "exit 3"), Setup())
    with pytest.raises(BenchmarkError, match="exit code 3"):
        worker.wait_until_ready()


def test_a_drawing_travels_whole():
    drawing = Drawing(torch.rand(2, 3, 4, 5), 1.5, 1.0, [3, 4], None, 7)
    back = unpack(json.loads(json.dumps(pack(drawing))))
    assert torch.equal(back.pictures, drawing.pictures) and back.pictures.dtype == torch.float32
    assert (back.seconds, back.flops, back.cached_steps, back.bytes_held) == (1.5, [3, 4], None, 7)
