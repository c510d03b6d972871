"""`cachedit kernels`: what it prints and writes, what it refuses."""

import csv
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cachedit_fx.bench import kernels_bandwidth as kernel_bench
from cachedit_fx.bench import kernels_verify as kernel_verify
from cachedit_fx.bench.kernels_bandwidth import Timed, cases, shapes_for
from cachedit_fx.bench.kernels_verify import Accesses, Checked
from cachedit_fx.cli import app
from cachedit_fx.cli.terminal import console
from cachedit_fx.kernels import layout

runner = CliRunner()
CPU = torch.device("cpu")
KERNELS = [
    "l1_sums, 1 previous",
    "l1_sums, 2 previous",
    "residual_apply, 1 term",
    "residual_apply, 2 terms",
    "residual_apply, 4 terms",
    "residual_store",
    "quant_fp8",
    "dequant_fp8",
]


def invoke(*arguments):
    given = [str(argument) for argument in ("kernels", *arguments)]
    return runner.invoke(app, given, env={"COLUMNS": "100", "TERM": "dumb"})


def plain(text):
    return " ".join(text.replace("│", " ").split())


def checked(variant, target="sm90", problems=(), **more):
    given = {"registers": 20, "spills": 0, "is_wide": True, "is_exact": True, "seconds": 0.1} | more
    return Checked("l1_sums", variant, target, accesses=Accesses((16, 16, 4), (16,)), problems=problems, **given)


@pytest.fixture
def found(monkeypatch):
    """What the checker finds, whatever is asked for."""
    rows = [checked("first"), checked("second", problems=("8 spilled",), spills=8, registers=40)]
    rows.append(checked("third", "sm80", is_wide=None))

    @contextmanager
    def checker():
        yield lambda todo: iter(rows)

    monkeypatch.setattr(kernel_verify, "checker", checker)
    monkeypatch.setattr(layout, "HAS_TRITON", True)
    return rows


def test_verify_compiles_what_is_chosen(tmp_path):
    pytest.importorskip("triton")
    result = invoke(
        "verify", "-k", "l1_sums bf16, 1 previous, row", "--target", "sm90", "--all", "--out", tmp_path / "o"
    )
    assert result.exit_code == 0, result.output
    assert "4 of 4 hold" in result.stdout
    text = (tmp_path / "o" / "kernels.md").read_text()
    assert "| l1_sums | sm90 | 4 |" in text and "| 2 of 2 | 4 of 4 |" in text
    rows = list(csv.DictReader((tmp_path / "o" / "kernels.csv").open()))
    assert len(rows) == 4 and {row["spills"] for row in rows} == {"0"} and rows[0]["loads"] == "4 x 16"


def test_a_variant_that_falls_short_is_told_and_fails(found, tmp_path):
    result = invoke("verify", "--out", tmp_path)
    assert result.exit_code == 1
    assert "2 of 3 hold" in result.stdout and "second, sm90: 8 spilled" in result.stdout
    text = (tmp_path / "kernels.md").read_text()
    assert (
        "| l1_sums | sm80 | 1 | 20 | 0 | 0 of 0 | 1 of 1 |\n| l1_sums | sm90 | 2 | 40 | 8 | 2 of 2 | 2 of 2 |" in text
    )
    assert "- second, sm90: 8 spilled" in text
    assert [row["problems"] for row in csv.DictReader((tmp_path / "kernels.csv").open())] == ["", "8 spilled", ""]


def test_all_shows_every_variant(found, monkeypatch):
    monkeypatch.setattr(console, "_width", 160)  # made at import; where nothing is a terminal, 80 columns would wrap
    shown = invoke("verify", "--all").stdout
    assert all(name in shown for name in ("first", "second", "third", "2 x 16 + 1 x 4", "not aligned"))
    assert "first" not in invoke("verify").stdout


def test_ctrl_c_leaves_nothing(found, tmp_path, monkeypatch):
    @contextmanager
    def checker():
        def run(todo):
            yield found[0]
            raise KeyboardInterrupt

        yield run

    monkeypatch.setattr(kernel_verify, "checker", checker)
    result = invoke("verify", "--out", tmp_path / "out")
    assert result.exit_code == 130 and "interrupted after 1 of" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["verify", "--target", "sm70"], "no target sm70; there are sm80, sm89, sm90, sm100, gfx942"),
        (["verify", "-k", "l2_diff"], "no variant's name contains l2_diff"),
        (["bench", "--dtype", "int8"], "no dtype int8; there are bf16, fp16, fp32"),
        (["bench", "--shape", "4096"], "is no shape such as 1x4096x3072"),
        (["bench", "--shape", "4xa"], "is no shape such as 1x4096x3072"),
        (["bench", "--device", "nothing"], "nothing cannot be used"),
        (["bench", "--rounds", "0"], "--rounds"),
    ],
)
def test_bad_arguments_are_refused_in_words(tmp_path, arguments, told):
    pytest.importorskip("triton")
    result = invoke(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and told in plain(result.output), result.output
    assert not (tmp_path / "out").exists()


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(layout, "HAS_TRITON", False)
    result = invoke("verify")
    assert result.exit_code == 1 and "pip install 'triton>=3.7.1,<3.10'" in plain(result.output)
    with pytest.raises(ModuleNotFoundError), monkeypatch.context() as patch:
        patch.setattr(kernel_verify, "HAS_TRITON", False)
        with kernel_verify.checker():
            pass


def test_bench_writes_three_files(tmp_path):
    result = invoke(
        "bench", "--device", "cpu", "--shape", "1x16x128", "--shape", "4x64", "--rounds", 1, "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bandwidth.csv", "bandwidth.md", "bandwidth.png"]
    rows = list(csv.DictReader((tmp_path / "bandwidth.csv").open()))
    assert [row["kernel"] for row in rows] == KERNELS * 4
    assert {(row["shape"], row["dtype"]) for row in rows} == {
        (s, d) for s in ("1x16x128", "4x64") for d in ("bf16", "fp32")
    }
    assert all(float(row[name]) > 0 for row in rows for name in ("seconds", "copy_seconds", "torch_seconds"))
    assert (tmp_path / "bandwidth.md").read_text().count("| residual_store |") == 4
    with Image.open(tmp_path / "bandwidth.png") as picture:
        assert picture.width > 1000 and picture.height > 600


def test_bytes_that_cannot_be_avoided():
    moved = {case.kernel: case.moved for case in cases([(1, 16, 128), (1, 4, 128)], torch.bfloat16, CPU)}
    elements, both = 16 * 128, 20 * 128
    assert list(moved) == KERNELS
    assert moved["l1_sums, 2 previous"] == elements * (2 + 2 + 4 + 4 + 4)
    assert moved["residual_apply, 4 terms"] == both * (2 + 2 + 4 * 4)
    assert moved["residual_store"] == both * (2 + 2 + 4)
    assert moved["quant_fp8"] == moved["dequant_fp8"] == elements * (2 + 1) + 16 * 4
    assert kernel_bench.count({"a": ((1, 1, 1),), "b": ((2, 2),)}, ["bf16", "fp32"]) == 4 * len(KERNELS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_reference_does_what_the_kernel_does(dtype):
    """As far as results are returned; sizes and dtypes of those that are written."""
    ours: Any
    reference: Any
    for case in cases([(1, 16, 128)], dtype, CPU):
        ours, reference = case.ours(), case.reference()
        if case.kernel.startswith("l1_sums"):
            torch.testing.assert_close(ours.float(), reference)
        elif case.kernel == "dequant_fp8":
            torch.testing.assert_close(ours, reference)


def test_shapes_are_chosen_by_the_memory(monkeypatch):
    monkeypatch.setattr(kernel_bench, "memory", lambda device: 2**40)
    assert list(shapes_for(CPU)) == ["small", "FLUX", "Wan / 5"]
    assert list(shapes_for(torch.device("meta"))) == ["small", "FLUX", "Wan"]
    monkeypatch.setattr(kernel_bench, "memory", lambda device: 8 * 2**30)
    assert list(shapes_for(torch.device("meta"))) == ["small", "FLUX", "Wan / 5"]
    monkeypatch.setattr(kernel_bench, "memory", lambda device: 2**20)
    assert list(shapes_for(CPU)) == ["small"]
    monkeypatch.undo()
    assert 2**20 < kernel_bench.memory(CPU) < 2**50


def test_ratios():
    row = Timed("a", "b", "c", moved=2_000_000_000, ours=0.5, copy=0.25, reference=1.0)
    assert (row.bandwidth, row.share, row.speedup) == (4.0, 0.5, 2.0)


def test_help():
    shown = invoke("--help").output
    assert "verify" in shown and "bench" in shown
    for command, options in (
        ("verify", ("--target", "--kernel", "--all", "--out")),
        ("bench", ("--device", "--rounds")),
    ):
        result = invoke(command, "--help")
        assert result.exit_code == 0 and all(option in result.output for option in options)
    assert "kernels" in runner.invoke(app, ["--help"]).output
