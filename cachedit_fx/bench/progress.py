"""How measuring reports its progress, whoever shows it."""

from __future__ import annotations

from typing import Protocol


class Tell(Protocol):
    """Takes a report.

    Args:
        what: what happens now; empty if nothing new begins.
        done: units of work done since the last report.
        more: units of work to do, beyond those reported before.
    """

    def __call__(self, what: str = "", done: int = 0, more: int = 0) -> None: ...


def silent(what: str = "", done: int = 0, more: int = 0) -> None:
    """Shows nothing."""
