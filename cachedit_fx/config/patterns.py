"""Matches names of modules with patterns: `blocks.1` and `blocks.*.attn` match `blocks.1.attn.to_q`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from cachedit_fx.config.rules import OptionError, nearest


def patterns_of(title: str, values: Any) -> tuple[str, ...]:
    """A name, or a list of names, as a tuple."""
    values = (values,) if isinstance(values, str) else values
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) for value in values):
        raise OptionError(f"{title}={values!r} is not allowed: it must be a name or a list of names")
    return tuple(values)


def matches(name: str, pattern: str) -> bool:
    """Whether neighbouring parts of a dotted name match: `blocks.1` matches `blocks.1.up`, and not `blocks.10.up`."""
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The pattern that is the whole name, or else the first that matches it; None if none does."""
    patterns = tuple(patterns)
    return name if name in patterns else next((pattern for pattern in patterns if matches(name, pattern)), None)


def check_patterns(patterns: Mapping[str, str], names: Collection[str], kind: str) -> None:
    """Raise on a pattern that matches none of the names.

    Args:
        patterns: pattern -> the argument that it is from.
        kind: of the named things, in the plural.
    """
    for pattern, title in patterns.items():
        if pattern not in names and not any(matches(name, pattern) for name in names):
            parts = {part for name in names for part in (name, *name.split(".")) if not part.isdecimal()}
            guess = f"; did you mean {nearest(pattern, parts)!r}?" if parts else ""
            raise OptionError(f"{title}: {pattern!r} matches none of the {len(names)} {kind}{guess}")
