"""`cachedit sensitivity`: the errors of groups, plans for a quality and a size, and that nothing measured is lost."""

import json
import math
import re
from statistics import fmean

import pytest
import torch
from lib.command_line import invoke, plain
from PIL import Image

import cachedit_fx
from cachedit_fx.bench.errors import RequestError
from cachedit_fx.bench.sensitivity import WHOLE, Measurement, Probe, Record, Settings, most_bytes, rivals
from cachedit_fx.bench.systems import load_entry
from cachedit_fx.metrics import psnr
from cachedit_fx.passes.graph_cost import bytes_of_tensors
from cachedit_fx.quantization.plan import Candidate, Plan

pytestmark = [
    pytest.mark.xdist_group("bench"),
    pytest.mark.filterwarnings("ignore:.*gains no time", "ignore:.*lru_cache"),
]
KINDS = "int8,float8_weight_only"
GROUPS = 2 * 3
"""Of the small FLUX: three parts of each of two single blocks. Its one double block does not repeat itself."""


def run(entry, out, *words):
    shared = ("--pipeline", entry, "--prompts", 2, "--steps", 4, "--every", 3, "--kinds", KINDS)
    return invoke("sensitivity", *shared, "--out", out, *words)


def page_of(out):
    return json.loads((out / "sensitivity.json").read_text())


@pytest.fixture(scope="module")
def ran(entry_folder, tmp_path_factory):
    """A run with a plan for a size, and its comparison."""
    out = tmp_path_factory.mktemp("sensitivity") / "out"
    return run("toy_entry:Entry", out, "--size", "91%", "--compare", 3), out


def test_every_group_is_measured_alone_in_every_kind(ran):
    result, out = ran
    assert result.exit_code == 0, result.output
    rows = [row for row in page_of(out)["rows"] if "block" in row]
    assert len(rows) == 2 * (GROUPS + 1)
    assert all(row["error"] > 0 and row["after"] < row["before"] for row in rows)
    for kind in KINDS.split(","):
        whole, = (row for row in rows if row["block"] == WHOLE and row["kind"] == kind)  # fmt: skip
        alone = [row for row in rows if row["block"] != WHOLE and row["kind"] == kind]
        assert sorted(whole["layers"]) == sorted(layer for row in alone for layer in row["layers"])
        assert whole["before"] == sum(row["before"] for row in alone)


def test_an_error_is_that_of_the_output_on_the_unquantized_trajectory(ran, entry):
    row = next(row for row in page_of(ran[1])["rows"] if row.get("part") == "proj_mlp")
    pipe, generate = load_entry(entry)
    inputs = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(kwargs), with_kwargs=True)
    for number, prompt in enumerate(page_of(ran[1])["settings"]["prompts"]):
        generate(pipe, [prompt], 4, number)
    hook.remove()
    kept = [kwargs for call, kwargs in enumerate(inputs) if call % 3 == 0]
    with torch.no_grad():
        before = torch.cat([pipe.transformer(**kwargs)[0] for kwargs in kept])
        cachedit_fx.quantize(pipe, None, per_layer=dict.fromkeys(row["layers"], row["kind"]))
        after = torch.cat([pipe.transformer(**kwargs)[0] for kwargs in kept])
    assert len(kept) == 3
    assert row["error"] == pytest.approx(float((after - before).square().sum() / before.square().sum()), rel=1e-4)


def test_the_plan_is_taken_as_it_is(ran, entry):
    result, out = ran
    plan = json.loads((out / "plan.json").read_text())
    drawings = {row["name"]: row for row in page_of(out)["rows"] if "name" in row}
    assert set(plan.values()) <= {None, *KINDS.split(",")} and None in plan.values()
    assert cachedit_fx.PrecisionConfig(None, per_layer=plan).per_layer == plan
    for kind in (None, "int8"):  # what it keeps is kept under any kind
        pipe, _ = load_entry(entry)
        report = cachedit_fx.quantize(pipe, kind, per_layer=plan)
        transformer = pipe.transformer
        assert {layer.name.removeprefix("transformer."): layer.kind for layer in report.layers} == {
            name: kind for name, kind in plan.items() if kind
        }
        size = bytes_of_tensors([*transformer.parameters(), *transformer.buffers()])
        assert size == drawings["plan"]["bytes"] <= 0.91 * page_of(out)["bytes"]


def test_the_comparison_draws_other_prompts_with_as_many_bytes(ran):
    result, out = ran
    page = page_of(out)
    drawings = {row["name"]: row for row in page["rows"] if "name" in row}
    others = {"front to back", "back to front", *(f"random {number}" for number in range(1, 6))}
    assert set(drawings) == {"plan", "int8 everywhere", "float8_weight_only everywhere"} | others
    assert all(drawings[name]["bytes"] >= drawings["plan"]["bytes"] for name in others)
    prompts = {prompt for row in drawings.values() for prompt in row["prompts"]}
    assert len(prompts) == 3 and not prompts & {*page["settings"]["prompts"]}
    text = (out / "sensitivity.md").read_text()
    for told in ("**plan**", "random, mean of 5", "the best other choice of its size", "add up to", "Made by `"):
        assert told in text and told.strip("*") in plain(result.output), told
    assert max(map(len, result.output.replace(str(out), "out").splitlines())) <= 80
    with Image.open(out / "sensitivity.png") as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(2**24) or []) > 20


def test_resume_measures_what_is_missing_and_takes_another_plan(ran, entry, monkeypatch):
    _, out = ran
    before = page_of(out)
    (out / "sensitivity.json").write_text(json.dumps(before | {"rows": before["rows"][1:]}))
    measured = []
    whole = Probe.error

    def spy(self, kinds):
        measured.append(kinds)
        return whole(self, kinds)

    monkeypatch.setattr(Probe, "error", spy)
    result = run(entry, out, "--resume", "--size", "91%", "--compare", 3)
    assert result.exit_code == 0, result.output
    assert measured == [dict.fromkeys(before["rows"][0]["layers"], "int8")]
    assert page_of(out)["rows"] == before["rows"]
    changed = run(entry, out, "--resume", "--seed", 5)
    assert changed.exit_code == 2 and "other settings: seed 0 there and 5 now" in plain(changed.output)


def test_a_plan_for_a_quality_has_it(ran, entry):
    _, out = ran
    everywhere = next(row for row in page_of(out)["rows"] if row.get("name") == "int8 everywhere")
    wanted = round(min(value for value in everywhere["psnr"] if value) + 3)
    result = run(entry, out, "--resume", "--psnr", wanted)
    assert result.exit_code == 0, result.output
    plan = {name: kind for name, kind in json.loads((out / "plan.json").read_text()).items() if kind}
    page = page_of(out)
    pipe, generate = load_entry(entry)
    reference = [generate(pipe, [prompt], 4, number) for number, prompt in enumerate(page["settings"]["prompts"])]
    cachedit_fx.quantize(pipe, None, per_layer=plan)
    pictures = [generate(pipe, [prompt], 4, number) for number, prompt in enumerate(page["settings"]["prompts"])]
    values = psnr(torch.cat(pictures), torch.cat(reference))
    assert wanted <= fmean(values) < math.inf
    assert f"Its PSNR is {fmean(values):.1f} dB on the prompts" in plain(result.output)
    beyond = run(entry, out, "--resume", "--psnr", 400)
    assert beyond.exit_code != 0 and "already; ask for no more than that" in plain(beyond.output)


def test_an_interrupt_keeps_what_is_measured(entry, tmp_path, monkeypatch):
    whole, count = Probe.error, []

    def interrupted(self, kinds):
        count.append(kinds)
        if len(count) == 4:
            raise KeyboardInterrupt
        return whole(self, kinds)

    monkeypatch.setattr(Probe, "error", interrupted)
    out = tmp_path / "out"
    result = run(entry, out, "--size", "91%")
    assert result.exit_code == 130 and "interrupted after 3 groups" in plain(result.output)
    assert "--resume goes on" in plain(result.output) and not (out / "plan.json").exists()
    assert len(page_of(out)["rows"]) == 3


@pytest.mark.full("quality")
@pytest.mark.budget(400, "54 groups of the bundled model, and ten choices of layers drawn on eight prompts")
def test_a_plan_is_better_than_other_choices_of_its_size(tmp_path):
    result = invoke("sensitivity", "--size", "70%", "--compare", 8, "--batch", 8, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    means = {row["name"]: fmean(row["psnr"]) for row in page_of(tmp_path)["rows"] if "name" in row}
    random = fmean(value for name, value in means.items() if name.startswith("random "))
    assert means["plan"] >= 3 + max(random, means["front to back"], means["back to front"])
    ratio = re.search(r"add up to (\d\.\d+) of the error of all together", plain(result.output))
    assert ratio is not None and 0.8 < float(ratio[1]) < 1.25


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--kinds", "int9"), "int8"),
        (("--kinds", "int4"), "'int4' does not run here: it needs an NVIDIA GPU"),
        (("--kinds", "int4_emulated"), "takes none of the model's layers"),
        (("--size", "many"), "'many' is no size; write a share of all weights, such as 60%"),
        (("--size", "1%"), "and no further"),
        (("--size", "60%", "--psnr", 50), "give one of them"),
        (("--compare", 3), "there is no plan to compare"),
        (("--compare", "prompts.txt", "--size", "90%"), "errors are measured on"),
        (("--compare", "nowhere.txt", "--size", "90%"), "nowhere.txt is neither a number nor a text file"),
        (("--guidance", 2), "let generate() set it"),
    ],
    ids=str,
)
def test_bad_input_has_its_words(entry, tmp_path, words, error, entry_folder):
    (entry_folder / "prompts.txt").write_text("a red circle\na blue square\n")
    result = run(entry, tmp_path / "out", "--prompts", "prompts.txt", *words)
    assert result.exit_code == 2 and error in plain(result.output), result.output
    assert not (tmp_path / "out" / "plan.json").exists()


def test_sizes_are_shares_or_bytes():
    assert (most_bytes("60%", 1000), most_bytes("1.5KiB", 1), most_bytes("2 MiB", 1)) == (600, 1536, 2 * 2**20)
    with pytest.raises(RequestError, match="no size"):
        most_bytes("-3MiB", 1)


def test_a_stand_in_counts_as_its_original(monkeypatch):
    probe = Probe(Settings(("a red circle",), ("int4_weight_only_emulated",), steps=2, every=2))
    monkeypatch.setattr(probe, "groups", {kind: dict([*groups.items()][:1]) for kind, groups in probe.groups.items()})
    record = Record(probe.settings, "", "", {})
    assert sum(1 for _ in probe.measure(record)) == 2
    attention = record.measurements[0]
    elements = 8 * 128 * 128
    assert attention.before == 4 * elements and attention.after == elements // 2 + 5 * elements // 32


def test_rivals_save_no_more_than_the_plan_and_refine_in_passes():
    def candidate(group, kind, saved):
        return Candidate(group, kind, (group,), 1.0, saved)

    candidates = [candidate(group, kind, saved) for kind, saved in (("int8", 10), ("int4", 15)) for group in "abcd"]
    mixed = rivals(candidates, Plan((candidates[0], candidates[5], candidates[6])))
    assert len(mixed) == 7 and all(choice.saved == 40 for choice in mixed.values())
    assert mixed["front to back"].kinds == dict.fromkeys("abcd", "int8")
    more = rivals(candidates, Plan((*candidates[:2], *candidates[6:])))
    assert more["back to front"].kinds == {"a": "int8", "b": "int8", "c": "int4", "d": "int4"}
    one = rivals(candidates, Plan((candidates[2], candidates[3])))
    assert one["front to back"].kinds == {"a": "int8", "b": "int8"}
    assert one["back to front"].kinds == {"d": "int8", "c": "int8"}
    assert len({tuple(one[f"random {seed}"].kinds) for seed in range(1, 6)}) > 1


def test_the_picture_fills_what_is_planned(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from cachedit_fx.report.plots import save_sensitivity

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    groups = [Measurement(f"blocks.{n}", part, "int8", (), 10.0**-n, 4, 1) for n in (1, 2) for part in ("attn", "ff")]
    save_sensitivity(groups, {("blocks.1.ff", "int8")}, tmp_path / "x.png")
    attention, feed_forward = drawn[0].axes[0].collections
    assert [tuple(face[:3]) == (1, 1, 1) for face in feed_forward.get_facecolors()] == [False, True]
    assert all(tuple(face[:3]) == (1, 1, 1) for face in attention.get_facecolors())
    assert attention.get_offsets().tolist() == [[0, 10], [1, 20]]
    assert re.match(r"attn.*ff", " ".join(text.get_text() for text in drawn[0].legends[0].get_texts()))
