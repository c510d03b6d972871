"""Settings that were accepted for a transformer, for its statistics. References to modules are weak."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from cachedit_fx.runtime.registry import unwrapped

if TYPE_CHECKING:
    from cachedit_fx.compat.adapters import BlockList
    from cachedit_fx.compat.parallelism import ParallelismConfig
    from cachedit_fx.compat.quantization import QuantizeConfig


@dataclass(frozen=True)
class Kept:
    """What was asked for a transformer, apart from its cache's configs."""

    parallelism_config: ParallelismConfig | None = None
    quantize_config: QuantizeConfig | None = None
    attention_backend: str | None = None
    lists: tuple[BlockList, ...] = ()
    """The block lists that an adapter named, in the order in which the transformer has them."""


_kept: weakref.WeakKeyDictionary[torch.nn.Module, Kept] = weakref.WeakKeyDictionary()


def kept_of(module: torch.nn.Module) -> Kept:
    """The module's settings; without any of them if nothing was kept."""
    return _kept.get(unwrapped(module), Kept())


def keep(module: torch.nn.Module, **changes: Any) -> None:
    """Keep those of the settings that are not None."""
    values = {name: value for name, value in changes.items() if value is not None}
    if values:
        _kept[unwrapped(module)] = replace(kept_of(module), **values)


def forget(module: torch.nn.Module) -> None:
    """Forget the module; an unknown one is ignored."""
    _kept.pop(unwrapped(module), None)
