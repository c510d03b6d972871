"""Which generation, denoising step and CFG branch a transformer call belongs to, told from the calls alone.

    observe(900.0), observe(900.0), observe(850.0), ... observe(950.0)
      step 0 br. 0    step 0 br. 1    step 1 br. 0        turned back: generation 1, step 0, branch 0

Three ways to tell branches apart, the first that applies wins:

- `enable_separate_cfg` given. True: calls alternate, branch 0 (conditional) first, or branch 1 first with
  `cfg_compute_first`. False: every call is a step of branch 0.
- The call carries a name (`transformer.cache_context("cond")`). Names are numbered as they appear in the generation.
  A name seen again is a new step, at an equal timestep too: in bfloat16 neighbouring ones can be equal. So is another
  timestep. Only at the generation's first timestep a name seen again starts a new one.
- The timestep. Seen again, it is the step's next branch, up to four; another one is a new step, its first call branch
  0. A call with no timestep is a step.

A new generation starts when the timestep turns back against its direction (that of the generation's first two
different timesteps), a branch's shape changes, `refresh` was called, `num_inference_steps` steps were made, or an
unnamed timestep comes a fifth time. Branches may come and go from step to step (guidance intervals).

What calls alone cannot tell, and what happens:

- A scheduler that evaluates a timestep twice (Heun, other second-order ones) looks like two branches: set
  `enable_separate_cfg=False`. A step is then a call, and `num_inference_steps` counts calls.
- A generation of one step, then one that starts at the same timestep: taken for a further branch where calls carry no
  names. With another start: taken for the next step, and the direction is learned across the border. `refresh` between
  them cures it; so does `num_inference_steps=1`, unless unnamed branches are told apart by the timestep.
- A timestep that never changes: with names every call starts a generation, so nothing is reused. A step index in
  `cache_context` cures it, or `enable_separate_cfg`.
- A generation that goes on where the last one stopped (a base model, then its refiner) is the same generation:
  `refresh`.
- A step without its first unnamed branch (the conditional call left out): the other one is taken for branch 0, and
  where its shape differs, a new generation starts. Names cure it.
- Schedulers that go back in time on purpose (RePaint) start a generation at each return.
- With `enable_separate_cfg=True`, a step of one call swaps the branches from there to the end of the generation.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from cachedit_fx.config.cache import DBCacheConfig

MAX_UNNAMED_BRANCHES = 4
"""Branches told apart by the timestep alone; some video models have four."""


class Position(NamedTuple):
    """Where a call stands. All three count from 0; steps are shared by the branches."""

    generation: int
    step: int
    branch: int


@dataclass
class _Generation:
    number: int
    calls: int = 0
    step: int = -1
    timestep: float | None = None
    """The latest one that was given."""
    rising: bool | None = None
    """Its direction; None until two different ones were seen."""
    in_step: set[int] = field(default_factory=set)
    """Branches seen in the present step."""
    names: dict[str, int] = field(default_factory=dict)
    shapes: dict[int, Hashable] = field(default_factory=dict)
    """By branch, for every branch seen in the generation."""

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
        """Place the next call.

        Args:
            timestep: as the transformer takes it, any unit; None or NaN where it is not known.
            branch: the name that the caller gave to the branch, if any.
            shape: whatever must stay equal for stored values to fit, compared within a branch.
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
        """A name seen again at the first timestep: what came before was a generation of one step."""
        now = self._now
        if self.config.enable_separate_cfg is not None or name not in now.names:
            return False
        return now.step == 0 and timestep is not None and timestep == now.timestep

    def refresh(self) -> None:
        """Let the next call start a new generation. Twice in a row is once."""
        if self._now.calls:
            self._now = _Generation(self._now.number + 1)

    def candidates(self, branch: str | None = None) -> tuple[int, ...]:
        """Branches whose stored values the next call may need, before its timestep is known.

        Those seen in this generation only: a branch's first call, and a generation's, have nothing to be compared with.
        """
        now = self._now
        if self.config.enable_separate_cfg is not None or branch is not None:
            possible = {self._locate(None, branch)[1]}
        else:
            possible = {0, len(now.in_step)}
        return tuple(sorted(possible & now.shapes.keys()))

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
        known_to_differ = another_time and timestep is not None and now.timestep is not None
        same_step = now.in_step and branch not in now.in_step and not known_to_differ
        return (now.step if same_step else now.step + 1), branch
