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

Anchors: TypeAlias = tuple[int, int]
"""Indices of the two graph inputs by which a call's module is found."""

_lock = threading.Lock()
_by_anchors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weight of a block -> last weight -> options -> state."""
_by_module: weakref.WeakKeyDictionary[torch.nn.Module, ModelState] = weakref.WeakKeyDictionary()


class StateFinder:
    """From a call's inputs to the state of its module. Holds a given state weakly: dynamo keeps compiled code for good.

    Args:
        options: of the compiled graph.
        state: of the one module that the graph is for; None if it is for any.
        anchors: the inputs to find a module by; None if the graph has no weights.
    """

    def __init__(self, options: Options, state: ModelState | None, anchors: Anchors | None) -> None:
        self.options, self.anchors = options, anchors
        self._own = weakref.ref(state) if state is not None else None
        self._shared = ModelState(options) if state is None and anchors is None else None
        """For a graph without weights, which belongs to no module."""

    def __call__(self, inputs: Sequence[Any]) -> ModelState:
        state = self._own() if self._own is not None else self._shared
        if state is not None:
            return state
        assert self.anchors is not None
        block, last = self.anchors
        return state_of_anchors(inputs[block], inputs[last], self.options)


def anchors_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Anchors | None:
    """The inputs that tell modules apart: the last weight in a numbered member of a container, and the last of all."""
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    weights = [index for index, value in enumerate(example_inputs) if isinstance(value, torch.nn.Parameter)]
    if not weights:
        return None
    in_blocks = [index for index in weights if re.search(r"_\d+_(modules|parameters)_", names[index])]
    return (in_blocks or weights)[-1], weights[-1]


def state_of_anchors(block: torch.Tensor, last: torch.Tensor, options: Options) -> ModelState:
    """The state of the model that owns both weights, under `options`; made at the first call."""
    with _lock:
        by_last: WeakTensorKeyDictionary = _by_anchors.setdefault(block, WeakTensorKeyDictionary())
        states: dict[Options, ModelState] = by_last.setdefault(last, {})
        if options not in states:
            states[options] = ModelState(options)
        return states[options]


def states_of_weights(weights: Iterable[torch.Tensor]) -> list[ModelState]:
    """Every state whose two anchors are among these weights."""
    owned = list(weights)
    with _lock:
        tables = [_by_anchors[weight] for weight in owned if weight in _by_anchors]
        states = [state for table in tables for last in owned if last in table for state in table[last].values()]
    return list(dict.fromkeys(states))


def register(module: torch.nn.Module, state: ModelState) -> None:
    """Remember that `module` was compiled with `state`."""
    with _lock:
        _by_module[module] = state


def unregister(module: torch.nn.Module) -> None:
    """Forget the module; unknown ones are ignored."""
    with _lock:
        _by_module.pop(module, None)


def state_of_module(module: torch.nn.Module) -> ModelState | None:
    """The state that `cachedit_fx.compile` made for the module, if it did."""
    with _lock:
        return _by_module.get(module)


def states_of(module: torch.nn.Module) -> list[ModelState]:
    """The states of a module, or of what `torch.compile` returned for it; the one used last comes first."""
    inner = unwrapped(module)
    state = state_of_module(inner)
    if state is not None:
        return [state]
    return sorted(states_of_weights(inner.parameters()), key=lambda state: state.used, reverse=True)


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside what `torch.compile` returned; any other module as it is."""
    inner = module._modules.get("_orig_mod")
    return inner if isinstance(inner, torch.nn.Module) else module
