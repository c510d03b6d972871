"""Copies the state that a call may change, so that the call can be made again from the same state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

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
    generator = torch.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        for leaf, copy, place in copies:
            if place is not None and _place_of(leaf) != place:  # `resize_`, `transpose_`, `out=` of another shape
                with torch.no_grad():
                    leaf.set_(*place)
            if not torch.equal(leaf, copy):
                leaf.detach().copy_(copy)
        torch.set_rng_state(generator)
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)

    return restore


def _place_of(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Storage, offset, shape and strides of a tensor; None of one that has none, as a sparse one."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return None
    return tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()


def call_snapshot(module: nn.Module, args: Any, kwargs: Any) -> Callable[[], None]:
    """Copy what a call of `module` may change, its parameters left out. The result restores that state."""
    restore_values = snapshot((args, kwargs, list(module.buffers()), attribute_tensors(module)))
    restore_attributes = attribute_snapshot(module)
    containers = [(container, container.copy()) for container in _containers_in((args, kwargs))]

    def restore() -> None:
        restore_attributes()
        _refill(containers)
        restore_values()

    return restore


def _containers_in(value: Any) -> Iterator[Any]:
    """Every list, dict and set in `value`, and in those."""
    if type(value) in (list, dict, set):
        yield value
    if isinstance(value, (list, tuple, dict)):
        for element in value.values() if isinstance(value, dict) else value:
            yield from _containers_in(element)


def _refill(containers: Iterable[tuple[Any, Any]]) -> None:
    """Give containers the elements of their copies."""
    for container, copy in containers:
        container.clear()
        container.extend(copy) if isinstance(container, list) else container.update(copy)


def attribute_snapshot(module: nn.Module) -> Callable[[], None]:
    """Copy the attributes of `module` and its submodules. The result restores them, and drops those added since.

    The tensors under the names of buffers are restored too, parameters are not. Lists, dicts and sets are copied one
    level deep and restored in place. Values of tensors are not copied: give `attribute_tensors` to `snapshot` for that.
    """
    owners = [
        (owner, {name: value for name, value in vars(owner).items() if name not in _INTERNAL})
        for owner in module.modules()
    ]
    held = (value for _, attributes in owners for value in attributes.values() if type(value) in (list, dict, set))
    registered = (owner._buffers for owner, _ in owners)  # an assignment to a buffer's name replaces its tensor
    containers: list[tuple[Any, Any]] = [(value, value.copy()) for value in (*held, *registered)]

    def restore() -> None:
        for owner, attributes in owners:
            present = vars(owner)
            for name in [name for name in present if name not in _INTERNAL and name not in attributes]:
                del present[name]
            present.update(attributes)
        _refill(containers)

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
