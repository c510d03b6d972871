"""examples/benchmarks: what its tables claim, on made-up measurements; and that its processes come and go cleanly."""

import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cachedit_fx.bench.process import BenchmarkError, Worker, check_peer
from cachedit_fx.bench.systems import Setup

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "compare_cache_dit.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("compare_cache_dit", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def stub(tmp_path):
    """Makes an "interpreter" that runs a line of shell instead of the worker."""

    def make(line: str) -> str:
        path = tmp_path / f"python{len(list(tmp_path.iterdir()))}"
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def measured(bench, ours_steps=(10, 12), ours_error=0.01, ours_seconds=0.4):
    """A comparison of one threshold and one prompt, as it would be after a run."""
    comparison = bench.Comparison(False, [0.12], 28, ["a prompt"])
    ((peer, ours, fewer),) = comparison.triples
    for row, error, flops, seconds, steps in [
        (comparison.reference, 0.0, 100, 1.0, []),
        (peer, 0.01, 70, 0.5, [10, 12]),
        (ours, ours_error, 70, ours_seconds, list(ours_steps)),
        (fewer, 0.1, 71, 0.71, []),
    ]:
        row.pictures, row.flops, row.cached_steps = [np.full(12, 0.5 + error, np.float32)], [flops], [steps]
        row.seconds = row.cpu_seconds = [[seconds], [seconds]]
    return comparison


def test_table(bench):
    cells = {row[0]: row[1:] for row in bench.table_of(measured(bench))}
    assert cells["uncached, eager"] == ("", "", "", "1.00", "1.00", "1.00", "", "")
    assert cells["cachedit_fx R0.12"] == ("2.0", "0 =", "40.0", "0.70", "0.40", "0.40", "0.80", "0.80")
    assert cells["fewer steps"][2:4] == ("20.0", "0.71")


@pytest.mark.parametrize(
    ("changed", "held"),
    [
        ({}, [True, True, True]),
        ({"ours_steps": (10,)}, [True, True, True]),
        ({"ours_steps": ()}, [False, True, True]),
        ({"ours_error": 0.02}, [True, False, True]),
        ({"ours_seconds": 0.51}, [True, True, False]),
    ],
)
def test_verdicts(bench, changed, held):
    assert [holds for holds, _ in bench.verdicts(measured(bench, **changed))] == held


def test_files_hold_every_row(bench):
    comparison = measured(bench)
    comparison.versions = {"cache-dit": {"torch": "2"}}
    page = json.loads(json.dumps(bench.as_json([comparison], {"rounds": 2})))
    assert [row["name"] for row in page["tables"][0]["rows"]] == [row.name for row in comparison.rows]
    text = bench.markdown([comparison], {"rounds": 2})
    assert all(f"| {row.name} |" in text for row in comparison.rows)


def test_missing_peer_is_said_before_anything_starts(stub):
    with pytest.raises(BenchmarkError, match=r"cachedit-fx\[peers\]"):
        check_peer(stub("exit 1"))
    with pytest.raises(BenchmarkError, match="--peer-python"):
        check_peer("/no/such/python")


def test_worker_that_dies_is_reported(stub):
    worker = Worker("dying", stub("exit 3"), Setup())
    with pytest.raises(BenchmarkError, match="exit code 3"):
        worker.wait_until_ready()


def test_interrupt_stops_the_workers(stub, tmp_path):
    pids = tmp_path / "pids"
    python = stub(f'[ "$1" = -c ] && echo 1.5.3 && exit; echo $$ >> {pids}; exec sleep 300')
    code = (
        f"import sys; sys.executable = {python!r}; sys.argv = ['bench', '--peer-python', {python!r}, '--mode', 'eager']"
    )
    # A background job of a shell without job control is born with the signal ignored.
    code += "; import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    run = f"{code}; import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    driver = subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not pids.exists() or len(pids.read_text().split()) < 7:
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.1)
    driver.send_signal(signal.SIGINT)
    out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130 and "interrupted" in out
    for pid in map(int, pids.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
