"""Defines the package's warnings, shown at the user's line of code."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_INSIDE = ("cachedit_fx.", "torch.", "diffusers.", "accelerate.", "peft.", "transformers.", "contextlib.", "functools.")
"""Packages between the user's call and us."""


class CacheWarning(UserWarning):
    """The result is right, but the model runs without the gain of caching."""


class SettingWarning(UserWarning):
    """A setting or a name was accepted for compatibility, and has no effect."""


def warn(message: str, category: type[Warning] = CacheWarning) -> None:
    """Warn at the user's line: the nearest frame outside this package and those that call models."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and _is_inside(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level if frame is not None else 2)


def _is_inside(frame: FrameType) -> bool:
    is_graph = frame.f_code.co_filename.startswith("<eval_with_key>")  # a graph module's code
    return is_graph or (str(frame.f_globals.get("__name__")) + ".").startswith(_INSIDE)
