"""Defines the rules of settings: the test of a value, its words in an error, and the nearest known name."""

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from dataclasses import field as dataclass_field
from numbers import Integral, Real
from typing import Any


class OptionError(ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class ContractError(RuntimeError):
    """A policy or a calibrator returned what its contract does not allow."""


@dataclass(frozen=True)
class Rule:
    """The values that a setting may have.

    Attributes:
        allows: the test.
        words: the test in words, for an error message; `{choices}` stands for the names.
        choices: names to choose from. It may be a table that still grows, such as the policies': every check reads it.
    """

    allows: Callable[[Any], bool]
    words: str
    choices: Collection[str] = ()

    @property
    def description(self) -> str:
        """The words, with the names filled in."""
        return self.words.replace("{choices}", f"one of {', '.join(map(repr, self.choices))}")


def setting(default: Any, rule: Rule, **more: Any) -> Any:
    """A dataclass field with a default and a rule."""
    return dataclass_field(default=default, metadata={"rule": rule}, **more)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def integer(low: int, note: str = "") -> Rule:
    """An integer not below `low`; `note` says what it counts."""

    def allows(value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low

    return Rule(allows, f"an integer >= {low}{note and f' ({note})'}")


def choice(*names: str) -> Rule:
    """One of these names."""
    return Rule(lambda value: isinstance(value, str) and value in names, "{choices}", names)


def optional(rule: Rule) -> Rule:
    """None, or a value that `rule` allows."""
    return Rule(lambda value: value is None or rule.allows(value), f"{rule.words}, or None", rule.choices)


FLAG = Rule(lambda value: isinstance(value, bool), "True or False")
MASK = Rule(
    lambda value: isinstance(value, tuple) and bool(value) and all(bit in (0, 1) for bit in value),
    "a non-empty list, tuple or string of ones (compute) and zeros (may reuse), one for each step",
)
LIMIT = integer(-1, "a number of steps; -1 = no limit")


def as_mask(value: Any) -> Any:
    """A mask as a tuple, if it is a list or a string of digits. `MASK` rejects other values."""
    if not isinstance(value, (list, tuple, str)):
        return value
    digits = [{"0": 0, "1": 1}.get(digit, digit) for digit in value] if isinstance(value, str) else value
    return tuple(int(digit) if digit in (0, 1) else digit for digit in digits)


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` that is most similar to `name`."""
    by_lower = {other.lower(): other for other in names}
    return by_lower[difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.0)[0]]


def reject_unknown(names: Iterable[Any], owners: Mapping[str, str]) -> None:
    """Raise on the first name that is not in `owners`, a map from name to the class that documents it."""
    for name in names:
        if name not in owners:
            guess = nearest(str(name), owners)
            raise OptionError(
                f"unknown option {name!r}; the nearest known one is {guess!r} (see {owners[guess]}). "
                f"Known options: {', '.join(sorted(owners, key=str.lower))}."
            )


def check(name: str, value: Any, rule: Rule) -> None:
    """Raise unless the rule allows the value. The error describes the rule, and names the nearest choice."""
    if not rule.allows(value):
        guess = isinstance(value, str) and rule.choices and f"; did you mean {nearest(value, rule.choices)!r}?"
        raise OptionError(f"{name}={value!r} is not allowed: it must be {rule.description}{guess or ''}")


def check_config_class(config_class: Any, base: type, owner: str) -> None:
    """Raise unless `config_class` is a subclass of `base`: a config of the base itself would stand for every other."""
    if not (isinstance(config_class, type) and issubclass(config_class, base)):
        raise TypeError(f"{owner} has the config class {config_class!r}: it must be a subclass of {base.__name__}")


def check_fields(settings: Any) -> None:
    """Check every field of a dataclass by its rule."""
    for field in fields(settings):
        check(field.name, getattr(settings, field.name), field.metadata["rule"])
