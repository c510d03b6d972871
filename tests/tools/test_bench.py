"""`cachedit bench`: what it measures, what it writes, and that nothing measured is lost."""

import itertools
import json
import math
from importlib.metadata import version

import pytest
from lib.benches import ROWS, SHARES_SYSTEMS, bench, measured, page_of, record_of, shared_system
from lib.command_line import plain
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import cachedit_fx
from cachedit_fx.bench.errors import BenchmarkError
from cachedit_fx.bench.measure import Bench, Group, Settings
from cachedit_fx.bench.pages import markdown
from cachedit_fx.bench.record import load_rows
from cachedit_fx.bench.resume import ResumeError
from cachedit_fx.bench.rows import UNCACHED, Row, read_rows
from cachedit_fx.bench.systems import Setup, load_entry
from cachedit_fx.report.plots import save_quality

pytestmark = SHARES_SYSTEMS


@pytest.fixture(scope="module")
def options(rows_file):
    return (rows_file, "--prompts", 2, "--steps", 4, "--rounds", 1)


@pytest.fixture(scope="module")
def ran(options, tmp_path_factory):
    """A run over two prompts, drawn at once, on the bundled model."""
    out = tmp_path_factory.mktemp("bench") / "out"
    return bench(*options, "--batch", 2, "--out", out), out


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


def test_resume_refuses_other_settings(ran, rows_file, tmp_path):
    _, out = ran
    changed = bench(rows_file, "--prompts", 2, "--batch", 2, "--steps", 5, "--rounds", 1, "--out", out, "--resume")
    assert changed.exit_code == 2 and "other settings: steps 4 there and 5 now" in plain(changed.output)
    nothing = bench(rows_file, "--prompts", 2, "--out", tmp_path / "nowhere", "--resume")
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


def test_rows_can_be_quantized(entry, tmp_path):
    rows = tmp_path / "rows.toml"
    row = 'quantize = { quant_type = "int8", exclude = ["proj_out"] }\nFn_compute_blocks = 1\n'
    by_step = "precision = { full_first_steps = 2 }\nFn_compute_blocks = 1\n"
    never = "residual_diff_threshold = 0\n"
    rows.write_text(f'["some"]\n{row}{never}["by step"]\n{by_step}{never}')
    out = tmp_path / "out"
    result = bench(rows, "--pipeline", entry, "--prompts", 1, "--steps", 3, "--rounds", 0, "--out", out)
    assert result.exit_code == 0, result.output
    by_name = {row["name"]: row for row in page_of(out)["rows"]}
    assert 20 < by_name["some"]["psnr"][0] < 90 and by_name["3 steps"]["psnr"] == [None]
    pipe = load_entry(entry)[0]
    report = cachedit_fx.quantize(pipe, "int8", exclude="proj_out")
    assert by_name["some"]["weight_bytes"] == report.bytes_after
    assert by_name["uncached"]["weight_bytes"] == by_name["3 steps"]["weight_bytes"] == report.bytes_before
    assert by_name["some"]["work"] == pytest.approx(1, rel=0.02)  # products of integers count
    assert by_name["by step"]["psnr"][0] > by_name["some"]["psnr"][0]
    assert by_name["by step"]["weight_bytes"] > report.bytes_before  # copies count
    assert "weights MiB" in (out / "bench.md").read_text()


def test_an_unknown_kind_is_refused_before_anything_is_drawn(tmp_path):
    rows = tmp_path / "rows.toml"
    rows.write_text('["int9"]\nquantize = "int9"\n')
    result = bench(rows, "--list")
    assert result.exit_code == 2 and "row 'int9': quant_type='int9' is not allowed" in plain(result.output)


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


def test_flops_are_the_transformers_alone(entry):
    system = shared_system(Setup(entry=entry))
    one = system.draw(["a red circle"], 1, 0, count=True).flops
    assert system.draw(["a red circle"], 3, 0, count=True).flops == one * 3
    assert system.pipe.transformer._compiled_call_impl is None


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
