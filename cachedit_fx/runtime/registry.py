"""From a call's weights, or from a module, to its `ModelState`. Weak, and the only module-level state there is.

One compiled graph serves every module of a class, and one module has many graphs (shapes, batch sizes, autocast). So a
graph does not hold state; it finds it at each call by two *anchors*, weights that dynamo lifts to inputs: one of a
block, and the graph's last. Models may share their heads or their blocks, hardly both. A module handed to
`cachedit_fx.compile` is known by itself.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from cachedit_fx.config.options import Options
from cachedit_fx.runtime.model_state import ModelState

_lock = threading.Lock()


_by_anchors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weight of a block -> last weight -> options -> cache."""


_by_module: weakref.WeakKeyDictionary[torch.nn.Module, ModelState] = weakref.WeakKeyDictionary()


def cache_of_anchors(block: torch.Tensor, last: torch.Tensor, options: Options) -> ModelState:
    """The cache of the model that owns both weights, under `options`; made at the first call."""
    with _lock:
        inner: WeakTensorKeyDictionary = _by_anchors.setdefault(block, WeakTensorKeyDictionary())
        caches: dict[Options, ModelState] = inner.setdefault(last, {})
        if options not in caches:
            caches[options] = ModelState(options)
        return caches[options]


def caches_of_weights(weights: Iterable[torch.Tensor]) -> list[ModelState]:
    """Every cache whose two anchors are among these weights."""
    owned = list(weights)
    with _lock:
        inner = [_by_anchors[weight] for weight in owned if weight in _by_anchors]
        found = [cache for table in inner for last in owned if last in table for cache in table[last].values()]
    return list(dict.fromkeys(found))


def register(module: torch.nn.Module, cache: ModelState) -> None:
    """Remember that `module` was compiled with `cache`."""
    with _lock:
        _by_module[module] = cache


def unregister(module: torch.nn.Module) -> None:
    """Forget the module; unknown ones are ignored."""
    with _lock:
        _by_module.pop(module, None)


def cache_of_module(module: torch.nn.Module) -> ModelState | None:
    """The cache that `cachedit_fx.compile` made for the module, if it did."""
    with _lock:
        return _by_module.get(module)


Anchors: TypeAlias = tuple[int, int]
"""Indices of the two inputs by which a call's module is found."""


class StateFinder:
    """From a call's inputs to the cache of its module, which is held weakly: dynamo keeps compiled code for good."""

    def __init__(self, options: Options, cache: ModelState | None, anchors: Anchors | None) -> None:
        self.options, self.anchors = options, anchors
        self.own = weakref.ref(cache) if cache is not None else None
        self.nobodys = ModelState(options) if cache is None and anchors is None else None

    def __call__(self, args: Sequence[Any]) -> ModelState:
        found = self.own() if self.own is not None else self.nobodys
        if found is not None:
            return found
        assert self.anchors is not None
        block, last = self.anchors
        return cache_of_anchors(args[block], args[last], self.options)


def anchors_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Anchors | None:
    """Which inputs tell modules apart: the last weight in a numbered member of a container, and the last of all."""
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    weights = [index for index, value in enumerate(example_inputs) if isinstance(value, torch.nn.Parameter)]
    if not weights:
        return None
    in_blocks = [index for index in weights if re.search(r"_\d+_(modules|parameters)_", names[index])]
    return (in_blocks or weights)[-1], weights[-1]


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    inner = module._modules.get("_orig_mod")
    return inner if isinstance(inner, torch.nn.Module) else module


def states_of(module: torch.nn.Module) -> list[ModelState]:
    """The caches of a module, the one used last ahead."""
    inner = unwrapped(module)
    known = cache_of_module(inner)
    if known is not None:
        return [known]
    return sorted(caches_of_weights(inner.parameters()), key=lambda cache: cache.used, reverse=True)
