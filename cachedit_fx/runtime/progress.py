"""Shows on a terminal that a model is being captured and compiled, which takes seconds to minutes, once.

Nothing is shown if stderr is no terminal; the log has the same words.
"""

from __future__ import annotations

import contextvars
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status

logger = logging.getLogger(__name__)

LONG = 2.0
"""Seconds of compiling after which its end is worth a line."""

_status: contextvars.ContextVar[Status | None] = contextvars.ContextVar("cachedit_fx_status", default=None)


@contextmanager
def compiling(name: str) -> Iterator[None]:
    """Context manager around capturing and compiling the model called `name`. Inner ones show nothing of their own."""
    logger.info("capturing %s", name)
    if _status.get() is not None or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    console, start = Console(stderr=True), time.perf_counter()
    with console.status(f"cachedit_fx: capturing {name}, once for inputs of this kind") as status:
        token = _status.set(status)
        try:
            yield
        finally:
            _status.reset(token)
    seconds = time.perf_counter() - start
    if seconds > LONG:
        console.print(f"cachedit_fx: {name} captured and compiled in {seconds:.0f} s", style="dim", highlight=False)


def report(step: str) -> None:
    """Show the present step of compiling."""
    logger.info(step)
    status = _status.get()
    if status is not None:
        status.update(f"cachedit_fx: {step}")
