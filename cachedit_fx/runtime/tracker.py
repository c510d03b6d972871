"""Finds the generation, denoising step and CFG branch of a transformer call.

    observe(900.0), observe(900.0), observe(850.0), ... observe(950.0)
      step 0 br. 0    step 0 br. 1    step 1 br. 0        turned back: generation 1, step 0, branch 0

The best evidence decides, in this order:

1. Explicit settings. `enable_separate_cfg=True`: calls alternate, branch 0 (conditional) first, or branch 1 first with
   `cfg_compute_first`. False: every call is a step of branch 0. `num_inference_steps`: as many steps are a generation.
2. The clock of the pipeline that calls (`runtime.clock`). Another schedule is another generation, and so is an index
   that goes back. Another index is another step. Calls at one index are the step's branches: a call's branch is that of
   its name, and of its number among the step's calls of that name.
3. `refresh`, which diffusers calls at a pipeline's end, and users by `refresh_context`.
4. Names (`transformer.cache_context("cond")`). They are numbered as they appear in the generation. A repeated name
   begins a new step, even at an equal timestep: in bfloat16 neighbouring timesteps can be equal. Another timestep
   begins a new step too. A name repeated at the generation's first timestep begins a new generation.
5. The timestep. A repeated timestep is the step's next branch, up to four. Another timestep begins a new step, and its
   first call is branch 0. A timestep that turns back begins a generation. The direction is that of the generation's
   first two different timesteps.
6. The shape, only if there is no timestep: a branch's other shape begins a generation.

A call without a timestep and a clock is a step. Branches may come and go from step to step (guidance intervals), and
change their shapes (guidance that ends midway halves a batch).

Without a clock, calls alone do not distinguish some cases:

- A scheduler that evaluates a timestep twice (Heun, other second-order ones) looks like two branches: set
  `enable_separate_cfg=False`. A step is then a call, and `num_inference_steps` counts calls.
- A generation of one step, then one that starts at the same timestep: if calls carry no names, the second call is taken
  for a further branch. With another start, it is taken for the next step, and the direction is learned across the
  border. `refresh` between the two solves this. `num_inference_steps=1` does too, unless unnamed branches are
  distinguished by the timestep.
- A timestep that never changes: with names every call begins a generation, so nothing is reused. A step index in
  `cache_context` solves this, or `enable_separate_cfg`.
- A generation that goes on at the timestep at which the last one stopped (a base model, then its refiner) is taken for
  the same generation: call `refresh`.
- A step without its first unnamed branch (the conditional call left out): the other call is taken for branch 0. Names
  solve this.
- Schedulers that go back in time on purpose (RePaint) begin a generation at each return.
- With `enable_separate_cfg=True`, a step of one call swaps the branches from that step to the end of the generation.
"""

import itertools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeGuard

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.runtime.clock import Tick, Timestep

MAX_UNNAMED_BRANCHES = 4
"""Highest number of branches distinguished by the timestep alone; some video models have four."""
MAX_LONE_STEPS = 4
"""Fewest generations in a row, of one step each and beside each other, that are taken for steps of one generation."""


class Position(NamedTuple):
    """The place of a call. All three count from 0; branches share their steps."""

    generation: int
    step: int
    branch: int


@dataclass(frozen=True)
class Evidence:
    """Facts about one call that show its position.

    Attributes:
        shape: a key that must stay equal for stored values to fit; compared within a branch.
        name: the caller's name for the branch, if any.
        tick: of the pipeline's clock; None without a clock.
        timestep: returns the number that the transformer takes, any unit; None if it is not known. It is called only
            if no better evidence decides, since it may wait for a device.
    """

    shape: Hashable
    name: str | None = None
    tick: Tick | None = None
    timestep: Callable[[], float | None] = Timestep(None)


@dataclass(frozen=True)
class Generation:
    """The calls of one generation so far. A further call makes another object."""

    number: int
    calls: int = 0
    step: int = -1
    timestep: float | None = None
    """The latest known timestep."""
    rising: bool | None = None
    """Whether timesteps rise; None until there were two different ones."""
    first: Evidence | None = None
    """The first call."""
    tick: Tick | None = None
    """The clock at the latest call."""
    in_step: tuple[tuple[str | None, int], ...] = ()
    """(name, branch) of the present step's calls."""
    branches: dict[Hashable, int] = field(default_factory=dict)
    """Name, or with a clock (name, number among the step's calls of that name) -> branch."""
    shapes: dict[int, Hashable] = field(default_factory=dict)
    """Branch -> shape, for every branch that had a call in the generation."""
    suspicion: int = 0
    """Calls that the clock does not explain: after its last step, or before its first one."""
    alone: int = 0
    """Generations just before this one that had one step each, each beside the next one in the clock's schedule.

    Negative if the clock's index fell from each to the next.
    """
    aside: "Generation | None" = None
    """The calls since the latest step that are no steps, such as those that want gradients."""

    def is_left_by(self, evidence: Evidence, timestep: float | None) -> bool:
        """Whether a call certainly belongs to a later generation."""
        return bool(self.calls) and (_other_schedule(self.tick, evidence.tick) or self.turns_back(timestep))

    def turns_back(self, timestep: float | None) -> bool:
        """Whether the timestep goes against the generation's direction."""
        if timestep is None or self.timestep is None or self.rising is None or timestep == self.timestep:
            return False
        return (timestep > self.timestep) is not self.rising

    def with_call(self, evidence: Evidence, timestep: float | None, place: "Place") -> "Generation":
        """The generation after a call at `place`."""
        rising = self.rising
        if timestep is not None and self.timestep is not None and timestep != self.timestep:
            rising = timestep > self.timestep
        in_step = self.in_step if place.step == self.step else ()
        return Generation(
            number=self.number,
            calls=self.calls + 1,
            step=place.step,
            timestep=self.timestep if timestep is None else timestep,
            rising=rising,
            first=self.first or evidence,
            tick=evidence.tick,
            in_step=(*in_step, (evidence.name, place.branch)),
            suspicion=self.suspicion if place.step == 0 else 0,
            alone=self.alone if place.step == 0 else 0,
            branches=self.branches if place.key is None else {**self.branches, place.key: place.branch},
            shapes={**self.shapes, place.branch: evidence.shape},
        )


class Place(NamedTuple):
    """Step and branch of a call, and the branch's key in `Generation.branches`, if it has one."""

    step: int
    branch: int
    key: Hashable = None


class Tracker:
    """The positions of the calls of one model in one session.

    Args:
        config: may be replaced between calls.
        warn: called with a sentence for people when a clock turns out to tell no steps.

    Attributes:
        generation: the calls so far.
    """

    def __init__(self, config: DBCacheConfig, warn: Callable[[str], None] = lambda message: None) -> None:
        self.config, self._warn = config, warn
        self.generation = Generation(0)
        self._numbers = itertools.count(1)
        """No number is used again, even if its generation is taken back: others may have noted the number."""
        self._stopped: Tick | None = None
        """Of a clock that stood still while steps went on."""
        self._restless: list[Tick] = []
        """One tick of each clock that showed another generation at every step."""

    def observe(self, evidence: Evidence) -> Position | None:
        """Find the position of the next call; None if it comes after the last step of the clock's schedule."""
        evidence = self._with_trusted_clock(evidence)
        if evidence.tick is not None and evidence.tick.is_over:
            self.generation = replace(self.generation, suspicion=self.generation.suspicion + 1)
            return None
        timestep = self._time_of(evidence)
        place = self._place(evidence, timestep)
        if self._begins_generation(evidence, timestep, place):
            stays = self.is_clocked(evidence.tick) and _same_tick(self.generation.tick, evidence.tick)
            suspicion = self.generation.suspicion + 1 if stays else 0
            alone = self._lone_steps(evidence.tick)
            self.generation = Generation(next(self._numbers), suspicion=suspicion, alone=alone)
            place = self._place(evidence, timestep)
        self.generation = self.generation.with_call(evidence, timestep, place)
        return Position(self.generation.number, place.step, place.branch)

    def begins_aside(self, evidence: Evidence) -> bool:
        """Take note of a call that is no step. Returns whether it begins a generation, as far as that is certain.

        The position of the next step is the same as without the call.
        """
        evidence = self._with_running_clock(evidence)
        timestep, latest = self._time_of(evidence), self.generation.aside or self.generation
        begins = not latest.calls or latest.is_left_by(evidence, timestep)
        base = Generation(latest.number + 1) if begins else replace(latest, aside=None)
        self.generation = replace(self.generation, aside=base.with_call(evidence, timestep, Place(0, 0)))
        return begins

    def joins_aside(self, evidence: Evidence) -> bool:
        """Whether the next call, a step, is of one generation with the calls since the latest step that are none."""
        aside, evidence = self.generation.aside, self._with_running_clock(evidence)
        if aside is None:
            return False
        timestep = self._time_of(evidence)
        is_near = aside.rising is not None or timestep in (None, aside.timestep)
        return is_near and not aside.is_left_by(evidence, timestep)

    def is_clocked(self, tick: Tick | None) -> TypeGuard[Tick]:
        """Whether a clock tells the step of a call, so that its timestep need not be read."""
        return tick is not None and tick.tells_steps and not self._is_stopped(tick)

    def restore(self, generation: Generation) -> None:
        """Take back the calls since `generation` was the present one."""
        self.generation = generation if generation.calls else replace(generation, number=next(self._numbers))

    def refresh(self) -> None:
        """Let the next call start a new generation. Repeated calls of `refresh` in between have no effect."""
        if self.generation.calls or self.generation.aside is not None:
            self.generation = Generation(next(self._numbers))

    def candidates(self, name: str | None = None) -> tuple[int, ...]:
        """Branches whose stored values the next call may need, before its timestep is known.

        Only branches that had a call in this generation count: the first call of a branch has nothing to compare with.
        """
        now = self.generation
        if self.config.enable_separate_cfg is not None or name is not None:
            branches = {self._place(Evidence(None, name), None).branch}
        else:
            branches = {0, len(now.in_step)}
        return tuple(sorted(branches & now.shapes.keys()))

    def _place(self, evidence: Evidence, timestep: float | None) -> Place:
        """Step and branch of the next call, if it belongs to the present generation."""
        now, separate, name = self.generation, self.config.enable_separate_cfg, evidence.name
        if separate is not None:
            step, place = divmod(now.calls, 2 if separate else 1)
            return Place(step, 1 - place if separate and self.config.cfg_compute_first else place)
        if self.is_clocked(evidence.tick):
            in_step = now.in_step if _same_tick(now.tick, evidence.tick) else ()
            key = name, sum(other == name for other, _ in in_step)
            return Place(now.step if in_step else now.step + 1, now.branches.get(key, len(now.shapes)), key)
        another_time = timestep is None or timestep != now.timestep
        if name is None:
            return Place(now.step + 1, 0) if another_time else Place(now.step, len(now.in_step))
        branch = now.branches.get(name, len(now.shapes))
        differs = another_time and timestep is not None and now.timestep is not None
        is_new = all(branch != other for _, other in now.in_step)
        return Place(now.step if now.in_step and is_new and not differs else now.step + 1, branch, name)

    def _begins_generation(self, evidence: Evidence, timestep: float | None, place: Place) -> bool:
        """Whether the next call, at `place` in the present generation, belongs to a new one instead."""
        now, steps = self.generation, self.config.num_inference_steps
        if not now.calls:
            return False
        if steps is not None and place.step >= steps:
            return True
        if _other_schedule(now.tick, evidence.tick):
            return True
        if self.is_clocked(evidence.tick):
            return self._is_outside_first_step(evidence, place)
        is_unnamed = evidence.name is None and self.config.enable_separate_cfg is None
        return (
            now.turns_back(timestep)
            or (timestep is None and now.shapes.get(place.branch, evidence.shape) != evidence.shape)
            or (is_unnamed and place.branch >= MAX_UNNAMED_BRANCHES)
            or self._starts_again(timestep, evidence.name)
        )

    def _starts_again(self, timestep: float | None, name: str | None) -> bool:
        """Whether a name is repeated at the first timestep. The calls before then were a generation of one step."""
        now = self.generation
        if self.config.enable_separate_cfg is not None or name not in now.branches:
            return False
        return now.step == 0 and timestep is not None and timestep == now.timestep

    def _is_outside_first_step(self, evidence: Evidence, place: Place) -> bool:
        """Whether an unnamed call in the clock's first step has another timestep than the call before it.

        The call before it was none of the steps, but was made for its side effects.
        """
        now = self.generation
        if place.step or not place.branch or evidence.name is not None or now.first is None:
            return False
        return evidence.timestep() != now.first.timestep()

    def _with_trusted_clock(self, evidence: Evidence) -> Evidence:
        """The evidence without its tick, if the clock is known to stand still, or to be restless.

        A clock stands still if it shows one step for more calls of a name than a step has branches. A clock is restless
        if it shows one generation after the other of one step each, and these steps are beside each other. Its schedule
        is another tensor at each step, or its index counts down.
        """
        now, tick = self.generation, evidence.tick
        if tick is None:
            return evidence
        repeats = sum(name == evidence.name for name, _ in now.in_step) if _same_tick(now.tick, tick) else 0
        is_still = max(repeats, now.suspicion) >= MAX_UNNAMED_BRANCHES
        if is_still and self.config.enable_separate_cfg is None:
            self._stopped = tick
        if abs(self._lone_steps(tick)) >= MAX_LONE_STEPS and not self._is_stopped(tick):
            self._restless.append(tick)
            names = ", ".join(kind.__name__ for kind in tick.kinds)
            self._warn(
                f"the scheduler ({names}) seems to begin a generation at every step, by new timesteps or by an index "
                "that goes back: it is not believed from now on, and the timestep tells the steps"
            )
        return self._with_running_clock(evidence)

    def _lone_steps(self, tick: Tick | None) -> int:
        """`Generation.alone` of a generation that begins at the tick. Calls of one step may be generations too."""
        now = self.generation
        if now.step or now.tick is None or tick is None or not tick.same_clock(now.tick):
            return 0
        pairs = zip(now.tick.indices, tick.indices, strict=True)
        moves = {after - before for before, after in pairs if before is not None and after is not None} - {0}
        if not moves:
            return now.alone
        move = moves.pop()
        if moves or abs(move) > 1:
            return 0
        return move + (now.alone if now.alone * move > 0 else 0)

    def _with_running_clock(self, evidence: Evidence) -> Evidence:
        is_stopped = evidence.tick is not None and self._is_stopped(evidence.tick)
        return replace(evidence, tick=None) if is_stopped else evidence

    def _time_of(self, evidence: Evidence) -> float | None:
        """The timestep, if no clock tells the steps."""
        timestep = None if self.is_clocked(evidence.tick) else evidence.timestep()
        return None if timestep is None or math.isnan(timestep) else timestep

    def _is_stopped(self, tick: Tick) -> bool:
        is_still = self._stopped is not None and tick.same_schedule(self._stopped)
        return is_still or any(tick.same_clock(other) for other in self._restless)


def _same_tick(one: Tick | None, two: Tick | None) -> bool:
    """Whether a clock shows one step in two calls."""
    return one is not None and two is not None and one.same_schedule(two) and one.indices == two.indices


def _other_schedule(before: Tick | None, now: Tick | None) -> bool:
    """Whether two consecutive ticks belong to two generations."""
    if before is None or now is None:
        return before is not now
    return not now.same_schedule(before) or now.tells_steps != before.tells_steps or now.is_before(before)
