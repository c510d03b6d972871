"""All that is remembered of one model under one set of options.

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
from cachedit_fx.passes.base import NOTHING_KNOWN
from cachedit_fx.runtime.listener import Hint
from cachedit_fx.runtime.warning import warn

if TYPE_CHECKING:
    pass
from cachedit_fx.runtime.session import Session, session_key

logger = logging.getLogger(__name__)

MAX_SESSIONS = 32
"""Named sessions that a model keeps; the one unused for longest is dropped, and its next call computes."""


class ModelState:
    """All that is remembered of one model under one set of options.

    Attributes:
        options: as parsed; only the policy, that is, what is not in `options.structure()`, may change later
            (`set_policy`).
        hint: returns what the caller says of the present call.
        traced: what is known of the module beside its graphs.
        used: when it was called last, by the monotonic clock.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.config = options.cache
        self.hint: Callable[[], Hint] = Hint
        self.traced = NOTHING_KNOWN
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
        key = session_key.get()
        session = getattr(self._here, "session", None) if key is None else self._named(key)
        if session is None:
            with self._lock:
                session = self._here.session = self._by_thread[threading.current_thread()] = Session(self)
        self.latest = session
        self.used = time.monotonic()
        return session

    def _named(self, key: Hashable) -> Session:
        with self._lock:
            session = self._by_key.get(key)
            if session is None:
                session = self._by_key[key] = Session(self)
            self._by_key.move_to_end(key)
            if len(self._by_key) > MAX_SESSIONS:
                dropped, _ = self._by_key.popitem(last=False)
                logger.info("session %r dropped: more than %d are kept", dropped, MAX_SESSIONS)
        return session

    def set_policy(self, options: Options) -> None:
        """Go on under `options`, whose structure is the same. Takes effect at the next call, which starts a new
        generation in every session."""
        self.options, self.config = options, options.cache
        with self._lock:
            for session in (*self._by_thread.values(), *self._by_key.values()):
                session.refresh(options.cache)

    def warn_once(self, message: str, better: Callable[[], str | None] | None = None) -> None:
        """Warn, the first time that this model has this to say; in the words of `better`, asked only then, if any."""
        with self._lock:
            if message in self._warned:
                return
            self._warned.add(message)
        warn((better and better()) or message)
