"""The ladder: what is left of the eager model's time with a cache, compiled, quantized, and with faster attention.

    eager ──► cache ──► cache + compile ──► + int8 ──► + attention

`examples/gpu_check.py --only ladder` runs a rung a part, on the model of `flux_steps`. With the cache every other step
is reused, by its static mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

import cachedit_fx
from cachedit_fx.bench.flux_steps import Found, Steps, built
from cachedit_fx.bench.kernels_numerics import Check
from cachedit_fx.report.tables import Table

COMPUTED, CACHED = ", computed", ", cached"
"""What a rung's name ends in, for its kinds of steps."""


@dataclass(frozen=True)
class Rung:
    """A way to run the model.

    Attributes:
        title: its name in the table.
        inner_backend: of the pieces; None takes the one that is asked for.
        has_cache: whether every other step is reused.
        quant_type: kind of the blocks' linear layers.
        attention: back end of attention on a GPU. A CPU keeps `scaled_dot_product_attention`.
    """

    title: str
    inner_backend: str | None = "eager"
    has_cache: bool = True
    quant_type: str | None = None
    attention: str | None = None


RUNGS = {
    "eager": Rung("eager", has_cache=False),
    "cache": Rung("cache"),
    "compile": Rung("cache + compile", None),
    "int8": Rung("cache + compile + int8", None, quant_type="int8"),
    "attention": Rung("cache + compile + int8 + attention", None, quant_type="int8", attention="int8"),
}
"""The rungs by name, from below."""


def climb(device: torch.device, steps: int, inner_backend: str, name: str) -> Found:
    """Time a generation on one rung.

    Args:
        device: of the model; tiny on a CPU.
        steps: of the generation, at least 4. The first two do not count.
        inner_backend: of the rungs that compile.
        name: a key of `RUNGS`.
    """
    rung = RUNGS[name]
    mask = ("10" * steps)[:steps] if rung.has_cache else "1" * steps
    backend = rung.inner_backend or inner_backend
    with built(device, steps, f"inner backend {inner_backend}") as model:
        if rung.quant_type is not None:
            cachedit_fx.quantize(model.module.requires_grad_(False), rung.quant_type)
        if rung.has_cache:
            cachedit_fx.compile(
                model.module,
                dynamic=False,
                inner_backend=backend,
                Fn_compute_blocks=1,
                steps_computation_mask=mask,
                steps_computation_policy="static",
                attention=None if device.type == "cpu" else rung.attention,
            )
        outputs = model.generation([rung.title + (COMPUTED if digit == "1" else CACHED) for digit in mask])
        first = model.close_to_eager(f"first output, {rung.title}, against eager", outputs[0])
        finite = Check(f"outputs, {rung.title}")
        finite.take("not a number", torch.stack([(~x.isfinite()).sum() for x in outputs]).double(), 0.5)
        return Found(model.about, tuple(model.times), (first, finite))


def is_rung(times: Steps) -> bool:
    """Whether the steps are those of a rung."""
    return times.kind.endswith((COMPUTED, CACHED)) and times.kind.rpartition(",")[0] in _titles()


def _titles() -> list[str]:
    return [rung.title for rung in RUNGS.values()]


def table(steps: Sequence[Steps], is_cpu: bool) -> Table:
    """A line for each rung that was timed: milliseconds of a step, and its mean over the eager step's."""
    if is_cpu:  # the highest rung is the one below, whose attention a CPU keeps
        lower, highest = _titles()[-2:]
        steps = [times for times in steps if not times.kind.startswith(highest)]
        steps += [replace(times, kind=times.kind.replace(lower, highest)) for times in steps if lower in times.kind]
    seconds = {times.kind: median(times.device) for times in steps}
    result = Table(("rung", "computed, ms", "reused, ms", "mean, ms", "of eager", "of the rung\nbelow"), texts=(0,))
    below: float | None = None
    eager = seconds.get(RUNGS["eager"].title + COMPUTED)
    for title in _titles():
        pair = [seconds[title + kind] for kind in (COMPUTED, CACHED) if title + kind in seconds]
        if pair:
            mean = sum(pair) / len(pair)
            cells = [f"{1e3 * value:.2f}" for value in pair] + [""] * (2 - len(pair))
            shares = [f"{mean / base:.2f}" if base else "" for base in (eager, below)]
            result.add(title, *cells, f"{1e3 * mean:.2f}", *shares)
        below = mean if pair else None
    return result
