"""`cachedit bench links`: counts off graphs, the formulas against published times, the page."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lib.command_line import invoke, plain
from lib.counted import COUNTED
from lib.zoo import ZOO
from tools.pages import ROOT

from cachedit_fx.backend import rewrite
from cachedit_fx.bench import links, links_checks, links_page
from cachedit_fx.bench.graphs import largest_graph
from cachedit_fx.bench.ulysses import count, pretended
from cachedit_fx.capture import copy_of
from cachedit_fx.config.options import parse_options
from cachedit_fx.parallel_plan.cards import L20
from cachedit_fx.parallel_plan.choice import choose
from cachedit_fx.parallel_plan.costs import cost
from cachedit_fx.parallel_plan.counts import blocks_of
from cachedit_fx.parallel_plan.descriptions import Blocks, Model, Split
from cachedit_fx.passes.base import Traced
from cachedit_fx.passes.block_loops import Detection
from cachedit_fx.passes.infer_sequence_axes import SequenceAxes
from cachedit_fx.report.tables import page

MODELS = [make(COUNTED.__getitem__) for make in links.MODELS.values()]


@pytest.fixture(scope="module")
def captured():
    module, inputs = ZOO["FluxTransformer2DModel"]()
    return module, largest_graph(module, inputs(1))


def blocks_in(module, gm):
    settings = {"ulysses_size": 2, "inner_backend": "aot_eager", "passes": dict.fromkeys(links.LATER, False)}
    with pretended(2):
        outcome = rewrite(copy_of(gm), parse_options(settings), Traced.of(module))
    return blocks_of(outcome.graph_module, outcome.facts[Detection], outcome.facts[SequenceAxes])


@pytest.fixture(scope="module")
def blocks(captured):
    return blocks_in(*captured)


@pytest.mark.budget(40, "captures a model")
def test_blocks_are_read_off_a_graph(blocks):
    tokens, width, float32 = 16 + 6, 16, 4
    double, single = blocks
    kept = {"count": 4, "heads": 2, "head_size": width // 2, "width": width}
    assert double == Blocks(
        "transformer_blocks",
        segments=(6, 16),
        token_flops=2 * 12 * width**2 * tokens,
        weight_bytes=2 * 12 * 256 * 4,
        **kept,
    )
    linear = 2 * width**2 * tokens
    assert single == Blocks(
        "single_transformer_blocks",
        segments=(6, 16),
        token_flops=12 * linear,
        beside_flops=4 * linear,
        weight_bytes=12 * width**2 * float32,
        **kept,
    )
    assert double.attention_flops == 4 * tokens**2 * width and double.projection_flops == linear


@pytest.mark.full("parallel")
@pytest.mark.budget(40, "captures a model")
def test_a_second_self_attention_has_an_entry_without_the_work_of_the_first():
    module, inputs = ZOO["SD3Transformer2DModel"]()
    first, second = blocks_in(module, largest_graph(module, inputs(1)))
    assert first.segments == (16, 5) and first.token_flops and first.weight_bytes
    assert second == replace(first, segments=(16,), token_flops=0, weight_bytes=0)


def test_bytes_are_those_that_the_graph_sends(captured, blocks):
    module, gm = captured
    share = count("tiny", module, gm, 2)
    assert share is not None
    model = Model("tiny", blocks, 16 * 4 * 4, element_bytes=4)
    assert sum(cost(model, L20.cards(), Split(ulysses=2)).sent.values()) == share.sent


@pytest.mark.full("parallel")
@pytest.mark.budget(60, "captures three models of full width")
@pytest.mark.parametrize("name", COUNTED)
def test_large_models_are_counted(name):
    assert links.counted(name) == COUNTED[name]


def test_bytes_of_large_models_are_those_of_the_other_page():
    sent = {model.name: cost(replace(model, branches=1), L20.cards(), Split(ulysses=8)).sent for model in MODELS}
    other = (ROOT / "docs/performance/ulysses.md").read_text()
    for ours, theirs in ((links.FLUX, links.FLUX), (links.QWEN, links.QWEN), (links.WAN_720, links.WAN)):
        line = next(line for line in other.splitlines() if line.startswith(f"| {theirs} | 8 |"))
        assert f"{sum(sent[ours].values()) / 2**20:.0f}" == line.split(" | ")[7]


def test_published_times_are_met_as_far_as_the_page_says():
    flux, qwen, *_ = MODELS
    errors = {links.title(each.split): each.error for each in links_checks.checks(links_checks.CACHE_DIT, flux)}
    assert len(errors) == 7 and all(-0.12 < error < 0.04 for error in errors.values())
    assert all(error > -0.07 for name, error in errors.items() if "R" not in name)
    (cfg,) = links_checks.checks(links_checks.SGLANG, qwen)
    assert -0.06 < cfg.error < 0
    for run, model in ((links_checks.CACHE_DIT, flux), (links_checks.SGLANG, qwen)):
        tflops = links_checks.reached(run, model)
        alone = cost(model, run.kind.cards(tflops / run.kind.tflops), Split()).seconds * run.steps
        assert alone + run.outside_flops / tflops / 1e12 == pytest.approx(run.alone)
        assert run.kind.share == pytest.approx(tflops / run.kind.tflops, abs=0.01)


@pytest.mark.parametrize(
    ("run", "ranks"), [(links_checks.CACHE_DIT, 2), (links_checks.CACHE_DIT, 4), (links_checks.SGLANG_AUTO, 2)]
)
def test_the_choice_is_the_fastest_of_the_published_ones(run, ranks):
    times = {split: seconds for split, seconds in run.times if split.ranks == ranks and not split.float8}
    model = next(model for model in MODELS if model.name == run.model)
    published = {replace(split, is_async=False) for split in times}
    ranked = [replace(choice.split, is_async=False) for choice in choose(model, run.kind.cards(), ranks).ranked]
    first = next(split for split in ranked if split in published)
    assert first == replace(min(times, key=lambda split: times[split]), is_async=False)


def test_the_page_is_current():
    written = (ROOT / "docs/performance/links.md").read_text().split("\n\n", 2)
    assert written[1].startswith("`cachedit bench links --out docs/performance`")
    assert written[2] == page(*links_page.parts(MODELS)), "run: cachedit bench links --out docs/performance"


def test_the_command_writes_a_page_and_a_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(links, "counted", COUNTED.__getitem__)
    result = invoke("bench", "links", "--only", "qwen", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "links.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "links.md").read_text()
    assert "| Qwen-Image | 2 | C2: " in text and "FLUX.1-dev |" not in text
    assert "](links.png)" in text and "0.52" in text


def test_a_model_that_nobody_knows(tmp_path):
    result = invoke("bench", "links", "--only", "qwem", "--out", tmp_path)
    assert result.exit_code == 2 and "did you mean 'Qwen-Image'" in plain(result.output)
