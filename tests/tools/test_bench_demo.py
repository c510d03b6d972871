"""`cachedit demo`: what it writes, what it says, what it refuses, what it leaves behind."""

import math

import pytest
import torch
from lib.benches import SHARES_SYSTEMS, measured
from lib.command_line import invoke, plain
from PIL import Image
from rich.console import Console

from cachedit_fx.bench.demo import PROMPTS, Demo, Threesome, markdown, save, settings_for, table, verdict
from cachedit_fx.bench.measure import Bench
from cachedit_fx.bench.rows import UNCACHED
from cachedit_fx.report.tables import terminal
from cachedit_fx.runtime.policies.base import Decision, Reason
from cachedit_fx.runtime.stats import CacheStats
from cachedit_fx.shapes import tokenize

pytestmark = SHARES_SYSTEMS

STEPS, WARMUP = 6, 4
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
        folder, "--steps", STEPS, "--thresholds", "0,0.6", "-p", PROMPTS[0], "-p", "a small cyan cross on gray"
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
    assert rows[0] == ["uncached", str(STEPS), "", "100%", "100%", ""]
    assert all(row[4].endswith("%") for row in rows)


def test_threshold_0_gives_the_uncached_pictures_bit_by_bit(ran):
    _, rows = table_rows(ran[1])
    assert all(row[2:4] == ["0", "100%"] and row[5] == "identical" for row in rows[1:3])


def test_work_of_a_cached_run_and_of_its_rival(ran):
    _, rows = table_rows(ran[1])
    cached, predicted, rival = rows[4:7]
    assert int(predicted[2]) > 0 and predicted[5] != cached[5]
    assert 0 < int(cached[2]) <= STEPS - WARMUP
    work = (18 * STEPS - 17 * int(cached[2])) / (18 * STEPS)
    assert cached[3] == f"{work:.0%}" and 20 < float(cached[5]) < 100
    assert rival[1:4] == [str(round(STEPS * work)), "", f"{round(STEPS * work) / STEPS:.0%}"]
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
    def draw(*_):
        raise error

    monkeypatch.setattr(Bench, "draw_reference", draw)
    result = invoke_demo(tmp_path / "out")
    assert result.exit_code == code and isinstance(result.exception, SystemExit)
    assert (str(error) or "nothing was written") in plain(result.output)
    assert not (tmp_path / "out").exists()


def test_the_default_prompts_are_words_the_model_knows():
    assert tokenize(PROMPTS).shape[0] == 6


def test_the_uncached_model_is_cut_into_the_same_pieces_and_drawn_in_one_call():
    settings = settings_for(("circle",) * 3, 28, "inductor", 0, 5)
    assert (settings.plain, settings.work, settings.batch, settings.calls) == ("pieces", "blocks", 3, 1)
    assert settings.setup(UNCACHED, {}).plain == "pieces"


def stats_of(cached, steps):
    stats = CacheStats("region_0", num_blocks=18, first=1, last=0)
    for step in range(steps):
        reason = Reason.BELOW_THRESHOLD if step < cached else Reason.ABOVE_THRESHOLD
        stats.record(0, step, Decision(reason.action, reason, 0.1 + step / 10))
    return stats


def row(psnr, cached=0, steps=10, **more):
    """A measured row; psnr is infinite for identical pictures."""
    values = [None if math.isinf(value) else value for value in psnr]
    given = {"cached_steps": cached, "wall_ratios": [1.0, 0.5, 0.75], "pictures": torch.rand(len(psnr), 3, 32, 32)}
    return measured("row", 0.5, values, steps=steps, **given, **more)


def demo(*groups, seconds=(1.0, 1.2, 1.1), steps=10, cached=0):
    """A run; a group is a threshold and the PSNRs of its three rows."""
    size = len(groups[0][1])
    uncached = row([math.inf] * size, steps=steps, seconds=list(seconds))
    threes = []
    for threshold, repeated, predicted, fewer in groups:
        stats = stats_of(cached, steps)
        rows = (row(repeated, cached, steps, stats=stats), row(predicted, cached, steps), row(fewer, steps=steps))
        threes.append(Threesome(threshold, *rows))
    prompts = ("", "a large pink square above a small green cross on black")[:size]
    return Demo(settings_for(prompts, steps, "eager", 0, 3), uncached, threes)


@pytest.mark.parametrize(
    ("cached", "fewer", "told"),
    [(45.0, 40.0, "5.0 dB ahead at 0.5"), (40.0, 45.0, "5.0 dB behind at 0.5"), (math.inf, math.inf, "equal at 0.5"),
     (math.inf, 40.0, "identical pictures at 0.5"), (40.0, math.inf, "too little cached to compare at 0.5")],
)  # fmt: skip
def test_verdict(cached, fewer, told):
    repeated, predicted = verdict(demo((0.5, [cached], [fewer + 1], [fewer])))
    assert repeated == f"At equal work, DBCache against fewer steps: {told}."
    assert predicted.startswith("At equal work, DBCache with TaylorSeer against fewer steps: ")
    assert predicted.endswith("equal at 0.5." if math.isinf(fewer) else "1.0 dB ahead at 0.5.")


def test_times_of_a_busy_machine_are_doubted():
    group = (0.5, [40.0], [40.0], [40.0])
    assert "slowest round took 3.0 x its fastest" in markdown(demo(group, seconds=(1.0, 3.0, 2.0)))
    assert "Busy" not in markdown(demo(group, seconds=(1.0, 1.2, 1.1)))


def test_an_inert_threshold_is_told():
    text = markdown(demo((0.01, [math.inf], [math.inf], [math.inf])))
    assert "Nothing was cached: inert threshold: smallest difference 0.1, threshold 0.01" in text


def test_table_fits_80_columns_whatever_the_figures():
    result = demo((0.123456, [math.inf], [math.inf], [123.45]), cached=999, steps=1000)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal(table(result)))
    text = console.export_text()
    assert "…" not in text and "DBCache, threshold 0.123456" in text and "999" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("thresholds", [(0.2,), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)])
def test_pictures_of_one_threshold_and_of_many(tmp_path, thresholds):
    save(demo(*((t, [40.0, math.inf], [50.0, 50.0], [30.0, 31.0]) for t in thresholds), cached=4), tmp_path)
    heights = [Image.open(tmp_path / name).height for name in ("grid.png", "differences.png")]
    assert all(height > 150 * len(thresholds) for height in heights)


def test_help_teaches():
    helped = invoke("demo", "--help")
    assert helped.exit_code == 0
    for option in ("--out", "--prompts", "--steps", "--thresholds", "--inner-backend", "--seed", "--rounds"):
        assert option in helped.output
    assert "fewer steps at equal work" in plain(helped.output)
