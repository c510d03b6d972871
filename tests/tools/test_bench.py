"""`cachedit bench`: what it measures, what it writes, what it refuses, and that nothing measured is lost."""

import json
import math
import sys

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import cachedit_fx
from cachedit_fx.bench.measure import UNCACHED, Bench, Measured, Settings, fewer_steps
from cachedit_fx.bench.process import Worker, pack, unpack
from cachedit_fx.bench.report import Report, ResumeError, load_rows, markdown, save_json
from cachedit_fx.bench.rows import Row, RowError, peer_rows, read_rows, select
from cachedit_fx.bench.systems import Drawing, EntryError, Setup, System, load_entry
from cachedit_fx.cli import app
from cachedit_fx.report.plots import save_plot

ROWS = """
["never"]
Fn_compute_blocks = 1
residual_diff_threshold = 0

["mask"]
Fn_compute_blocks = 1
steps_computation_mask = "1101"
steps_computation_policy = "static"

["mask, TaylorSeer"]
Fn_compute_blocks = 1
steps_computation_mask = "1101"
steps_computation_policy = "static"
calibrator = "taylorseer"
"""

ENTRY = """
import torch
from cachedit_fx.shapes.pipeline import build_models, generate, make_pipeline

SMALL = {"patch_size": 1, "in_channels": 48, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8, "guidance_embeds": False,
         "axes_dims_rope": [4, 2, 2]}

class Entry:
    def __init__(self):
        torch.manual_seed(0)
        self.pipe = make_pipeline(*build_models(SMALL, {"width": 8, "layers": 1, "heads": 1}))
    def generate(self, pipe, prompts, steps, seed):
        return generate(pipe, prompts, steps, seed)

def nothing():
    return 3
"""


def invoke(*arguments):
    return CliRunner().invoke(
        app, ["bench", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"}, catch_exceptions=False
    )


def plain(text):
    return " ".join(text.replace("│", " ").split())


def page_of(folder):
    return json.loads((folder / "bench.json").read_text())


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.toml"
    path.write_text(ROWS)
    return path


@pytest.fixture(scope="module")
def options(config):
    return (config, "--prompts", 2, "--steps", 4, "--rounds", 1)


@pytest.fixture(scope="module")
def ran(options, tmp_path_factory):
    """A run over two prompts on the bundled model."""
    out = tmp_path_factory.mktemp("bench") / "out"
    return invoke(*options, "--out", out), out


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """A module in the current folder, as a user would have it."""
    (tmp_path / "toy_entry.py").write_text(ENTRY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield "toy_entry:Entry"
    sys.modules.pop("toy_entry", None)


def measured(name, work, psnr, system="cachedit_fx", **more):
    return Measured(name, system, 28, {}, work, cached_steps=10.0, psnr=psnr, **more)


def report_of(rows, **more):
    return Report(Settings(("a red circle",), **more), "cachedit bench", "a machine", {"torch": "2"}, rows)


def test_every_row_comes_with_its_rival_once(ran):
    result, out = ran
    assert result.exit_code == 0, result.output
    # Three blocks of four steps: all of the 18 blocks thrice, and one block once; 3.06 of 4 steps' work.
    assert [row["name"] for row in page_of(out)["rows"]] == [
        "uncached",
        "never",
        "4 steps",
        "mask",
        "3 steps",
        "mask, TaylorSeer",
    ]


def test_what_a_row_says(ran):
    rows = {row["name"]: row for row in page_of(ran[1])["rows"]}
    assert rows["never"]["psnr"] == [None, None] and rows["never"]["work"] == 1 and rows["never"]["cached_steps"] == 0
    assert rows["4 steps"]["psnr"] == [None, None]
    mask, predicted = rows["mask"], rows["mask, TaylorSeer"]
    assert mask["cached_steps"] == predicted["cached_steps"] == 1
    assert mask["work"] == predicted["work"] and 0.75 < mask["work"] < 0.8  # a cached step runs a block in 18
    assert rows["3 steps"]["work"] == pytest.approx(0.75)
    assert mask["mean_psnr"] == pytest.approx(sum(mask["psnr"]) / 2) and 15 < mask["mean_psnr"] < 80
    assert mask["psnr"] != predicted["psnr"]
    assert predicted["bytes_held"] > mask["bytes_held"] > 0
    assert all(len(row["wall_ratios"]) == 1 and row["wall"] > 0 for row in rows.values())
    assert list(mask["accuracy"])[0] == "all"


def test_files_say_what_made_them(ran):
    result, out = ran
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    page, text = page_of(out), (out / "bench.md").read_text()
    assert page["settings"]["steps"] == 4 and len(page["settings"]["prompts"]) == 2
    assert page["versions"]["torch"] == torch.__version__ and "CPU" in page["machine"]
    assert "| uncached | 4 |" in text and "| **3 steps** | 3 |" in text
    for told in ("identical", "Made by `", torch.__version__, "2 prompts"):
        assert told in text and told in plain(result.stdout)
    with Image.open(out / "bench.png") as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(2**24) or []) > 20


def test_resume_measures_what_is_missing(ran, options, monkeypatch):
    _, out = ran
    before = page_of(out)
    kept = [row for row in before["rows"] if row["name"] not in ("mask", "3 steps")]
    (out / "bench.json").write_text(json.dumps(before | {"rows": kept}))
    done = []
    whole = Bench.measure

    def spy(self, row):
        done.append(row.name)
        return whole(self, row)

    monkeypatch.setattr(Bench, "measure", spy)
    result = invoke(*options, "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    assert sorted(done) == ["3 steps", "mask"]
    after = {row["name"]: row for row in page_of(out)["rows"]}
    assert set(after) == {row["name"] for row in before["rows"]}
    again = {row["name"]: row for row in before["rows"]}["mask"]
    assert after["mask"]["psnr"] == again["psnr"] and after["mask"]["work"] == again["work"]


def test_resume_refuses_other_settings(ran, config, tmp_path):
    _, out = ran
    changed = invoke(config, "--prompts", 2, "--steps", 5, "--rounds", 1, "--out", out, "--resume")
    assert changed.exit_code == 2 and "steps 4 there and 5 now" in plain(changed.output)
    nothing = invoke(config, "--prompts", 2, "--out", tmp_path / "nowhere", "--resume")
    assert nothing.exit_code == 2 and "nothing to resume" in plain(nothing.output)


def test_resume_refuses_a_row_that_changed(ran, options, tmp_path):
    _, out = ran
    other = tmp_path / "rows.toml"
    other.write_text(ROWS.replace('"1101"', '"1011"', 1))
    result = invoke(other, *options[1:], "--out", out, "--resume")
    assert result.exit_code == 2 and "row 'mask' was measured with" in plain(result.output)


def test_interrupt_keeps_what_is_measured(entry, options, tmp_path, monkeypatch):
    whole = Bench.measure

    def interrupted(self, row):
        if row.name == "mask":
            raise KeyboardInterrupt
        return whole(self, row)

    monkeypatch.setattr(Bench, "measure", interrupted)
    out = tmp_path / "out"
    result = invoke(*options, "--pipeline", entry, "--out", out)
    assert result.exit_code == 130 and "interrupted with 2 of 3 rows to go" in plain(result.output)
    assert "--resume goes on" in plain(result.output)
    assert [row["name"] for row in page_of(out)["rows"]] == ["uncached", "never", "4 steps"]
    monkeypatch.setattr(Bench, "measure", whole)
    resumed = invoke(*options, "--pipeline", entry, "--out", out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert len(page_of(out)["rows"]) == 5 and (out / "bench.md").exists()


def test_a_pipeline_of_the_users(entry, options, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    out = tmp_path / "out"
    result = invoke(
        *options[:1],
        "--prompts",
        tmp_path / "prompts.txt",
        *options[3:],
        "--pipeline",
        entry,
        "--out",
        out,
        "-k",
        "mask",
    )
    assert result.exit_code == 0, result.output
    page = page_of(out)
    assert page["settings"]["prompts"] == ["a red circle", "a blue square"] and page["settings"]["entry"] == entry
    assert [row["name"] for row in page["rows"]] == ["uncached", "mask", "4 steps", "mask, TaylorSeer"]
    assert page["rows"][0]["accuracy"] is None and "right" in (out / "bench.md").read_text()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_module:make", "MODULE:FUNCTION"),
        ("toy_entry:missing", "has no attribute 'missing'"),
        ("toy_entry:nothing", "returned a int"),
        ("toy_entry", "MODULE:FUNCTION"),
    ],
)
def test_an_entry_that_gives_no_pipeline(entry, name, told):
    with pytest.raises(EntryError, match=told):
        load_entry(name)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[a]\nmax_warmup_step = 1", "row 'a': unknown option 'max_warmup_step'; the nearest known one is"),
        ("[a]\nFn_compute_blocks = -1", "row 'a': Fn_compute_blocks=-1 is not allowed"),
        ("[a]\nsystem = 'teacache'", "system='teacache' is not one of cachedit_fx, cache-dit, diffusers"),
        ("steps = 3", "steps = 3 belongs to no row"),
        ("[a", "is not TOML"),
        ("", "has no rows"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong(entry, tmp_path, text, told):
    path = tmp_path / "rows.toml"
    path.write_text(text)
    result = invoke(path, "--prompts", 1, "--steps", 2, "--pipeline", entry, "--out", tmp_path / "out")
    assert result.exit_code == 2 and told in plain(result.output), result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prompts", 201], "200 prompts; 201"),
        (["--prompts", "no-such-file"], "neither a number nor a text file"),
        (["--prompts", 2, "--held-out", 2], "give one of them"),
        (["--pipeline", "a:b", "--guidance", 3], "let generate() set it"),
        (["-k", "nonsense"], "no row's name contains 'nonsense'"),
    ],
)
def test_bad_arguments_are_refused_in_words(config, tmp_path, arguments, told):
    result = invoke(config, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and told in plain(result.output), result.output


def test_list_shows_rows_and_draws_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr("cachedit_fx.bench.measure.Bench", None)
    result = invoke(config, "--list", "--out", tmp_path / "out")
    assert result.exit_code == 0 and "mask, TaylorSeer" in result.output and "calibrator='taylorseer'" in result.output
    assert not (tmp_path / "out").exists()


def test_presets_are_rows(tmp_path):
    path = tmp_path / "rows.toml"
    path.write_text(f"presets = true\n{ROWS}")
    names = list(cachedit_fx.presets(20))
    found = read_rows(path, 20)[-len(names) :]
    assert found == [Row(f"preset {name}", arguments={"preset": name, "steps": 20}) for name in names]
    with pytest.raises(RowError, match="leave out `presets = true`"):
        read_rows(path, 4)


def test_peers_that_are_not_installed_are_skipped_with_the_reason(config, tmp_path):
    result = invoke(
        config, "--peers", "--peer-python", "/no/such/python", "-k", "mask", "-k", "cache-dit 0.2", "--list"
    )
    assert "cache-dit 0.2" not in result.output and "mask" in result.output
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    out = tmp_path / "out"
    result = invoke(config, "--peers", "--peer-python", python, "-k", "mask, T", "-k", "cache-dit 0.2", "--prompts", 1,
                    "--steps", 4, "--rounds", 0, "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "cache-dit is not installed in" in plain(result.output) and 'pip install "cachedit-fx[peers]"' in plain(
        result.output
    )
    page = page_of(out)
    assert "Rows of cache-dit were skipped" in page["notes"][0] and not any(
        "cache-dit" in r["name"] for r in page["rows"]
    )
    assert all(row["wall"] is None for row in page["rows"][1:])
    alone = invoke(config, "--peers", "--peer-python", python, "-k", "cache-dit 0.2", "--out", out)
    assert alone.exit_code == 1 and "not installed" in plain(alone.output)


def test_a_peer_that_fails_does_not_end_the_run(entry, config, tmp_path):
    path = tmp_path / "rows.toml"
    path.write_text("[peer]\nsystem = 'diffusers'\nconfig = 'NoSuchConfig'\n[ours]\nFn_compute_blocks = 1\n")
    out = tmp_path / "out"
    result = invoke(path, "--prompts", 1, "--steps", 2, "--rounds", 0, "--pipeline", entry, "--out", out)
    assert result.exit_code == 0 and "peer failed" in plain(result.output)
    assert [row["name"] for row in page_of(out)["rows"]] == ["uncached", "ours", "2 steps"]


PEERS = [
    ({"config": "FirstBlockCacheConfig", "threshold": 10.0}, [0]),
    ({"config": "TaylorSeerCacheConfig", "cache_interval": 2, "use_lite_mode": True}, [0, 1, 2, 4]),
    ({"config": "MagCacheConfig", "threshold": 10.0, "retention_ratio": 0.5}, [0, 1, 2]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "computed"), PEERS)
def test_diffusers_own_caches_run(entry, arguments, computed):
    system = System(Setup("diffusers", arguments, steps=5, entry=entry, calibration=("a red circle",)))
    drawing = system.draw(["a blue square"], 5, 0, count=True)
    whole = System(Setup(entry=entry)).draw(["a blue square"], 5, 0, count=True)
    assert [step for step, flops in enumerate(drawing.flops) if flops == whole.flops[step]] == computed
    assert not torch.equal(drawing.pictures, whole.pictures)


def test_a_worker_draws_what_this_process_draws(entry):
    setup = Setup(entry=entry)
    worker = Worker("plain", sys.executable, setup)
    try:
        worker.wait_until_ready()
        there = worker.draw(["a red circle", "a blue square"], 2, 5, count=True)
    finally:
        worker.stop()
    here = System(setup).draw(["a red circle", "a blue square"], 2, 5, count=True)
    assert torch.equal(there.pictures, here.pictures) and there.flops == here.flops and len(here.flops) == 2
    assert worker.versions["torch"] == torch.__version__


def test_flops_are_the_transformers_alone(entry):
    system = System(Setup(entry=entry))
    one = system.draw(["a red circle"], 1, 0, count=True).flops
    assert system.draw(["a red circle"], 3, 0, count=True).flops == one * 3
    assert system.pipe.transformer._compiled_call_impl is None


def test_a_drawing_travels_whole():
    drawing = Drawing(torch.rand(2, 3, 4, 5), 1.5, 1.0, [3, 4], None, 7)
    back = unpack(json.loads(json.dumps(pack(drawing))))
    assert torch.equal(back.pictures, drawing.pictures) and back.pictures.dtype == torch.float32
    assert (back.seconds, back.flops, back.cached_steps, back.bytes_held) == (1.5, [3, 4], None, 7)


def test_the_front_is_what_nothing_beats():
    rows = [
        measured(UNCACHED, 1.0, [None], UNCACHED),
        measured("best", 0.5, [50.0]),
        measured("dearer and worse", 0.6, [49.0]),
        measured("cheap", 0.3, [40.0]),
        measured("as cheap and worse", 0.3, [39.0]),
        measured("cheapest", 0.2, [30.0], "cache-dit"),
    ]
    report = report_of(rows)
    assert [row.name for row in report.pareto()] == ["best", "cheap", "cheapest"]
    assert "| **cheap** |" in markdown(report) and "| dearer and worse |" in markdown(report)


def test_means():
    assert measured("a", 0.5, [40.0, None, 44.0]).mean_psnr == 42.0
    assert math.isinf(measured("a", 0.5, [None]).mean_psnr)
    row = measured("a", 0.5, [40.0], wall_ratios=[0.5, 0.9, 0.6], ssim=[0.5, 1.0])
    assert (row.wall, row.mean_ssim) == (0.6, 0.75)


def test_rows_survive_the_file(tmp_path):
    report = report_of([measured(UNCACHED, 1.0, [None], UNCACHED), measured("a", 0.5, [40.0], accuracy={"all": 0.5})])
    save_json(report, tmp_path)
    assert load_rows(tmp_path, report.settings) == report.rows
    with pytest.raises(ResumeError, match="seed 0 there and 1 now"):
        load_rows(tmp_path, Settings(("a red circle",), seed=1))
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ResumeError, match="was not written by"):
        load_rows(tmp_path, report.settings)


def test_two_rows_of_one_name():
    with pytest.raises(RowError, match="two rows are named 'a'"):
        select([Row("a"), Row("a")], [])


def test_peers_have_names_of_their_own():
    rows = select(peer_rows(), [])
    assert {row.system for row in rows} == {"cache-dit", "diffusers"}
    assert fewer_steps(9) == Row("9 steps", UNCACHED, steps=9)


@pytest.mark.parametrize("count", [0, 1, 40])
def test_plot_of_few_and_of_many(tmp_path, count):
    systems = ("cachedit_fx", "cache-dit", "diffusers", UNCACHED)
    rows = [measured(UNCACHED, 1.0, [None], UNCACHED)]
    rows += [measured(f"row {i}", 0.2 + i / 60, [30.0 + i], systems[i % 4]) for i in range(count)]
    save_plot(report_of(rows), tmp_path / "bench.png")
    assert Image.open(tmp_path / "bench.png").height > 500


def test_help_teaches_and_imports_little():
    helped = plain(invoke("--help").output)
    for told in ("--peers", "--resume", "generate(pipe, prompts, steps, seed)", "as many steps as cost the same work"):
        assert told in helped


def test_a_mask_policy_stands_for_the_mask_of_the_run_s_steps(tmp_path):
    path = tmp_path / "rows.toml"
    path.write_text('[one]\nmask_policy = "fast"\nsteps_computation_policy = "static"\nFn_compute_blocks = 1\n')
    (row,) = read_rows(path, 6)
    settings = Settings(prompts=("a red circle",), steps=6, rounds=0)
    made = Bench(settings, lambda what, done: None, sys.executable)
    made.draw_reference()
    assert made.measure(row).cached_steps == cachedit_fx.steps_mask("fast", 6).count(0)
