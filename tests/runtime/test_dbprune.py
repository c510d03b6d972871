"""DBPrune end to end: its options, what each setting does to the blocks of each step, which blocks may be pruned."""

import math

import pytest
import torch
from lib import models
from lib.cases import text
from lib.helpers import capture, planned
from lib.pruning import ALWAYS, BASE, EAGER, MASK, STILL, TEXTS, fresh, pruned, reasons, run
from lib.toys import denoise, make, noise

import cachedit_fx
from cachedit_fx import (
    Action,
    DBCacheConfig,
    DBPruneConfig,
    OptionError,
    Reason,
    TaylorSeerCalibratorConfig,
    enable_cache,
    explain,
    summary,
)
from cachedit_fx.config.options import parse_options
from cachedit_fx.passes.plan_regions import RegionReport
from cachedit_fx.runtime.policies.dbprune import BELOW_DYNAMIC

pytestmark = pytest.mark.filterwarnings("ignore:.*inert threshold")

# ---------------------------------------------------------------------------------------------------------------------
# options


def test_defaults_are_the_published_ones():
    config = DBPruneConfig()
    assert (config.enable_dynamic_prune_threshold, config.max_dynamic_prune_threshold) == (False, None)
    assert (config.dynamic_prune_threshold_relax_ratio, config.non_prune_block_ids) == (1.25, ())
    assert (config.Fn_compute_blocks, config.Bn_compute_blocks, config.residual_diff_threshold) == (8, 0, 0.08)


def test_by_name_with_flat_options():
    parsed = parse_options({"cache": "dbprune", "Fn_compute_blocks": 0, "non_prune_block_ids": range(2, 4)})
    assert parsed.cache == DBPruneConfig(Fn_compute_blocks=0, non_prune_block_ids=[2, 3])
    assert parse_options({"cache": "dbcache"}).cache == DBCacheConfig()


@pytest.mark.parametrize("ids", [[1, 4], (1, 4), {1, 4}, range(1, 5, 3), [1, 4, 1]])
def test_forms_of_block_ids_are_one(ids):
    assert DBPruneConfig(non_prune_block_ids=ids).non_prune_block_ids == (1, 4)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"enable_dynamic_prune_threshold": 1}, ["True or False"]),
        ({"max_dynamic_prune_threshold": 0}, ["max_dynamic_prune_threshold=0", "> 0", "None"]),
        ({"max_dynamic_prune_threshold": 0.08, "enable_dynamic_prune_threshold": True}, ["=0.08", "larger"]),
        ({"dynamic_prune_threshold_relax_ratio": -1.0}, ["dynamic_prune_threshold_relax_ratio=-1.0", "> 0"]),
        ({"non_prune_block_ids": 3}, ["non_prune_block_ids=3", "list"]),
        ({"non_prune_block_ids": [-1]}, [">= 0"]),
        ({"non_prune_block_ids": "12"}, ["list"]),
        ({"non_prune_blocks_ids": [1]}, ["nearest known one is 'non_prune_block_ids'", "cachedit_fx.DBPruneConfig"]),
        ({"warmup_interval": 0}, [">= 1"]),
    ],
)
def test_rejected_with_what_is_allowed(setting, words):
    with pytest.raises(OptionError) as error:
        parse_options({"cache": "dbprune"} | setting)
    for word in words:
        assert word in str(error.value)


def test_settings_of_another_class_say_whose_they_are():
    with pytest.raises(OptionError, match="non_prune_block_ids.* for DBPruneConfig only.* cache='dbprune'"):
        parse_options({"non_prune_block_ids": [1]})
    with pytest.raises(OptionError, match="for DBPruneConfig only"):
        DBCacheConfig().reset(enable_dynamic_prune_threshold=True)
    with pytest.raises(OptionError, match="cache='dbprun' .*did you mean 'dbprune'"):
        parse_options({"cache": "dbprun"})


def test_structure():
    def structure(**fields):
        return parse_options({"cache": DBPruneConfig(**fields)}).structure()

    assert structure() == structure(residual_diff_threshold=0.5, enable_dynamic_prune_threshold=True)
    assert structure(non_prune_block_ids=[2, 1]) == structure(non_prune_block_ids=[1, 2])
    assert len({structure(), structure(Fn_compute_blocks=1), structure(non_prune_block_ids=[1])}) == 3
    assert structure() != parse_options({"cache": DBCacheConfig()}).structure()


# ---------------------------------------------------------------------------------------------------------------------
# settings, each by what it does to ten steps of six blocks


@pytest.fixture(scope="module")
def toy():
    """One model, compiled once: every policy below is a change of settings."""
    model = enable_cache(make(), BASE, **EAGER)
    denoise(model)
    return model


@pytest.mark.keep_compiled
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "-ppppppppp"),
        ({"max_warmup_steps": 4}, "----pppppp"),
        ({"max_warmup_steps": 0}, "-ppppppppp"),  # nothing is stored at step 0
        ({"max_warmup_steps": 6, "warmup_interval": 2}, "-p-p-ppppp"),
        ({"max_cached_steps": 3}, "-ppp------"),
        ({"max_cached_steps": 0}, "----------"),
        ({"max_continuous_cached_steps": 2}, "-pp-pp-pp-"),
        ({"max_continuous_cached_steps": 0}, "----------"),
        ({"residual_diff_threshold": 0}, "----------"),
        ({"residual_diff_threshold": -1.0}, "----------"),
        ({"max_accumulated_residual_diff_threshold": 0.0}, "----------"),
        ({"steps_computation_mask": MASK}, "--p-pp-ppp"),
        ({"steps_computation_mask": MASK, "residual_diff_threshold": 0}, "----------"),
        ({"steps_computation_mask": MASK, "max_cached_steps": 2}, "--p-p-----"),
        ({"steps_computation_mask": MASK, "residual_diff_threshold": 0, "steps_computation_policy": "static"},
         "--p-pp-ppp"),
        ({"num_inference_steps": 10}, "-ppppppppp"),
    ],
    ids=str,
)  # fmt: skip
def test_steps(toy, changes, expected):
    """In a step that may prune, all five blocks behind the first one are: a limit never cuts a step in two."""
    _, chain = run(toy, ALWAYS.reset(**changes))
    denoise(toy)
    for generation in (chain, *summary(toy)):  # limits hold for each by itself
        assert pruned(generation) == [[1, 2, 3, 4, 5] if step == "p" else [] for step in expected]
        assert generation.pruned_blocks == [5 if step == "p" else 0 for step in expected]
        assert generation.actual_blocks == [6] * 10
        assert generation.pruned_steps == generation.cached_steps == [i for i, s in enumerate(expected) if s == "p"]
        assert generation.pruned_ratio == pytest.approx(expected.count("p") * 5 / 60)
        assert generation.work == pytest.approx(1 - generation.pruned_ratio)


@pytest.mark.keep_compiled
def test_the_threshold_divides_pruned_from_computed(toy):
    _, chain = run(toy, BASE)
    measured = [d for d in chain.branch(0).every_decision if d.difference is not None]
    assert 0 < sum(chain.pruned_blocks) < len(measured) == 8 * 5
    assert all((d.action is Action.REUSE) == (d.difference < 0.06) for d in measured)
    assert any(0 < count < 5 for count in chain.pruned_blocks)  # a step prunes some of its blocks
    assert math.fsum(d.difference for d in measured[:5]) / 5 == pytest.approx(chain.residual_diffs[2])


@pytest.mark.keep_compiled
def test_the_accumulated_difference_is_each_blocks_own(toy):
    _, free = run(toy, ALWAYS)
    of_block = {
        block: [row[block].difference for row in free.branch(0).parts.values()][1:] for block in (1, 2, 3, 4, 5)
    }
    limit = sorted(values[0] for values in of_block.values())[2]  # three blocks reach it with their first pruned step
    _, chain = run(toy, ALWAYS.reset(max_accumulated_residual_diff_threshold=limit))
    assert pruned(chain)[1] == [1, 2, 3, 4, 5]
    assert pruned(chain)[2] == [block for block, values in of_block.items() if values[0] < limit]
    assert len(pruned(chain)[2]) == 2 and Reason.ACCUMULATED in reasons(chain)
    assert max(map(len, pruned(chain)[3:])) > 0  # a computed block starts anew


@pytest.mark.keep_compiled
def test_a_static_mask_measures_nothing(toy):
    _, chain = run(toy, ALWAYS.reset(steps_computation_mask=MASK, steps_computation_policy="static"))
    assert chain.residual_diffs == {} and reasons(chain) == {Reason.MASK_COMPUTES, Reason.MASK_REUSES}


DYNAMIC = BASE.reset(enable_dynamic_prune_threshold=True, residual_diff_threshold=0.05)


@pytest.mark.keep_compiled
def test_dynamic_threshold(toy):
    _, fixed = run(toy, DYNAMIC.reset(enable_dynamic_prune_threshold=False))
    _, raised = run(toy, DYNAMIC)
    assert BELOW_DYNAMIC in reasons(raised) and BELOW_DYNAMIC not in reasons(fixed)
    assert sum(raised.pruned_blocks) > sum(fixed.pruned_blocks)
    above = [d.difference for d in raised.branch(0).every_decision if d.reason is BELOW_DYNAMIC]
    assert all(0.05 <= value < 0.1 for value in above)
    _, capped = run(toy, DYNAMIC.reset(max_dynamic_prune_threshold=0.0501))
    assert pruned(capped) == pruned(fixed)
    _, higher = run(toy, DYNAMIC.reset(max_dynamic_prune_threshold=1.0))
    assert sum(higher.pruned_blocks) > sum(raised.pruned_blocks)
    _, strict = run(toy, DYNAMIC.reset(dynamic_prune_threshold_relax_ratio=0.1))
    assert pruned(strict) == pruned(fixed)


def by_hand(model, config, order=0):
    """A toy with DBPrune written down plainly, as far as thresholds, warm-up and Taylor's order 0 and 1 go."""
    kept: dict[int, tuple[torch.Tensor, list[tuple[int, list[torch.Tensor]]]]] = {}
    counts: list[int] = []

    def call(hidden_states, timestep, text):
        step = len(counts)
        seen: list[float] = []
        counts.append(0)
        angles = timestep.reshape(-1, 1).to(torch.float32) / 1000 * model.frequencies
        temb, hidden = model.time(torch.cos(angles)), model.embed(hidden_states)
        for number, block in enumerate(model.blocks):
            threshold, difference = config.residual_diff_threshold, math.inf
            if seen and config.enable_dynamic_prune_threshold:
                raised = sum(seen[:5]) / len(seen[:5]) * config.dynamic_prune_threshold_relax_ratio
                threshold = raised if threshold < raised < 2 * threshold else threshold
            if number >= config.Fn_compute_blocks and step >= config.max_warmup_steps:
                reference, values = kept[number]
                difference = float((reference - hidden).abs().mean() / reference.abs().mean())
                seen.append(difference)
            if difference < threshold:
                counts[-1] += 1
                (latest, residuals), *before = values
                if order and before:
                    slopes = [(a - b) / (latest - before[0][0]) for a, b in zip(residuals, before[0][1], strict=True)]
                    residuals = [r + s * (step - latest) for r, s in zip(residuals, slopes, strict=True)]
                hidden, text = (hidden + residuals[0]).float(), (text + residuals[1]).float()
            else:
                results = block(hidden, text, temb)
                residuals = [new.double() - old for new, old in zip(results, (hidden, text), strict=True)]
                before = kept[number][1] if number in kept else []
                kept[number] = hidden, [(step, residuals), *before][:2]
                hidden, text = results
        return model.out(hidden + text.mean(1, keepdim=True))

    return call, counts


@pytest.mark.keep_compiled
@pytest.mark.parametrize("config", [BASE, DYNAMIC, BASE.reset(Fn_compute_blocks=3)], ids=["base", "dynamic", "F3"])
@pytest.mark.parametrize("order", [None, 0, 1])
def test_equals_what_is_written_down_plainly(config, order, shared):
    call, counts = by_hand(shared.module, config, order or 0)
    expected = denoise(call)
    calibrator = None if order is None else TaylorSeerCalibratorConfig(taylorseer_order=order)
    found, chain = fresh(shared, config, calibrator)
    assert chain.pruned_blocks == counts and sum(counts) > 0
    torch.testing.assert_close(found, expected, rtol=1e-6 if not order else 1e-5, atol=1e-6)


def test_whole_outputs_are_predicted_too():
    model = make()
    results = [
        run(model, ALWAYS.reset(max_continuous_cached_steps=1), TaylorSeerCalibratorConfig(kind))[0]
        for kind in ("residual", "hidden_states")
    ]
    assert not torch.equal(*results)
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# which blocks


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({"Fn_compute_blocks": 0}, [0, 1, 2, 3, 4, 5]),
        ({"Fn_compute_blocks": 2, "Bn_compute_blocks": 3}, [2]),
        ({"Bn_compute_blocks": 1}, [1, 2, 3, 4]),
        ({"non_prune_block_ids": [2, 4, 0, 99]}, [1, 3, 5]),
        ({"Bn_compute_blocks": 2, "non_prune_block_ids": [1, 2]}, [3]),
    ],
    ids=str,
)
@pytest.mark.keep_compiled
def test_first_last_and_excepted_blocks_are_never_pruned(changes, blocks, shared):
    planned: list[RegionReport | None] = []
    shared.observe = lambda facts: planned.append(facts.get(RegionReport))
    _, chain = fresh(shared, ALWAYS.reset(**changes))
    shared.observe = None
    assert pruned(chain) == [[]] + [blocks] * 9
    assert (chain.num_blocks, chain.pruned_blocks) == (6, [0] + [len(blocks)] * 9)
    for report in planned:
        assert report is not None and [region.block for region in report.regions] == blocks
        middles = zip(report.regions, blocks, strict=True)
        assert all(region.middle == (region.blocks[number],) for region, number in middles)


def test_what_is_explained_of_blocks_that_may_be_pruned():
    model = enable_cache(make(), ALWAYS.reset(Fn_compute_blocks=2, Bn_compute_blocks=3), **EAGER)
    with torch.no_grad():
        explanation = explain(model, noise(), torch.tensor([900.0]), TEXTS[0])
    assert [region.block for region in explanation.regions] == [2]
    assert "block 2 of 6 may be bypassed" in str(explanation)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"Fn_compute_blocks": 4, "Bn_compute_blocks": 2}, "4 \\+ 2 leaves nothing to bypass of 6 blocks"),
        ({"non_prune_block_ids": range(9)}, "non_prune_block_ids names every block that is left"),
    ],
)
def test_nothing_left_to_prune_runs_uncached_and_says_so(changes, words):
    model = make()
    expected = denoise(model)
    with pytest.warns(cachedit_fx.CacheWarning, match=words):
        result, _ = run(model, ALWAYS.reset(**changes))
    assert torch.equal(result, expected)


def test_blocks_are_numbered_over_the_chain_and_glue_stays_outside():
    graph = capture(models.TwoLoops(3, 4), *models.inputs(), text())
    regions = planned(graph.gm, 1, 1, kept=[4]).regions
    assert [region.middle[0].name for region in regions] == [
        "double_blocks.1", "double_blocks.2", "single_blocks.0", "single_blocks.2",
    ]  # fmt: skip
    assert {region.loops for region in regions} == {("double_blocks", "single_blocks")}
    assert all((region.start, region.end) == (block.start, block.end) for region in regions for block in region.middle)
    assert all(all(region.continued) and region.reference is None for region in regions)
    by_loop = planned(graph.gm, 1, 1, "loop", kept=[2]).regions
    assert [region.middle[0].name for region in by_loop] == ["double_blocks.1", "single_blocks.1"]


def test_one_entry_of_statistics_for_each_loop():
    model, inputs = make(models.TwoLoops), (*models.inputs(), text())
    enable_cache(model, STILL, scope="loop", **EAGER)
    with torch.no_grad():
        for _ in range(3):
            model(*inputs)
    assert [(chain.name, chain.num_blocks, chain.pruned_blocks) for chain in summary(model)] == [
        ("chain_0", 3, [0, 2, 2]),
        ("chain_1", 4, [0, 3, 3]),
    ]


class Lends(models.Toy):
    """Its third block makes, without the stream, what the block behind it uses too."""

    def forward(self, hidden_states, timestep):
        temb = models.time_embedding(timestep, hidden_states.shape[-1])
        x, lent = self.embed(hidden_states), temb
        for index, block in enumerate(self.blocks):
            if index == 2:
                lent = torch.tanh(block.modulation(temb)).mean() + 1
            x = block(x, temb) * lent if index >= 2 else block(x, temb)
        return self.project(x)


def test_what_others_use_of_a_block_is_hoisted_out_of_it():
    model, inputs = make(Lends), models.inputs()
    with torch.no_grad():
        plain = model(*inputs)
        enable_cache(model, STILL, **EAGER)
        assert any(region.hoisted for region in explain(model, *inputs).regions)
        assert all(torch.equal(model(*inputs), plain) for _ in range(3))
    assert summary(model)[0].pruned_blocks == [0, 3, 3]
