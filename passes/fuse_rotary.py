"""Writes the turn of rotary embeddings so that a compiler fuses it with the norm before and the products after.

    real, imaginary = pairs.unbind(-1)
    turned = stack([-imaginary, real], -1)     ->     turned = turned_pairs(pairs)

Inductor computes and stores what `stack` joins, one kernel for each part. `turned_pairs` reads each pair the other way
round, within the kernel that takes it: two kernels in place of three, and two thirds of the bytes, from a query's norm
to attention. Every number is the same.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import fx

from .base import Facts, FlatGraph, Rewrite, Rewritten
from .graph_values import input_nodes, meta_of_value, target_name, tensor_of
from .normalize import Normalized


def turned_pairs(pairs: torch.Tensor) -> torch.Tensor:
    """Pairs (a, b) of the last dimension as (-b, a)."""
    signs = 2 * torch.arange(2, device=pairs.device, dtype=pairs.dtype) - 1
    return (pairs.flip(-1) * signs).contiguous()


class FuseRotary(Rewrite):
    """Replaces the two parts of a turn, and their stack, by one node."""

    name: ClassVar[str] = "fuse_rotary"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized)

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        turns = [(node, pairs) for node in gm.graph.nodes if (pairs := _pairs_of(node)) is not None]
        for stack, pairs in turns:
            with gm.graph.inserting_before(stack):
                turned = gm.graph.call_function(turned_pairs, (pairs,))
            turned.meta = meta_of_value(stack)
            stack.replace_all_uses_with(turned)
            _erase_unused(stack)
        return Rewritten(gm, len(turns))


def _pairs_of(node: fx.Node) -> fx.Node | None:
    """The pairs whose turn the node stacks; None if the node does something else."""
    value, parts = tensor_of(node), input_nodes(node)
    if target_name(node) != "stack" or value is None or len(parts) != 2 or not _is_last(node, value.dim()):
        return None
    negative, real = parts
    if target_name(negative) != "neg":
        return None
    second, first = _half_of(input_nodes(negative)[0]), _half_of(real)
    if second is None or first is None or (second, first) != ((second[0], 1), (second[0], 0)):
        return None
    return second[0]


def _half_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The pairs that the node is one half of, and which."""
    if target_name(node) != "getitem" or not isinstance(node.args[1], int):
        return None
    unbind = cast(fx.Node, node.args[0])
    if target_name(unbind) != "unbind":
        return None
    (pairs,) = input_nodes(unbind)
    value = tensor_of(pairs)
    is_pair = (
        value is not None and value.dtype.is_floating_point and value.shape[-1] == 2 and _is_last(unbind, value.dim())
    )
    return (pairs, node.args[1] % 2) if is_pair else None


def _is_last(node: fx.Node, dims: int) -> bool:
    """Whether a `stack` or `unbind` is along the last of so many dimensions."""
    dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    return isinstance(dim, int) and dim % dims == dims - 1


def _erase_unused(node: fx.Node) -> None:
    """Erase a node that nothing reads, and what only it read."""
    sources = input_nodes(node)
    if not node.users and node.op.startswith("call"):
        node.graph.erase_node(node)
        for source in dict.fromkeys(sources):
            _erase_unused(source)
