"""Times steps with and without code motion: a FLUX in bfloat16 with random weights, one thread, by turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

import cachedit_fx
from cachedit_fx.bench.flux import Size, inputs_in, make
from cachedit_fx.bench.progress import Tell, silent
from cachedit_fx.report.tables import Table

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Timing:
    """CPU seconds of steps over those without the pass: medians of pairs.

    Attributes:
        computed, cached: with the pass: a computed step, and a cached step that computes the first block.
        computed_by_hand, cached_by_hand: without the pass, of a model whose modulations are constants: the least that
            code motion can take.
        whole: a computed step with the pass over the model under plain `torch.compile`.
        rounds: pairs.
    """

    tokens: int
    computed: float
    computed_by_hand: float
    cached: float
    cached_by_hand: float
    whole: float
    rounds: int


MOVED, PLAIN, BY_HAND, WHOLE = "moved", "plain", "by hand", "whole"
COMPUTED, CACHED = 0, 1
WARMUP = 3
"""Pairs before those that count. After two of them all hoisted values are kept."""
FEW, LONG = 5, 300.0
"""No pair begins after so many pairs that count and so many seconds."""


class _Constant(nn.Module):
    """Stands for a module, with one result."""

    def __init__(self, result: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("result", result)

    def forward(self, *_: Any) -> Any:
        return self.result


def with_constants(module: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    """A copy of a FLUX whose embedding of the timestep and whose modulations are those of this call."""
    copied = copy.deepcopy(module)
    results: dict[str, torch.Tensor] = {}
    handles = [
        part.register_forward_hook(lambda *values, name=name: results.update({name: values[-1]}))
        for name, part in copied.named_modules()
        if name == "time_text_embed" or ("norm" in name and name.endswith(".linear"))
    ]
    with torch.no_grad():
        copied(**arguments)
    for handle in handles:
        handle.remove()
    for name, result in results.items():
        copied.set_submodule(name, _Constant(result))
    return copied


def measure(size: Size, side: int, rounds: int, tell: Tell = silent) -> Timing:
    """Time steps of a random FLUX in bfloat16 with and without the pass, by hand and by `torch.compile`, by turns.

    Args:
        size: of the model.
        side: image tokens a side.
        rounds: the most pairs of each kind. There are fewer if they take long.
    """
    torch.set_num_threads(1)
    module, shape = make(size).to(DTYPE), size._replace(side=side)
    arguments = inputs_in(DTYPE, shape)
    models = {name: copy.deepcopy(module) for name in (MOVED, PLAIN, WHOLE)}
    models[BY_HAND] = with_constants(module, arguments)
    models[WHOLE].compile(dynamic=False)
    for name in (MOVED, PLAIN, BY_HAND):
        cachedit_fx.compile(
            models[name],
            dynamic=False,
            guards="generation",
            steps_computation_mask="10" * 500,
            steps_computation_policy="static",
            Fn_compute_blocks=1,
            passes={"hoist_invariants": name == MOVED},
        )
    seconds: dict[tuple[str, int], list[float]] = {}
    started = time.monotonic()
    with torch.no_grad():
        for step in range(2 * (rounds + WARMUP)):
            if step % 2 == 0 and step >= 2 * (WARMUP + FEW) and time.monotonic() - started > LONG:
                break
            tell(f"{side**2} image tokens, pair {step // 2 + 1} of {rounds + WARMUP}")
            kind = step % 2
            arguments["timestep"] = torch.tensor([1.0 - kind / 8])
            names = [MOVED, PLAIN, BY_HAND] + ([WHOLE] if kind == COMPUTED else [])
            for name in names if step % 4 < 2 else reversed(names):
                begun = time.process_time()
                models[name](**arguments)
                if step >= 2 * WARMUP:
                    seconds.setdefault((name, kind), []).append(time.process_time() - begun)

    def ratio(above: str, kind: int, below: str = PLAIN) -> float:
        return median(a / b for a, b in zip(seconds[above, kind], seconds[below, kind], strict=True))

    return Timing(
        side**2,
        ratio(MOVED, COMPUTED),
        ratio(BY_HAND, COMPUTED),
        ratio(MOVED, CACHED),
        ratio(BY_HAND, CACHED),
        ratio(MOVED, COMPUTED, WHOLE),
        len(seconds[MOVED, CACHED]),
    )


def time_table(rows: Sequence[Timing]) -> Table:
    """The times of steps, a line for each number of tokens."""
    table = Table(
        (
            "image\ntokens",
            "computed\nstep",
            "by hand",
            "cached\nstep",
            "cached,\nby hand",
            "computed, over\ntorch.compile",
            "pairs",
        )
    )
    for row in rows:
        ratios = (row.computed, row.computed_by_hand, row.cached, row.cached_by_hand, row.whole)
        table.add(str(row.tokens), *(f"{ratio:.2f}" for ratio in ratios), str(row.rounds))
    return table
