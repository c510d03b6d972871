"""Puts a model in int8 through the cache: quantized in place, and by step."""

from __future__ import annotations

import torch

from cachedit_fx.bench.coverage_steps import FIRST, LATER, NEVER, Make, at_timestep, equal, tensors
from cachedit_fx.bench.coverage_subject import Subject
from cachedit_fx.config.precision import PrecisionConfig
from cachedit_fx.config.rules import OptionError
from cachedit_fx.quantization.apply import quantize

INT8 = (
    "the blocks' layers in dynamic int8: the same blocks are found, and threshold 0 equals the same quantized model "
    "uncached, bit for bit; with int8 by step, a step in full precision equals the plain module, bit for bit, and the "
    "next one does not"
)
"""What the column means."""


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
    by_step, in_place = Subject(whole), Subject(quantized)
    by_step.compile(NEVER, verify=None, precision=PrecisionConfig("int8", full_steps_mask=(1, 0)))
    full, low = map(by_step, steps)
    low_steps = [stats.low_steps for stats in by_step.summary()]
    in_place.compile(NEVER, verify=None)
    results = list(map(in_place, steps))
    claims = {
        "the chain has other blocks": in_place.chain == by_step.chain,
        "threshold 0 differs from the uncached model": all(map(equal, results, plain)),
        "by step, full precision differs from the plain module": equal(full, first),
        "by step, nothing ran in int8": [1] in low_steps and not equal(low, later),
    }
    return [words for words, holds in claims.items() if not holds]
