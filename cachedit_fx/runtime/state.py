"""What one generation of one model keeps: stored values, counters, statistics.

    ModelCache ── sessions ──► Session ── generation ──► BranchMemory for each (region, CFG branch)
        (one model, one set of options)   (one stream of requests)

`runtime.call` uses all this at a transformer call. Everything here belongs to a `ModelCache`; nothing is global, so
models, threads and sessions do not meet.
"""

from __future__ import annotations

import contextvars
import itertools
import logging
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch

from cachedit_fx.kernels.residual_apply import residual_apply
from cachedit_fx.kernels.residual_store import residual_dtype, residual_like, residual_store
from cachedit_fx.options import DBCacheConfig, Options
from cachedit_fx.passes.detect_block_loops import NOTHING_KNOWN
from cachedit_fx.runtime.calibrators import Moment
from cachedit_fx.runtime.listener import Hint
from cachedit_fx.runtime.policy import Action, History
from cachedit_fx.runtime.prune_policy import PruneHistory
from cachedit_fx.runtime.stats import CacheStats
from cachedit_fx.runtime.stopwatch import Stopwatch
from cachedit_fx.runtime.tracker import Position, Tracker
from cachedit_fx.runtime.warning import warn

if TYPE_CHECKING:
    from cachedit_fx.runtime.call import Call, RegionInfo
    from cachedit_fx.shortcut import Shortcut

logger = logging.getLogger(__name__)

MAX_SESSIONS = 32
"""Named sessions that a model keeps; the one unused for longest is dropped, and its next call computes."""

ChainKey: TypeAlias = tuple[tuple[str, ...], int]
"""The loops that a chain runs through, and its number among those of a call that run through the same."""
RegionKey: TypeAlias = tuple[ChainKey, int | None]
"""The chain that a region was cut from, and its block where it is a single one."""

_session_key: contextvars.ContextVar[Hashable] = contextvars.ContextVar("cachedit_fx_session", default=None)


@contextmanager
def session(key: Hashable) -> Iterator[None]:
    """Keep interleaved generations apart: calls made inside belong to the generation named `key`.

    For a server that steps several requests in turn. Any hashable key but None; a request's own id is a good one.
    Without it every thread has a session of its own.
    """
    if key is None:
        raise ValueError("session(None): the key must be a hashable object other than None, such as a request id")
    token = _session_key.set(key)
    try:
        yield
    finally:
        _session_key.reset(token)


@dataclass
class BranchMemory:
    """What is stored for one region and one CFG branch. Buffers outlive their generation and are written again."""

    history: History = field(default_factory=History)
    signature: Hashable = None
    """Shapes and dtypes of the streams that entered when it was stored."""
    reference: torch.Tensor | None = None
    """r of the last computed step, float32. Without a signature, a buffer for it."""
    start: int = 0
    """The step from which the history counts (`policy.context_start`)."""
    trail: list[Moment] = field(default_factory=list)
    """The steps since the earliest one whose values are stored, the latest first."""
    stored: list[list[torch.Tensor]] = field(default_factory=list)
    """For each result of the region, as the computed steps of `trail`: its residual, or the result itself where it has
    no base."""
    dtypes: list[torch.dtype] = field(default_factory=list)
    strides: list[tuple[int, ...]] = field(default_factory=list)
    """Of the results as they were computed; what reads them is given the same layout."""

    def forget(self, start: int = 0) -> None:
        """Begin anew at step `start`: keep the buffers, not their meaning."""
        self.history = History()
        self.start = start
        self.signature = None
        self.trail = []

    def store(
        self,
        results: Sequence[torch.Tensor],
        bases: Sequence[torch.Tensor | None],
        now: Moment,
        kept: int,
        dtype: str = "wider",
    ) -> None:
        """Keep the residuals of a computed step, and of the `kept` - 1 computed before it, in `dtype` (see
        `CalibratorConfig.calibrator_state_dtype`)."""
        if len(self.stored) != len(results):
            self.stored = [[] for _ in results]
        self.trail = _since_computed([now, *self.trail], kept)
        self.dtypes = [result.dtype for result in results]
        self.strides = [_strides(result) for result in results]
        oldest = []
        for buffers, result in zip(self.stored, results, strict=True):
            buffers[:] = [buffer for buffer in buffers if _fits(buffer, result, dtype)][:kept]
            oldest.append(buffers.pop() if len(buffers) == kept else residual_like(result, dtype))
        residual_store(results, bases, oldest)
        for buffers, buffer in zip(self.stored, oldest, strict=True):
            buffers.insert(0, buffer)

    def restore(self, bases: Sequence[torch.Tensor | None], weights: Sequence[float]) -> tuple[torch.Tensor, ...]:
        """The region's results from the bases of the present step and the weights of the stored values. They have the
        computed ones' strides: matrix products round differently on another layout."""
        used = [index for index, weight in enumerate(weights) if weight]
        outs = tuple(
            torch.empty_strided(buffers[0].shape, strides, dtype=dtype, device=buffers[0].device)
            for buffers, dtype, strides in zip(self.stored, self.dtypes, self.strides, strict=True)
        )
        terms = [[buffers[index] for index in used] for buffers in self.stored]
        residual_apply(bases, terms, [weights[index] for index in used], outs)
        return outs

    @property
    def bytes_held(self) -> int:
        tensors = [*itertools.chain.from_iterable(self.stored), *([] if self.reference is None else [self.reference])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _since_computed(trail: Sequence[Moment], count: int) -> list[Moment]:
    """The trail back to its `count`-th computed step."""
    ends = [index for index, moment in enumerate(trail) if moment.computed][:count]
    return list(trail[: ends[-1] + 1])


def _strides(value: torch.Tensor) -> tuple[int, ...]:
    """Those that a twin of `value` can have whose elements share no memory, as an expanded dimension's do."""
    return torch.empty_like(value, device="meta").stride() if 0 in value.stride() else value.stride()


def _fits(buffer: torch.Tensor, result: torch.Tensor, dtype: str) -> bool:
    same_place = buffer.shape == result.shape and buffer.device == result.device
    return same_place and buffer.dtype == residual_dtype(result, dtype)


class Session:
    """One stream of requests to one model: a tracker, the present generation's memory, its statistics."""

    def __init__(self, cache: ModelCache) -> None:
        self.cache = cache
        self.tracker = Tracker(cache.config or DBCacheConfig())
        self.generation = -1
        self.memories: dict[tuple[RegionKey, int], BranchMemory] = {}
        self.prune_histories: dict[tuple[ChainKey, int, int], PruneHistory] = {}
        """By chain, branch and the step that steps are counted from."""
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
        self.prune_histories = {}
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
        found = self.memories.get((region, branch))
        if found is None:
            found = self.memories[region, branch] = BranchMemory()
        return found

    def region_stats(self, region: RegionKey, info: RegionInfo) -> CacheStats:
        """Of a region, or of all regions of a chain whose blocks are pruned one by one."""
        chain, block = region
        if chain not in self.stats:
            self.configs[chain], _ = self.cache.options.policy(info.loop)
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
                memory.bytes_held for (region, _), memory in self.memories.items() if region[0] == chain
            )
        if not self.stats and self.uncached:
            return [CacheStats("uncached", 0, 0, 0, uncached_causes=self.uncached)]
        return list(self.stats.values())

    def _warn_of_inert_thresholds(self) -> None:
        """Once a generation: at its end, or when its statistics are asked for."""
        if self.cache.config is None or self.inert_told:
            return
        for region, stats in self.stats.items():
            message = stats.inert_threshold_message(self.configs[region])
            if message:
                self.inert_told = True
                warn(f"{stats.name}: {message}; no step was cached")

    def _warn_of_long_masks(self) -> None:
        """At a generation's end: one that stopped early was not cached as its mask means. One step is a warm-up run."""
        for region, stats in self.stats.items():
            mask = self.configs[region].steps_computation_mask
            if mask is not None and 1 < stats.executed_steps < len(mask):
                self.cache.warn_once(
                    f"steps_computation_mask has {len(mask)} digits, and a generation had {stats.executed_steps} "
                    "steps: make the mask, or the preset, for the number of steps that the pipeline takes"
                )


class ModelCache:
    """All that is remembered of one model under one set of options.

    Attributes:
        options: as parsed; only the policy, that is, what is not in `options.structure()`, may change later
            (`set_policy`).
        hint: returns what the caller says of the present call.
        module: what is known of the module.
        used: when it was called last, by the monotonic clock.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.config = options.cache
        self.hint: Callable[[], Hint] = Hint
        self.module = NOTHING_KNOWN
        self.latest: Session | None = None
        self.used = 0.0
        self._here = threading.local()
        """`session` of each thread: every call asks twice."""
        self._by_thread: weakref.WeakKeyDictionary[threading.Thread, Session] = weakref.WeakKeyDictionary()
        self._by_key: OrderedDict[Hashable, Session] = OrderedDict()
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def session(self) -> Session:
        """The session of the present thread, or of the `session(key)` that it is in."""
        key = _session_key.get()
        found = getattr(self._here, "session", None) if key is None else self._named(key)
        if found is None:
            with self._lock:
                found = self._here.session = self._by_thread[threading.current_thread()] = Session(self)
        self.latest = found
        self.used = time.monotonic()
        return found

    def _named(self, key: Hashable) -> Session:
        with self._lock:
            found = self._by_key.get(key)
            if found is None:
                found = self._by_key[key] = Session(self)
            self._by_key.move_to_end(key)
            if len(self._by_key) > MAX_SESSIONS:
                dropped, _ = self._by_key.popitem(last=False)
                logger.info("session %r dropped: more than %d are kept", dropped, MAX_SESSIONS)
        return found

    def set_policy(self, options: Options) -> None:
        """Go on under `options`, whose structure is the same. Takes effect at the next call, which starts a new
        generation in every session."""
        self.options, self.config = options, options.cache
        with self._lock:
            for found in (*self._by_thread.values(), *self._by_key.values()):
                found.refresh(options.cache)

    def warn_once(self, message: str, better: Callable[[], str | None] | None = None) -> None:
        """Warn, the first time that this model has this to say; in the words of `better`, asked only then, if any."""
        with self._lock:
            if message in self._warned:
                return
            self._warned.add(message)
        warn((better and better()) or message)
