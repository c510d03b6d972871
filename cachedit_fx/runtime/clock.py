"""Tells the time of a call: the timestep, and the clock of the pipeline that makes the call, its scheduler.

    pipe.__call__ ──► transformer(...) ──► clock()        Tick(schedule=pipe.scheduler.timesteps, index=3, steps=28)

The pipeline is found on the call stack, as the `self` (in modular pipelines `components`) of a frame that called the
transformer, with an attribute that is a scheduler. So pipelines that share a transformer, and threads, have clocks of
their own. Nothing is patched, and no tensor is read: everything is on the host.

`index` comes from the first of two sources that the pipeline has:

- `scheduler.step_index`, which `scheduler.step` advances. Until the first step it is the index to begin with.
- `pipe._current_timestep`, if it is an element of `scheduler.timesteps`: its place in that tensor's memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch

from cachedit_fx.runtime.guard import on_host, read_back

MAX_DEPTH = 24
"""Highest number of frames between a transformer and the pipeline that called it."""
_OUTSIDE = ("torch.", "cachedit_fx.", "accelerate.")
"""Packages whose frames are no pipeline's."""


class Timestep:
    """A call's timestep, read at most once.

    Args:
        value: as the transformer takes it, any unit. Of several elements the largest counts. None if there is none.
    """

    def __init__(self, value: torch.Tensor | float | None) -> None:
        self.number: float | None = None
        self.unread: torch.Tensor | None = None
        if isinstance(value, torch.Tensor):
            self.unread = value.amax() if value.numel() > 1 else value
        else:
            self.number = value

    @property
    def waits(self) -> bool:
        """Whether reading the timestep makes the host wait for a device."""
        return self.unread is not None and not on_host(self.unread)

    def set(self, number: float) -> None:
        """Take the number that was read together with others."""
        self.number, self.unread = number, None

    def __call__(self) -> float | None:
        """The timestep as a number."""
        if self.unread is not None:
            (number,) = read_back([self.unread])
            self.set(number)
        return self.number


class Tick(NamedTuple):
    """What a pipeline's clock shows.

    Attributes:
        schedules: the timesteps of each of the pipeline's schedulers. Other tensors mean another generation.
        indices: the place of each scheduler in its timesteps; None if it is not known.
        steps: number of steps of the generation; None if it is not known.
    """

    schedules: tuple[torch.Tensor, ...]
    indices: tuple[int | None, ...]
    steps: int | None

    @property
    def tells_steps(self) -> bool:
        """Whether steps can be told apart."""
        return None not in self.indices

    def same_schedule(self, other: Tick) -> bool:
        """Whether both ticks are of one generation's schedule."""
        return len(self.schedules) == len(other.schedules) and all(
            one is two for one, two in zip(self.schedules, other.schedules, strict=True)
        )

    def is_before(self, other: Tick) -> bool:
        """Whether an index is smaller than in `other`, of the same schedule."""
        return any(
            one is not None and two is not None and one < two
            for one, two in zip(self.indices, other.indices, strict=True)
        )

    @property
    def place(self) -> tuple[torch.Tensor, int] | None:
        """The timesteps and the place in them, if there is one scheduler."""
        if len(self.schedules) != 1 or self.indices[0] is None:
            return None
        return self.schedules[0], self.indices[0]


def clock() -> Tick | None:
    """The tick of the pipeline that is calling; None if there is none, or if it is not inside its schedule."""
    pipeline = _calling_pipeline(sys._getframe(1))
    if pipeline is None:
        return None
    readings = [
        reading for reading in (_reading(scheduler, pipeline) for scheduler in _schedulers(pipeline)) if reading
    ]
    if not readings or any(index is not None and index >= len(timesteps) for timesteps, index, _ in readings):
        return None
    steps = readings[0][2] if len(readings) == 1 else None
    return Tick(tuple(reading[0] for reading in readings), tuple(reading[1] for reading in readings), steps)


def _calling_pipeline(frame: FrameType | None) -> Any:
    """The nearest object on the stack that has a scheduler and called a method of its own; None if there is none."""
    for _ in range(MAX_DEPTH):
        frame = frame.f_back if frame is not None else None
        if frame is None:
            return None
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        if not names or names[0] != "self" or str(frame.f_globals.get("__name__")).startswith(_OUTSIDE):
            continue
        for name in ("self", "components"):
            owner = frame.f_locals.get(name) if name in names else None
            if owner is not None and any(True for _ in _schedulers(owner)):
                return owner
    return None


def _schedulers(owner: Any) -> Iterator[Any]:
    """The attributes of `owner` that are schedulers."""
    for value in getattr(owner, "__dict__", {}).values():
        if hasattr(type(value), "set_timesteps") and isinstance(getattr(value, "timesteps", None), torch.Tensor):
            yield value


def _reading(scheduler: Any, pipeline: Any) -> tuple[torch.Tensor, int | None, int | None] | None:
    """Timesteps, place in them, number of steps; None before the first generation."""
    timesteps: torch.Tensor = scheduler.timesteps
    if getattr(scheduler, "num_inference_steps", 0) is None:
        return None
    count = len(timesteps)
    total = getattr(pipeline, "_num_timesteps", None)
    begin = getattr(scheduler, "begin_index", None)
    if begin is None:
        begin = count - total if isinstance(total, int) and 0 < total <= count else 0
    if hasattr(scheduler, "step_index"):
        index = begin if scheduler.step_index is None else int(scheduler.step_index)
        return timesteps, index, count - begin
    index = _place(getattr(pipeline, "_current_timestep", None), timesteps)
    return timesteps, index, count - begin


def _place(element: Any, timesteps: torch.Tensor) -> int | None:
    """The index of `element` in `timesteps`, if it is a view of it."""
    if not isinstance(element, torch.Tensor) or element.dim() or timesteps.dim() != 1:
        return None
    if element.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    return (element.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
