"""Copies the state that a call may change, so that the call can be made again from the same state."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

_INTERNAL = frozenset(vars(nn.Module()))
"""Attributes that every module has: its parameters, buffers, submodules, hooks and mode."""


def snapshot(arguments: Any) -> Callable[[], None]:
    """Copy the tensors in `arguments`, and the states of the random generators. The result restores that state.

    A tensor that did not change is not written to, so autograd does not see the restoring as a write.
    """
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    copies = [(leaf, leaf.detach().clone(), _place_of(leaf)) for leaf in leaves]
    generator, of_python, of_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        for leaf, copy, place in copies:
            if place is not None and _place_of(leaf) != place:  # `resize_`, `transpose_`, `out=` of another shape
                with torch.no_grad():
                    leaf.set_(*place)
            if not torch.equal(leaf, copy):
                leaf.detach().copy_(copy)
        torch.set_rng_state(generator)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)

    return restore


def _place_of(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Storage, offset, shape and strides of a tensor; None of one that has none, as a sparse one."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return None
    return tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()


class _Reachable:
    """What hangs on some values: containers, attributes of objects, tensors and random generators.

    Objects in objects are not looked at: one may hold a whole program.

    Attributes:
        containers: lists, dicts, sets and queues; the attributes of an object are a dict.
    """

    def __init__(self) -> None:
        self.containers: list[Any] = []
        self.tensors: list[torch.Tensor] = []
        self.generators: list[torch.Generator] = []
        self._seen: set[int] = set()

    def visit(self, value: Any, is_inside: bool = False) -> None:
        """Note a value and what hangs on it; `is_inside` if an object holds it."""
        if isinstance(value, _SIMPLE) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
        elif isinstance(value, torch.Generator):
            self.generators.append(value)
        elif isinstance(value, (list, tuple, set, frozenset, deque, dict)):
            if not isinstance(value, (tuple, frozenset)):
                self.containers.append(value)
            for element in value.values() if isinstance(value, dict) else value:
                self.visit(element, is_inside)
        elif hasattr(value, "__dict__") and not is_inside and not type(value).__module__.startswith(_FOREIGN):
            self.containers.append(vars(value))
            for element in vars(value).values():
                self.visit(element, True)


_SIMPLE = (str, bytes, int, float, complex, type, nn.Module, FunctionType, MethodType, BuiltinFunctionType, ModuleType)
"""Kinds of values that a call does not change, and modules, whose attributes are visited anyway."""
_FOREIGN = ("torch.", "cachedit_fx.", "accelerate.", "diffusers.hooks.")
"""Packages whose objects are no state of a model's."""


def call_snapshot(module: nn.Module, args: Any, kwargs: Any) -> Callable[[], None]:
    """Copy what a call of `module` may change, its parameters left out. The result restores that state."""
    reachable = _Reachable()
    reachable.visit((args, kwargs))
    for owner in module.modules():
        for name, value in vars(owner).items():
            if name not in _INTERNAL:
                reachable.visit(value)
    restore_values = snapshot((list(module.buffers()), reachable.tensors))
    restore_attributes = attribute_snapshot(module)
    containers = [(each, dict(each) if isinstance(each, dict) else list(each)) for each in reachable.containers]
    generators = [(generator, generator.get_state()) for generator in reachable.generators]

    def restore() -> None:
        restore_attributes()
        _refill(containers)
        restore_values()
        for generator, state in generators:
            generator.set_state(state)

    return restore


def _refill(containers: Iterable[tuple[Any, Any]]) -> None:
    """Give containers the elements of their copies, where these are others."""
    for container, elements in containers:
        if _identities(container) != _identities(elements):
            container.clear()
            container.extend(elements) if isinstance(container, (list, deque)) else container.update(elements)


def _identities(container: Any) -> list[Any]:
    values = container.items() if isinstance(container, dict) else ((None, element) for element in container)
    return [(name, id(value)) for name, value in values]


def attribute_snapshot(module: nn.Module) -> Callable[[], None]:
    """Copy the attributes of `module` and its submodules. The result restores them, and drops those added since.

    The tensors under the names of buffers are restored too, parameters are not. What the attributes hold is not copied.
    """
    owners = [
        (owner, {name: value for name, value in vars(owner).items() if name not in _INTERNAL})
        for owner in module.modules()
    ]
    buffers = [(owner._buffers, owner._buffers.copy()) for owner, _ in owners]  # assignment to a name replaces a tensor

    def restore() -> None:
        for owner, attributes in owners:
            present = vars(owner)
            for name in [name for name in present if name not in _INTERNAL and name not in attributes]:
                del present[name]
            present.update(attributes)
        _refill(buffers)

    return restore


def attribute_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Tensors in the attributes of `module` and its submodules that are neither parameters nor buffers."""
    return [
        leaf
        for owner in module.modules()
        for name, value in vars(owner).items()
        if name not in _INTERNAL
        for leaf in tree_leaves(value)
        if isinstance(leaf, torch.Tensor)
    ]


def parameter_versions(module: nn.Module) -> dict[str, int]:
    """Name of a parameter -> the number of its in-place changes so far; parameters without a count are left out."""
    return {name: each._version for name, each in module.named_parameters() if not each.is_inference()}
