"""The files that unfinished runs are kept in, and from which they go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cachedit_fx.bench.errors import RequestError
from cachedit_fx.report.files import whole_files


class ResumeError(RequestError):
    """A file cannot be continued; the message says why."""


def save_page(path: Path, page: Mapping[str, Any]) -> None:
    """Write a run as it stands, whole or not at all.

    Args:
        page: `settings`, from names to what the run was asked for, `rows`, and whatever else is of interest.
    """
    with whole_files(path.parent) as staging:
        (staging / path.name).write_text(json.dumps(page, indent=1, default=str) + "\n")


def kept_rows(
    path: Path, command: str, settings: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """The rows of an earlier run, as `save_page` wrote them.

    Args:
        command: writes such files, for messages.
        settings: of the run that goes on, as JSON gives them back.
        defaults: of settings that may be newer than the file.

    Raises:
        ResumeError: if there is no earlier run, or it was made with other settings.
    """
    try:
        page = json.loads(path.read_text())
        before = {**defaults, **page["settings"]}
        rows: list[dict[str, Any]] = page["rows"]
    except OSError as error:
        raise ResumeError(f"there is nothing to resume: {path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ResumeError(f"{path} was not written by `{command}`") from None
    pairs = {name: (before.get(name), now) for name, now in settings.items()}
    changed = [f"{name} {_short(old)} there and {_short(now)} now" for name, (old, now) in pairs.items() if old != now]
    if changed:
        words = ", ".join(changed)
        raise ResumeError(f"{path} was made with other settings: {words}. Use the same ones, or another folder")
    return rows


def _short(value: Any) -> str:
    return f"{len(value)} others" if isinstance(value, list) else repr(value)
