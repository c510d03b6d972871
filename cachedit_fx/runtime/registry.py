"""From a call's weights, or from a module, to its `ModelCache`. Weak, and the only module-level state there is.

One compiled graph serves every module of a class, and one module has many graphs (shapes, batch sizes, autocast). So a
graph does not hold state; it finds it at each call by two *anchors*, weights that dynamo lifts to inputs: one of a
block, and the graph's last. Models may share their heads or their blocks, hardly both. A module handed to
`cachedit_fx.compile` is known by itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from cachedit_fx.options import Options
from cachedit_fx.runtime.state import ModelCache

_lock = threading.Lock()
_by_anchors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weight of a block -> last weight -> options -> cache."""
_by_module: weakref.WeakKeyDictionary[torch.nn.Module, ModelCache] = weakref.WeakKeyDictionary()


def cache_of_anchors(block: torch.Tensor, last: torch.Tensor, options: Options) -> ModelCache:
    """The cache of the model that owns both weights, under `options`; made at the first call."""
    with _lock:
        inner: WeakTensorKeyDictionary = _by_anchors.setdefault(block, WeakTensorKeyDictionary())
        caches: dict[Options, ModelCache] = inner.setdefault(last, {})
        if options not in caches:
            caches[options] = ModelCache(options)
        return caches[options]


def caches_of_weights(weights: Iterable[torch.Tensor]) -> list[ModelCache]:
    """Every cache whose two anchors are among these weights."""
    owned = list(weights)
    with _lock:
        inner = [_by_anchors[weight] for weight in owned if weight in _by_anchors]
        found = [cache for table in inner for last in owned if last in table for cache in table[last].values()]
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
