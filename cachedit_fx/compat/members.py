"""Finds the member of an enumeration that a text names, in any case."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

from cachedit_fx.config.rules import reject_unknown

Member = TypeVar("Member", bound=Enum)


def member_of(kind: type[Member], text: str, aliases: Mapping[str, Member] | None = None) -> Member:
    """The member whose name or value `text` is, in any case, or that `aliases` has for it in lower case.

    Raises:
        OptionError: on an unknown name.
    """
    members = {word.lower(): each for each in kind for word in (each.name, str(each.value))} | dict(aliases or {})
    reject_unknown([text.lower()], dict.fromkeys(members, f"compat.{kind.__name__}"))
    return members[text.lower()]
