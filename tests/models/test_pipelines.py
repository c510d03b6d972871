"""The bundled model behind a real `FluxPipeline`: what a user does first."""

import copy

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from lib.wrapped import enabled, small_pipeline

import cachedit_fx
from cachedit_fx import DBCacheConfig, Reason, disable_cache, refresh_context, summary
from cachedit_fx.metrics.flops import FlopCounter
from cachedit_fx.shapes import generate

pytestmark = [pytest.mark.keep_compiled, pytest.mark.filterwarnings("ignore:.*inert threshold")]
STEPS = 6
PROMPTS = ["a small red circle on navy", "a large blue square on white"]
# Every other step from the third on, whatever the bundled weights of the day measure.
BASE = DBCacheConfig(1, max_warmup_steps=2, residual_diff_threshold=1e9, max_continuous_cached_steps=1)
ALL_ONES = BASE.reset(steps_computation_mask="1" * STEPS, steps_computation_policy="static")


def picture(pipe, prompts=PROMPTS[:1], scale=1.0, seed=0, steps=STEPS):
    return generate(pipe, prompts, num_inference_steps=steps, true_cfg_scale=scale, seed=seed)


class Heun(FlowMatchHeunDiscreteScheduler):
    """Takes, and ignores, what `FluxPipeline` hands to every scheduler."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        super().set_timesteps(STEPS, device)


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["one branch", "true CFG"])
def test_everything_computed_is_the_plain_pipeline_to_the_bit(bundled, scale):
    bundled.use(ALL_ONES)
    assert torch.equal(picture(bundled.compiled, PROMPTS, scale), picture(bundled.plain, PROMPTS, scale))
    (region,) = summary(bundled.compiled)
    assert (region.num_blocks, region.executed_steps, region.cached_steps) == (18, STEPS, [])
    assert len(region.branches) == (1 if scale == 1.0 else 2)


def test_a_cached_picture_takes_less_work_and_is_nearly_the_same(bundled):
    bundled.use(BASE)
    with FlopCounter() as full:
        expected = picture(bundled.plain)
    with FlopCounter() as less:
        found = picture(bundled.compiled)
    (region,) = summary(bundled.compiled)
    assert region.cached_steps == [2, 4] and region.uncached_calls == 0
    assert list(region.residual_diffs) == [2, 4] and all(0 < d < 5 for d in region.residual_diffs.values())
    assert region.work - 0.05 < less.flops / full.flops < region.work + 0.05
    assert 0 < (found - expected).abs().mean() < 0.05


def test_guided_pictures_cache_both_branches_by_name(bundled):
    """The pipeline names its branches; the second generation repeats the first to the bit."""
    bundled.use(BASE)
    pipe = bundled.compiled
    first = picture(pipe, scale=3.0)
    (region,) = summary(pipe)
    decided = [branch.decisions for branch in region.branches]
    assert [branch.executed_steps for branch in region.branches] == [STEPS, STEPS]
    assert region.cached_steps and region.cfg_cached_steps
    assert torch.equal(picture(pipe, scale=3.0), first)
    assert [branch.decisions for branch in summary(pipe)[0].branches] == decided


def test_generations_of_another_length_seed_and_batch_do_not_meet(bundled):
    bundled.use(BASE)
    pipe = bundled.compiled
    wanted = [(PROMPTS[:1], 0, 6), (PROMPTS[1:], 1, 4), (PROMPTS, 2, 6)]
    apart = []
    for prompts, seed, steps in wanted:
        refresh_context(pipe)
        apart.append(picture(pipe, prompts, seed=seed, steps=steps))
    for expected, (prompts, seed, steps) in zip(apart, wanted, strict=True):
        assert torch.equal(picture(pipe, prompts, seed=seed, steps=steps), expected)
        assert summary(pipe)[0].executed_steps == steps


def test_a_second_order_scheduler_evaluates_timesteps_twice(bundled):
    """To the tracker its two evaluations look like two branches, unless told that every call is a step."""
    pipe, plain = bundled.compiled, bundled.plain
    for one in (pipe, plain):
        one.scheduler = Heun(num_train_timesteps=1000, shift=1.0)
    calls = 2 * STEPS - 1
    computed = BASE.reset(enable_separate_cfg=False, steps_computation_mask="1" * calls)
    bundled.use(computed.reset(steps_computation_policy="static"))
    assert torch.equal(picture(pipe), picture(plain))
    (region,) = summary(pipe)
    assert len(region.branches) == 1 and region.executed_steps == calls
    bundled.use(BASE.reset(enable_separate_cfg=False))
    found = picture(pipe)
    (region,) = summary(pipe)
    assert len(region.branches) == 1 and region.executed_steps == calls and region.cached_steps
    assert torch.equal(picture(pipe), found)


# ---------------------------------------------------------------------------------------------------------------------
# what compiles anew: a pipeline of four blocks


def test_a_bfloat16_pipeline():
    pipe = small_pipeline().to(torch.bfloat16)
    plain = copy.deepcopy(pipe)
    expected = picture(plain)
    enabled(pipe, ALL_ONES)
    assert torch.equal(picture(pipe), expected)
    enabled(pipe, BASE)
    picture(pipe)
    assert Reason.BELOW_THRESHOLD in summary(pipe)[0].reasons.values()


def test_disabled_the_pipeline_is_plain_again():
    pipe = small_pipeline()
    expected = picture(pipe)
    enabled(pipe, BASE)
    cached = picture(pipe)
    disable_cache(pipe)
    assert torch.equal(picture(pipe), expected) and not torch.equal(cached, expected)
    assert summary(pipe) == []


def test_past_the_guards_pictures_and_decisions_are_the_same():
    """With and without guidance by turns, in a real pipeline, which names its branches."""
    found = {}
    for guards in ("always", "generation"):
        pipe = enabled(small_pipeline(), BASE, guards=guards)
        call = pipe.transformer._compiled_call_impl
        passed: list[int] = []
        inner = call.compiled

        def counted(*args, passed=passed, inner=inner, **kwargs):
            passed.append(1)
            return inner(*args, **kwargs)

        call.compiled = counted
        pictures, decisions, guarded = [], [], []
        for scale in (1.0, 3.0, 1.0):
            passed.clear()
            pictures.append(picture(pipe, scale=scale))
            decisions.append([branch.decisions for region in summary(pipe) for branch in region.branches])
            guarded.append(len(passed))
        found[guards] = pictures, decisions, guarded
    (expected, wanted, every), (pictures, decisions, some) = found.values()
    assert all(torch.equal(a, b) for a, b in zip(pictures, expected, strict=True)) and decisions == wanted
    assert every == [STEPS, 2 * STEPS, STEPS]
    assert some[1:] == [2, 2], "the two branches look alike: their prompts are of one length"


def test_a_preset_alone_takes_steps_and_guidance_from_the_pipeline():
    pipe = cachedit_fx.enable_cache(small_pipeline(), preset="fast", inner_backend="eager")
    masks = []
    for scale in (1.0, 3.0):
        picture(pipe, scale=scale, steps=12)
        (region,) = summary(pipe)
        wanted = cachedit_fx.presets(12, guidance=scale)["fast"]["cache_config"].steps_computation_mask
        for branch in region.branches:
            assert [int(decision.action.value == "compute") for decision in branch.decisions.values()] == list(wanted)
        assert len(region.branches) == (1 if scale == 1.0 else 2)
        masks.append(wanted)
    assert masks[0] != masks[1]
