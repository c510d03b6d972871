"""Estimates from shapes the size of a value and the work of a node. The estimates serve comparisons, not timing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import optimization_hint
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .graph_values import input_nodes, target_name, tensor_of, value_of

UNKNOWN_SIZE = 512
"""Replaces a length that depends on data (read from a mask, for example): a typical order of a sequence's length."""

_MATMULS = frozenset({"linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "__matmul__"})


def hint(size: Any) -> int:
    """A concrete number for a size that may be symbolic. Symbols that depend on data count as `UNKNOWN_SIZE`."""
    return optimization_hint(size, fallback=UNKNOWN_SIZE)


def numel(tensor: torch.Tensor) -> int:
    """Number of elements, symbols replaced by their hints."""
    return math.prod(hint(size) for size in tensor.shape)


def numel_of(node: fx.Node) -> int:
    """Number of elements of the node's tensor; 0 if the node has none."""
    tensor = tensor_of(node)
    return 0 if tensor is None else numel(tensor)


def bytes_of(node: fx.Node) -> int:
    """Size of the node's tensor in bytes; 0 if the node has none."""
    tensor = tensor_of(node)
    return 0 if tensor is None else numel(tensor) * tensor.element_size()


def is_compute(node: fx.Node) -> bool:
    """Whether the node multiplies matrices, convolves or attends."""
    name = target_name(node)
    return name in _MATMULS or name.startswith("conv") or "attention" in name


def inner_size(node: fx.Node) -> int | None:
    """The length that a product of matrices sums over; None if the node has no such inputs."""
    inputs = _input_tensors(node)
    place = 1 if target_name(node) in ("addmm", "baddbmm") else 0
    return hint(inputs[place].shape[-1]) if len(inputs) > place and inputs[place].dim() else None


def _input_tensors(node: fx.Node) -> list[torch.Tensor]:
    return [tensor for source in input_nodes(node) if (tensor := tensor_of(source)) is not None]


def cost_of(node: fx.Node) -> int:
    """An estimate of the node's floating-point operations, from shapes alone."""
    output = value_of(node)
    if isinstance(output, (list, tuple)):
        output = next((element for element in output if isinstance(element, torch.Tensor)), None)
    if not isinstance(output, torch.Tensor):
        return 0
    name = target_name(node)
    if name in _MATMULS and (inner := inner_size(node)) is not None:
        return 2 * numel(output) * inner
    inputs = _input_tensors(node)
    if "attention" in name and len(inputs) > 1 and inputs[1].dim() > 1:
        return 4 * numel(output) * hint(inputs[1].shape[-2])
    if name.startswith("conv") and len(inputs) > 1 and inputs[1].dim() > 1:
        weight = inputs[1]
        return 2 * numel(output) * (numel(weight) // max(hint(weight.shape[0]), 1))
    return numel(output)


def bytes_of_tensors(tensors: Iterable[torch.Tensor]) -> int:
    """Size of tensors in bytes, the parts of quantized ones counted."""
    return sum(_bytes_of_tensor(tensor) for tensor in tensors)


def _bytes_of_tensor(tensor: torch.Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor):
        return bytes_of_tensors(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
