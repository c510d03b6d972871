"""Answers which nodes name the same memory, and which nodes write to it. Nothing here rewrites."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .graph_values import target_name, tensor_of


def dependents(sources: Iterable[fx.Node], within: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes of `within` (in graph order) that depend on one of `sources`.

    A node depends on a source if it uses the source, another dependent node, or memory that a dependent node writes to.
    """
    origins = set(sources)
    users: set[fx.Node] = set()
    for node in within:
        if any(value in origins for value in node.all_input_nodes):
            origins.add(node)
            users.add(node)
            target = mutated_input(node)
            if target is not None:
                origins |= {target, root_of(target)}
    return users


IN_PLACE_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}
"""Python's in-place operators, which write to their first argument if it is a tensor -> their pure forms."""

# Methods and functions that may return a view of their first argument. `to`, `contiguous`, `reshape`, `flatten`,
# `type_as` and `dropout` (outside training it returns its input) do so for some inputs only. For safety they count.
# fmt: off
_VIEW_NAMES = frozenset({
    "alias", "as_strided", "broadcast_to", "chunk", "contiguous", "cpu", "cuda", "detach", "diagonal", "dropout",
    "expand", "expand_as", "flatten", "float", "half", "bfloat16", "double", "to", "type_as", "ravel", "getitem",
    "hsplit", "movedim", "moveaxis", "mT", "mH", "narrow", "permute", "real", "imag", "reshape", "reshape_as", "rot90",
    "select", "slice", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t", "T", "tensor_split",
    "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as", "view_as_complex", "view_as_real",
    "vsplit", "getattr",
})

# Members of `_VIEW_NAMES` that return a view if they can, and a copy if they must; the tracer's values show which.
# Dropout is not among them: outside training it is a view in eager mode, and a copy for the tracer.
_SOMETIMES_VIEWS = frozenset({
    "contiguous", "cpu", "cuda", "float", "half", "bfloat16", "double", "to", "type_as", "ravel", "reshape",
    "reshape_as", "flatten", "unflatten",
})
_FACTORIES = frozenset({
    "clone", "empty", "empty_like", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_empty",
    "new_zeros", "new_ones", "new_full", "rand", "randn", "rand_like", "randn_like",
})
# fmt: on


def mutated_input(node: fx.Node) -> fx.Node | None:
    """The node whose tensor `node` writes to in place, or None. The target of `out=` counts."""
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return out
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or tensor_of(first) is None:
        return None
    if node.target in IN_PLACE_OPERATORS or node.target is operator.setitem:
        return first
    if getattr(node.target, "__module__", None) == "_operator":
        return None  # and_, or_, not_: the underscore only keeps them apart from keywords
    if node.kwargs.get("inplace") is True or _inplace_argument(node):
        return first
    name = target_name(node)
    in_place = name.endswith("_") and not name.endswith("__") and not name.startswith("_")
    return first if in_place and name not in ("requires_grad_",) else None


def _inplace_argument(node: fx.Node) -> bool:
    """Whether the call sets `inplace` by position, as `F.dropout(x, p, training, True)` and `F.silu(x, True)` do."""
    positional: dict[Any, int] = {
        F.dropout: 3,
        F.silu: 1,
        F.relu: 1,
        F.leaky_relu: 2,
        F.elu: 2,
        F.hardtanh: 3,
        F.mish: 1,
    }
    index = positional.get(node.target)
    return index is not None and len(node.args) > index and node.args[index] is True


def is_view(node: fx.Node) -> bool:
    """Whether the node may return a view of its first argument."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = target_name(node)
    if name not in _VIEW_NAMES:
        return False
    source = node.args[0] if node.args else None
    if name == "getitem" and isinstance(source, fx.Node) and tensor_of(source) is None and not is_view(source):
        return False  # one of several results that share no memory with the argument: of sort, topk, max
    return name not in _SOMETIMES_VIEWS or not _is_copy(node)


def _is_copy(node: fx.Node) -> bool:
    """Whether the node returned other memory than its first argument's when it was traced."""
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    before, after = (tensor_of(source) if source is not None else None), tensor_of(node)
    if before is None or after is None or before.layout is not torch.strided or after.layout is not torch.strided:
        return False
    try:
        return before.untyped_storage()._cdata != after.untyped_storage()._cdata
    except NotImplementedError:  # tensor subclasses that have no storage of their own
        return False


def aliases(root: fx.Node) -> list[fx.Node]:
    """Every other node that may name `root`'s memory, in graph order: views of `root`, and in-place writes to it."""
    names: set[fx.Node] = set()
    pending = [root]
    while pending:
        name = pending.pop()
        for user in name.users:
            source = mutated_input(user)
            if source is None and is_view(user):
                source = user.args[0] if isinstance(user.args[0], fx.Node) else None
            if source is name and user not in names:
                names.add(user)
                pending.append(user)
    return sorted(names)


def is_factory(node: fx.Node) -> bool:
    """Whether the node returns memory that nothing else holds."""
    return node.op in ("call_function", "call_method") and target_name(node) in _FACTORIES


def root_of(node: fx.Node) -> fx.Node:
    """The node whose memory `node` may be a view of: `node` itself if it is no view."""
    while is_view(node) or mutated_input(node) is not None:
        source = mutated_input(node)
        if source is None:
            source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None:
            return node
        node = source
    return node
