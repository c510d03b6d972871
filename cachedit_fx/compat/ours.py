"""Tells objects of this package from those of cache_dit, which a script with two imports hands over by mistake."""

from __future__ import annotations

from typing import Any

from cachedit_fx.config.rules import OptionError


def check_ours(name: str, value: Any, title: str, *kinds: type) -> None:
    """Raise unless the value is None, or an object of one of these classes, which `title` names.

    Raises:
        OptionError: the message says what is allowed, or what to import.
    """
    if value is None or isinstance(value, kinds):
        return
    reject_other_package(value, f"{name}: ")
    raise OptionError(f"{name}={value!r} is not allowed: it must be a {title} of cachedit_fx.compat, or None")


def reject_other_package(value: Any, where: str = "") -> None:
    """Raise if the object is of the package cache_dit itself.

    Raises:
        OptionError: the message says what to import.
    """
    kind = type(value)
    if kind.__module__.partition(".")[0] == "cache_dit":
        raise OptionError(f"{where}this {kind.__name__} is of the package cache_dit; import it from cachedit_fx.compat")
