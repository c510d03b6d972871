"""Finds a module's `ModelState` by the module, or by a call's weights. Holds the package's only module-level state.

One compiled graph serves every module of a class, and one module has many graphs (shapes, batch sizes, autocast). So a
graph holds no state. At each call it finds the state by two *anchors*, weights that dynamo lifts to inputs: a weight of
a block, and the graph's last weight. Two models may share their heads or their blocks, but hardly both. The state of a
module passed to `cachedit_fx.compile` is found by the module. All references are weak.
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
"""Indices of the two graph inputs that identify a call's module."""

_lock = threading.Lock()
_by_anchors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weight of a block -> last weight -> options -> state."""
_by_module: weakref.WeakKeyDictionary[torch.nn.Module, ModelState] = weakref.WeakKeyDictionary()


class StateFinder:
    """Finds the state of a call's module by the call's inputs.

    Args:
        options: of the compiled graph.
        state: of the one module that the graph is for; None if the graph is for any module. The reference is weak,
            since dynamo keeps compiled code for good.
        anchors: the inputs that identify a module; None if the graph has no weights.
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
    """The inputs that identify a module: the last weight in a numbered member of a container, and the last of all."""
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    weights = [index for index, value in enumerate(example_inputs) if isinstance(value, torch.nn.Parameter)]
    if not weights:
        return None
    in_blocks = [index for index in weights if re.search(r"_\d+_(modules|parameters)_", names[index])]
    return (in_blocks or weights)[-1], weights[-1]


def state_of_anchors(block: torch.Tensor, last: torch.Tensor, options: Options) -> ModelState:
    """The state of the model that owns both weights, under `options`. It is made at the first call."""
    with _lock:
        by_last: WeakTensorKeyDictionary = _by_anchors.setdefault(block, WeakTensorKeyDictionary())
        states: dict[Options, ModelState] = by_last.setdefault(last, {})
        if options not in states:
            states[options] = ModelState(options)
        return states[options]


def states_of_weights(weights: Iterable[torch.Tensor]) -> list[ModelState]:
    """Every state whose two anchors are among these weights."""
    anchors = list(weights)
    with _lock:
        tables = [_by_anchors[block] for block in anchors if block in _by_anchors]
        states = [state for table in tables for last in anchors if last in table for state in table[last].values()]
    return list(dict.fromkeys(states))


def register(module: torch.nn.Module, state: ModelState) -> None:
    """Remember that `module` was compiled with `state`."""
    with _lock:
        _by_module[module] = state


def unregister(module: torch.nn.Module) -> None:
    """Forget the module; an unknown module is ignored."""
    with _lock:
        _by_module.pop(module, None)


def state_of_module(module: torch.nn.Module) -> ModelState | None:
    """The state that `cachedit_fx.compile` made for the module, if it did."""
    with _lock:
        return _by_module.get(module)


def states_of(module: torch.nn.Module) -> list[ModelState]:
    """The states of a module, or of the object that `torch.compile` returned for it; the one used last comes first."""
    inner = unwrapped(module)
    state = state_of_module(inner)
    if state is not None:
        return [state]
    return sorted(states_of_weights(inner.parameters()), key=lambda state: state.last_call, reverse=True)


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside an object that `torch.compile` returned; any other module unchanged."""
    inner = module._modules.get("_orig_mod")
    return inner if isinstance(inner, torch.nn.Module) else module
