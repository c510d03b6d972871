"""The rules of settings: what a value may be, the words for it in an error, and the nearest known name."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any


class OptionError(ValueError):
    """A setting that is unknown, out of range, or at odds with another one."""


@dataclass(frozen=True)
class Rule:
    """What a setting may be: a test, the words for it in an error message, and the names to choose from, if any."""

    allows: Callable[[Any], bool]
    words: str
    choices: tuple[str, ...] = ()


def setting(default: Any, rule: Rule, **more: Any) -> Any:
    return field(default=default, metadata={"rule": rule}, **more)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def integer(low: int, note: str = "") -> Rule:
    """An integer not below `low`; `note` says what it counts."""

    def allows(value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low

    return Rule(allows, f"an integer >= {low}{note and f' ({note})'}")


def choice(*names: str) -> Rule:
    """One of these names."""
    return Rule(lambda value: isinstance(value, str) and value in names, f"one of {', '.join(map(repr, names))}", names)


def optional(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.allows(value), f"{rule.words}, or None", rule.choices)


def is_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


def is_switches(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], bool)
        for item in value
    )


FLAG = Rule(lambda value: isinstance(value, bool), "True or False")


MASK = Rule(
    lambda value: isinstance(value, tuple) and bool(value) and all(bit in (0, 1) for bit in value),
    "a non-empty list, tuple or string of ones (compute) and zeros (may reuse), one for each step",
)


LIMIT = integer(-1, "a number of steps; -1 = no limit")


def nearest(name: str, known: Iterable[str]) -> str:
    """Of the known names the one that `name` was probably meant to be."""
    by_lower = {other.lower(): other for other in known}
    return by_lower[difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.0)[0]]


def reject_unknown(given: Iterable[Any], known: Mapping[str, str]) -> None:
    """Raise on the first name that is not among `known`, a map from name to the class that documents it."""
    for name in given:
        if name not in known:
            guess = nearest(str(name), known)
            raise OptionError(
                f"unknown option {name!r}; the nearest known one is {guess!r} (see {known[guess]}). "
                f"Known options: {', '.join(sorted(known, key=str.lower))}."
            )


def check(name: str, value: Any, rule: Rule) -> None:
    """Raise unless the rule allows the value, saying what it must be, and the nearest name where there are names."""
    if not rule.allows(value):
        guess = isinstance(value, str) and rule.choices and f"; did you mean {nearest(value, rule.choices)!r}?"
        raise OptionError(f"{name}={value!r} is not allowed: it must be {rule.words}{guess or ''}")


def check_fields(settings: Any) -> None:
    for item in fields(settings):
        check(item.name, getattr(settings, item.name), item.metadata["rule"])
