"""The command line: what it writes, what it says, what it refuses, what it leaves behind."""

import math
import subprocess
import sys

import pytest
import torch
from lib.command_line import invoke, plain
from PIL import Image
from rich.console import Console

from cachedit_fx import DBCacheConfig
from cachedit_fx.bench.comparison import TAYLOR, Row, Settings, psnr
from cachedit_fx.cli.demo import PROMPTS, markdown, table, verdict
from cachedit_fx.report.charts import save_differences, save_grid
from cachedit_fx.report.files import whole_files
from cachedit_fx.runtime.policies.base import Decision, Reason
from cachedit_fx.runtime.stats import CacheStats
from cachedit_fx.shapes import tokenize

FILES = ["differences.png", "grid.png", "table.md"]


def invoke_demo(out, *arguments):
    return invoke("demo", "--out", out, "--inner-backend", "eager", "--rounds", 1, *arguments)


def table_rows(folder):
    lines = (folder / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return cells[0], cells[2:]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A demo of two thresholds, the first of which never caches."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    result = invoke_demo(
        folder, "--steps", 10, "--thresholds", "0,0.6", "-p", PROMPTS[0], "-p", "a small cyan cross on gray"
    )
    return result, folder


def test_demo_writes_three_files_and_nothing_else(ran):
    result, folder = ran
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for name in FILES[:2]:
        with Image.open(folder / name) as picture:
            assert picture.width > 300 and picture.height > 300
            assert len(picture.convert("RGB").getcolors(2**24) or []) > 20


def test_demo_table(ran):
    headings, rows = table_rows(ran[1])
    assert headings == ["configuration", "steps", "cached", "work", "time", "PSNR dB"]
    assert [row[0] for row in rows] == [
        "uncached",
        "DBCache, threshold 0",
        "with TaylorSeer",
        "fewer steps, equal work",
        "DBCache, threshold 0.6",
        "with TaylorSeer",
        "fewer steps, equal work",
    ]
    assert rows[0] == ["uncached", "10", "", "100%", "100%", ""]


def test_threshold_0_gives_the_uncached_pictures_bit_by_bit(ran):
    _, rows = table_rows(ran[1])
    assert all(row[2:4] == ["0", "100%"] and row[5] == "identical" for row in rows[1:3])


def test_work_of_a_cached_run_and_of_its_rival(ran):
    _, rows = table_rows(ran[1])
    cached, predicted, rival = rows[4:7]
    assert int(predicted[2]) > 0 and predicted[5] != cached[5]
    assert 0 < int(cached[2]) <= 6  # 4 of 10 steps are warm-up
    work = (18 * 10 - 17 * int(cached[2])) / (18 * 10)
    assert cached[3] == f"{work:.0%}" and 20 < float(cached[5]) < 100
    assert rival[1:4] == [str(round(10 * work)), "", f"{round(10 * work) / 10:.0%}"]
    assert 10 < float(rival[5]) < 100


def test_demo_tells_what_it_tells_in_80_columns(ran):
    result, folder = ran
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines if str(folder) not in line)
    assert "…" not in result.stdout and "torchvision" not in result.output
    assert all(name in result.stdout for name in FILES)
    assert plain((folder / "table.md").read_text().split("\n\n", 1)[1]) in plain(result.stdout)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-p", "a large red circel on white"], ["'circel' (nearest known: 'circle')", "Shapes: circle, square"]),
        (["-p", "a " * 13], ["13 words", "at most 12"]),
        (["-p", "circle"] * 17, ["17 prompts; at most 16"]),
        (["--thresholds", "0.1;0.2"], ["'0.1;0.2' is not a list of numbers", "such as 0.08,0.12,0.2"]),
        (["--thresholds", "0.1,-1"], ["0 or more"]),
        (["--thresholds", "nan"], ["0 or more"]),
        (["--steps", "0"], ["--steps", "1"]),
        (["--inner-backend", "triton"], ["inductor", "eager"]),
    ],
)
def test_bad_arguments_are_refused_in_words(tmp_path, arguments, told):
    result = invoke_demo(tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert all(part in plain(result.output) for part in told), result.output
    assert not (tmp_path / "out").exists()


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke_demo(tmp_path / "file" / "deeper")
    assert result.exit_code == 2 and "is a file; give a folder" in plain(result.output)


def test_inductor_without_a_compiler_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = invoke("demo", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "no-such-compiler" in plain(result.output) and "--inner-backend eager" in plain(result.output)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (FileNotFoundError("no weights"), 1)])
def test_what_ends_early_leaves_nothing(tmp_path, monkeypatch, error, code):
    def compare(*_):
        raise error

    monkeypatch.setattr("cachedit_fx.bench.comparison.compare", compare)
    result = invoke_demo(tmp_path / "out")
    assert result.exit_code == code and isinstance(result.exception, SystemExit)
    assert (str(error) or "nothing was written") in plain(result.output)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("before", [None, {}, {"table.md": "old", "other.txt": "kept"}])
def test_files_are_whole_or_not_there(tmp_path, before):
    folder = tmp_path / "deep" / "out"
    for name, text in (before or {}).items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if before == {}:
        folder.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), whole_files(folder) as staging:
        (staging / "table.md").write_text("half")
        raise KeyboardInterrupt
    left = {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else None
    assert left == before
    with whole_files(folder) as staging:
        (staging / "table.md").write_text("new")
    left = {path.name: path.read_text() for path in folder.iterdir()}
    assert left == {**(before or {}), "table.md": "new"}


def test_the_default_prompts_are_words_the_model_knows():
    assert tokenize(PROMPTS).shape[0] == 6


def test_psnr_is_per_picture_and_infinite_for_equal_ones():
    pictures = torch.zeros(2, 3, 4, 4)
    other = pictures.clone()
    other[1] += 0.1
    assert psnr(other, pictures) == [math.inf, pytest.approx(20.0, abs=1e-3)]


def row(threshold, psnrs, cached=0, steps=10, calibrator=None):
    config = None if threshold is None else DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=threshold)
    stats = None
    if config:
        stats = CacheStats("region_0", num_blocks=18, first=1, last=0)
        for step in range(steps):
            reason = Reason.BELOW_THRESHOLD if step < cached else Reason.ABOVE_THRESHOLD
            stats.record(0, step, Decision(reason.action, reason, 0.1 + step / 10))
    return Row(
        steps, config, torch.rand(2, 3, 32, 32), 0.5, psnrs, stats, calibrator, [1.0, 3.0, 2.0], [1.0, 0.5, 0.75]
    )


def group(threshold, repeated, predicted, fewer, **more):
    """The three rows of a threshold."""
    return [
        row(threshold, repeated, **more),
        row(threshold, predicted, calibrator=TAYLOR, **more),
        row(None, fewer, steps=more.get("steps", 10)),
    ]


def test_means_leave_identical_pictures_out_and_ratios_are_medians():
    made = row(None, [40.0, math.inf])
    assert made.mean_psnr == 40.0 and made.ratio == 0.75
    assert row(None, [math.inf, math.inf]).mean_psnr == math.inf


@pytest.mark.parametrize(
    ("cached", "fewer", "told"),
    [(45.0, 40.0, "5.0 dB ahead at 0.5"), (40.0, 45.0, "5.0 dB behind at 0.5"), (math.inf, math.inf, "equal at 0.5"),
     (math.inf, 40.0, "identical pictures at 0.5")],
)  # fmt: skip
def test_verdict(cached, fewer, told):
    rows = [row(None, [math.inf]), *group(0.5, [cached], [fewer + 1], [fewer])]
    repeated, predicted = verdict(rows)
    assert repeated == f"At equal work, DBCache against fewer steps: {told}."
    assert predicted.startswith("At equal work, DBCache with TaylorSeer against fewer steps: ")
    assert predicted.endswith("equal at 0.5." if math.isinf(fewer) else "1.0 dB ahead at 0.5.")


def test_times_of_a_busy_machine_are_doubted():
    rows = [row(None, [math.inf]), *group(0.5, [40.0], [40.0], [40.0])]
    assert "slowest round took 3.0 x its fastest" in markdown(rows, Settings(("circle",)))
    rows[0].seconds = [1.0, 1.2, 1.1]
    assert "Busy" not in markdown(rows, Settings(("circle",)))


def test_an_inert_threshold_is_told():
    rows = [row(None, [math.inf]), *group(0.01, [math.inf], [math.inf], [math.inf])]
    assert "Nothing was cached: inert threshold: smallest difference 0.1" in markdown(rows, Settings(("circle",)))


def test_table_fits_80_columns_whatever_the_figures():
    rows = [row(None, [math.inf], steps=1000)]
    rows += group(0.123456, [math.inf], [math.inf], [123.45], cached=999, steps=1000)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(rows))
    text = console.export_text()
    assert "…" not in text and "DBCache, threshold 0.123456" in text and "999" in text


@pytest.mark.parametrize("thresholds", [(0.2,), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)])
def test_charts_of_one_and_of_many(tmp_path, thresholds):
    rows = [row(None, [math.inf, math.inf])]
    for threshold in thresholds:
        rows += group(threshold, [40.0, math.inf], [50.0, 50.0], [30.0, 31.0], cached=4)
    save_grid(rows, ["", "a large pink square above a small green cross on black"], tmp_path / "grid.png")
    save_differences(rows, tmp_path / "differences.png")
    heights = [Image.open(tmp_path / name).height for name in ("grid.png", "differences.png")]
    assert all(height > 150 * len(thresholds) for height in heights)


def test_help_and_version():
    top = invoke("--help")
    assert top.exit_code == 0 and "demo" in top.output and 'backend="cachedit"' in top.output
    helped = invoke("demo", "--help")
    assert helped.exit_code == 0
    for option in ("--out", "--prompts", "--steps", "--thresholds", "--inner-backend", "--seed", "--rounds"):
        assert option in helped.output
    assert "fewer steps at equal work" in plain(helped.output)
    assert torch.__version__ in invoke("--version").output
    assert invoke().exit_code == 2 and "demo" in invoke().output


def test_help_imports_neither_diffusers_nor_matplotlib():
    code = (
        "import sys; from typer.testing import CliRunner; from cachedit_fx.cli import app; "
        "assert CliRunner().invoke(app, ['demo', '--help']).exit_code == 0; "
        "print({'diffusers', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
