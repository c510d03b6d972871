"""Puts a model in int8 through the cache: quantized in place, and by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cachedit_fx import api
from cachedit_fx.bench.coverage_counts import Make
from cachedit_fx.bench.coverage_steps import FIRST, LATER, at_timestep, equal, tensors
from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.config.precision import PrecisionConfig
from cachedit_fx.config.rules import OptionError
from cachedit_fx.passes.base import Facts
from cachedit_fx.passes.block_loops import Detection
from cachedit_fx.quantization.apply import quantize
from cachedit_fx.runtime.registry import state_of_module

INT8 = (
    "the blocks' layers in dynamic int8: the same blocks are found, and threshold 0 equals the same quantized model "
    "uncached, bit for bit; with int8 by step, a step in full precision equals the plain module, bit for bit, and the "
    "next one does not"
)
"""What the column means."""
NEVER = DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0, enable_separate_cfg=False)


@torch.no_grad()
def check_quantized(make: Make) -> tuple[bool | None, str]:
    """Whether a model in int8 is cached as the unquantized one is, and why not.

    Args:
        make: gives a module in eval mode and its inputs, anew at each call.

    Returns:
        True and no words; False, or None if it could not be tried, and words.
    """
    try:
        failures = _failures(make)
    except (ImportError, OptionError) as error:
        return None, str(error)
    except Exception as error:  # whatever a model raises is told in the table
        return False, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    finally:
        torch.compiler.reset()
    return not failures, "; ".join(failures)


def _failures(make: Make) -> list[str]:
    """What does not hold of the model quantized in place, and of the one whose second step runs in int8."""
    whole, inputs = make()
    quantized, _ = make()
    quantize(quantized, "int8")
    steps = [at_timestep(inputs(1), scale) for scale in (FIRST, LATER)]
    first, later = (tensors(whole(**step)) for step in steps)
    plain = [tensors(quantized(**step)) for step in steps]
    by_step = _Run(whole, steps, precision=PrecisionConfig("int8", full_steps_mask=(1, 0)))
    in_place = _Run(quantized, steps)
    claims = {
        "the chain has other blocks": in_place.chain == by_step.chain,
        "threshold 0 differs from the uncached model": all(map(equal, in_place.results, plain)),
        "by step, full precision differs from the plain module": equal(by_step.results[0], first),
        "by step, nothing ran in int8": [1] in by_step.low_steps and not equal(by_step.results[1], later),
    }
    return [words for words, holds in claims.items() if not holds]


class _Run:
    """Two steps of a compiled module: its chain, the steps in low precision by region, and what it returns.

    Args:
        steps: arguments of each call.
        options: of `cachedit_fx.compile`.
    """

    def __init__(self, module: nn.Module, steps: Sequence[Mapping[str, Any]], **options: Any) -> None:
        self.chain: dict[str, int] = {}
        api.compile(module, inner_backend="eager", cache=NEVER, **options)
        state = state_of_module(module)
        assert state is not None
        state.observe = self._note
        self.results = [tensors(module(**step)) for step in steps]
        self.low_steps = [stats.low_steps for stats in api.summary(module)]

    def _note(self, facts: Facts) -> None:
        detection = facts.get(Detection)
        if detection is not None:
            self.chain |= {loop.name: loop.num_blocks for loop in detection.chain_loops}
