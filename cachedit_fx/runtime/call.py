"""One transformer call: which step it is, compute or bypass, and why where it ran uncached.

    Call ──► GraphCall for each of the call's graphs: `decide` once for each region, then `run`

A module is one graph as a rule, and several where something breaks its capture. These share the call: its timestep,
its position, the numbering of its regions. A graph that is called by itself (plain `torch.compile`) is a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cachedit_fx.runtime.model_state import ModelState
from cachedit_fx.runtime.region import RegionInfo, RegionKey
from cachedit_fx.runtime.session import Session
from cachedit_fx.runtime.shortcut import Ran
from cachedit_fx.runtime.tracker import Position

NOT_CAPTURED = "not captured"
"""The cause of an uncached call that reached none of our graphs."""


NO_LOOP = "no block loop"
"""The cause where it reached some, but none holds a loop of blocks."""


@dataclass(frozen=True)
class Uncached:
    """Why a graph, or a whole call, runs uncached: a label for the statistics, and a sentence for people."""

    cause: str
    explanation: str


class NewGeneration(Exception):
    """A call that went past dynamo's guards turns out to begin a generation, which has to pass them."""


class call_of:  # noqa: N801 - a context manager, and used like a function
    """The call under way in the present session; where there is none, a new one for as long as the block lasts, which
    is finished at its end, unless that is left to the caller (`finish=False`). A class: each step enters two."""

    def __init__(
        self, cache: ModelState, diagnose: Callable[[Call], str | None] | None = None, finish: bool = True
    ) -> None:
        self.session = cache.session()
        self.diagnose, self.finish = diagnose, finish
        self.call = self.session.call
        self.is_own = self.call is None

    def __enter__(self) -> Call:
        if self.call is None:
            self.call = self.session.call = Call(self.session)
        return self.call

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.is_own:
            self.session.call = None
            if kind is None and self.finish and self.call is not None:
                self.call.finish(self.diagnose)


class Call:
    """What the graphs of one transformer call have in common.

    Attributes:
        session: whose call it is.
        graphs: how many of our graphs ran in it so far.
        chains: how many chains with regions these had, by the loops that they run through.
        time: the timestep, or what the caller says in its place; None where nothing is known of it.
        position: generation, step and branch; None until a region asks for it.
        now: the timestep as a number, from then on; None where it is not known.
    """

    def __init__(self, session: Session) -> None:
        hint = session.cache.hint()
        self.session = session
        self.branch_name = hint.branch
        self.time = hint.time
        self.graphs = 0
        self.chains: dict[tuple[str, ...], int] = {}
        self.position: Position | None = None
        self.now: float | None = None
        self.is_guarded = True
        """False while the call goes past dynamo."""
        self.ran: list[Ran] | None = None
        """Of each graph with regions what it was given and what it gave; None where nobody asks."""
        self._passed_by: Uncached | None = None

    def restart(self) -> None:
        """Run the graphs again from the first; where the call stands in its generation is known by now."""
        self.is_guarded = True
        self.graphs = 0
        self.chains = {}

    @property
    def uncached(self) -> Uncached | None:
        """Why nothing could be cached; None where a graph had a region, or caching is off."""
        if self.chains or self.session.cache.options.cache is None:
            return None
        return self._passed_by or Uncached(NOT_CAPTURED, "no caching: the call reached no graph of this backend")

    def finish(self, diagnose: Callable[[Call], str | None] | None = None) -> None:
        """Count and explain a call that ran uncached. `diagnose` may have a better explanation than its graphs, and is
        asked once for each of theirs."""
        why = self.uncached
        if why is not None:
            self.session.record_uncached(why.cause)
            self.session.cache.warn_once(why.explanation, (lambda: diagnose(self)) if diagnose else None)

    def enter(self, regions: Sequence[RegionInfo], timestep: torch.Tensor | float | None) -> list[RegionKey]:
        """A graph with regions begins; what the session knows them by, whichever graphs the call consists of."""
        self._count(timestep)
        before = self.chains
        self.chains = before | {region.loops: before.get(region.loops, 0) + 1 for region in regions}
        return [((region.loops, before.get(region.loops, 0)), region.block) for region in regions]

    def pass_by(self, why: Uncached, timestep: torch.Tensor | float | None = None) -> None:
        """A graph without a region begins. Its timestep may be what a later graph's regions go by."""
        self._count(timestep)
        if self._passed_by is None or self._passed_by.cause == NO_LOOP:
            self._passed_by = why

    def _count(self, timestep: torch.Tensor | float | None) -> None:
        self.graphs += 1
        if self.time is None:
            self.time = timestep
