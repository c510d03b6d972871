"""Holds the state of one model under one set of options.

    ModelState ── sessions ──► Session ── generation ──► BranchMemory for each (region, CFG branch)
        (one model, one set of options)   (one stream of requests)

Everything here belongs to a `ModelState`; nothing is global, so models, threads and sessions do not meet.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from cachedit_fx.config.options import Options
from cachedit_fx.passes.base import NOTHING_KNOWN, Facts
from cachedit_fx.runtime.checksum import Memo, checksum
from cachedit_fx.runtime.listener import Hint
from cachedit_fx.runtime.presence import come_back, leave
from cachedit_fx.runtime.session import Session, SessionBlock, present_block
from cachedit_fx.runtime.verification import Verifier
from cachedit_fx.runtime.warning import warn

if TYPE_CHECKING:
    from cachedit_fx.auto_parallel import ParallelChoice
    from cachedit_fx.quantization.copies import WeightCopies
    from cachedit_fx.runtime.agreement import Agreement
    from cachedit_fx.runtime.graph import RewrittenGraph
    from cachedit_fx.runtime.hoisted_memory import HoistedMemory

logger = logging.getLogger(__name__)

MAX_SESSIONS = 32
"""Highest number of named sessions of a model. Beyond it, the session unused for longest is dropped, and its next call
computes."""


class ModelState:
    """The state of one model under one set of options.

    Attributes:
        title: name of the model's class; empty if it is not known.
        options: as parsed, with the sizes chosen in place of `parallel`. Only settings that are read at each call may
            change later (`set_options`).
        asked: as parsed.
        choice: how the ranks share a sample, if that is chosen and a graph was seen.
        config: the config in `options.cache`; None if caching is off.
        grid: the ranks that share the work on one sample with this one; None if it works alone.
        ranks: all of them.
        is_apart: whether it worked alone since the ranks met last, and has said so.
        hint: returns the caller's hint about the present call.
        verifier: compares calls with the plain module; None unless the options ask for it.
        traced: knowledge about the module from outside its graphs.
        observe: called with the facts of each graph that is compiled.
        latest: the session that was called last.
        latest_graphs: the graphs of the latest call that succeeded.
        last_call: time of the last call, by the monotonic clock, in seconds.
        hoisted: the kept values of each graph that hoists some.
        copies: quantized copies of the model's weights; None without the option `precision`.
        checksums: of the weights, for comparisons of ranks.
        agreements: what ranks have compared, of each graph that they share.
    """

    def __init__(self, options: Options, title: str = "") -> None:
        self.title = title
        self.options = options
        self.config = options.cache
        self.asked = options
        self.choice: ParallelChoice | None = None
        self._take_grid()
        self.is_apart = False
        self.hint: Callable[[], Hint] = Hint
        self.verifier = Verifier(options.is_exact) if options.verify else None
        self.traced = NOTHING_KNOWN
        self.observe: Callable[[Facts], None] | None = None
        self.latest: Session | None = None
        self.latest_graphs: list[RewrittenGraph] = []
        self.last_call = 0.0
        self.hoisted: weakref.WeakSet[HoistedMemory] = weakref.WeakSet()
        self.copies: WeightCopies | None = None
        self.checksums = Memo(checksum)
        self.agreements: weakref.WeakSet[Agreement] = weakref.WeakSet()
        self._here = threading.local()
        """`session` of each thread: every call asks twice."""
        self._by_thread: weakref.WeakKeyDictionary[threading.Thread, Session] = weakref.WeakKeyDictionary()
        self._by_key: OrderedDict[Hashable, Session] = OrderedDict()
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    @property
    def has_lost_ranks(self) -> bool:
        """Whether the group of the ranks that share a sample was destroyed."""
        return self.ranks is not None and self.ranks.is_destroyed

    def session(self) -> Session:
        """The session of the present thread, or of the `session(key)` that it is in."""
        block = present_block()
        session = self._of_thread() if block is None else self._of_block(block)
        self.latest = session
        self.last_call = time.monotonic()
        return session

    def present_session(self) -> Session | None:
        """The session that `session` returns, if it exists already."""
        block = present_block()
        return getattr(self._here, "session", None) if block is None else self._by_key.get(block.key)

    def session_to_report(self) -> Session | None:
        """The present session. For a thread that never called the model and is in no session, the one used last."""
        return self.present_session() or (None if present_block() else self.latest)

    def sessions(self) -> list[Session]:
        """Every session there is, in the order of their first calls: the threads', then the named ones."""
        with self._lock:
            return [*self._by_thread.values(), *self._by_key.values()]

    def hoisted_values(self) -> tuple[int, tuple[str, ...]]:
        """Size of all kept hoisted values in bytes; the inputs of which other tensors come in at most steps."""
        memories = list(self.hoisted)
        names = dict.fromkeys(name for memory in memories for name in memory.renewed_inputs)
        return sum(memory.bytes_held for memory in memories), tuple(names)

    def end_generation(self) -> None:
        """A pipeline has ended: the session's next call starts a generation. A named session frees its values.

        Raises:
            RanksDisagree: on all ranks that share a sample, if the inputs of the last call differed.
        """
        session = self.present_session()
        if session is None:
            return
        if present_block() is not None:
            session.free()
        session.tracker.refresh()
        for agreement in list(self.agreements):
            agreement.end(session)

    def end_session(self, key: Hashable) -> None:
        """Free a named session; an unknown one is ignored."""
        with self._lock:
            session = self._by_key.pop(key, None)
        if session is not None:
            session.free()

    def _of_thread(self) -> Session:
        session: Session | None = getattr(self._here, "session", None)
        if session is None:
            thread = threading.current_thread()
            session = Session(self, f"thread {thread.name}", is_stray=SessionBlock.open_blocks > 0)
            with self._lock:
                self._here.session = self._by_thread[thread] = session
        elif session.is_stray and not SessionBlock.open_blocks:
            session.is_stray = False
        return session

    def _of_block(self, block: SessionBlock) -> Session:
        key = block.key
        block.states.add(self)
        with self._lock:
            session = self._by_key.get(key)
            if session is None:
                session = self._by_key[key] = Session(self, f"session {key!r}")
            self._by_key.move_to_end(key)
            dropped = self._by_key.popitem(last=False) if len(self._by_key) > MAX_SESSIONS else None
        if dropped is not None:
            logger.info("session %r dropped: more than %d are kept", dropped[0], MAX_SESSIONS)
            dropped[1].free()
        return session

    def set_options(self, options: Options) -> None:
        """Replace the options by others of equal structure. In every session the next call starts a new generation."""
        self.asked, self.config = options, options.cache
        self.options = options if self.choice is None else self.choice.applied(options)
        for session in self.sessions():
            session.refresh(options.cache)

    def settle(self, choice: ParallelChoice) -> None:
        """Let the ranks share a sample as chosen, from the present graph on. All ranks must call it together."""
        self.choice, self.options = choice, choice.applied(self.asked)
        self._take_grid()

    def _take_grid(self) -> None:
        self.grid = self.options.grid()
        self.ranks = self.grid.everyone if self.grid is not None else None

    def announce(self) -> None:
        """Tell the other ranks, if there are any, whether this one will come to calls of the model."""
        if self.ranks is None:
            leave(self.title, "enabled the cache for itself alone")
        else:
            come_back(self.title)

    def leave_ranks(self, reason: str | None) -> None:
        """Tell the other ranks, if there are any, that this one does not take part in calls of the model.

        Args:
            reason: words that follow "the rank"; None if it follows another rank's fault.
        """
        if self.ranks is not None:
            leave(self.title, reason)

    def warn_once(self, message: str, better: Callable[[], str | None] | None = None) -> None:
        """Warn, but only once for each message. If `better` returns a text, the warning has that text instead.

        `better` is called only if the warning is shown.
        """
        with self._lock:
            if message in self._warned:
                return
            self._warned.add(message)
        warn((better and better()) or message)
