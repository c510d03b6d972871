"""A FLUX of random weights, as large as FLUX.1 where the memory allows: is the cache right there, and what is a step.

    cached(...)      uncached, threshold 0 and a static mask, by `cachedit_fx.compile`, against the eager model
    compiled(...)    plain `torch.compile`, for its times

`examples/gpu_check.py` runs both on a GPU. There the clock is CUDA's: events between steps that are queued without
waiting. The seconds of the host, which are Python, are told apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

import cachedit_fx
from cachedit_fx.bench import flux
from cachedit_fx.bench.kernels_bandwidth import memory
from cachedit_fx.bench.kernels_numerics import Check
from cachedit_fx.report.tables import Table

EAGER, PLAIN, UNCACHED, ZERO, COMPUTED, CACHED = (
    "eager",
    "torch.compile",
    "ours, no cache",
    "ours, threshold 0",
    "ours, computed step",
    "ours, cached step",
)
"""The kinds of steps."""
ALLOWED = 0.05
"""Largest error of a compiled model's first output, as a share of the largest value."""


@dataclass(frozen=True)
class Steps:
    """The times of one kind of step, in seconds."""

    kind: str
    device: tuple[float, ...]
    """By the device's own clock. On a CPU by the wall clock."""
    host: tuple[float, ...]
    """Until the step was queued. On a CPU as above."""


@dataclass(frozen=True)
class Found:
    """What a run of the model gave.

    Attributes:
        about: the model, in words.
        steps: a time for each kind of step.
        checks: what was compared.
    """

    about: str
    steps: tuple[Steps, ...]
    checks: tuple[Check, ...]


def size_for(device: torch.device) -> flux.Size:
    """FLUX.1 where twice its weights fit, else as many of its blocks as do. Tiny on a CPU."""
    if device.type == "cpu":
        return flux.Size(1, 2, width=128, side=4)
    width, whole = 3072, 57
    of_block = 2 * (19 * 36 + 38 * 15) * width**2 / whole  # bytes in bfloat16, on average
    blocks = min(whole, int(memory(device) / 2 / of_block))
    return flux.size_of(max(3, blocks), width=width, side=64, text=512)


@dataclass
class _Model:
    """The module, its inputs at each step, and the times so far."""

    module: torch.nn.Module
    inputs: list[dict[str, torch.Tensor]]
    device: torch.device
    about: str
    times: list[Steps] = field(default_factory=list)

    @property
    def scale(self) -> torch.Tensor:
        return self.eager.double().abs().max()

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.eager: torch.Tensor = self.module(**self.inputs[0])[0].clone()

    def generation(self, kinds: Sequence[str]) -> list[torch.Tensor]:
        """The outputs of a generation, once to compile, and once with a clock on all steps but the first two."""
        with torch.no_grad():
            for arguments in self.inputs:
                self.module(**arguments)
            outputs, device, host = [], [], []
            marks = [_Mark(self.device)]
            for arguments in self.inputs:
                begun = time.perf_counter()
                outputs.append(self.module(**arguments)[0].clone())
                host.append(time.perf_counter() - begun)
                marks.append(_Mark(self.device))
        _wait(self.device)
        device = [before.seconds_to(after) for before, after in zip(marks, marks[1:], strict=False)]
        for kind in dict.fromkeys(kinds):
            which = [step for step in range(2, len(kinds)) if kinds[step] == kind]
            self.times.append(Steps(kind, *(tuple(times[step] for step in which) for times in (device, host))))
        return outputs

    def close_to_eager(self, name: str, output: torch.Tensor) -> Check:
        check = Check(name)
        error = (output - self.eager).double().abs()
        check.take(f"largest error, of {ALLOWED:.0%} of the largest value", error, ALLOWED * self.scale)
        return check


class _Mark:
    """A moment on the device's clock."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(device))
        self.wall = time.perf_counter()

    def seconds_to(self, later: _Mark) -> float:
        if self.event is None or later.event is None:
            return later.wall - self.wall
        return self.event.elapsed_time(later.event) / 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cached(device: torch.device, steps: int, inner_backend: str) -> Found:
    """Compile the model by `cachedit_fx.compile` in three ways in turn, and run a generation each."""
    options: dict[str, Any] = {"dynamic": False, "inner_backend": inner_backend}
    with built(device, steps, f"inner backend {inner_backend}") as model:
        zero, masked = Check("threshold 0 against no cache, to the bit"), Check("cached steps by a static mask")

        cachedit_fx.compile(model.module, cache=None, **options)
        uncached = model.generation([UNCACHED] * steps)
        first = model.close_to_eager("first output of ours against eager", uncached[0])

        cachedit_fx.compile(model.module, Fn_compute_blocks=1, residual_diff_threshold=0.0, **options)
        for step, (a, b) in enumerate(zip(uncached, model.generation([ZERO] * steps), strict=True)):
            zero.same(f"step {step}", b, a)

        mask = ("10" * steps)[:steps]
        static = {"steps_computation_mask": mask, "steps_computation_policy": "static"}
        cachedit_fx.compile(model.module, Fn_compute_blocks=1, **static, **options)
        outputs = model.generation([COMPUTED if digit == "1" else CACHED for digit in mask])
        (region,) = cachedit_fx.summary(model.module)
        masked.same("which steps are cached", torch.tensor(region.cached_steps), torch.arange(1, steps, 2))
        masked.take("not a number", torch.stack([(~x.isfinite()).sum() for x in outputs]).double(), 0.5)
        differs = torch.tensor([not torch.equal(a, b) for a, b in zip(outputs, uncached, strict=True)])
        masked.same("computed steps are the uncached ones, cached steps are not", differs, torch.arange(steps) % 2 == 1)
        return Found(model.about, tuple(model.times), (first, zero, masked))


def compiled(device: torch.device, steps: int, inner_backend: str) -> Found:
    """Run the model eagerly, then compile it by plain `torch.compile`."""
    with built(device, steps, f"torch.compile with {inner_backend}") as model:
        model.generation([EAGER] * steps)
        model.module.compile(backend=inner_backend, dynamic=False)
        outputs = model.generation([PLAIN] * steps)
        return Found(
            model.about, tuple(model.times), (model.close_to_eager("torch.compile against eager", outputs[0]),)
        )


@contextmanager
def built(device: torch.device, steps: int, how: str) -> Iterator[_Model]:
    size, dtype = size_for(device), torch.float32 if device.type == "cpu" else torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = flux.make(size)
            inputs = [_inputs(size, step, dtype) for step in range(steps)]
    finally:
        torch.set_default_dtype(before)
    parameters = sum(weight.numel() for weight in module.parameters())
    about = (
        f"FLUX, {size.double} + {size.single} blocks of width {size.width}, {parameters / 1e6:,.1f} million parameters "
        f"in {str(dtype).removeprefix('torch.')}, {size.side**2} image tokens; {how}"
    )
    yield _Model(module, inputs, device, about)
    cachedit_fx.disable_cache(module)
    torch._dynamo.reset()


def _inputs(size: flux.Size, step: int, dtype: torch.dtype) -> dict[str, Any]:
    inputs = flux.inputs(size, step)
    inputs["timestep"] = inputs["timestep"].float()
    return {name: value.to(dtype) if name.endswith("states") else value for name, value in inputs.items()}


def table(steps: Sequence[Steps]) -> Table:
    """A line for each kind of step; the last column is over the uncached step of ours, if that was timed."""
    base = next((median(times.device) for times in steps if times.kind == UNCACHED), None)
    result = Table(("step", "ms", "ms of Python until queued", "of ours, no cache"))
    for times in steps:
        device, host = median(times.device), median(times.host)
        share = f"{device / base:.1%}" if base else ""
        result.add(times.kind, f"{1e3 * device:.2f}", f"{1e3 * host:.2f}", share)
    return result
