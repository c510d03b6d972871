"""From a call's weights, or from a module, to its `ModelCache`. Weak, and the only module-level state there is.

One compiled graph serves every module of a class, and one module has many graphs (shapes, batch sizes, autocast). So a
graph does not hold state; it finds it at each call by an *anchor*, a weight of the first block of the chain, which
dynamo lifts to an input. A module handed to `cachedit_fx.compile` is known by itself as well.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from cachedit_fx.options import Options
from cachedit_fx.runtime.state import ModelCache

_lock = threading.Lock()
_by_anchor: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_by_module: weakref.WeakKeyDictionary[torch.nn.Module, ModelCache] = weakref.WeakKeyDictionary()


def cache_of_anchor(anchor: torch.Tensor, options: Options) -> ModelCache:
    """The cache of the model that owns `anchor`, under `options`; made at the first call."""
    key: Hashable = options
    with _lock:
        caches: dict[Hashable, ModelCache] = _by_anchor.setdefault(anchor, {})
        if key not in caches:
            caches[key] = ModelCache(options)
        return caches[key]


def caches_of_weights(weights: Iterable[torch.Tensor]) -> list[ModelCache]:
    """Every cache that one of these weights leads to."""
    with _lock:
        found = [cache for weight in weights if weight in _by_anchor for cache in _by_anchor[weight].values()]
    return list(dict.fromkeys(found))


def register(module: torch.nn.Module, cache: ModelCache) -> None:
    """Remember that `module` was compiled with `cache`."""
    with _lock:
        _by_module[module] = cache


def unregister(module: torch.nn.Module) -> None:
    """Forget the module; unknown ones are ignored."""
    with _lock:
        _by_module.pop(module, None)


def cache_of_module(module: torch.nn.Module) -> ModelCache | None:
    """The cache that `cachedit_fx.compile` made for the module, if it did."""
    with _lock:
        return _by_module.get(module)
