"""What the tests of wrappings ask of every model, however it is wrapped: exact where all is computed; and where reuse
is allowed, identical inputs give the identical output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lib.toys import Toy, make, noise
from torch import Tensor, nn

from cachedit_fx import DBCacheConfig, enable_cache, refresh_context, summary

Inputs = dict[str, Any]

REUSES = DBCacheConfig(1, max_warmup_steps=1, residual_diff_threshold=0.1, enable_separate_cfg=False)
"""Every call is a step; the second of identical ones reuses."""
NEVER = REUSES.reset(residual_diff_threshold=0)
TIMES = (0.9, 0.8, 0.6, 0.4, 0.2)
COMPUTES = REUSES.reset(steps_computation_mask="1" * len(TIMES), steps_computation_policy="static")
SKIPS = COMPUTES.reset(steps_computation_mask="00101")
"""A generation of `TIMES`: its second and fourth step reuse, whatever they measure; and its first, if it found anything
left of another generation."""


class InTuple(Toy):
    """Returns a tuple, as diffusers' models do."""

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        return (super().forward(hidden_states, timestep, encoder_hidden_states),)


def toy_inputs(width: int = 8) -> Inputs:
    return {
        "hidden_states": noise(width=width),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 3, width, seed=2),
    }


def toy(kind: Callable[..., nn.Module] = InTuple, blocks: int = 4) -> tuple[Any, Inputs]:
    """A model and its inputs: captured in a fifth of the time that a class of diffusers takes."""
    return make(kind, blocks=blocks), toy_inputs()


def enabled(model: Any, config: DBCacheConfig = REUSES, **options: Any) -> Any:
    return enable_cache(model, config, **{"inner_backend": "eager"} | options)


def call(model: Callable[..., Any], inputs: Inputs) -> Tensor:
    """The model's only result, without gradients."""
    with torch.no_grad():
        return model(**inputs)[0]


def plain(model: nn.Module, inputs: Inputs) -> Tensor:
    """What the module gives uncompiled, hooks and all."""
    return call(model._call_impl, inputs)


def steps(model: Any) -> list[tuple[int, list[int], int]]:
    """Steps, cached ones and uncached calls, by region."""
    return [(region.executed_steps, region.cached_steps, region.uncached_calls) for region in summary(model)]


def check(model: nn.Module, inputs: Inputs, run: Callable[[Any, Inputs], Tensor] = call, **options: Any) -> Tensor:
    """Threshold 0 and a mask of ones give the plain module's output to the bit; so does reuse on identical inputs.
    Returns that output."""
    expected = plain(model, inputs) if run is call else run(model._call_impl, inputs)
    for config, cached in ((NEVER, []), (COMPUTES, []), (REUSES, [1, 2])):
        enabled(model, config, **options)
        for _ in range(3):
            assert torch.equal(run(model, inputs), expected)
        assert steps(model) == [(3, cached, 0)]
    return expected


def generation(model: Callable[..., Any], inputs: Inputs, times: Sequence[float] = TIMES) -> Tensor:
    """Euler steps from `inputs`, which may hold a timestep of any shape."""
    hidden = inputs["hidden_states"]
    for time in times:
        now = {"hidden_states": hidden, "timestep": torch.full_like(inputs["timestep"], time)}
        hidden = hidden - 0.1 * call(model, inputs | now)
    return hidden


def check_next_generation(model: nn.Module, inputs: Inputs) -> Tensor:
    """A generation under `SKIPS`, which nobody announces: it has nothing of what ran before, and where all is computed
    it is the plain module's to the bit. Returns it, and leaves the model under `SKIPS` with a generation behind it."""
    found = generation(model, inputs)
    assert steps(model) == [(len(TIMES), [1, 3], 0)]
    refresh_context(model)
    assert torch.equal(generation(model, inputs), found)
    refresh_context(model, cache_config=COMPUTES)
    assert torch.equal(generation(model, inputs), generation(model._call_impl, inputs))
    refresh_context(model, cache_config=SKIPS)
    assert torch.equal(generation(model, inputs), found)
    return found


def small_pipeline() -> Any:
    """The bundled pipeline with two blocks of each kind, and weights drawn anew, the same each time."""
    from cachedit_fx.shapes.pipeline import TRANSFORMER_CONFIG, build_models, make_pipeline

    torch.manual_seed(0)
    return make_pipeline(*build_models(TRANSFORMER_CONFIG | {"num_layers": 2, "num_single_layers": 2}))
