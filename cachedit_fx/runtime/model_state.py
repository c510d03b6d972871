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

from cachedit_fx.config.options import Options
from cachedit_fx.passes.base import NOTHING_KNOWN, Facts
from cachedit_fx.runtime.listener import Hint
from cachedit_fx.runtime.session import Session, session_key
from cachedit_fx.runtime.verification import Verifier
from cachedit_fx.runtime.warning import warn

logger = logging.getLogger(__name__)

MAX_SESSIONS = 32
"""Highest number of named sessions of a model. Beyond it, the session unused for longest is dropped, and its next call
computes."""


class ModelState:
    """The state of one model under one set of options.

    Attributes:
        options: as parsed. Only settings that are read at each call may change later (`set_options`).
        config: the config in `options.cache`; None if caching is off.
        hint: returns the caller's hint about the present call.
        verifier: compares calls with the plain module; None unless the options ask for it.
        traced: knowledge about the module from outside its graphs.
        observe: called with the facts of each graph that is compiled.
        latest: the session that was called last.
        last_call: time of the last call, by the monotonic clock, in seconds.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.config = options.cache
        self.hint: Callable[[], Hint] = Hint
        self.verifier = Verifier(options.inner_backend == "eager") if options.verify else None
        self.traced = NOTHING_KNOWN
        self.observe: Callable[[Facts], None] | None = None
        self.latest: Session | None = None
        self.last_call = 0.0
        self._here = threading.local()
        """`session` of each thread: every call asks twice."""
        self._by_thread: weakref.WeakKeyDictionary[threading.Thread, Session] = weakref.WeakKeyDictionary()
        self._by_key: OrderedDict[Hashable, Session] = OrderedDict()
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def session(self) -> Session:
        """The session of the present thread, or of the `session(key)` that it is in."""
        key = session_key.get()
        session = getattr(self._here, "session", None) if key is None else self._named(key)
        if session is None:
            with self._lock:
                session = self._here.session = self._by_thread[threading.current_thread()] = Session(self)
        self.latest = session
        self.last_call = time.monotonic()
        return session

    def _named(self, key: Hashable) -> Session:
        with self._lock:
            session = self._by_key.get(key)
            if session is None:
                session = self._by_key[key] = Session(self)
            self._by_key.move_to_end(key)
            if len(self._by_key) > MAX_SESSIONS:
                oldest, _ = self._by_key.popitem(last=False)
                logger.info("session %r dropped: more than %d are kept", oldest, MAX_SESSIONS)
        return session

    def set_options(self, options: Options) -> None:
        """Replace the options by others of equal structure. In every session the next call starts a new generation."""
        self.options, self.config = options, options.cache
        with self._lock:
            for session in (*self._by_thread.values(), *self._by_key.values()):
                session.refresh(options.cache)

    def warn_once(self, message: str, better: Callable[[], str | None] | None = None) -> None:
        """Warn, but only once for each message. If `better` returns a text, the warning has that text instead.

        `better` is called only if the warning is shown.
        """
        with self._lock:
            if message in self._warned:
                return
            self._warned.add(message)
        warn((better and better()) or message)
