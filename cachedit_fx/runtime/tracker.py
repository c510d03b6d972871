"""Finds the generation, denoising step and CFG branch of a transformer call, from the calls alone.

    observe(900.0), observe(900.0), observe(850.0), ... observe(950.0)
      step 0 br. 0    step 0 br. 1    step 1 br. 0        turned back: generation 1, step 0, branch 0

Branches are distinguished by the first of three ways that applies:

- The option `enable_separate_cfg`. True: calls alternate, branch 0 (conditional) first, or branch 1 first with
  `cfg_compute_first`. False: every call is a step of branch 0.
- The call's name (`transformer.cache_context("cond")`). Names are numbered as they appear in the generation. A repeated
  name begins a new step, even at an equal timestep: in bfloat16 neighbouring timesteps can be equal. Another timestep
  begins a new step too. A name repeated at the generation's first timestep begins a new generation.
- The timestep. A repeated timestep is the step's next branch, up to four. Another timestep begins a new step, and its
  first call is branch 0. A call without a timestep is a step.

A new generation begins in these cases:

- The timestep turns back against its direction, which the generation's first two different timesteps set.
- A branch's shape changes.
- `refresh` was called, or `num_inference_steps` steps were made.
- An unnamed timestep comes a fifth time.

Branches may come and go from step to step (guidance intervals).

Calls alone do not distinguish some cases:

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
- A step without its first unnamed branch (the conditional call left out): the other call is taken for branch 0. If its
  shape differs, a new generation begins. Names solve this.
- Schedulers that go back in time on purpose (RePaint) begin a generation at each return.
- With `enable_separate_cfg=True`, a step of one call swaps the branches from that step to the end of the generation.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from cachedit_fx.config.cache import DBCacheConfig

MAX_UNNAMED_BRANCHES = 4
"""Highest number of branches distinguished by the timestep alone; some video models have four."""


class Position(NamedTuple):
    """The place of a call. All three count from 0; branches share their steps."""

    generation: int
    step: int
    branch: int


@dataclass
class _Generation:
    number: int
    calls: int = 0
    step: int = -1
    timestep: float | None = None
    """The latest known timestep."""
    rising: bool | None = None
    """Whether timesteps rise; None until there were two different ones."""
    in_step: set[int] = field(default_factory=set)
    """Branches that had a call in the present step."""
    names: dict[str, int] = field(default_factory=dict)
    """Name -> branch."""
    shapes: dict[int, Hashable] = field(default_factory=dict)
    """Branch -> shape, for every branch that had a call in the generation."""

    def turns_back(self, timestep: float | None) -> bool:
        if timestep is None or self.timestep is None or self.rising is None or timestep == self.timestep:
            return False
        return (timestep > self.timestep) is not self.rising

    def add(self, step: int, branch: int, timestep: float | None, name: str | None, shape: Hashable) -> None:
        if step != self.step:
            self.in_step.clear()
        self.calls += 1
        self.step = step
        self.in_step.add(branch)
        self.shapes[branch] = shape
        if name is not None:
            self.names[name] = branch
        if timestep is not None:
            if self.timestep is not None and timestep != self.timestep:
                self.rising = timestep > self.timestep
            self.timestep = timestep


class Tracker:
    """The positions of the calls of one model in one session. `config` may be replaced between calls."""

    def __init__(self, config: DBCacheConfig) -> None:
        self.config = config
        self._now = _Generation(0)

    def observe(self, timestep: float | None, branch: str | None, shape: Hashable) -> Position:
        """Find the position of the next call.

        Args:
            timestep: as the transformer takes it, any unit; None or NaN if it is not known.
            branch: the caller's name for the branch, if any.
            shape: a key that must stay equal for stored values to fit; compared within a branch.
        """
        if timestep is not None and math.isnan(timestep):
            timestep = None
        step, index = self._locate(timestep, branch)
        steps = self.config.num_inference_steps
        if (
            self._now.turns_back(timestep)
            or self._now.shapes.get(index, shape) != shape
            or (steps is not None and step >= steps)
            or (index >= MAX_UNNAMED_BRANCHES and branch is None)
            or self._starts_again(timestep, branch)
        ):
            self.refresh()
            step, index = self._locate(timestep, branch)
        self._now.add(step, index, timestep, branch, shape)
        return Position(self._now.number, step, index)

    def _starts_again(self, timestep: float | None, name: str | None) -> bool:
        """Whether a name is repeated at the first timestep. The calls before then were a generation of one step."""
        now = self._now
        if self.config.enable_separate_cfg is not None or name not in now.names:
            return False
        return now.step == 0 and timestep is not None and timestep == now.timestep

    def refresh(self) -> None:
        """Let the next call start a new generation. Repeated calls of `refresh` in between have no effect."""
        if self._now.calls:
            self._now = _Generation(self._now.number + 1)

    def candidates(self, branch: str | None = None) -> tuple[int, ...]:
        """Branches whose stored values the next call may need, before its timestep is known.

        Only branches that had a call in this generation count: the first call of a branch has nothing to compare with.
        """
        now = self._now
        if self.config.enable_separate_cfg is not None or branch is not None:
            branches = {self._locate(None, branch)[1]}
        else:
            branches = {0, len(now.in_step)}
        return tuple(sorted(branches & now.shapes.keys()))

    def _locate(self, timestep: float | None, name: str | None) -> tuple[int, int]:
        """Step and branch of the next call, if it belongs to the present generation."""
        now, separate = self._now, self.config.enable_separate_cfg
        if separate is not None:
            step, place = divmod(now.calls, 2 if separate else 1)
            return step, 1 - place if separate and self.config.cfg_compute_first else place
        another_time = timestep is None or timestep != now.timestep
        if name is None:
            return (now.step + 1, 0) if another_time else (now.step, len(now.in_step))
        branch = now.names.get(name, len(now.shapes))
        differs = another_time and timestep is not None and now.timestep is not None
        same_step = now.in_step and branch not in now.in_step and not differs
        return (now.step if same_step else now.step + 1), branch
