"""What pipelines hand to a transformer besides the sample: ControlNet residuals, image prompts, timesteps."""

from typing import Any

import pytest
import torch
from lib import models
from lib.marks import only_in
from lib.toys import FALLING, denoise, make, noise
from lib.wrapped import (
    COMPUTES,
    REUSES,
    SKIPS,
    TIMES,
    call,
    check,
    check_next_generation,
    enabled,
    generation,
    plain,
    steps,
)

from cachedit_fx import refresh_context, summary

TOKENS, WIDTH = 16, 16  # of the tiny Flux


def residuals(count: int, *shape: int) -> list[torch.Tensor]:
    return [torch.randn(*shape) for _ in range(count)]


def differs(model, inputs, without) -> torch.Tensor:
    """The inputs are exact, and do something."""
    found = check(model, inputs)
    assert not torch.equal(found, plain(model, without))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# ControlNet


CONTROLNETS: list[tuple[int, int, dict[str, bool]]] = [
    (3, 0, {}),
    (0, 3, {}),
    (2, 2, {}),
    (2, 0, {"controlnet_blocks_repeat": True}),
]


@pytest.mark.parametrize(
    ("double", "single", "more"),
    only_in("wrappings", CONTROLNETS, but=CONTROLNETS[2:]),
    ids=["double", "single", "fewer than blocks", "repeated"],
)
def test_controlnet_residuals_of_flux(double, single, more):
    model, inputs = models.flux(double=3, single=3)
    extra: dict[str, Any] = dict(more)
    if double:
        extra["controlnet_block_samples"] = residuals(double, 1, TOKENS, WIDTH)
    if single:
        extra["controlnet_single_block_samples"] = residuals(single, 1, TOKENS, WIDTH)
    differs(model, inputs | extra, inputs)
    (region,) = summary(model)
    assert region.num_blocks == 6, "not the whole chain"


def test_controlnet_residuals_of_sd3():
    model, inputs = models.sd3(3)
    differs(model, inputs | {"block_controlnet_hidden_states": residuals(2, 1, TOKENS, WIDTH)}, inputs)


def test_control_changes_and_goes_from_generation_to_generation():
    model, inputs = models.flux(double=2, single=2)
    enabled(model, SKIPS)
    generation(model, inputs)
    for extra in (
        {"controlnet_block_samples": residuals(2, 1, TOKENS, WIDTH)},
        {"controlnet_block_samples": residuals(2, 1, TOKENS, WIDTH)},
        {},
    ):
        check_next_generation(model, inputs | extra)


# ---------------------------------------------------------------------------------------------------------------------
# image prompts


def ip_adapter(blocks: int, clip: int = 6, cross: int = 12) -> dict[str, Any]:
    """An adapter as its file holds it: a projection of the image's embedding to four tokens, and a pair of keys and
    values for each double block."""
    projection = {"proj.weight": torch.randn(4 * cross, clip), "proj.bias": torch.randn(4 * cross)}
    projection |= {"norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross)}
    attention: dict[str, Any] = {}
    for block in range(blocks):
        for name in ("to_k_ip", "to_v_ip"):
            attention |= {
                f"{block}.{name}.weight": torch.randn(WIDTH, cross),
                f"{block}.{name}.bias": torch.randn(WIDTH),
            }
    return {"image_proj": projection, "ip_adapter": attention}


@pytest.mark.parametrize("loaded", only_in("wrappings", ["before", "after"], but=["after"]))
def test_an_ip_adapter_of_flux(loaded):
    """Its processors hand three values from block to block where two went before."""
    model, inputs = models.flux(double=2, single=2)
    without = plain(model, inputs)
    if loaded == "after":
        enabled(model)
        call(model, inputs)
    load: Any = model._load_ip_adapter_weights
    load(ip_adapter(2))
    found = []
    for _ in range(2):
        image = {"ip_adapter_image_embeds": [torch.randn(1, 1, 6)]}
        found.append(check(model, inputs | {"joint_attention_kwargs": image}))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], without)


# ---------------------------------------------------------------------------------------------------------------------
# timesteps


def as_is(timestep: float) -> float:
    return timestep


@pytest.mark.parametrize(
    ("by_name", "branches"),
    only_in("wrappings", [(True, 1), (True, 2), (False, 1), (False, 2)], but=[(True, 2), (False, 1)]),
)
def test_a_number_as_timestep(by_name, branches):
    """The first graph has it as a constant, the later ones as an input; a generation of other times follows."""
    texts = [noise(1, 3, seed=2), noise(1, 3, seed=3)][:branches]

    def run(model, times, convert):
        def by_keyword(hidden, timestep, text):
            return model(hidden_states=hidden, timestep=timestep, encoder_hidden_states=text)

        return denoise(by_keyword if by_name else model, times, texts, convert=convert)

    policy = REUSES.reset(enable_separate_cfg=None, max_warmup_steps=2)
    number, tensor = (enabled(make(), policy) for _ in range(2))
    for times in (FALLING, FALLING, [time - 50 for time in FALLING[:6]]):
        times = [float(int(time)) for time in times]
        assert torch.equal(run(number, times, as_is), run(tensor, times, lambda time: torch.tensor([time])))
        (found,), (expected,) = summary(number), summary(tensor)
        assert [branch.decisions for branch in found.branches] == [branch.decisions for branch in expected.branches]
        assert found.executed_steps == len(times) and found.cached_steps and found.uncached_calls == 0


def wan(batch: int = 1):
    """With a timestep for each of the 2 x 4 x 4 tokens, as text-and-image-to-video models take it."""
    model, inputs = models.wan(num_layers=3)
    inputs["hidden_states"] = torch.randn(batch, 4, 2, 8, 8)
    inputs["encoder_hidden_states"] = torch.randn(batch, 6, 16)
    return model, inputs | {"timestep": torch.full((batch, 32), 500.0)}


def test_a_timestep_for_each_token():
    model, inputs = wan()
    check(model, inputs)
    enabled(model, SKIPS.reset(enable_separate_cfg=None))
    generation(model, inputs)
    check_next_generation(model, inputs)


def test_the_tokens_of_a_given_first_frame_have_timestep_0():
    """The others tell the step; two calls a step are two branches."""
    model, inputs = wan()
    policy = SKIPS.reset(enable_separate_cfg=None)
    enabled(model, policy)

    def denoised(model):
        hidden = inputs["hidden_states"]
        for time in TIMES:
            timestep = torch.full((1, 32), 1000 * time)
            timestep[:, :16] = 0
            now = inputs | {"hidden_states": hidden, "timestep": timestep}
            cond = call(model, now)
            uncond = call(model, now | {"encoder_hidden_states": torch.zeros(1, 6, 16)})
            hidden = hidden - 0.1 * (uncond + 2 * (cond - uncond))
        return hidden

    first = denoised(model)
    assert torch.equal(denoised(model), first)
    (region,) = summary(model)
    assert [list(branch.decisions) for branch in region.branches] == [[0, 1, 2, 3, 4]] * 2
    assert region.cached_steps == region.cfg_cached_steps == [1, 3] and region.uncached_calls == 0
    refresh_context(model, cache_config=COMPUTES.reset(enable_separate_cfg=None))
    assert torch.equal(denoised(model), denoised(model._call_impl))


@pytest.mark.parametrize("kind", only_in("wrappings", ["flux", "wan"], but=["wan"]))
def test_a_timestep_of_equal_entries_for_a_batch_of_two(kind):
    model, inputs = models.flux(double=2, single=2, batch=2) if kind == "flux" else wan(2)
    if kind == "wan":
        inputs["timestep"] = torch.full((2,), 500.0)
    assert inputs["timestep"].shape == (2,)
    check(model, inputs)
    enabled(model, SKIPS.reset(enable_separate_cfg=None))
    generation(model, inputs)
    check_next_generation(model, inputs)
    single = {name: value[:1] if name in BATCHED else value for name, value in inputs.items()}
    check_next_generation(model, single)
    assert steps(model) == [(5, [1, 3], 0)]


BATCHED = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
