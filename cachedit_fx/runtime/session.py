"""Holds one stream of requests to one model: tracker, memory, statistics. Sessions separate interleaved generations."""

from __future__ import annotations

import contextvars
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.config.options import LoopSettings
from cachedit_fx.runtime.clock import Tick, guidance
from cachedit_fx.runtime.guard import on_host, read_back
from cachedit_fx.runtime.memory import BranchMemory
from cachedit_fx.runtime.policies.base import Action, GenerationFacts, Policy, policy_of
from cachedit_fx.runtime.region import ChainKey, RegionKey
from cachedit_fx.runtime.stats import CacheStats
from cachedit_fx.runtime.stopwatch import Stopwatch
from cachedit_fx.runtime.tracker import Tracker

if TYPE_CHECKING:
    from cachedit_fx.runtime.call import Call
    from cachedit_fx.runtime.model_state import ModelState
    from cachedit_fx.runtime.region import RegionInfo
    from cachedit_fx.runtime.shortcut import Shortcut


class SessionBlock:
    """One `with session(key)` block that is open.

    Attributes:
        key: the session's name.
        states: the models that were called inside.
    """

    open_blocks: ClassVar[int] = 0
    """Blocks that are open, in all threads."""
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, key: Hashable, outer: SessionBlock | None) -> None:
        self.key, self.outer, self.is_open = key, outer, True
        self.states: weakref.WeakSet[ModelState] = weakref.WeakSet()

    @classmethod
    def count(cls, change: int) -> None:
        with cls._lock:
            cls.open_blocks += change


_latest_block: contextvars.ContextVar[SessionBlock | None] = contextvars.ContextVar("cachedit_fx_session", default=None)


def present_block() -> SessionBlock | None:
    """The innermost block that is open. A block in a generator may be closed before one that was opened later."""
    block = _latest_block.get()
    while block is not None and not block.is_open:
        block = block.outer
    return block


@contextmanager
def session(key: Hashable, *, ends: bool = False) -> Iterator[None]:
    """Context manager that keeps interleaved generations apart: calls inside belong to the session named `key`.

    It is for a server that steps several requests alternately, in one thread or in several. Without it every thread has
    a separate session. The block must be open in the thread that calls the model: `asyncio.to_thread` takes it along,
    `loop.run_in_executor` does not.

    Args:
        key: any hashable object but None; a request's id is a good one.
        ends: whether the block holds a whole request: its stored values are freed at the block's end. Otherwise they
            are freed when a pipeline of diffusers returns, and by `cachedit_fx.end_session`.

    A block inside a generator function stays open for the code that drives the generator: open it there instead.

    Raises:
        ValueError: if the key is None.
        TypeError: if the key is unhashable.
    """
    if key is None:
        raise ValueError("session(None): the key must be a hashable object other than None, such as a request id")
    hash(key)  # TypeError: unhashable
    block = SessionBlock(key, present_block())
    _latest_block.set(block)
    SessionBlock.count(1)
    try:
        yield
    finally:
        SessionBlock.count(-1)
        block.is_open = False
        _latest_block.set(present_block())
        if ends:
            for state in block.states:
                state.end_session(key)


_OF_A_GENERATION = (
    "generation",
    "_histories",
    "shortcuts",
    "stats",
    "watches",
    "uncached",
    "elsewhere",
    "shared_differences",
    "failed_calls",
    "tick",
    "_chosen",
)
"""Attributes of a session that every generation has anew."""


class Session:
    """One stream of requests to one model: a tracker, and the present generation's memory and statistics.

    Args:
        state: the model's.
        name: for statistics: the session's key, or the thread's name.
        is_stray: whether it belongs to a thread without a `session(key)`, while other threads have one.
    """

    def __init__(self, state: ModelState, name: str = "", is_stray: bool = False) -> None:
        self.state, self.name, self.is_stray = state, name, is_stray
        self.lock = threading.RLock()
        """Held while memory and statistics change, and while they are read."""
        self.tracker = Tracker(state.config or DBCacheConfig(), state.warn_once)
        self.generation = -1
        self.memories: dict[tuple[RegionKey, int], BranchMemory] = {}
        self._histories: dict[tuple[ChainKey, int], tuple[int, Any]] = {}
        """(chain, branch) -> the step at which the context began, and the policy's history since."""
        self.shortcuts: dict[Hashable, Shortcut] = {}
        """Look of a call -> shortcut, in the present generation."""
        self.spares: dict[RegionKey, torch.Tensor] = {}
        """Region -> a buffer for its next r, float32."""
        self.stats: dict[ChainKey, CacheStats] = {}
        self.configs: dict[ChainKey, DBCacheConfig] = {}
        self.uncached: Counter[str] = Counter()
        self.elsewhere: Counter[int] = Counter()
        """Branch -> its calls that other ranks computed."""
        self.step_calls: tuple[tuple[int, int], int] = (-1, -1), 0
        """(generation, step) of the latest call that ranks shared out by branches, and the step's calls so far."""
        self.aside: Counter[str] | None = None
        """Causes of calls that are no steps, of a generation that had no step yet; None if there is none."""
        self.failed_calls = 0
        """Calls of the present generation that raised, and those since the last one that did not."""
        self._failures = 0
        """Calls that raised since the last one that did not."""
        self.watches: list[tuple[CacheStats, Action, Stopwatch]] = []
        self._times: tuple[torch.Tensor | None, list[float]] = (None, [])
        """A clock's schedule, and its elements as numbers; None and no elements while none was read."""
        self.call: Call | None = None
        """The present transformer call; None between calls."""
        self.tick: Tick | None = None
        """The clock at the generation's latest call."""
        self._chosen: dict[int | None, LoopSettings] = {}
        """Loop -> its settings in the present generation, once they are chosen."""
        self.shared_differences: dict[tuple[RegionKey, int], float] = {}

    def begin(self, generation: int) -> Callable[[], None]:
        """Begin a generation: forget the memory and the statistics. Returns what restores them."""
        self._warn_of_inert_thresholds()
        if self.tick is None or self.tick.is_last:
            self._warn_of_long_masks()
        before = {name: getattr(self, name) for name in _OF_A_GENERATION}
        contexts = [memory.forget() for memory in self.memories.values()]

        def restore() -> None:
            vars(self).update(before)
            for undo in contexts:
                undo()

        self.generation = generation
        self._histories = {}
        self.shortcuts = {}
        self.stats = {}
        self.watches = []
        self.uncached = Counter()
        self.elsewhere = Counter()
        self.shared_differences = {}
        self.failed_calls = self._failures
        self.tick = None
        self._chosen = {}
        return restore

    def settings(self, loop: int | None, step: int, tick: Tick | None) -> LoopSettings:
        """The settings of a loop, or of the whole chain, at a step. A policy may choose others at the second step."""
        settings = self._chosen.get(loop)
        if settings is None:
            settings = self.state.options.settings_of(loop)
            if step == 0:
                return settings
            chosen = settings.policy.choose(self.facts(step, tick))
            if chosen is not None:
                settings = LoopSettings(policy_of(chosen[0]), chosen[1])
            self._chosen[loop] = settings
        return settings

    def facts(self, step: int, tick: Tick | None) -> GenerationFacts:
        """What is known of the present generation at a step: the steps so far, and those that the clock has left."""
        first = self.tracker.generation.first
        place = tick.place_since(first.tick if first is not None else None) if tick is not None else None
        steps = len(place[0]) - place[1] + step if place is not None else None
        scale, doubles_batch = guidance()
        is_guided = doubles_batch or len(self.tracker.generation.shapes) > 1
        return GenerationFacts(steps, self._finite(scale) if is_guided else 1.0)

    def _finite(self, scale: Any) -> float | None:
        """A pipeline's scale of guidance as a number; None, with a warning, if it is no finite number."""
        if scale is None:
            return None
        with suppress(OverflowError):
            if isinstance(scale, Real) and math.isfinite(scale):
                return float(scale)
        words = str(scale) if isinstance(scale, float) else f"of type {type(scale).__name__}"
        self.state.warn_once(
            f"the pipeline's guidance scale, {words}, is no finite number: the preset is as careful as for the "
            "strongest guidance"
        )
        return None

    def schedule_time(self, tick: Tick) -> float | None:
        """The time of a clock's place, as a number. The schedule is read once in a generation."""
        if tick.place is None:
            return None
        schedule, index = tick.place
        return self._numbers(schedule)[index]

    def schedule(self, tick: Tick | None, waits: bool = False) -> tuple[list[float], int] | None:
        """A clock's schedule as numbers, and the place in it.

        None if there is none, or if reading the schedule would wait for a device, unless `waits` is True.
        """
        if tick is None or tick.place is None or not self.tracker.is_clocked(tick):
            return None
        schedule, index = tick.place
        if not 0 <= index < len(schedule):
            return None
        is_read = self._times[0] is schedule
        return (self._numbers(schedule), index) if waits or is_read or on_host(schedule) else None

    def _numbers(self, schedule: torch.Tensor) -> list[float]:
        """The elements of a clock's schedule."""
        if self._times[0] is not schedule:
            self._times = schedule, read_back([schedule])
        return self._times[1]

    def forget(self) -> None:
        """Use nothing stored again: the next call starts a generation."""
        for memory in self.memories.values():
            memory.forget()
        self.tracker.refresh()

    def free(self) -> None:
        """Free the stored values. The statistics stay."""
        with self.lock:
            self._measure_bytes()
            self.memories, self.spares, self._histories, self.shortcuts = {}, {}, {}, {}
            self.tracker.refresh()

    @property
    def bytes_held(self) -> int:
        """Size of all stored values, in bytes."""
        return sum(memory.bytes_held for memory in self.memories.copy().values())

    def _measure_bytes(self) -> None:
        memories = self.memories.copy()
        for chain, stats in self.stats.items():
            held = [memory.bytes_held for (region, _), memory in memories.items() if region.chain == chain]
            stats.bytes_held = sum(held) if held else stats.bytes_held

    def record_failure(self) -> None:
        """Count a call that raised."""
        self.failed_calls += 1
        self._failures += 1

    def record_success(self) -> None:
        """Take note that a call did not raise."""
        self._failures = 0

    def refresh(self, config: DBCacheConfig | None) -> None:
        """Let the next call start a generation, under `config`."""
        if config is not None:
            self.tracker.config = config
        self.tracker.refresh()

    def memory(self, region: RegionKey, branch: int) -> BranchMemory:
        """The memory of a region in a branch."""
        memory = self.memories.get((region, branch))
        if memory is None:
            memory = self.memories[region, branch] = BranchMemory()
        return memory

    def history(self, chain: ChainKey, branch: int, start: int, policy: Policy[Any, Any]) -> Any:
        """The policy's history of a chain in a branch, in the context that began at step `start`."""
        history_start, history = self._histories.get((chain, branch), (None, None))
        return history if history_start == start else policy.start()

    def set_history(self, chain: ChainKey, branch: int, start: int, history: Any) -> Callable[[], None]:
        """Store a policy's history for its next decision. Returns what restores the one before."""
        histories, key = self._histories, (chain, branch)
        before = histories.get(key)
        histories[key] = start, history

        def restore() -> None:
            if before is None:
                del histories[key]
            else:
                histories[key] = before

        return restore

    def region_stats(self, region: RegionKey, info: RegionInfo, config: DBCacheConfig) -> CacheStats:
        """The statistics of a region. All regions of a chain whose blocks are pruned separately share one entry."""
        chain, block = region
        self.configs[chain] = config
        if chain not in self.stats:
            self.stats[chain] = CacheStats(
                name=f"{'region' if block is None else 'chain'}_{len(self.stats)}",
                num_blocks=info.num_blocks,
                first=info.first,
                last=info.last,
                uncached_causes=self.uncached,
                elsewhere=self.elsewhere,
                prunes_blocks=block is not None,
                loop=info.loop,
            )
        return self.stats[chain]

    def record_uncached(self, cause: str, is_step: bool = True) -> None:
        """Count a call about which no policy decided."""
        counts = self.uncached if is_step or self.aside is None else self.aside
        counts[cause] += 1

    def record_elsewhere(self, branch: int) -> None:
        """Count a call that another rank computes."""
        self.elsewhere[branch] += 1

    def end_aside(self, is_joined: bool) -> None:
        """A step comes. If it joins the generation of the calls that are no steps, they count in its generation."""
        aside, self.aside = self.aside, None
        if aside and is_joined:
            self.uncached.update(aside)

    def summary(self) -> list[CacheStats]:
        """The present generation's statistics: one entry for each region, or with DBPrune for each chain.

        They are copies, which later calls do not change. If no region ran in the generation, uncached and failed calls,
        and those that other ranks computed, are in one entry without blocks.
        """
        with self.lock:
            self._warn_of_inert_thresholds()
            if self.is_over:
                self._warn_of_long_masks()
            watches, self.watches = self.watches, []
            for stats, action, watch in watches:
                stats.record_seconds(action, watch.seconds())
            self._measure_bytes()
            uncached = self.uncached if self.aside is None else self.aside
            entries = [stats.copy() for stats in self.stats.values()] if self.aside is None else []
            if not entries and (uncached or self.failed_calls or self.elsewhere):
                name = "uncached" if uncached or self.failed_calls else "elsewhere"
                entries = [
                    CacheStats(name, 0, 0, 0, uncached_causes=Counter(uncached), elsewhere=self.elsewhere.copy())
                ]
            for stats in entries:
                stats.session, stats.failed_calls = self.name, self.failed_calls
        return entries

    def _warn_of_inert_thresholds(self) -> None:
        """Warn once for each threshold: at a generation's end, or when its statistics are read."""
        if self.state.config is None:
            return
        for chain, stats in self.stats.items():
            config = self.configs[chain]
            message = stats.inert_threshold_message(config)
            if message:
                threshold = f"{stats.name}: inert threshold {config.residual_diff_threshold}"
                self.state.warn_once(threshold, f"{stats.name}: {message}; no step was cached".__str__)

    @property
    def is_over(self) -> bool:
        """Whether the present generation is known to have ended: by its clock, a pipeline's end, or `refresh`."""
        return not self.tracker.generation.calls or (self.tick is not None and self.tick.is_last)

    def _warn_of_long_masks(self) -> None:
        """Warn of a generation that ended before its mask did. A generation of one step is a warm-up.

        A generation that was cancelled is left out if a clock shows it.
        """
        for chain, stats in self.stats.items():
            mask = self.configs[chain].steps_computation_mask
            if mask is not None and 1 < stats.executed_steps < len(mask):
                self.state.warn_once(
                    f"steps_computation_mask has {len(mask)} digits, and a generation had {stats.executed_steps} "
                    "steps: make the mask, or the preset, for the number of steps that the pipeline takes"
                )
