"""One stream of requests to one model: tracker, memory, statistics; and how interleaved generations are kept apart."""

from __future__ import annotations

import contextvars
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.runtime.policies.base import Action, Policy
from cachedit_fx.runtime.stats import CacheStats
from cachedit_fx.runtime.stopwatch import Stopwatch
from cachedit_fx.runtime.tracker import Position, Tracker
from cachedit_fx.runtime.warning import warn

if TYPE_CHECKING:
    from cachedit_fx.runtime.call import Call
    from cachedit_fx.runtime.model_state import ModelState
    from cachedit_fx.runtime.region import RegionInfo
    from cachedit_fx.runtime.shortcut import Shortcut
from cachedit_fx.runtime.memory import BranchMemory
from cachedit_fx.runtime.region import ChainKey, RegionKey

session_key: contextvars.ContextVar[Hashable] = contextvars.ContextVar("cachedit_fx_session", default=None)


@contextmanager
def session(key: Hashable) -> Iterator[None]:
    """Keep interleaved generations apart: calls made inside belong to the generation named `key`.

    For a server that steps several requests in turn. Any hashable key but None; a request's own id is a good one.
    Without it every thread has a session of its own.
    """
    if key is None:
        raise ValueError("session(None): the key must be a hashable object other than None, such as a request id")
    token = session_key.set(key)
    try:
        yield
    finally:
        session_key.reset(token)


class Session:
    """One stream of requests to one model: a tracker, the present generation's memory, its statistics."""

    def __init__(self, state: ModelState) -> None:
        self.state = state
        self.tracker = Tracker(state.config or DBCacheConfig())
        self.generation = -1
        self.memories: dict[tuple[RegionKey, int], BranchMemory] = {}
        self._histories: dict[tuple[ChainKey, int], tuple[int, Any]] = {}
        """(chain, branch) -> the step at which the context began, and the policy's history since."""
        self.shortcuts: dict[Hashable, Shortcut] = {}
        """By the look of a call, in the present generation."""
        self.spares: dict[RegionKey, torch.Tensor] = {}
        """A buffer for each region's next r, float32."""
        self.stats: dict[ChainKey, CacheStats] = {}
        self.configs: dict[ChainKey, DBCacheConfig] = {}
        self.uncached: Counter[str] = Counter()
        self.watches: list[tuple[CacheStats, Action, Stopwatch]] = []
        self.call: Call | None = None
        """The transformer call under way."""
        self.inert_told = False
        self.shared_differences: dict[tuple[RegionKey, int], float] = {}

    def begin(self, position: Position) -> None:
        """Called at every position; clears the memory where it starts a generation."""
        if position.generation == self.generation:
            return
        self._warn_of_inert_thresholds()
        self._warn_of_long_masks()
        self.inert_told = False
        self.generation = position.generation
        for memory in self.memories.values():
            memory.forget()
        self._histories = {}
        self.shortcuts = {}
        self.stats = {}
        self.watches = []
        self.uncached = Counter()
        self.shared_differences = {}

    def refresh(self, config: DBCacheConfig | None) -> None:
        """Let the next call start a generation, under `config`."""
        if config is not None:
            self.tracker.config = config
        self.tracker.refresh()

    def memory(self, region: RegionKey, branch: int) -> BranchMemory:
        """What is stored for a region in a branch."""
        memory = self.memories.get((region, branch))
        if memory is None:
            memory = self.memories[region, branch] = BranchMemory()
        return memory

    def history(self, chain: ChainKey, branch: int, start: int, policy: Policy[Any, Any]) -> Any:
        """The policy's history of a chain in a branch, in the context that began at step `start`."""
        began, history = self._histories.get((chain, branch), (None, None))
        return history if began == start else policy.start()

    def set_history(self, chain: ChainKey, branch: int, start: int, history: Any) -> None:
        """Keep a policy's history for its next decision."""
        self._histories[chain, branch] = start, history

    def region_stats(self, region: RegionKey, info: RegionInfo) -> CacheStats:
        """Of a region, or of all regions of a chain whose blocks are pruned one by one."""
        chain, block = region
        if chain not in self.stats:
            self.configs[chain] = self.state.options.settings_of(info.loop).policy.config
            self.stats[chain] = CacheStats(
                name=f"{'region' if block is None else 'chain'}_{len(self.stats)}",
                num_blocks=info.num_blocks,
                first=info.first,
                last=info.last,
                uncached_causes=self.uncached,
                prunes_blocks=block is not None,
            )
        return self.stats[chain]

    def record_uncached(self, cause: str) -> None:
        """Count a call on which the policy had no say."""
        self.uncached[cause] += 1

    def summary(self) -> list[CacheStats]:
        """The present generation's statistics, one for each region, or each chain with DBPrune; one without blocks
        where no region ever ran."""
        self._warn_of_inert_thresholds()
        for stats, action, watch in self.watches:
            stats.record_seconds(action, watch.seconds())
        self.watches = []
        for chain, stats in self.stats.items():
            stats.bytes_held = sum(
                memory.bytes_held for (region, _), memory in self.memories.items() if region.chain == chain
            )
        if not self.stats and self.uncached:
            return [CacheStats("uncached", 0, 0, 0, uncached_causes=self.uncached)]
        return list(self.stats.values())

    def _warn_of_inert_thresholds(self) -> None:
        """Once a generation: at its end, or when its statistics are asked for."""
        if self.state.config is None or self.inert_told:
            return
        for chain, stats in self.stats.items():
            message = stats.inert_threshold_message(self.configs[chain])
            if message:
                self.inert_told = True
                warn(f"{stats.name}: {message}; no step was cached")

    def _warn_of_long_masks(self) -> None:
        """At a generation's end: one that stopped early was not cached as its mask means. One step is a warm-up run."""
        for chain, stats in self.stats.items():
            mask = self.configs[chain].steps_computation_mask
            if mask is not None and 1 < stats.executed_steps < len(mask):
                self.state.warn_once(
                    f"steps_computation_mask has {len(mask)} digits, and a generation had {stats.executed_steps} "
                    "steps: make the mask, or the preset, for the number of steps that the pipeline takes"
                )
