"""Where a generation begins and how it goes on, in real pipelines: each of their schedulers is a clock."""

import pytest
import torch
from diffusers.callbacks import SD3CFGCutoffCallback
from lib.families import FAMILIES, STEPS
from lib.marks import only_in

from cachedit_fx import DBCacheConfig, enable_cache, refresh_context, summary

pytestmark = [pytest.mark.keep_compiled, pytest.mark.filterwarnings("ignore:.*inert threshold")]
MASK = [1, 1, 0, 1, 0, 1]
STATIC = DBCacheConfig(1, steps_computation_mask=MASK, steps_computation_policy="static")
ALWAYS = DBCacheConfig(1, max_warmup_steps=0, residual_diff_threshold=1e9)
"""Reuses wherever anything is stored."""


class Cancelled(Exception):
    pass


def latents(family, pipe, seed=0, **changes):
    arguments = family.call | family.sizes[0] | {"num_inference_steps": STEPS} | changes
    generator = torch.Generator().manual_seed(seed)
    (result,) = pipe(**arguments, generator=generator, output_type="latent", return_dict=False)
    return result


def patterns(pipe):
    """For each region and branch a letter a step: c for computed, r for reused."""
    return [
        "".join(decision.action.value[0] for decision in branch.decisions.values())
        for region in summary(pipe)
        for branch in region.branches
    ]


@pytest.fixture(scope="module", params=only_in("families", ["SD3", "ZImage", "Lumina2"], but=["SD3"]))
def case(request):
    family = FAMILIES[request.param]
    return family, enable_cache(family.build(), STATIC, inner_backend="eager")


def test_a_generation_after_a_cancelled_one_is_as_new(case):
    family, pipe = case
    enable_cache(pipe, ALWAYS, inner_backend="eager")
    refresh_context(pipe)
    expected = latents(family, pipe, seed=1)
    decided = patterns(pipe)
    assert all(pattern == "c" + "r" * (STEPS - 1) for pattern in decided)

    def cancel(pipe, step, timestep, arguments):
        raise Cancelled

    with pytest.raises(Cancelled):
        latents(family, pipe, seed=2, callback_on_step_end=cancel)
    assert torch.equal(latents(family, pipe, seed=1), expected) and patterns(pipe) == decided
    latents(family, pipe, seed=3, num_inference_steps=1)
    assert torch.equal(latents(family, pipe, seed=1), expected) and patterns(pipe) == decided


def test_guidance_that_ends_midway_goes_on(case):
    family, pipe = case
    name = type(pipe).__name__
    enable_cache(pipe, STATIC, inner_backend="eager")
    if name == "StableDiffusion3Pipeline":
        ends = {"callback_on_step_end": SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2)}
    elif name == "ZImagePipeline":
        ends = {"cfg_truncation": 0.5}
    else:
        ends = {"cfg_trunc_ratio": 0.5}
    latents(family, pipe, **ends)
    (region,) = summary(pipe)
    assert region.executed_steps == STEPS and region.uncached_calls == 0
    reused = [step for step, digit in enumerate(MASK) if not digit]
    assert set(region.cached_steps) <= set(reused) and region.cached_steps
