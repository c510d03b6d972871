"""`cachedit bench`: what it measures, what it writes, what it refuses, and that nothing measured is lost."""

import copy
import itertools
import json
import math
import os
import sys
import types
from importlib.metadata import version
from typing import Any

import pytest
import torch
from lib.benches import ENTRY, WorkerHere, measured, shared_system, shared_systems, stub_python
from lib.command_line import invoke, plain
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import cachedit_fx
from cachedit_fx.bench.errors import BenchmarkError
from cachedit_fx.bench.measure import Bench, Group, Settings
from cachedit_fx.bench.pages import markdown
from cachedit_fx.bench.process import Worker, check_peer, pack, unpack
from cachedit_fx.bench.record import Record, ResumeError, load_rows
from cachedit_fx.bench.rows import UNCACHED, Row, RowError, fewer_steps, peer_rows, read_rows, select
from cachedit_fx.bench.systems import Drawing, EntryError, Setup, load_entry
from cachedit_fx.report.plots import save_quality

pytestmark = [pytest.mark.keep_compiled, pytest.mark.xdist_group("bench")]  # they share what is compiled

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


def bench(*arguments):
    return invoke("bench", *arguments, columns=200)


def page_of(folder):
    return json.loads((folder / "bench.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def systems():
    with shared_systems():
        yield


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
    """A run over two prompts, drawn at once, on the bundled model."""
    out = tmp_path_factory.mktemp("bench") / "out"
    return bench(*options, "--batch", 2, "--out", out), out


@pytest.fixture(scope="module", autouse=True)
def entry_folder(tmp_path_factory):
    """The folder of a module that holds a pipeline."""
    folder = tmp_path_factory.mktemp("entry")
    (folder / "toy_entry.py").write_text(ENTRY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(folder), *sys.path])
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
        yield folder
    sys.modules.pop("toy_entry", None)


@pytest.fixture
def entry(entry_folder, monkeypatch):
    """A pipeline in the current folder, as a user would have it."""
    monkeypatch.chdir(entry_folder)
    return "toy_entry:Entry"


def record_of(rows, **more):
    return Record(Settings(("a red circle",), **more), "cachedit bench", "a machine", {"torch": "2"}, rows)


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
    assert rows["never"]["psnr"] == [None, None] and rows["never"]["cached_steps"] == 0
    assert 0.99 < rows["never"]["work"] < 1  # the text is projected once
    assert rows["4 steps"]["psnr"] == [None, None]
    mask, predicted = rows["mask"], rows["mask, TaylorSeer"]
    assert mask["cached_steps"] == predicted["cached_steps"] == 1
    assert mask["cached_by_call"] == predicted["cached_by_call"] == [[2]]
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
    assert page["versions"]["torch"] == version("torch") and "CPU" in page["machine"]
    assert "| uncached | 4 |" in text and "| **3 steps** | 3 |" in text
    for told in ("identical", "Made by `", version("torch"), "2 prompts"):
        assert told in text and told in plain(result.stdout)
    with Image.open(out / "bench.png") as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(2**24) or []) > 20


def test_resume_measures_what_is_missing(ran, options, monkeypatch):
    _, out = ran
    before = page_of(out)
    kept = [row for row in before["rows"] if row["name"] not in ("mask", "3 steps")]
    (out / "bench.json").write_text(json.dumps(before | {"rows": kept}))
    done = []
    whole = Group.draw

    def spy(self, row):
        done.append(row.name)
        return whole(self, row)

    monkeypatch.setattr(Group, "draw", spy)
    result = bench(*options, "--batch", 2, "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    assert sorted(done) == ["3 steps", "mask"]
    after = {row["name"]: row for row in page_of(out)["rows"]}
    assert set(after) == {row["name"] for row in before["rows"]}
    again = {row["name"]: row for row in before["rows"]}["mask"]
    assert after["mask"]["psnr"] == again["psnr"] and after["mask"]["work"] == again["work"]


def test_resume_refuses_other_settings(ran, config, tmp_path):
    _, out = ran
    changed = bench(config, "--prompts", 2, "--batch", 2, "--steps", 5, "--rounds", 1, "--out", out, "--resume")
    assert changed.exit_code == 2 and "other settings: steps 4 there and 5 now" in plain(changed.output)
    nothing = bench(config, "--prompts", 2, "--out", tmp_path / "nowhere", "--resume")
    assert nothing.exit_code == 2 and "nothing to resume" in plain(nothing.output)


def test_resume_refuses_a_row_that_changed(ran, options, tmp_path):
    _, out = ran
    other = tmp_path / "rows.toml"
    other.write_text(ROWS.replace('"1101"', '"1011"', 1))
    result = bench(other, *options[1:], "--batch", 2, "--out", out, "--resume")
    assert result.exit_code == 2 and "row 'mask' was measured with" in plain(result.output)


def test_interrupt_keeps_what_is_measured(entry, options, tmp_path, monkeypatch):
    whole = Group.draw

    def interrupted(self, row):
        if row.name == "mask":
            raise KeyboardInterrupt
        return whole(self, row)

    monkeypatch.setattr(Group, "draw", interrupted)
    out = tmp_path / "out"
    result = bench(*options, "--pipeline", entry, "--out", out)
    assert result.exit_code == 130 and "interrupted with 2 of 3 rows to go" in plain(result.output)
    assert "--resume goes on" in plain(result.output)
    assert [row["name"] for row in page_of(out)["rows"]] == ["uncached", "never", "4 steps"]
    monkeypatch.setattr(Group, "draw", whole)
    resumed = bench(*options, "--pipeline", entry, "--out", out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert len(page_of(out)["rows"]) == 5 and (out / "bench.md").exists()


def test_a_pipeline_of_the_users(entry, options, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    prompts = ("--prompts", tmp_path / "prompts.txt")
    out = tmp_path / "out"
    result = bench(options[0], *prompts, *options[3:], "--pipeline", entry, "--out", out, "-k", "mask")
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
        ("toy_entry:__name__", "__name__ is a str"),
        ("toy_entry", "MODULE:FUNCTION"),
    ],
)
def test_an_entry_that_gives_no_pipeline(entry, name, told):
    with pytest.raises(EntryError, match=told):
        load_entry(name)


def without(pipe, **components):
    """A copy of a pipeline that lacks some of its parts."""
    other = copy.copy(pipe)
    other.components = pipe.components | components
    return other


class Unprompted:
    """A pipeline that draws classes."""

    def __init__(self, transformer):
        self.components = {"transformer": transformer}

    def __call__(self, class_labels):
        """Is never called."""


def test_a_pipeline_that_takes_no_prompts_is_refused_with_a_way_out(monkeypatch):
    class Prompted(Unprompted):
        def __call__(self, prompt):
            """Is never called."""

    module: Any = types.ModuleType("promptless")
    whole = Prompted(torch.nn.Identity())
    module.labels = lambda: Unprompted(torch.nn.Identity())
    module.embeddings = lambda: without(whole, text_encoder=None, text_encoder_2=None, tokenizer=None)
    module.partial = lambda: without(whole, text_encoder=torch.nn.Identity(), text_encoder_3=None)
    module.whole = lambda: whole
    monkeypatch.setitem(sys.modules, "promptless", module)
    with pytest.raises(EntryError, match=r"takes no `prompt`, so it cannot draw .* prompt_embeds"):
        load_entry("promptless:labels")
    with pytest.raises(EntryError, match=r"has no text encoder \(text_encoder, text_encoder_2: None\), so it cannot"):
        load_entry("promptless:embeddings")
    assert load_entry("promptless:partial")[0].components["text_encoder_3"] is None
    assert load_entry("promptless:whole")[0] is whole


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[a]\nmax_warmup_step = 1", "row 'a': unknown option 'max_warmup_step'; the nearest known one is"),
        ("[a]\nFn_compute_blocks = -1", "row 'a': Fn_compute_blocks=-1 is not allowed"),
        ("[a]\ncalibrator = 'taylor'", "did you mean 'taylorseer'?"),
        ("[a.calibrator]\nname = 'taylorseer'\norder = 2", "the nearest known one is 'taylorseer_order'"),
        ("[a]\npreset = 'balancd'", "did you mean 'balanced'?"),
        ("[a]\nmask_policy = 'fats'", "fats"),
        ("[a]\nsystem = 'teacache'", "system='teacache' is not one of cachedit_fx, cache-dit, diffusers"),
        ("steps = 3", "steps = 3 belongs to no row"),
        ("[a", "is not TOML"),
        ("", "has no rows"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong(entry, tmp_path, text, told):
    path = tmp_path / "rows.toml"
    path.write_text(text)
    listed = bench(path, "--list")
    assert listed.exit_code == 2 and told in plain(listed.output), listed.output
    result = bench(path, "--prompts", 1, "--steps", 2, "--pipeline", entry, "--out", tmp_path / "out")
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
    result = bench(config, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and told in plain(result.output), result.output


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "rows.toml"
    path.write_bytes(b"\xff\xfe\x00")
    listed = bench(path, "--list")
    assert listed.exit_code == 2 and "is not TOML" in plain(listed.output), listed.output


@pytest.mark.parametrize("name", ["no_such_module:f", "no.such.module:f", ":f", "json", "json.decoder.no:f"])
def test_list_names_a_module_that_is_not_there(config, name):
    listed = bench(config, "--list", "--pipeline", name)
    assert listed.exit_code == 2 and "MODULE:FUNCTION" in plain(listed.output), listed.output


def test_list_shows_rows_and_draws_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr("cachedit_fx.bench.measure.Bench", None)
    result = bench(config, "--list", "--out", tmp_path / "out")
    assert result.exit_code == 0 and "mask, TaylorSeer" in result.output and "calibrator='taylorseer'" in result.output
    assert not (tmp_path / "out").exists()


def test_presets_are_rows(tmp_path):
    path = tmp_path / "rows.toml"
    path.write_text(f"presets = true\n{ROWS}")
    names = list(cachedit_fx.presets(20))
    found = read_rows(path, 20)[-len(names) :]
    assert found == [Row(f"preset {name}", arguments={"preset": name, "steps": 20}) for name in names]
    assert [row.name for row in read_rows(path, 4)[-len(names) :]] == [row.name for row in found]


def test_peers_that_are_not_installed_are_skipped_with_the_reason(entry, config, tmp_path):
    options = ("--peers", "-k", "mask, T", "-k", "cache-dit 0.2")
    result = bench(config, *options, "--peer-python", "/no/such/python", "--list")
    assert "cache-dit 0.2" not in result.output and "mask" in result.output
    python, out = stub_python(tmp_path, "exit 1"), tmp_path / "out"
    prompts = ("--prompts", 1, "--steps", 4, "--rounds", 0, "--pipeline", entry)
    result = bench(config, *options, "--peer-python", python, *prompts, "--out", out)
    assert result.exit_code == 0, result.output
    assert "cache-dit is not installed in" in plain(result.output)
    assert 'pip install "cachedit-fx[peers]"' in plain(result.output)
    page = page_of(out)
    assert "Rows of cache-dit were skipped" in page["notes"][0]
    assert not any("cache-dit" in row["name"] for row in page["rows"])
    assert all(row["wall"] is None for row in page["rows"][1:])
    alone = bench(config, "--peers", "--peer-python", python, "-k", "cache-dit 0.2", "--out", out)
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


def test_flops_are_the_transformers_alone(entry):
    system = shared_system(Setup(entry=entry))
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
    record = record_of(rows)
    assert [row.name for row in record.pareto()] == ["best", "cheap", "cheapest"]
    assert "| **cheap** |" in markdown(record) and "| dearer and worse |" in markdown(record)


def test_means():
    assert measured("a", 0.5, [40.0, None, 44.0]).mean_psnr == 42.0
    assert math.isinf(measured("a", 0.5, [None]).mean_psnr)
    row = measured("a", 0.5, [40.0], wall_ratios=[0.5, 0.9, 0.6], ssim=[0.5, 1.0])
    assert (row.wall, row.mean_ssim) == (0.6, 0.75)


def test_rows_survive_the_file(tmp_path):
    record = record_of([measured(UNCACHED, 1.0, [None], UNCACHED), measured("a", 0.5, [40.0], accuracy={"all": 0.5})])
    record.save(tmp_path)
    assert load_rows(tmp_path, record.settings) == record.rows
    with pytest.raises(ResumeError, match="seed 0 there and 1 now"):
        load_rows(tmp_path, Settings(("a red circle",), seed=1))
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ResumeError, match="was not written by"):
        load_rows(tmp_path, record.settings)


def test_a_file_of_fewer_settings_can_be_resumed(tmp_path):
    record = record_of([measured("a", 0.5, [40.0])])
    record.save(tmp_path)
    page = page_of(tmp_path)
    del page["settings"]["threads"], page["rows"][0]["cpu_seconds"]
    (tmp_path / "bench.json").write_text(json.dumps(page))
    assert load_rows(tmp_path, record.settings) == record.rows
    with pytest.raises(ResumeError, match="threads 1 there and 2 now"):
        load_rows(tmp_path, Settings(("a red circle",), threads=2))


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
    rows = [measured(f"row {i}", 0.2 + i / 60, [30.0 + i], systems[i % 4]) for i in range(count)]
    rows.append(measured("identical", 0.9, [None]))
    save_quality(rows, record_of(rows).pareto(), "some rows", tmp_path / "bench.png")
    assert Image.open(tmp_path / "bench.png").height > 500


def test_names_in_the_plot_cover_neither_each_other_nor_the_points(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    systems = ("cachedit_fx", "cache-dit", "diffusers", UNCACHED)
    rows = [measured(f"{systems[i % 4]} row {i}", 0.2 + i / 60, [40.0 + i % 7], systems[i % 4]) for i in range(40)]
    record = record_of(rows)
    save_quality(rows, record.pareto(), "some rows", tmp_path / "bench.png")
    (figure,) = figures
    figure.draw_without_rendering()
    axes = figure.axes[0]
    labels = [text for text in axes.texts if text.get_text()]
    names = {text.get_text() for text in labels}
    bold = {text.get_text() for text in labels if text.get_weight() == "bold"}
    assert len(names) > 12 and bold == {row.name.removeprefix(f"{row.system} ") for row in record.pareto()}
    boxes = [Text.get_window_extent(text) for text in labels]
    assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
    points = [axes.transData.transform((row.work, row.mean_psnr)) for row in rows]
    assert not [1 for box, point in itertools.product(boxes, points) if box.contains(*point)]


def test_help_teaches():
    helped = plain(bench("--help").output)
    for told in ("--peers", "--resume", "generate(pipe, prompts, steps, seed)", "as many steps as cost the same work"):
        assert told in helped
    assert "What is measured" in helped and "On which pictures" in helped and "How it runs" in helped
    assert "overhead" in helped and "cold" in helped


def test_a_mask_policy_stands_for_the_mask_of_the_run_s_steps(entry, tmp_path):
    path = tmp_path / "rows.toml"
    path.write_text('[one]\nmask_policy = "fast"\nsteps_computation_policy = "static"\nFn_compute_blocks = 1\n')
    (row,) = read_rows(path, 6)
    made = Bench(Settings(prompts=("a red circle",), steps=6, rounds=0, entry=entry))
    made.draw_reference()
    with made.group() as group:
        assert group.draw(row).cached_steps == cachedit_fx.steps_mask("fast", 6).count(0)


def test_a_system_that_is_not_deterministic_is_found(entry):
    made = Bench(Settings(prompts=("a red circle",), steps=4, rounds=1, entry=entry))
    made.draw_reference()
    row = Row("mask", arguments={"Fn_compute_blocks": 1, "steps_computation_mask": "1101",
                                 "steps_computation_policy": "static"})  # fmt: skip
    with made.group() as group:
        group.draw(row).cached_by_call[0] = [1]
        with pytest.raises(BenchmarkError, match=r"mask cached steps \[2\] .* \[1\] before: it is not deterministic"):
            group.time()
