"""DBCache end to end on toys: what each setting does to the steps, and to the work that is really done."""

import warnings
from typing import Any

import pytest
import torch
from lib.helpers import UNMOVED
from lib.shared import SharedCapture
from lib.toys import FALLING, Timeless, Toy, denoise, make, noise

import cachedit_fx
from cachedit_fx import Action, CacheWarning, DBCacheConfig, Reason, enable_cache, refresh_context, summary
from cachedit_fx.metrics.flops import FlopCounter
from cachedit_fx.runtime import guard
from cachedit_fx.runtime.registry import state_of_module

pytestmark = pytest.mark.filterwarnings("ignore:.*inert threshold")
EAGER: dict[str, Any] = {"inner_backend": "eager"}
BASE = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.1)
ALWAYS = BASE.reset(max_warmup_steps=1, residual_diff_threshold=1e9)
"""Reuses whatever the difference, so that limits alone decide."""


def pattern(region: cachedit_fx.CacheStats, branch: int = 0) -> str:
    """The branch's steps as a string: c = computed, r = reused."""
    decisions = region.branch(branch).decisions
    assert list(decisions) == list(range(len(decisions)))
    return "".join("r" if decision.action is Action.REUSE else "c" for decision in decisions.values())


@pytest.fixture(scope="module")
def toy():
    """One model, compiled once: every policy below is a change of settings."""
    model = enable_cache(make(), BASE, **EAGER)
    denoise(model)
    return model


def run(model, config, **arguments):
    enable_cache(model, config, **EAGER)
    result = denoise(model, **arguments)
    (region,) = summary(model)
    return result, region


# ---------------------------------------------------------------------------------------------------------------------
# settings, each by what it does to ten steps

MASK = "1101001000"


@pytest.mark.keep_compiled
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "crrrrrrrrr"),
        ({"max_warmup_steps": 4}, "ccccrrrrrr"),
        ({"max_warmup_steps": 0}, "crrrrrrrrr"),  # nothing is stored at step 0
        ({"max_warmup_steps": 6, "warmup_interval": 2}, "crcrcrrrrr"),
        ({"max_warmup_steps": 7, "warmup_interval": 3}, "crrcrrcrrr"),
        ({"max_cached_steps": 3}, "crrrcccccc"),
        ({"max_cached_steps": 0}, "cccccccccc"),
        ({"max_continuous_cached_steps": 2}, "crrcrrcrrc"),
        ({"max_continuous_cached_steps": 1, "max_cached_steps": 3}, "crcrcrcccc"),
        ({"max_continuous_cached_steps": 0}, "cccccccccc"),
        ({"residual_diff_threshold": 0}, "cccccccccc"),
        ({"residual_diff_threshold": -1.0}, "cccccccccc"),
        ({"steps_computation_mask": MASK}, "ccrcrrcrrr"),
        ({"steps_computation_mask": MASK, "residual_diff_threshold": 0}, "cccccccccc"),
        ({"steps_computation_mask": MASK, "residual_diff_threshold": 0, "steps_computation_policy": "static"}, None),
        ({"steps_computation_mask": MASK, "max_cached_steps": 2}, "ccrcrccccc"),
        ({"steps_computation_mask": MASK, "max_cached_steps": 2, "steps_computation_policy": "static"}, None),
        ({"steps_computation_mask": "0" * 10, "steps_computation_policy": "static"}, "crrrrrrrrr"),
        ({"steps_computation_mask": MASK, "max_warmup_steps": 9}, "ccrcrrcrrr"),  # its leading ones are the warm-up
        ({"steps_computation_mask": "1000"}, "crrrcccccc"),  # ends early: computes
        ({"num_inference_steps": 10}, "crrrrrrrrr"),
        ({"force_refresh_step_hint": 4}, "crrrcrrrrr"),
        ({"force_refresh_step_hint": 3, "force_refresh_step_policy": "repeat"}, "crrcrrcrrc"),
        ({"force_refresh_step_hint": 5, "max_cached_steps": 2}, "crrcccrrcc"),  # limits and warm-up begin anew
        ({"force_refresh_step_hint": 5, "max_warmup_steps": 2}, "ccrrrccrrr"),
        ({"force_refresh_step_hint": 5, "steps_computation_mask": MASK}, "ccrcrccrcr"),
        ({"force_refresh_step_hint": 10}, "crrrrrrrrr"),
    ],
    ids=str,
)
def test_settings(toy, changes, expected):
    _, region = run(toy, ALWAYS.reset(**changes))
    denoise(toy)
    for generation in (region, *summary(toy)):  # limits hold for each by itself
        assert pattern(generation) == (expected or "ccrcrrcrrr")
        assert generation.work == pytest.approx(1 - len(generation.cached_steps) * 5 / 60)


@pytest.mark.keep_compiled
def test_a_forced_refresh_leaves_nothing_to_extrapolate_from(toy):
    refreshed, limited = {"force_refresh_step_hint": 5}, {"max_continuous_cached_steps": 4}
    results = []
    for changes, calibrator in ((refreshed, "taylorseer"), (refreshed, None), (limited, "taylorseer")):
        enable_cache(toy, ALWAYS.reset(**changes), **EAGER, calibrator=calibrator)
        results.append(denoise(toy))
        assert pattern(summary(toy)[0]) == "crrrrcrrrr"
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.keep_compiled
def test_dynamic_mask_measures_where_the_static_one_does_not(toy):
    _, dynamic = run(toy, BASE.reset(steps_computation_mask=MASK, residual_diff_threshold=0.05))
    zeros = [step for step, digit in enumerate(MASK) if digit == "0"]
    assert list(dynamic.residual_diffs) == zeros
    assert Reason.ABOVE_THRESHOLD in dynamic.reasons.values() and dynamic.cached_steps
    _, static = run(toy, BASE.reset(steps_computation_mask=MASK, steps_computation_policy="static"))
    assert static.cached_steps == zeros and static.residual_diffs == {}
    assert {static.reasons[step] for step in zeros} == {Reason.MASK_REUSES}


@pytest.mark.keep_compiled
def test_the_threshold_divides_reused_from_computed(toy):
    _, region = run(toy, BASE)
    assert 0 < len(region.cached_steps) < 8
    for step, difference in region.residual_diffs.items():
        assert (step in region.cached_steps) == (difference < 0.1)
    step, smallest = region.cached_steps[0], region.residual_diffs[region.cached_steps[0]]
    _, at_it = run(toy, BASE.reset(residual_diff_threshold=smallest))
    _, above = run(toy, BASE.reset(residual_diff_threshold=smallest * 1.001))
    assert step not in at_it.cached_steps and step in above.cached_steps


@pytest.mark.keep_compiled
def test_the_difference_is_taken_to_the_last_computed_step(toy):
    """It grows along a run of cached steps, and is small again behind a computed one."""
    _, region = run(toy, ALWAYS.reset(max_continuous_cached_steps=3))
    assert pattern(region) == "crrrcrrrcr"
    diffs = region.residual_diffs
    assert diffs[1] < diffs[2] < diffs[3] and diffs[5] < diffs[6] < diffs[7] and diffs[5] < diffs[3]


@pytest.mark.keep_compiled
def test_downsampling_compares_every_nth_token(toy, monkeypatch):
    seen: dict[int, list[tuple[torch.Tensor, ...]]] = {1: [], 2: []}
    right = guard.l1_sums
    for factor, compared in seen.items():

        def spy(hidden, base, previous, out, compared=compared):
            found = right(hidden, base, previous, out)
            compared.append((hidden.clone(), base.clone(), out.clone()))
            return found

        monkeypatch.setattr(guard, "l1_sums", spy)
        _, region = run(toy, ALWAYS.reset(downsample_factor=factor))
        assert pattern(region) == "crrrrrrrrr"
    assert len(seen[1]) == len(seen[2]) == 10
    for all_tokens, every_other in zip(seen[1], seen[2], strict=True):
        assert all(torch.equal(x[:, ::2], y) for x, y in zip(all_tokens, every_other, strict=True))


@pytest.mark.keep_compiled
def test_buffers_are_made_once_for_all_generations(toy):
    """A computed step swaps r for the one before, and writes the oldest stored value again."""
    enable_cache(toy, BASE.reset(max_continuous_cached_steps=1), **EAGER, calibrator="taylorseer")
    held = []
    for _ in range(4):
        denoise(toy)
        cache = state_of_module(toy)
        assert cache is not None and cache.latest is not None
        (memory,), (spare,) = cache.latest.memories.values(), cache.latest.spares.values()
        assert memory.reference is not None
        buffers = [*(buffer for kept in memory.stored for buffer in kept), memory.reference, spare]
        held.append({buffer.data_ptr() for buffer in buffers})
    assert held[0] == held[1] == held[2] == held[3] and len(held[0]) == len(memory.stored) * 2 + 2


@pytest.mark.keep_compiled
def test_accumulated_differences_are_reset_by_a_computed_step(toy):
    """Tripped, one step is computed and caching goes on; never reset, the rest of the generation would be computed."""
    _, free = run(toy, ALWAYS)
    first, second = free.residual_diffs[1], free.residual_diffs[2]
    limit = (first + second) * 0.999  # reached by steps 1 and 2 together, so step 3 computes
    _, region = run(toy, ALWAYS.reset(max_accumulated_residual_diff_threshold=limit))
    tripped = [step for step, reason in region.reasons.items() if reason is Reason.ACCUMULATED]
    assert tripped[0] == 3
    assert len(tripped) > 1 and 4 in region.cached_steps  # the other reading: cached_steps == [1, 2]
    for before, after in zip([0, *tripped], [*tripped, 10], strict=True):
        run_of = [region.residual_diffs[step] for step in range(before + 1, after)]
        assert sum(run_of[:-1]) < limit
    _, never = run(toy, ALWAYS.reset(max_accumulated_residual_diff_threshold=0.0))
    assert pattern(never) == "cccccccccc"


def test_static_mask_with_no_first_blocks():
    """F = 0: the whole chain is the region, and the work of a cached step is none of it."""
    model, config = (
        make(),
        ALWAYS.reset(Fn_compute_blocks=0, steps_computation_mask=MASK, steps_computation_policy="static"),
    )
    expected = denoise(model)
    _, region = run(model, config)
    assert pattern(region) == "ccrcrrcrrr" and region.work == pytest.approx(0.4)
    result, _ = run(model, config.reset(steps_computation_mask="1" * 10))
    assert torch.equal(result, expected)


def test_work_counts_the_blocks_between_first_and_last():
    model = SharedCapture(make(blocks=9))
    for first, last in ((1, 0), (1, 3), (2, 2), (5, 0), (8, 0)):
        model.compile_anew(cache=ALWAYS.reset(Fn_compute_blocks=first, Bn_compute_blocks=last))
        denoise(model)
        (region,) = model.summary()
        assert (region.num_blocks, region.first, region.last) == (9, first, last)
        assert region.work == pytest.approx(1 - 9 * (9 - first - last) / 90)


# ---------------------------------------------------------------------------------------------------------------------
# reuse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_reuse_on_identical_inputs_is_exact_and_the_work_is_gone(dtype):
    model = make(Timeless, width=16).to(dtype)
    inputs = noise(2, 5, 16).to(dtype), noise(2, 3, 16, seed=2).to(dtype)
    plain = model(*inputs)
    with FlopCounter() as embed:
        model.embed(inputs[0])
    with FlopCounter() as block:
        model.blocks[0](inputs[0], inputs[1], inputs[1].mean(1))
    shared = SharedCapture(model)
    shared(*inputs)  # captures
    for first, last in ((1, 0), (1, 2), (0, 0)):
        config = DBCacheConfig(first, last, steps_computation_mask=(1, 0, 0), steps_computation_policy="static")
        if first:
            config = DBCacheConfig(first, last, residual_diff_threshold=0.01, max_warmup_steps=1)
        shared.compile_anew(cache=config, passes=UNMOVED)
        with FlopCounter() as computed:
            result = shared(*inputs)
        with FlopCounter() as reused:
            again = shared(*inputs)
        assert shared.summary()[0].cached_steps == [1]
        assert torch.equal(result, plain) and torch.equal(again, plain)
        assert embed.flops and computed.flops == 2 * embed.flops + 6 * block.flops
        assert reused.flops == 2 * embed.flops + (first + last) * block.flops


def test_a_cached_step_differs_where_the_inputs_do():
    """Reuse adds the stored residual to the present hidden states: it does not replay the old output."""
    model = enable_cache(make(Timeless), ALWAYS.reset(max_warmup_steps=1), **EAGER)
    text = noise(1, 3, seed=2)
    with torch.no_grad():
        first, second = model(noise(), text), model(noise() * 1.01, text)
    assert summary(model)[0].cached_steps == [1]
    assert not torch.equal(first, second)


def test_blocks_that_write_in_place():
    """In-place blocks change their own residual's base; reuse must be exact and the differences must be numbers."""
    plain = denoise(make())
    model = make(in_place=True)
    assert torch.equal(denoise(model), plain)
    expected, region = run(make(), BASE)
    found, in_place = run(model, BASE)
    assert torch.equal(found, expected)
    assert in_place.residual_diffs == region.residual_diffs and in_place.cached_steps == region.cached_steps


def test_a_difference_that_is_not_a_number_computes_is_counted_and_warns_once():
    model = make(Timeless)
    enable_cache(model, ALWAYS, **EAGER)
    broken = noise()
    broken[0, 0, 0] = torch.nan
    with torch.no_grad(), pytest.warns(CacheWarning, match="infinite or not a number") as caught:
        for _ in range(4):
            model(broken, noise(1, 3, seed=2))
    (region,) = summary(model)
    assert pattern(region) == "cccc" and region.non_finite == 3
    assert set(region.reasons.values()) == {Reason.WARMUP, Reason.NOT_FINITE}
    assert region.residual_diffs == {}
    assert len([w for w in caught if "not a number" in str(w.message)]) == 1


def test_a_threshold_that_never_triggers_is_reported_when_the_generation_ends():
    model = enable_cache(make(), BASE.reset(residual_diff_threshold=1e-6), **EAGER)
    denoise(model)
    with pytest.warns(CacheWarning, match="inert threshold: smallest difference 0.0"):
        denoise(model)


def test_a_mask_that_is_too_short_warns_once():
    model = enable_cache(make(), ALWAYS.reset(steps_computation_mask="10"), **EAGER)
    with pytest.warns(CacheWarning, match="2 digits") as caught:
        denoise(model)
        denoise(model)
    assert len(caught) == 1


# ---------------------------------------------------------------------------------------------------------------------
# generations and branches

RISING = FALLING[::-1]
TEXTS = noise(1, 3, seed=2), noise(1, 3, seed=3)
LONGER = noise(1, 3, seed=2), noise(1, 7, seed=3)


def fresh(shared, config, **arguments):
    """(result, decisions by branch) of one generation by a model that was never called before."""
    shared.compile_anew(cache=config)
    result = denoise(shared, **arguments)
    return result, [branch.decisions for region in shared.summary() for branch in region.branches]


@pytest.mark.keep_compiled
@pytest.mark.parametrize("timesteps", [FALLING, RISING], ids=["falling", "rising"])
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS, LONGER, (*TEXTS, *LONGER)], ids=["one", "cfg", "lengths", "four"])
def test_two_generations_back_to_back_equal_two_fresh_ones(timesteps, texts, shared):
    """Without a warm-up, and with a limit on cached steps, whatever is left of the first would show in the second."""
    model, config = make(), BASE.reset(max_warmup_steps=0, max_cached_steps=4)
    enable_cache(model, config, **EAGER)
    for start, steps in [(noise(), 10), (noise(seed=5), 7)]:
        expected, decisions = fresh(shared, config, timesteps=timesteps[:steps], texts=texts, start=start)
        found = denoise(model, timesteps=timesteps[:steps], texts=texts, start=start)
        assert torch.equal(found, expected)
        (region,) = summary(model)
        assert [branch.decisions for branch in region.branches] == decisions
        assert [len(decided) for decided in decisions] == [steps] * len(texts)
        assert any(branch.cached_steps for branch in region.branches)


@pytest.mark.keep_compiled
@pytest.mark.parametrize("convert", [float, int, lambda t: torch.tensor([int(t)]), lambda t: torch.tensor(t)])
@pytest.mark.parametrize("texts", [TEXTS[:1], LONGER], ids=["one", "lengths"])
def test_every_kind_of_timestep(convert, texts, shared):
    """A number is baked into the first graph, and a 0-d tensor or a symbol in those that follow."""
    timesteps = [float(int(t)) for t in FALLING]
    expected, decisions = fresh(shared, BASE, timesteps=timesteps, texts=texts)
    model = make()
    enable_cache(model, BASE, **EAGER)
    for _ in range(2):
        found = denoise(model, timesteps=timesteps, texts=texts, convert=convert)
        assert [branch.decisions for branch in summary(model)[0].branches] == decisions
        assert torch.equal(found, expected)


def test_no_timestep_at_all():
    """Every call is a step; a number of steps, or a refresh, ends the generation."""
    model, text = make(Timeless), noise(1, 3, seed=2)
    enable_cache(model, ALWAYS.reset(num_inference_steps=3), **EAGER)
    with torch.no_grad():
        for _ in range(5):
            model(noise(), text)
    assert pattern(summary(model)[0]) == "cr"
    refresh_context(model)
    with torch.no_grad():
        model(noise(), text)
    assert pattern(summary(model)[0]) == "c"


@pytest.mark.parametrize("separate", [None, True])
def test_each_branch_has_its_own_history(separate):
    """With one text for both, the branches decide alike; with two, each measures its own differences."""
    model, config = make(), BASE.reset(enable_separate_cfg=separate)
    _, same = run(model, config, texts=TEXTS[:1] * 2)
    assert same.branch(0).decisions == same.branch(1).decisions and same.cached_steps
    _, apart = run(model, config, texts=(TEXTS[0], TEXTS[1] * 4))
    assert apart.residual_diffs.keys() and apart.residual_diffs != apart.cfg_residual_diffs
    assert apart.cfg_cached_steps == apart.branch(1).cached_steps


def test_explicitly_fused_calls_are_steps():
    """Two evaluations of one timestep are two steps, as second-order schedulers need it."""
    _, region = run(make(), ALWAYS.reset(enable_separate_cfg=False), texts=TEXTS)
    assert len(region.branches) == 1 and pattern(region) == "c" + "r" * 19


def test_unconditional_branch_called_first():
    config = ALWAYS.reset(enable_separate_cfg=True, cfg_compute_first=True, cfg_diff_compute_separate=False)
    model = make()
    _, swapped = run(model, config, texts=TEXTS)
    _, straight = run(model, config.reset(cfg_compute_first=False), texts=TEXTS)
    assert swapped.branch(1).residual_diffs == straight.branch(0).residual_diffs


@pytest.mark.parametrize("first", [False, True], ids=["conditional first", "unconditional first"])
def test_one_difference_for_both_branches(first):
    """The step's first branch measures, whichever it is; the other one takes that, though its own is another."""
    texts = TEXTS[0], TEXTS[1] * 4
    config = ALWAYS.reset(enable_separate_cfg=True)
    model = make()
    _, apart = run(model, config, texts=texts)
    _, shared = run(model, config.reset(cfg_diff_compute_separate=False, cfg_compute_first=first), texts=texts)
    measured = apart.branch(0).residual_diffs
    assert apart.branch(1).residual_diffs != measured
    assert shared.branch(0).residual_diffs == shared.branch(1).residual_diffs == measured


class Named(Toy):
    """With what diffusers' models have: a context that names the branch."""

    from diffusers.models.cache_utils import CacheMixin

    cache_context = CacheMixin.cache_context


def call_named(model, names, timesteps=FALLING, **context):
    hidden = noise()
    with torch.no_grad():
        for number, timestep in enumerate(timesteps):
            for name, text in names:
                step = {key: value(number) for key, value in context.items()}
                with model.cache_context(name, **step):
                    model(hidden, torch.tensor([timestep]), text)


def test_branches_by_name_win_over_detection():
    model = enable_cache(make(Named), ALWAYS, **EAGER)
    call_named(model, [("cond", TEXTS[0]), ("uncond", TEXTS[1])])
    (region,) = summary(model)
    assert [pattern(region, branch) for branch in range(len(region.branches))] == ["crrrrrrrrr"] * 2
    call_named(model, [("same", TEXTS[0]), ("same", TEXTS[1])])
    (region,) = summary(model)
    assert len(region.branches) == 1 and region.executed_steps == 19  # the name seen again at once starts anew
    # an explicit setting wins over both
    enable_cache(model, ALWAYS.reset(enable_separate_cfg=False), **EAGER)
    call_named(model, [("cond", TEXTS[0]), ("uncond", TEXTS[1])])
    (region,) = summary(model)
    assert len(region.branches) == 1 and region.executed_steps == 20


def test_a_step_index_from_the_pipeline_is_preferred():
    """Equal timesteps (rounded, in bfloat16) are steps apart where the caller says so."""
    model = enable_cache(make(Named), ALWAYS, **EAGER)
    call_named(model, [("cond", TEXTS[0])], timesteps=[500.0] * 4, step_index=lambda number: number)
    call_named(model, [("cond", TEXTS[0])], timesteps=[500.0] * 3, step_index=lambda number: number)
    assert pattern(summary(model)[0]) == "crr"


@pytest.mark.keep_compiled
def test_shapes_that_change_compute_and_start_no_generation(shared):
    model = enable_cache(make(), ALWAYS, **EAGER)
    denoise(model, timesteps=FALLING[:4])
    denoise(model, timesteps=FALLING[4:], start=noise(tokens=7))
    assert pattern(summary(model)[0]) == "crrrcrrrrr"
    denoise(model, timesteps=FALLING[8:], start=noise(batch=2, tokens=7))
    assert pattern(summary(model)[0]) == "cr"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, _ = fresh(shared, BASE, start=noise(batch=2, tokens=7))
        enable_cache(model, BASE, **EAGER)
        assert torch.equal(denoise(model, start=noise(batch=2, tokens=7)), expected)
