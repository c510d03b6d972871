"""What one generation of one model keeps: stored values, counters, statistics. And the call that uses them.

    ModelCache ── sessions ──► Session ── generation ──► BranchMemory for each (region, CFG branch)
        (one model, one set of options)   (one stream of requests)

The rewritten graph sees a `Call`: it asks `decide` once for each region, then `run`. Everything here belongs to a
`ModelCache`; nothing is global, so models, threads and sessions do not meet.
"""

from __future__ import annotations

import contextvars
import itertools
import logging
import threading
import time
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cachedit_fx.kernels.l1_diff import l1_difference, residual
from cachedit_fx.kernels.residual_apply import apply_residual, residual_dtype, residual_like, store_residual
from cachedit_fx.options import CalibratorConfig, DBCacheConfig, Options
from cachedit_fx.runtime.calibrators import coefficients, values_kept
from cachedit_fx.runtime.listener import Hint
from cachedit_fx.runtime.policy import Action, Decision, History, Reason, advance, decide
from cachedit_fx.runtime.stats import CacheStats
from cachedit_fx.runtime.tracker import Position, Tracker

logger = logging.getLogger(__name__)

MAX_SESSIONS = 32
"""Named sessions that a model keeps; the one unused for longest is dropped, and its next call computes."""

NO_REGION = "no region to bypass"
"""The cause of an uncached call that a graph without a region is."""

_session_key: contextvars.ContextVar[Hashable] = contextvars.ContextVar("cachedit_fx_session", default=None)


class CacheWarning(UserWarning):
    """The result is right, but something keeps the cache from helping."""


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


def read_back(values: Sequence[torch.Tensor]) -> list[float]:
    """The 0-d `values` as numbers, in one transfer: the only place where the host waits for the device."""
    if all(on_host(value) for value in values):
        return [float(value) for value in values]
    exact = torch.float32 if values[0].device.type == "mps" else torch.float64  # Metal has no float64
    numbers: list[float] = torch.stack([value.detach().to(exact) for value in values]).tolist()
    return numbers


@dataclass(frozen=True)
class RegionInfo:
    """What the statistics say of a region: its name, blocks of its chain, F and B."""

    name: str
    num_blocks: int
    first: int
    last: int


@dataclass
class BranchMemory:
    """What is stored for one region and one CFG branch. Buffers outlive their generation and are written again."""

    history: History = field(default_factory=History)
    signature: Hashable = None
    """Shapes and dtypes of the streams that entered when it was stored."""
    reference: torch.Tensor | None = None
    """r of the last computed step, float32."""
    steps: list[int] = field(default_factory=list)
    """Numbers of the computed steps whose values are stored, the latest first."""
    stored: list[list[torch.Tensor]] = field(default_factory=list)
    """For each result of the region, as `steps`: its residual, or the result itself where it has no base."""
    dtypes: list[torch.dtype] = field(default_factory=list)

    def forget(self) -> None:
        """Start a generation: keep the buffers, not their meaning."""
        self.history = History()
        self.signature = self.reference = None
        self.steps = []

    def store(
        self, results: Sequence[torch.Tensor], bases: Sequence[torch.Tensor | None], step: int, kept: int
    ) -> None:
        """Keep the residuals of a computed step, and of the `kept` - 1 computed before it."""
        if len(self.stored) != len(results):
            self.stored = [[] for _ in results]
        self.steps = [step, *self.steps][:kept]
        self.dtypes = [result.dtype for result in results]
        for buffers, result, base in zip(self.stored, results, bases, strict=True):
            buffers[:] = [buffer for buffer in buffers if _fits(buffer, result)][:kept]
            oldest = buffers.pop() if len(buffers) == kept else residual_like(result)
            store_residual(result, base, oldest)
            buffers.insert(0, oldest)

    def restore(self, bases: Sequence[torch.Tensor | None], weights: Sequence[float]) -> tuple[torch.Tensor, ...]:
        """The region's results from the bases of the present step and the weights of the stored values."""
        return tuple(
            apply_residual(base, buffers[: len(weights)], weights, dtype)
            for base, buffers, dtype in zip(bases, self.stored, self.dtypes, strict=True)
        )

    @property
    def bytes_held(self) -> int:
        tensors = [*itertools.chain.from_iterable(self.stored), *([] if self.reference is None else [self.reference])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _fits(buffer: torch.Tensor, result: torch.Tensor) -> bool:
    same_place = buffer.shape == result.shape and buffer.device == result.device
    return same_place and buffer.dtype == residual_dtype(result)


class Session:
    """One stream of requests to one model: a tracker, the present generation's memory, its statistics."""

    def __init__(self, cache: ModelCache) -> None:
        self.cache = cache
        self.tracker = Tracker(cache.config or DBCacheConfig())
        self.generation = -1
        self.memories: dict[tuple[int, int], BranchMemory] = {}
        self.stats: list[CacheStats] = []
        self.uncached: Counter[str] = Counter()
        self.watches: list[tuple[CacheStats, Action, Stopwatch]] = []
        self.calls = 0
        self.inert_told = False
        self.shared_differences: dict[tuple[int, int], float] = {}

    def begin(self, position: Position) -> None:
        """Called at every position; clears the memory where it starts a generation."""
        if position.generation == self.generation:
            return
        self._warn_of_inert_thresholds()
        self.inert_told = False
        self.generation = position.generation
        for memory in self.memories.values():
            memory.forget()
        self.stats = []
        self.watches = []
        self.uncached = Counter()
        self.shared_differences = {}

    def refresh(self, config: DBCacheConfig | None) -> None:
        """Let the next call start a generation, under `config`."""
        if config is not None:
            self.tracker.config = config
        self.tracker.refresh()

    def memory(self, region: int, branch: int) -> BranchMemory:
        return self.memories.setdefault((region, branch), BranchMemory())

    def region_stats(self, number: int, info: RegionInfo) -> CacheStats:
        while len(self.stats) <= number:
            self.stats.append(
                CacheStats(info.name, info.num_blocks, info.first, info.last, uncached_causes=self.uncached)
            )
        return self.stats[number]

    def record_uncached(self, cause: str) -> None:
        """Count a call on which the policy had no say."""
        self.calls += 1
        self.uncached[cause] += 1

    def summary(self) -> list[CacheStats]:
        """The present generation's statistics, one for each region; one without blocks where no region ever ran."""
        self._warn_of_inert_thresholds()
        for stats, action, watch in self.watches:
            stats.record_seconds(action, watch.seconds())
        self.watches = []
        for number, stats in enumerate(self.stats):
            stats.bytes_held = sum(memory.bytes_held for key, memory in self.memories.items() if key[0] == number)
        if not self.stats and self.uncached:
            return [CacheStats("uncached", 0, 0, 0, uncached_causes=self.uncached)]
        return self.stats

    def _warn_of_inert_thresholds(self) -> None:
        """Once a generation: at its end, or when its statistics are asked for."""
        config = self.cache.config
        if config is None or self.inert_told:
            return
        for stats in self.stats:
            message = stats.inert_threshold_message(config)
            if message:
                self.inert_told = True
                warnings.warn(f"{stats.name}: {message}; no step was cached", CacheWarning, stacklevel=3)


class ModelCache:
    """All that is remembered of one model under one set of options.

    Attributes:
        options: as parsed; only the policy, `options.cache` less F and B and `options.calibrator`, may change
            later (`set_policy`).
        hint: returns what the caller says of the present call.
        used: when it was called last, by the monotonic clock.
        has_region: whether any graph of the model has a region.
        spans_graphs: whether it is told when the module's call ends (`end_call`), whose graphs may be several.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.config = options.cache
        self.hint: Callable[[], Hint] = Hint
        self.latest: Session | None = None
        self.used = 0.0
        self.has_region = False
        self.spans_graphs = False
        self._pending: str | None = None
        self._by_thread: weakref.WeakKeyDictionary[threading.Thread, Session] = weakref.WeakKeyDictionary()
        self._by_key: OrderedDict[Hashable, Session] = OrderedDict()
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def session(self) -> Session:
        """The session of the present thread, or of the `session(key)` that it is in."""
        key = _session_key.get()
        with self._lock:
            if key is None:
                thread = threading.current_thread()
                found = self._by_thread.get(thread)
                if found is None:
                    found = self._by_thread[thread] = Session(self)
            else:
                found = self._by_key.get(key)
                if found is None:
                    found = self._by_key[key] = Session(self)
                self._by_key.move_to_end(key)
                if len(self._by_key) > MAX_SESSIONS:
                    dropped, _ = self._by_key.popitem(last=False)
                    logger.info("session %r dropped: more than %d are kept", dropped, MAX_SESSIONS)
            self.latest = found
            self.used = time.monotonic()
        return found

    def set_policy(self, config: DBCacheConfig, calibrator: CalibratorConfig | None) -> None:
        """Change the policy. Takes effect at the next call, which starts a new generation in every session."""
        self.options = replace(self.options, cache=config, calibrator=calibrator)
        self.config = config
        with self._lock:
            for found in (*self._by_thread.values(), *self._by_key.values()):
                found.refresh(config)

    def note_uncached(self, cause: str, explanation: str) -> None:
        """Count a call of a graph that runs uncached, and say why once. Where a module's call spans several graphs, one
        without a region is no cause of either if another has one: that is known at the call's end (`end_call`)."""
        if cause == NO_REGION and self.has_region:
            return
        self.session().record_uncached(cause)
        if cause == NO_REGION and self.spans_graphs:
            self._pending = explanation
        else:
            self.warn_once(explanation)

    def note_cached(self) -> Session:
        """Count a call of a graph that has a region, and return its session."""
        session = self.session()
        session.calls += 1
        self.has_region = True
        session.uncached.pop(NO_REGION, None)
        return session

    def end_call(self) -> None:
        """The module's call is over: warn if none of its graphs had a region."""
        if self._pending is not None and not self.has_region:
            self.warn_once(self._pending)
        self._pending = None

    def warn_once(self, message: str) -> None:
        """Warn, the first time that this model has this to say."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, CacheWarning, stacklevel=3)


class Call:
    """One transformer call, as the rewritten graph sees it."""

    def __init__(
        self,
        session: Session,
        regions: Sequence[RegionInfo],
        timestep: torch.Tensor | float | None,
        hint: Hint,
    ) -> None:
        self.session = session
        self.regions = regions
        self.config = session.cache.config or DBCacheConfig()
        self.calibrator = session.cache.options.calibrator
        self._time = timestep if hint.time is None else hint.time
        self._branch_name = hint.branch
        self._position: Position | None = None
        self._residuals: dict[int, tuple[torch.Tensor | None, Hashable]] = {}

    def decide(
        self,
        number: int,
        reference: torch.Tensor | None,
        hidden: torch.Tensor | None,
        streams: Sequence[torch.Tensor],
    ) -> Decision:
        """Compute region `number` or reuse what is stored?

        Args:
            reference: base of the hidden states behind the first F blocks (H_in in a plain chain).
            hidden: those hidden states, H_F; None where F is 0.
            streams: the values that enter the region; what is stored must fit their shapes.
        """
        signature = tuple(
            (stream.shape, stream.dtype) if isinstance(stream, torch.Tensor) else stream for stream in streams
        )
        current = None
        if hidden is not None and _may_measure(self.config):
            current = residual(hidden, reference)
        measured: dict[int, float] = {}
        if self._position is None:
            measured = self._locate(number, current, signature)
        assert self._position is not None
        generation, step, branch = self._position
        memory = self.session.memory(number, branch)
        history = replace(
            memory.history,
            stored=memory.history.stored and memory.signature is not None,
            shapes_match=memory.signature == signature,
        )

        def difference() -> float:
            shared = self.session.shared_differences
            if not self.config.cfg_diff_compute_separate and (number, step) in shared:
                return shared[number, step]
            value = measured.get(branch)
            if value is None:
                assert memory.reference is not None and current is not None
                (value,) = read_back([l1_difference(memory.reference, current)])
            shared[number, step] = value
            return value

        decision = decide(self.config, step, history, difference)
        self._residuals[number] = (current, signature)
        self._warn(decision)
        return decision

    def run(
        self,
        number: int,
        decision: Decision,
        compute: Callable[..., tuple[Any, ...]],
        bases: Callable[..., tuple[Any, ...]],
        inputs: Sequence[Any],
    ) -> tuple[Any, ...]:
        """Carry the decision out: the region's results, computed and stored, or restored."""
        assert self._position is not None
        _, step, branch = self._position
        memory = self.session.memory(number, branch)
        watch = Stopwatch(inputs)
        if decision.action is Action.REUSE:
            weights = coefficients(self.calibrator, memory.steps, step)
            results = memory.restore(self._bases(bases, inputs, len(memory.stored)), weights)
        else:
            results = compute(*inputs)
            if may_reuse(self.config):
                current, signature = self._residuals[number]
                if signature != memory.signature:
                    memory.steps = []
                memory.reference, memory.signature = current, signature
                found = self._bases(bases, inputs, len(results))
                memory.store(results, found, step, values_kept(self.calibrator))
        memory.history = advance(memory.history, decision)
        stats = self.session.region_stats(number, self.regions[number])
        stats.record(branch, step, decision)
        self.session.watches.append((stats, decision.action, watch.stop()))
        return results

    def _bases(
        self, bases: Callable[..., tuple[torch.Tensor | None, ...]], inputs: Sequence[Any], count: int
    ) -> tuple[torch.Tensor | None, ...]:
        """What the stored residuals of `count` results are relative to; nothing where whole values are predicted."""
        whole = self.calibrator is not None and self.calibrator.calibrator_cache_type == "hidden_states"
        return (None,) * count if whole else bases(*inputs)

    def _locate(self, number: int, current: torch.Tensor | None, signature: Hashable) -> dict[int, float]:
        """Find the position; where the timestep is on the device, read it together with the differences against every
        branch that the call may turn out to be."""
        tracker = self.session.tracker
        time_now, name = self._time, self._branch_name
        measured: dict[int, float] = {}
        if isinstance(time_now, torch.Tensor):
            branches = []
            values = [time_now.detach().amax()]
            if current is not None and not on_host(time_now):
                for branch in tracker.candidates(name):
                    memory = self.session.memories.get((number, branch))
                    if memory and memory.reference is not None and memory.signature == signature:
                        branches.append(branch)
                        values.append(l1_difference(memory.reference, current).to(time_now.device))
            time_now, *differences = read_back(values)
            measured = dict(zip(branches, differences, strict=True))
        self._position = tracker.observe(time_now, name, signature)
        if self._position.generation != self.session.generation:
            measured = {}
        self.session.begin(self._position)
        return measured

    def _warn(self, decision: Decision) -> None:
        cache = self.session.cache
        if decision.reason is Reason.NOT_FINITE:
            cache.warn_once("a difference is infinite or not a number: such steps are computed")
        elif decision.reason is Reason.MASK_ENDED:
            mask = self.config.steps_computation_mask or ()
            cache.warn_once(f"steps_computation_mask has {len(mask)} digits; steps past its end are computed")


def on_host(tensor: torch.Tensor) -> bool:
    """Whether reading the tensor does not make the host wait for a device."""
    return tensor.device.type == "cpu"


def _may_measure(config: DBCacheConfig) -> bool:
    return config.residual_diff_threshold > 0 and not config.static


def may_reuse(config: DBCacheConfig) -> bool:
    """Whether any step may ever reuse: if not, nothing needs to be stored."""
    if config.static:
        return not all(config.steps_computation_mask or ())
    return config.residual_diff_threshold > 0


class Stopwatch:
    """Wall time of a region: by the clock on the host, by events on a GPU, which are read only when somebody asks."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self._device = next((item.device for item in inputs if isinstance(item, torch.Tensor)), torch.device("cpu"))
        self._events: list[torch.cuda.Event] = []
        if self._device.type == "cuda":
            self._mark_event()
        self._times = [time.perf_counter()]

    def stop(self) -> Stopwatch:
        """End the measurement; waits for nothing."""
        if self._events:
            self._mark_event()
        self._times.append(time.perf_counter())
        return self

    def seconds(self) -> float:
        """The measured time. On a GPU this waits until the region is done."""
        if self._events:
            first, last = self._events
            last.synchronize()
            return float(first.elapsed_time(last)) / 1e3
        return self._times[-1] - self._times[0]

    def _mark_event(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
