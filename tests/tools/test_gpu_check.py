"""examples/gpu_check.py: its parts, what an interrupted run leaves, and what needs neither a GPU nor diffusers."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gpu_check
import pytest
import torch
from gpu_check import Findings, Piece, Settings

from cachedit_fx.bench import flux_ladder, flux_steps, kernels_numerics
from cachedit_fx.bench.kernels_bandwidth import Timed
from cachedit_fx.bench.kernels_numerics import Check, Launchers
from cachedit_fx.kernels.layout import HAS_TRITON
from cachedit_fx.metrics.flops import FlopCounter

CPU = torch.device("cpu")
SCRIPT = Path(gpu_check.__file__)
WITHOUT = f"""
import runpy, sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        absent = {{"diffusers", "transformers", "typer", "rich", "matplotlib"}}
        return None if name.split(".")[0] in absent else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
sys.argv = [{str(SCRIPT)!r}, *sys.argv[1:]]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def check(*problems):
    return Check("a check", 1, 0.5, list(problems))


@pytest.fixture
def pieces(monkeypatch):
    """Three parts that do nothing, by name; the names of those that ran."""
    ran = []

    def piece(name):
        def run(settings):
            ran.append(name)
            return Findings(timed=[Timed("k", "s", "bf16", 8, 1.0, 1.0, 2.0)] if name == "c" else [])

        return Piece(f"part {name}", run, 7)

    table = {name: piece(name) for name in "abc"}
    monkeypatch.setattr(gpu_check, "PIECES", table)
    return table, ran


def replaced(piece, error):
    def run(settings):
        raise error

    return Piece(piece.about, run, piece.seconds)


SETTINGS = Settings(CPU)


def test_an_interrupted_run_keeps_what_is_done_and_goes_on(pieces, tmp_path, capsys):
    table, ran = pieces
    whole = dict(table)
    table["b"] = replaced(table["b"], KeyboardInterrupt())
    assert gpu_check.run(table, SETTINGS, tmp_path) == 130
    assert ran == ["a"] and "Parts: a 0 s." in (tmp_path / "report.md").read_text()
    assert {path.stem for path in tmp_path.glob("*.json")} == {"a"} and "interrupted in b" in capsys.readouterr().err

    table.update(whole)
    assert gpu_check.run(table, SETTINGS, tmp_path) == 0
    assert ran == ["a", "b", "c"] and (tmp_path / "bandwidth.png").exists()
    assert (tmp_path / "bandwidth.csv").read_text().count("\n") == 2
    assert gpu_check.run(table, SETTINGS, tmp_path) == 0 and ran == ["a", "b", "c"]
    assert gpu_check.run(table, SETTINGS, tmp_path, again=True) == 0 and len(ran) == 6
    assert gpu_check.run(table, Settings(CPU, steps=5), tmp_path) == 0 and len(ran) == 9  # other conditions


def test_a_part_that_fails_is_written_and_tried_again(pieces, tmp_path, capsys):
    table, ran = pieces
    right = table["b"]
    table["b"] = replaced(right, RuntimeError("no such kernel"))
    assert gpu_check.run(table, SETTINGS, tmp_path) == 1 and ran == ["a", "c"]
    assert json.loads((tmp_path / "b.json").read_text())["error"] == "RuntimeError: no such kernel"
    assert "b failed: RuntimeError: no such kernel" in (tmp_path / "report.md").read_text()
    table["b"] = right
    assert gpu_check.run(table, SETTINGS, tmp_path) == 0 and ran == ["a", "c", "b"]


def test_problems_make_the_exit_code_and_stay_in_the_record(pieces, tmp_path, capsys):
    table, _ = pieces
    table["b"] = Piece("wrong", lambda settings: Findings([check(), check("(2, 3): not identical")]), 7)
    assert gpu_check.run(table, SETTINGS, tmp_path) == 1
    assert gpu_check.run(table, SETTINGS, tmp_path) == 1  # nothing is run again, and nothing is forgotten
    assert "a check: (2, 3): not identical" in capsys.readouterr().out


def test_a_broken_file_is_no_record(pieces, tmp_path, capsys):
    table, ran = pieces
    gpu_check.run(table, SETTINGS, tmp_path)
    (tmp_path / "b.json").write_text('{"part": "b"')
    gpu_check.run(table, SETTINGS, tmp_path)
    assert ran == ["a", "b", "c", "b"]


def test_the_time_is_told_before(pieces, tmp_path, capsys):
    table, ran = pieces
    table["d"] = Piece("of a package that is not there", partial(lambda settings: Findings()), 9, needs=("no_such",))
    assert gpu_check.run(table, SETTINGS, tmp_path, only_list=True) == 0
    told = capsys.readouterr().out
    assert not ran and "3 parts to do, about 6 s" in told and "needs no_such" in told
    assert not list(tmp_path.iterdir())


def test_the_kernels_need_torch_and_triton_alone(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT, "--cpu-rehearsal", "--kernels-only", "--rounds", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("# Rehearsal on a CPU: nothing here was run on a GPU") and " no |" not in report
    for text in ("l1_sums, bf16", "residuals, fp16", "fp8, fp32", "rows far apart", "| small | fp32 |", "| Wan |"):
        assert text in report
    assert ("residuals, fp32, interpreted" in report) is HAS_TRITON
    assert not (tmp_path / "model.json").exists()


def test_the_whole_model(monkeypatch):
    """The clock counts kernels, of which a busy machine runs as many as an idle one."""
    with FlopCounter() as work:
        monkeypatch.setattr(flux_steps, "time", SimpleNamespace(perf_counter=lambda: work.kernels))
        found = flux_steps.cached(CPU, steps=4, inner_backend="eager")
    assert not [problem for made in found.checks for problem in made.problems]
    assert [check.tried for check in found.checks] == [1, 4, 3]
    assert [times.kind for times in found.steps] == [
        flux_steps.UNCACHED,
        flux_steps.ZERO,
        flux_steps.COMPUTED,
        flux_steps.CACHED,
    ]
    cached, uncached = found.steps[-1], found.steps[0]
    assert cached.device[0] < uncached.device[0] and len(uncached.device) == 2
    assert "1 + 2 blocks" in found.about


@pytest.mark.filterwarnings("ignore:.*gains no time")
def test_the_ladder():
    found = [flux_ladder.climb(CPU, 4, "eager", name) for name in ("eager", "int8")]
    assert not [problem for each in found for check in each.checks for problem in check.problems]
    steps = [times for each in found for times in each.steps]
    assert all(map(flux_ladder.is_rung, steps)) and len(steps) == 3
    lines = [line.cells for line in flux_ladder.table(steps, is_cpu=True).lines]
    assert [line[0] for line in lines] == ["eager", "cache + compile + int8", lines[-1][0]]
    assert lines[0][4] == "1.00" and lines[-1][5] == "1.00" and lines[-1][1:4] == lines[-2][1:4]


def test_a_group_of_parts():
    (rungs,) = gpu_check.parser().parse_args(["--only", "ladder"]).only
    assert rungs == [f"ladder_{name}" for name in flux_ladder.RUNGS]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words", [[], ["--only", "fp8"]])
def test_the_gpu_check_wants_a_gpu(tmp_path, words, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main([*words, "--out", str(tmp_path / "o")])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "no GPU" in told and "--cpu-rehearsal" in told and told.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_part_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "fp9"])
    assert "fp9" in capsys.readouterr().err


def test_the_checks_can_fail():
    """Launchers that are a little wrong."""
    launchers = Launchers(on_triton=False)
    right = launchers.store

    def wrong(results, bases, outs):
        right(results, bases, outs)
        outs[-1].mul_(1 + 2**-6)

    launchers.store = wrong
    launchers.quant = lambda x: kernels_numerics.quant_fp8.quant_fp8(x).bitwise_xor(1)
    shapes = [(2, 3, 5)]
    found = {name: list(kernels_numerics.numerics(name, launchers, CPU, shapes)) for name in kernels_numerics.KERNELS}
    wrongs = {name: all(check.problems for check in checks) for name, checks in found.items()}
    assert wrongs == {"l1_sums": False, "residuals": True, "fp8": True}
    assert kernels_numerics.far_apart(launchers, CPU).problems
