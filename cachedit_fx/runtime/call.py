"""Holds one transformer call: the state that its graphs share, and the reason why a call ran uncached.

    Call ──► RegionCall for each of the call's graphs: `decide` for each region, then `run`

A module is one graph as a rule, and several if its capture breaks. The graphs of a call share its timestep, its
position, and the numbering of its regions. A graph that is called alone (plain `torch.compile`) is a call too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cachedit_fx.runtime.clock import Timestep, clock
from cachedit_fx.runtime.model_state import ModelState
from cachedit_fx.runtime.presence import RanksDisagree
from cachedit_fx.runtime.region import RegionInfo, RegionKey
from cachedit_fx.runtime.session import Session
from cachedit_fx.runtime.tracker import Evidence, Position

if TYPE_CHECKING:
    from cachedit_fx.runtime.graph import RewrittenGraph
    from cachedit_fx.runtime.shortcut import Route

NOT_CAPTURED = "not captured"
"""The cause of an uncached call that reached none of our graphs."""
STRAY = "no session"
"""The cause of an uncached call in a thread without a `session(key)`, while other threads have one."""
LATE = "after the last step"
"""The cause of an uncached call by a pipeline that has made its last step: the call is made for its side effects."""
NO_LOOP = "no block loop"
"""The cause of an uncached call that reached some graphs of ours, but none that holds a loop of blocks."""


@dataclass(frozen=True)
class Uncached:
    """The reason why a graph, or a whole call, runs uncached.

    Attributes:
        cause: a label for statistics.
        explanation: a sentence for people.
        is_step: whether such a call may be a step of a generation that is cached otherwise.
    """

    cause: str
    explanation: str
    is_step: bool = True


class current_call:  # noqa: N801 - a context manager, and used like a function
    """Context manager for the session's current `Call`.

    Creates a call if there is none. On exit a call that succeeded is committed, and counted if `finish` is True. A call
    that raised is rolled back, and counted as failed. A class, because `@contextmanager` is too slow for a path that
    every step enters twice.

    Args:
        state: the session is that of this state, in the present thread or `session(key)`.
        diagnose: see `Call.finish`.
        expected: exceptions after which the call is made in another way, so that it has not failed.
    """

    def __init__(
        self,
        state: ModelState,
        diagnose: Callable[[Call], str | None] | None = None,
        finish: bool = True,
        expected: tuple[type[BaseException], ...] = (),
    ) -> None:
        self.session = state.session()
        self.expected = expected
        self.diagnose, self.finish = diagnose, finish
        self.call = self.session.call
        self.is_own = self.call is None

    def __enter__(self) -> Call:
        if self.call is None:
            self.call = self.session.call = Call(self.session)
        return self.call

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self.is_own or self.call is None:
            return
        self.session.call = None
        if kind is not None:
            self.call.roll_back()
            if issubclass(kind, RanksDisagree):  # other ranks may have stored more, or all have stored wrong values
                self.session.forget()
            if not issubclass(kind, self.expected):
                self.session.record_failure()
            return
        self.call.commit()
        if self.finish:
            self.call.finish(self.diagnose)
        if not self.call.is_shared:
            self.call.leave_ranks()
        self.session.record_success()


class Call:
    """The state that the graphs of one transformer call share.

    Attributes:
        session: the session that the call belongs to.
        branch_name: the CFG branch, if the caller names it.
        tick: what the clock of the calling pipeline shows; None without a clock.
        time: the timestep, or the caller's hint of it; a `Timestep` of None while neither is known.
        graphs: our graphs that began in the call so far.
        chains: names of loops -> the number of chains with regions through these loops so far.
        is_located: whether a region asked for the position.
        signature: that with which the position was found.
        position: generation, step and branch; None for a call after the last step of the pipeline's schedule, and until
            `is_located`.
        is_shared: whether a graph was reached that ranks share.
        forms: shapes and dtypes of that graph's inputs, equal on all ranks; None if ranks share no graph.
        route: the call's way to its graphs, if shortcuts are learned.
    """

    def __init__(self, session: Session) -> None:
        hint = session.state.hint()
        self.session = session
        self.branch_name = hint.branch
        self.tick = clock()
        self.time = Timestep(hint.time)
        self._has_time = hint.time is not None
        self.graphs: list[RewrittenGraph] = []
        self.chains: dict[tuple[str, ...], int] = {}
        self.is_located = False
        self.signature: Hashable = None
        self.position: Position | None = None
        self.route: Route | None = None
        self.is_shared = False
        self.forms: Hashable = None
        self._passed_by: Uncached | None = None
        self._changes: list[Callable[[], None]] = []
        self._restorations: list[Callable[[], None]] = []

    def on_success(self, change: Callable[[], None]) -> None:
        """Make a change of the session when the whole call has succeeded, after the changes passed before."""
        self._changes.append(change)

    def on_failure(self, restoration: Callable[[], None]) -> None:
        """Take back a change of the session, made already, if the call fails: the latest change first."""
        self._restorations.append(restoration)

    def commit(self) -> None:
        """The call has succeeded: make all changes. If one fails, nothing stored is used again."""
        changes, self._changes = self._changes, []
        with self.session.lock:
            try:
                for change in changes:
                    change()
            except BaseException:
                self.roll_back()
                self.session.forget()
                self.session.record_failure()
                raise
            self._restorations = []
            self.session.state.latest_graphs = self.graphs

    def roll_back(self) -> None:
        """The call has failed: leave the session as it was before the call."""
        restorations, self._restorations, self._changes = self._restorations, [], []
        with self.session.lock:
            for restoration in reversed(restorations):
                restoration()

    def leave_ranks(self) -> None:
        """The call has run without the other ranks, if there are any: tell them, once between two meetings."""
        state = self.session.state
        if state.ranks is not None and not state.is_apart:
            state.is_apart = True
            cause = f" ({self._passed_by.cause})" if self._passed_by is not None else ""
            state.leave_ranks(f"ran the model without the other ranks{cause}")

    def abandon(self) -> None:
        """Take back what the call's graphs have done: the call is made in another way."""
        self.roll_back()
        self.restart()
        self.is_located, self.position = False, None

    def restart(self) -> None:
        """Let the graphs run again from the first one. The call's position is known already, and stays."""
        self.graphs = []
        self.chains = {}
        self._changes = []

    @property
    def begins_by_clock(self) -> bool:
        """Whether a clock shows, before anything runs, that the call may begin a generation."""
        before = self.session.tick
        is_same = before is not None and self.tick is not None and self.tick.same_schedule(before)
        return self.session.tracker.is_clocked(self.tick) and not is_same

    @property
    def begins_afresh(self) -> bool:
        """Whether the call certainly begins a generation: nothing was called in the present one."""
        return not self.session.is_stray and not self.session.tracker.generation.calls

    @property
    def turns_back(self) -> bool:
        """Whether the timestep shows, without waiting for a device, that the call begins a generation."""
        tracker = self.session.tracker
        return not tracker.is_clocked(self.tick) and not self.time.waits and tracker.generation.turns_back(self.time())

    def locate(self, signature: Hashable = None) -> bool:
        """Find the call's position, and begin a generation if the call is the first of one. Returns whether it is.

        `signature` tells the shapes of the values that a region reads; None for an uncached call.
        """
        session, tracker = self.session, self.session.tracker
        before = tracker.generation
        self.on_failure(lambda: tracker.restore(before))
        self.is_located, self.signature = True, signature
        evidence = Evidence(signature, self.branch_name, self.tick, self.time)
        joins_aside = tracker.joins_aside(evidence)
        self.position = tracker.observe(evidence)
        if self.position is None:
            return False
        self.on_success(lambda: setattr(session, "tick", self.tick))
        self.on_success(lambda: session.end_aside(joins_aside))
        begins = self.position.generation != session.generation
        if begins:
            self.on_failure(session.begin(self.position.generation))
        return begins

    def locate_region(self, signature: Hashable) -> bool:
        """Find the position of a call with regions. Returns whether a generation begins."""
        begins = self.locate(signature)
        if self.position is None:
            self.on_success(lambda: self.session.record_uncached(LATE))
        if begins and self.route is not None:
            self.route.generation_begins()
        return begins

    def now(self) -> float | None:
        """The call's place in time, in one unit for all calls of a generation; None if it is not known."""
        if self.session.tracker.is_clocked(self.tick):
            return self.session.schedule_time(self.tick)
        return self.time()

    @property
    def uncached(self) -> Uncached | None:
        """The reason why nothing could be cached; None if a graph had a region, or caching is off."""
        if self.chains or self.session.state.config is None:
            return None
        return self._passed_by or Uncached(NOT_CAPTURED, "no caching: the call reached no graph of this backend")

    def finish(self, diagnose: Callable[[Call], str | None] | None = None) -> None:
        """Count and explain a call that ran uncached.

        `diagnose` may have a better explanation than the graphs. It is asked once for each explanation of theirs.
        """
        uncached = self.uncached
        if uncached is not None:
            with self.session.lock:
                self._place_uncached(uncached.is_step)
                self.on_success(lambda: self.session.record_uncached(uncached.cause, uncached.is_step))
                self.commit()
            self.session.state.warn_once(uncached.explanation, (lambda: diagnose(self)) if diagnose else None)

    def _place_uncached(self, is_step: bool) -> None:
        """Let an uncached call begin a generation too, if that is known without waiting for a device.

        A call that is no step begins a generation only among the calls that are none.
        """
        tracker = self.session.tracker
        if self.is_located or (not tracker.is_clocked(self.tick) and (self.time.waits or self.time() is None)):
            return
        if is_step:
            self.locate()
        elif tracker.begins_aside(Evidence(None, self.branch_name, self.tick, self.time)):
            self.session.aside = Counter()

    def enter(
        self, graph: RewrittenGraph, regions: Sequence[RegionInfo], timestep: torch.Tensor | float | None
    ) -> list[RegionKey]:
        """A graph with regions begins. Returns the regions' keys."""
        self._count(graph, timestep)
        counts = self.chains
        self.chains = counts | {region.loops: counts.get(region.loops, 0) + 1 for region in regions}
        return [RegionKey((region.loops, counts.get(region.loops, 0)), region.block) for region in regions]

    def pass_by(self, graph: RewrittenGraph, uncached: Uncached, timestep: torch.Tensor | float | None = None) -> None:
        """A graph without a region begins. Regions of a later graph may use its timestep."""
        self._count(graph, timestep)
        if self._passed_by is None or self._passed_by.cause == NO_LOOP:
            self._passed_by = uncached

    def _count(self, graph: RewrittenGraph, timestep: torch.Tensor | float | None) -> None:
        self.graphs.append(graph)
        if not self._has_time and timestep is not None:
            self.time, self._has_time = Timestep(timestep), True
