"""Patterns of block inputs and outputs, and patch functors: accepted, because cache-dit's scripts name them.

The graph shows what runs from block to block. So no pattern has to be stated, and no module needs a patch.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch

from cachedit_fx.compat.ours import check_ours, reject_other_package
from cachedit_fx.config.rules import OptionError
from cachedit_fx.runtime.warning import SettingWarning, warn

_HIDDEN, _ENCODER = "hidden_states", "encoder_hidden_states"


class ForwardPattern(Enum):
    """The streams that a block takes and returns, in this order."""

    Pattern_0 = (_HIDDEN, _ENCODER), (_HIDDEN, _ENCODER)
    Pattern_1 = (_HIDDEN, _ENCODER), (_ENCODER, _HIDDEN)
    Pattern_2 = (_HIDDEN, _ENCODER), (_HIDDEN,)
    Pattern_3 = (_HIDDEN,), (_HIDDEN,)
    Pattern_4 = (_HIDDEN,), (_HIDDEN, _ENCODER)
    Pattern_5 = (_HIDDEN,), (_ENCODER, _HIDDEN)

    def __init__(self, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        self.In, self.Out = inputs, outputs
        self.Forward_H_only = inputs == (_HIDDEN,)
        self.Return_H_Only = outputs == (_HIDDEN,)
        self.Return_H_First = outputs == (_HIDDEN, _ENCODER)
        self.Supported = True

    @staticmethod
    def supported_patterns() -> list[ForwardPattern]:
        """Every pattern."""
        return list(ForwardPattern)


Pattern_0, Pattern_1, Pattern_2, Pattern_3, Pattern_4, Pattern_5 = ForwardPattern


def check_pattern(pattern: Any) -> ForwardPattern:
    """The argument, if it is a pattern.

    Raises:
        OptionError: if it is none.
    """
    if isinstance(pattern, ForwardPattern):
        return pattern
    names = ", ".join(each.name for each in ForwardPattern)
    reject_other_package(pattern, "forward_pattern: ")
    raise OptionError(f"forward_pattern={pattern!r} is not allowed: it must be one of ForwardPattern.{names}")


def leave_out(functor: Any) -> None:
    """Say once that a patch functor is not applied.

    Raises:
        OptionError: if the argument is no `PatchFunctor`.
    """
    check_ours("patch_functor", functor, "PatchFunctor", PatchFunctor)
    warn(f"{type(functor).__name__}: cachedit_fx patches nothing, so it is left out", SettingWarning)


class PatchFunctor:
    """Accepted as `patch_functor`, and never applied: no block needs a patch. No method of a subclass is called."""

    def apply(self, transformer: torch.nn.Module, *_: Any, **__: Any) -> torch.nn.Module:
        """The transformer as it is. Says once that nothing needs patching."""
        leave_out(self)
        return transformer
