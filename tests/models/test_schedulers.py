"""Second-order schedulers, generations of few steps, and guidance in its three forms."""

import copy
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler
from diffusers.models.cache_utils import CacheMixin
from lib.toys import FALLING, Toy, denoise, make, noise
from lib.wrapped import enabled

from cachedit_fx import DBCacheConfig, Reason, refresh_context, summary
from cachedit_fx.shapes import generate

pytestmark = [pytest.mark.keep_compiled, pytest.mark.filterwarnings("ignore:.*inert threshold")]
PROMPTS = ["a small red circle on navy", "a large blue square on white"]
EAGER = DBCacheConfig(1, max_warmup_steps=0, residual_diff_threshold=1e9)
"""Reuses whatever is stored: what a generation should not have shows at once."""
NEVER = EAGER.reset(residual_diff_threshold=0)


def use(pipes, scheduler):
    for pipe in (pipes.compiled, pipes.plain):
        pipe.scheduler = copy.deepcopy(scheduler)


def decided(pipe):
    (region,) = summary(pipe)
    assert region.uncached_calls == 0
    return [{step: decision.reason for step, decision in branch.decisions.items()} for branch in region.branches]


# ---------------------------------------------------------------------------------------------------------------------
# second order


class Heun(FlowMatchHeunDiscreteScheduler):
    """Takes, and ignores, what `FluxPipeline` hands to every scheduler."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        super().set_timesteps(len(sigmas), device)


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["one branch", "true CFG"])
def test_heun_with_named_branches_needs_no_setting(bundled, scale):
    """A name that is seen again is a step of its own, at the same timestep too. Seven calls are four timesteps."""
    pipe, plain = bundled.compiled, bundled.plain
    use(bundled, Heun(num_train_timesteps=1000, shift=1.0))
    enabled(pipe, NEVER)
    assert torch.equal(
        generate(pipe, PROMPTS, 4, true_cfg_scale=scale), generate(plain, PROMPTS, 4, true_cfg_scale=scale)
    )
    enabled(pipe, EAGER.reset(max_continuous_cached_steps=1))
    first = generate(pipe, PROMPTS, 4, true_cfg_scale=scale)
    found = decided(pipe)
    assert [len(branch) for branch in found] == [7] * (1 if scale == 1.0 else 2)
    assert all(list(branch.values()).count(Reason.BELOW_THRESHOLD) == 3 for branch in found)
    assert torch.equal(generate(pipe, PROMPTS, 4, true_cfg_scale=scale), first) and decided(pipe) == found


HEUN_TIMES = [FALLING[0], *(time for time in FALLING[1:] for _ in range(2))]


@pytest.mark.parametrize("separate", [None, False], ids=["found", "told"])
def test_heun_without_names(separate):
    """Unless told, two evaluations of a timestep are two branches: each reuses its own, and generations keep apart."""
    policy = DBCacheConfig(1, max_warmup_steps=2, residual_diff_threshold=0.1, enable_separate_cfg=separate)
    model = enabled(make(), policy)
    first = denoise(model, HEUN_TIMES)
    found = decided(model)
    assert [len(branch) for branch in found] == ([10, 9] if separate is None else [19])
    assert Reason.BELOW_THRESHOLD in found[0].values()
    assert torch.equal(denoise(model, HEUN_TIMES), first) and decided(model) == found
    refresh_context(model, cache_config=policy.reset(residual_diff_threshold=0))
    assert torch.equal(denoise(model, HEUN_TIMES), denoise(model._call_impl, HEUN_TIMES))


# ---------------------------------------------------------------------------------------------------------------------
# few steps


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["one branch", "true CFG"])
def test_generations_of_two_and_four_steps(bundled, scale):
    pipe, plain = bundled.compiled, bundled.plain
    enabled(pipe, NEVER)
    for number, count in enumerate((4, 2, 4, 2)):
        expected = generate(plain, PROMPTS, count, seed=number, true_cfg_scale=scale)
        assert torch.equal(generate(pipe, PROMPTS, count, seed=number, true_cfg_scale=scale), expected)
    enabled(pipe, EAGER)
    seen: dict[Any, torch.Tensor] = {}
    for seed, count in ((0, 4), (1, 2), (0, 2), (1, 4), (0, 4), (1, 2)):
        found = generate(pipe, PROMPTS, count, seed=seed, true_cfg_scale=scale)
        assert torch.equal(seen.setdefault((seed, count), found), found)
        wanted = {0: Reason.NOTHING_STORED} | dict.fromkeys(range(1, count), Reason.BELOW_THRESHOLD)
        assert decided(pipe) == [wanted] * (1 if scale == 1.0 else 2)


@pytest.mark.parametrize("told", [False, True], ids=["found", "told"])
def test_generations_of_one_step(bundled, told):
    """They all stand at one timestep. What one stored is nothing to the next, which starts from other noise."""
    pipe, plain = bundled.compiled, bundled.plain
    enabled(pipe, EAGER.reset(num_inference_steps=1 if told else None))
    for seed in range(5):
        assert torch.equal(generate(pipe, PROMPTS, 1, seed=seed), generate(plain, PROMPTS, 1, seed=seed)), seed
        assert decided(pipe) == [{0: Reason.NOTHING_STORED}]


def test_a_consistency_scheduler(bundled):
    """It adds noise between its steps."""
    pipe, plain = bundled.compiled, bundled.plain
    use(bundled, FlowMatchLCMScheduler(num_train_timesteps=1000, shift=1.0))

    def picture(pipe):
        torch.manual_seed(5)
        return generate(pipe, PROMPTS, 4)

    enabled(pipe, NEVER)
    assert torch.equal(picture(pipe), picture(plain))
    enabled(pipe, EAGER.reset(max_continuous_cached_steps=1))
    first = picture(pipe)
    assert torch.equal(picture(pipe), first) and not torch.equal(first, picture(plain))
    assert [step for step, reason in decided(pipe)[0].items() if reason is Reason.BELOW_THRESHOLD] == [1, 3]


# ---------------------------------------------------------------------------------------------------------------------
# guidance

TEXTS = noise(1, 3, seed=2), noise(1, 3, seed=3)
MASK = "1011011010"
STATIC = DBCacheConfig(1, steps_computation_mask=tuple(map(int, MASK)), steps_computation_policy="static")
CACHED = [step for step, digit in enumerate(MASK) if digit == "0"]


class Named(Toy, CacheMixin):
    """A toy with diffusers' `cache_context`."""


def two_calls(model):
    return denoise(model, texts=TEXTS)


def named_calls(model):
    """The context is closed before the other branch's is opened, as pipelines do."""
    module = getattr(model, "__self__", model)  # `_call_impl` is the plain one's call

    def named(name, *inputs):
        with module.cache_context(name):
            return model(*inputs)

    hidden = noise()
    with torch.no_grad():
        for time in FALLING:
            cond, uncond = (
                named(name, hidden, torch.tensor([time]), text)
                for name, text in zip(("cond", "uncond"), TEXTS, strict=True)
            )
            hidden = hidden - 0.05 * (cond + (cond - uncond))
    return hidden


def one_batch(model):
    """Both halves in one call, with a timestep for each."""
    hidden = noise()
    with torch.no_grad():
        for time in FALLING:
            both = model(torch.cat([hidden, hidden]), torch.full((2,), time), torch.cat(TEXTS))
            cond, uncond = both.chunk(2)
            hidden = hidden - 0.05 * (cond + (cond - uncond))
    return hidden


@pytest.mark.parametrize(("guided", "branches"), [(two_calls, 2), (named_calls, 2), (one_batch, 1)])
def test_guidance(guided, branches):
    """Exact where all is computed; under one mask the three forms reuse the same steps and come to the same result."""
    model = enabled(make(Named), STATIC.reset(steps_computation_mask="1" * len(FALLING)))
    assert torch.equal(guided(model), guided(model._call_impl))
    assert [len(branch) for branch in decided(model)] == [10] * branches
    refresh_context(model, cache_config=STATIC)
    found = guided(model)
    (region,) = summary(model)
    assert [branch.cached_steps for branch in region.branches] == [CACHED] * branches
    assert region.work == pytest.approx(1 - len(CACHED) * 5 / (10 * 6))
    assert torch.equal(guided(model), found)
    expected = two_calls(enabled(make(Named), STATIC))
    assert torch.equal(found, expected) if branches == 2 else torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, guided(model._call_impl), atol=1e-5)
