"""Times steps of a quantized model: a FLUX with random weights, one thread, by turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

import cachedit_fx
from cachedit_fx.bench.flux import Size, inputs_in, make
from cachedit_fx.bench.progress import Tell, silent
from cachedit_fx.config.precision import PrecisionConfig
from cachedit_fx.quantization.apply import quantize
from cachedit_fx.report.tables import Table

EAGER, EAGER_CACHED, PLAIN, CACHED, LOW, BY_STEP = (
    "eager",
    "eager, cached",
    "torch.compile",
    "cached",
    "quantized",
    "by step",
)
"""The models. Cached ones reuse every other step. The last two are cached too."""
KINDS = 4
"""Steps come in fours: a computed one, a reused one, a computed one in low precision if the model has it, a reused one.
"""
WARMUP = 2
"""Fours before those that count."""
SIDE, TEXT = 16, 64
"""Image tokens a side, and text tokens."""
HEAD = 64


@dataclass(frozen=True)
class Timing:
    """CPU seconds of steps as ratios: medians of pairs.

    Attributes:
        computed, reused: of the quantized model over the unquantized one, both cached.
        low, full: steps of precision by step: in low precision over the quantized model's, and in full precision over
            the unquantized model's. The first F blocks are in full precision at both.
        half: computed and reused steps by turns of the quantized model, over plain `torch.compile` of the unquantized
            one.
        half_full: those of the unquantized cached model, over the same.
        rounds: pairs.
        ladder: model -> its steps, computed and reused ones by turns, over those of the eager model without a cache.
    """

    width: int
    dtype: str
    kind: str
    computed: float
    reused: float
    low: float
    full: float
    half: float
    half_full: float
    rounds: int
    ladder: Mapping[str, float] = field(default_factory=dict)


def measure(width: int, dtype: torch.dtype, kind: str, rounds: int, tell: Tell = silent) -> Timing:
    """Time steps of a random FLUX of 2 + 4 blocks with 320 tokens, quantized and not, by turns.

    Args:
        width: of the model, a multiple of 64.
        dtype: of the unquantized weights and of activations.
        kind: of quantization, as for `cachedit_fx.quantize`.
        rounds: fours of steps that count.
    """
    torch.set_num_threads(1)
    size = Size(2, 4, width=width, side=SIDE, head=HEAD, text=TEXT)
    module = make(size).to(dtype).requires_grad_(False)
    models = {name: copy.deepcopy(module) for name in (EAGER, EAGER_CACHED, PLAIN, CACHED, LOW, BY_STEP)}
    del module
    models[PLAIN].compile(dynamic=False)
    quantize(models[LOW], kind)
    steps = KINDS * (rounds + WARMUP)
    by_step = PrecisionConfig(kind, full_steps_mask=(1, 1, 0, 0) * (rounds + WARMUP))
    for name in (EAGER_CACHED, CACHED, LOW, BY_STEP):
        cachedit_fx.compile(
            models[name],
            dynamic=False,
            guards="generation",
            steps_computation_mask="10" * (steps // 2),
            steps_computation_policy="static",
            Fn_compute_blocks=1,
            precision=by_step if name == BY_STEP else None,
            inner_backend="eager" if name == EAGER_CACHED else "inductor",
        )
    seconds: dict[tuple[str, int], list[float]] = {}
    with torch.no_grad():
        for step in range(steps):
            if step % KINDS == 0:
                tell(f"width {width}, {kind}, round {step // KINDS + 1} of {rounds + WARMUP}")
            arguments = inputs_in(dtype, size, step)
            names = list(models) if step % 8 < KINDS else list(reversed(models))
            for name in names:
                begun = time.process_time()
                models[name](**arguments)
                if step >= KINDS * WARMUP:
                    seconds.setdefault((name, step % KINDS), []).append(time.process_time() - begun)

    def ratio(above: str, below: str, *places: int) -> float:
        columns = [[seconds[name, place] for place in places] for name in (above, below)]
        sums = [[sum(four) for four in zip(*column, strict=True)] for column in columns]
        return median(a / b for a, b in zip(*sums, strict=True))

    return Timing(
        width,
        str(dtype).removeprefix("torch."),
        kind,
        ratio(LOW, CACHED, 0, 2),
        ratio(LOW, CACHED, 1, 3),
        ratio(BY_STEP, LOW, 2),
        ratio(BY_STEP, CACHED, 0),
        ratio(LOW, PLAIN, 0, 1, 2, 3),
        ratio(CACHED, PLAIN, 0, 1, 2, 3),
        rounds,
        {name: ratio(name, EAGER, 0, 1, 2, 3) for name in (EAGER, EAGER_CACHED, PLAIN, CACHED, LOW)},
    )


def time_table(rows: Sequence[Timing]) -> Table:
    """The times of steps, a line for each model."""
    table = Table(
        (
            "width",
            "dtype",
            "kind",
            "computed",
            "reused",
            "low",
            "full",
            "half\nreused",
            "not\nquantized",
            "rounds",
        ),
        texts=(1, 2),
    )
    for row in rows:
        ratios = (row.computed, row.reused, row.low, row.full, row.half, row.half_full)
        table.add(str(row.width), row.dtype, row.kind, *(f"{ratio:.3f}" for ratio in ratios), str(row.rounds))
    return table


def ladder_table(rows: Sequence[Timing]) -> Table:
    """What each rung takes of the eager model's time, a line for each model."""
    headings = ("width", "dtype", "eager", "cache", "torch.compile", "cache + compile", "cache + compile\n+ quantized")
    table = Table(headings, texts=(1,))
    for row in rows:
        rungs = (EAGER, EAGER_CACHED, PLAIN, CACHED, LOW)
        table.add(str(row.width), row.dtype, *(f"{row.ladder[name]:.2f}" for name in rungs))
    return table
