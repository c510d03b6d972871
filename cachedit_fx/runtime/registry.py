"""Finds a module's `ModelState` by the module, or by a call's weights. Holds the package's only module-level state.

How to make the call of a module passed to `cachedit_fx.compile` is kept here too, so that the call can be put back when
`torch.nn.Module.compile` has replaced it.

One compiled graph serves every module of a class, and one module has many graphs (shapes, batch sizes, autocast). So a
graph holds no state. At each call it finds the state by two *anchors*, weights that dynamo lifts to inputs: a weight of
a block, and the graph's last weight. Two models may share their heads or their blocks, but hardly both. The state of a
module passed to `cachedit_fx.compile` is found by the module. All references are weak.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from cachedit_fx.config.options import Options
from cachedit_fx.runtime.model_state import ModelState
from cachedit_fx.runtime.warning import warn

if TYPE_CHECKING:
    from cachedit_fx.runtime.compiled_call import CompiledCall

Anchors: TypeAlias = tuple[int, int]
"""Indices of the two graph inputs that identify a call's module."""


class Registration(NamedTuple):
    """A compiled module: its state, and what makes its compiled call. Neither holds the module."""

    state: ModelState
    make_call: Callable[[torch.nn.Module], CompiledCall]


_lock = threading.Lock()
_by_anchors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Weight of a block -> last weight -> options -> state."""
_by_module: weakref.WeakKeyDictionary[torch.nn.Module, Registration] = weakref.WeakKeyDictionary()


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
        is_lost = options in states and states[options].has_lost_ranks and dist.is_initialized()
        if options not in states or is_lost:
            states[options] = ModelState(options)
        return states[options]


def states_of_weights(weights: Iterable[torch.Tensor]) -> list[ModelState]:
    """Every state whose two anchors are among these weights."""
    anchors = list(weights)
    with _lock:
        tables = [_by_anchors[block] for block in anchors if block in _by_anchors]
        states = [state for table in tables for last in anchors if last in table for state in table[last].values()]
    return list(dict.fromkeys(states))


def register(module: torch.nn.Module, registration: Registration) -> None:
    """Give the module its compiled call, and remember how to make it."""
    with _lock:
        _by_module[module] = registration
    module._compiled_call_impl = registration.make_call(module)


def unregister(module: torch.nn.Module) -> None:
    """Forget the module; an unknown module is ignored."""
    with _lock:
        _by_module.pop(module, None)


def state_of_module(module: torch.nn.Module) -> ModelState | None:
    """The state that `cachedit_fx.compile` made for the module, if it did."""
    with _lock:
        registration = _by_module.get(module)
    return registration.state if registration is not None else None


def put_back(module: torch.nn.Module) -> None:
    """Give the module its cached call again if `module.compile()` has replaced it, and say so."""
    with _lock:
        registration = _by_module.get(module)
    call = module._compiled_call_impl
    if registration is not None and call is not None and getattr(call, "state", None) is not registration.state:
        module._compiled_call_impl = registration.make_call(module)
        warn(
            f"{type(module).__name__}.compile() was called after the cache was enabled, and replaced the cached call; "
            "the cached call is put back. It compiles the model too (option `inner_backend`), so leave compile() out"
        )


def put_all_back() -> None:
    """`put_back` for every module: when torch compiles something, a replaced call may be the reason."""
    with _lock:
        modules = list(_by_module)
    for module in modules:
        put_back(module)


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


def transformers_of(pipe_or_module: Any) -> list[torch.nn.Module]:
    """The modules that an argument stands for: the module, or a pipeline's components named `transformer...`.

    Raises:
        TypeError: if there is none.
    """
    if isinstance(pipe_or_module, torch.nn.Module):
        return [pipe_or_module]
    components = getattr(pipe_or_module, "components", None)
    if isinstance(components, dict):
        transformers = [
            module
            for name, module in components.items()
            if name.startswith("transformer") and isinstance(module, torch.nn.Module)
        ]
        if transformers:
            return transformers
        raise TypeError(
            f"{type(pipe_or_module).__name__} has no component named 'transformer...'; it has "
            f"{', '.join(components)}. Pass the module itself"
        )
    raise TypeError(f"expected a torch.nn.Module or a diffusers pipeline, not {type(pipe_or_module).__name__}")
