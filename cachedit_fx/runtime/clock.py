"""Tells the time of a call: the timestep, and the clock of the pipeline that makes the call, its scheduler.

    pipe.__call__ ──► transformer(...) ──► clock()        Tick(schedule=pipe.scheduler.timesteps, index=3, steps=28)

The pipeline is found on the call stack, as the `self` (in modular pipelines `components`) of a frame that called the
transformer, with an attribute that is a scheduler. So pipelines that share a transformer, and threads, have clocks of
their own. Nothing is patched, and no tensor is read: everything is on the host.

`index` comes from the first of two sources that the pipeline has:

- `scheduler.step_index`, which `scheduler.step` advances. Until the first step it is the index to begin with. What is
  no integer is no index.
- `pipe._current_timestep`, if it is an element of `scheduler.timesteps`: its place in that tensor's memory.

Of several schedulers (inversion has its own) those that made their last step are left out, unless all did.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

from cachedit_fx.runtime.guard import on_host, read_back

MAX_DEPTH = 40
"""Highest number of frames between a transformer and the pipeline that called it. Those of torch do not count."""
MAX_HELPERS = 8
"""Highest number of frames between two of a pipeline's methods."""
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
        method: code of the pipeline's method that makes the calls, the outermost one. Another method has another loop.
        schedules: the timesteps of each of the pipeline's schedulers. Other tensors mean another generation.
        indices: the place of each scheduler in its timesteps; None if it is not known.
        steps: number of steps of the generation; None if it is not known.
        is_over: whether all schedulers have made their last step.
        kinds: the schedulers' classes.
    """

    method: CodeType
    schedules: tuple[torch.Tensor, ...]
    indices: tuple[int | None, ...]
    steps: int | None
    is_over: bool = False
    kinds: tuple[type, ...] = ()

    @property
    def tells_steps(self) -> bool:
        """Whether steps can be told apart."""
        return None not in self.indices

    def same_schedule(self, other: Tick) -> bool:
        """Whether both ticks are of one generation's schedule."""
        return (
            self.method is other.method
            and len(self.schedules) == len(other.schedules)
            and all(one is two for one, two in zip(self.schedules, other.schedules, strict=True))
        )

    def is_before(self, other: Tick) -> bool:
        """Whether an index is smaller than in `other`, of the same schedule."""
        return any(
            one is not None and two is not None and one < two
            for one, two in zip(self.indices, other.indices, strict=True)
        )

    def same_clock(self, other: Tick) -> bool:
        """Whether both ticks are of one method's schedulers, or of others of their classes."""
        return self.method is other.method and self.kinds == other.kinds

    @property
    def is_last(self) -> bool:
        """Whether the clock shows the last step of its schedule."""
        return self.place is not None and self.place[1] == len(self.place[0]) - 1

    @property
    def place(self) -> tuple[torch.Tensor, int] | None:
        """The timesteps and the place in them, if there is one scheduler."""
        if len(self.schedules) != 1 or self.indices[0] is None:
            return None
        return self.schedules[0], self.indices[0]

    def place_since(self, first: Tick | None) -> tuple[torch.Tensor, int] | None:
        """`place`; of several schedulers, that of the only one that has moved since the tick `first`."""
        if first is None or len(self.schedules) == 1 or not self.same_schedule(first):
            return self.place
        moved = [
            (schedule, index)
            for schedule, index, before in zip(self.schedules, self.indices, first.indices, strict=True)
            if index is not None and index != before
        ]
        return moved[0] if len(moved) == 1 else None


def clock() -> Tick | None:
    """The tick of the pipeline that is calling; None if there is none, or if it never set its timesteps."""
    pipeline, frame = _calling_pipeline(sys._getframe(1))
    if frame is None:
        return None
    readings = [_reading(scheduler, pipeline) for scheduler in _schedulers(pipeline) if _is_set(scheduler)]
    running = [reading for reading in readings if not reading.is_over] or readings
    if not running:
        return None
    return Tick(
        _outermost(pipeline, frame).f_code,
        tuple(reading.timesteps for reading in running),
        tuple(reading.index for reading in running),
        running[0].steps if len(running) == 1 else None,
        all(reading.is_over for reading in running),
        tuple(reading.kind for reading in running),
    )


def _calling_pipeline(frame: FrameType | None) -> tuple[Any, FrameType | None]:
    """The nearest object on the stack that has a scheduler and called a method of its own, and the method's frame."""
    depth = 0
    while frame is not None and depth < MAX_DEPTH:
        if not str(frame.f_globals.get("__name__")).startswith(_OUTSIDE):
            depth += 1
            code = frame.f_code
            if code.co_argcount > 0 and code.co_varnames[0] == "self":
                variables = frame.f_locals
                for name in ("self", "components"):
                    owner = variables.get(name)
                    if any(True for _ in _schedulers(owner)):
                        return owner, frame
        frame = frame.f_back
    return None, None


def _outermost(pipeline: Any, frame: FrameType) -> FrameType:
    """The outermost of the pipeline's methods, a few frames above the one that makes the call."""
    outermost, outer = frame, frame.f_back
    for _ in range(MAX_HELPERS):
        if outer is None:
            break
        code = outer.f_code
        if code.co_argcount and code.co_varnames[0] == "self" and outer.f_locals.get("self") is pipeline:
            outermost = outer
        outer = outer.f_back
    return outermost


def guidance() -> tuple[Any, bool]:
    """The scale of classifier-free guidance of the pipeline that is calling, and whether it says that it guides.

    The scale is as the pipeline has it: the first number, or else the first other value but None. `true_cfg_scale`
    comes first: if a pipeline has it, `guidance_scale` is an input of the model. A pipeline that guides by one call a
    step doubles the batch.
    """
    pipeline, frame = _calling_pipeline(sys._getframe(1))
    if frame is None:
        return None, False
    variables = frame.f_locals
    scales = (
        variables.get("true_cfg_scale"),
        _attribute(pipeline, "guidance_scale"),
        variables.get("guidance_scale"),
        _attribute(_attribute(pipeline, "guider"), "guidance_scale"),
    )
    values = [value for value in scales if value is not None]
    scale = next((value for value in values if isinstance(value, Real)), values[0] if values else None)
    words = (
        _attribute(pipeline, "do_classifier_free_guidance"),
        variables.get("do_classifier_free_guidance"),
        variables.get("do_true_cfg"),
    )
    return scale, any(word is True for word in words)


def _attribute(owner: Any, name: str) -> Any:
    """The attribute; None if there is none, or if a property raises: a clock that is asked must not fail a call."""
    try:
        return getattr(owner, name, None)
    except Exception:
        return None


def _schedulers(owner: Any) -> Iterator[Any]:
    """The attributes of `owner` that are schedulers."""
    for value in getattr(owner, "__dict__", {}).values():
        kind: type = type(value)
        timesteps = _attribute(value, "timesteps") if _has_timesteps(kind) else None
        if isinstance(timesteps, torch.Tensor) and timesteps.dim():
            yield value


@functools.lru_cache(maxsize=1024)
def _has_timesteps(kind: type) -> bool:
    return hasattr(kind, "set_timesteps")


@dataclass(frozen=True)
class _Reading:
    """What one scheduler shows: its timesteps, the place in them, the number of steps from the first place on."""

    timesteps: torch.Tensor
    index: int | None
    steps: int
    kind: type

    @property
    def is_over(self) -> bool:
        return self.index is not None and self.index >= len(self.timesteps)


def _is_set(scheduler: Any) -> bool:
    """Whether a generation's timesteps were ever set."""
    return _attribute(scheduler, "num_inference_steps") is not None


def _reading(scheduler: Any, pipeline: Any) -> _Reading:
    timesteps: torch.Tensor = scheduler.timesteps
    count, total = len(timesteps), _attribute(pipeline, "_num_timesteps")
    begin = _attribute(scheduler, "begin_index")
    if not isinstance(begin, int):
        begin = count - total if isinstance(total, int) and 0 < total <= count else 0
    index: int | None
    try:
        step = scheduler.step_index
        index = begin if step is None else operator.index(step)
    except Exception:  # there is none, or it is no integer, such as a method
        index = _place(_attribute(pipeline, "_current_timestep"), timesteps)
    return _Reading(timesteps, index, count - begin, type(scheduler))


def _place(element: Any, timesteps: torch.Tensor) -> int | None:
    """The index of `element` in `timesteps`, if it is a view of it."""
    if not isinstance(element, torch.Tensor) or element.dim() or timesteps.dim() != 1 or not timesteps.stride(0):
        return None
    if element.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    return (element.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
