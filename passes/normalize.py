"""Makes in-place writes pure where they would cross a cut, and keeps tuple values from crossing one.

    h += a                      h_1 = h + a
    q, k = x.chunk(2)    ->     (getitems moved up beside the chunk, so that tensors cross cuts, never tuples)
    x[:, :n] = y                x_1 = x.clone(); x_1[:, :n] = y     (and every later use of x takes x_1)

A block that adds to its input in place would make its own residual zero, and a bypassed block would leave the write
undone. A buffer that is made, filled and read in one place (rotary embeddings through `empty_like` and `setitem`)
crosses nothing and is left alone: rewriting it would only cost copies.

Requires nothing. What it cannot make pure (a write through a view, a write to a graph input's view) stays as it is;
the region analysis then refuses regions that contain it.
"""

from __future__ import annotations

import operator
from typing import ClassVar

from torch import fx

from cachedit_fx.passes.base import Pass, PassResult, facts
from cachedit_fx.passes.graph_analysis import (
    IN_PLACE_OPERATORS,
    body_nodes,
    is_factory,
    is_view,
    mutated_input,
    positions_of,
    root_of,
    tensor_of,
    value_of,
)


class Normalize(Pass):
    """In-place writes made pure; getitems beside their producers."""

    name: ClassVar[str] = "normalize"
    provides: ClassVar[frozenset[str]] = frozenset({"normalized"})

    def run(self, gm: fx.GraphModule) -> PassResult:
        matches = _gather_getitems(gm.graph) + _purify_writes(gm.graph)
        facts(gm)["normalized"] = True
        return PassResult(gm, matches)


def _gather_getitems(graph: fx.Graph) -> int:
    """Move `producer[i]` directly behind a producer whose value is a tuple."""
    moved = 0
    for producer in body_nodes(graph):
        if not isinstance(value_of(producer), (list, tuple)):
            continue
        anchor = producer
        for user in sorted(producer.users):
            if user.target is operator.getitem and isinstance(user.args[1], int):
                if anchor.next is not user:
                    anchor.append(user)
                    moved += 1
                anchor = user
    return moved


def _purify_writes(graph: fx.Graph) -> int:
    changed = 0
    for node in body_nodes(graph):
        target = mutated_input(node)
        if target is None or is_factory(root_of(target)) or _has_live_views(target, node):
            continue
        changed += _make_pure(graph, node, target)
    return changed


def _has_live_views(target: fx.Node, write: fx.Node) -> bool:
    """Whether another name for `target`'s memory is read after the write, so that renaming would miss it."""
    if is_view(target):
        return True
    position = positions_of(list(write.graph.nodes))
    views = [user for user in target.users if is_view(user)]
    while views:
        view = views.pop()
        if any(position[user] > position[write] for user in view.users):
            return True
        views.extend(user for user in view.users if is_view(user))
    return False


def _make_pure(graph: fx.Graph, write: fx.Node, target: fx.Node) -> int:
    """Replace the write by a new value; every use of `target` behind it takes the new value."""
    before = tensor_of(target)
    pure = _pure_twin(write)
    if pure is not None:
        write.op, write.target = pure
        write.kwargs = {name: value for name, value in write.kwargs.items() if name != "inplace"}
        result: fx.Node = write
        after = tensor_of(write)
        if before is not None and after is not None and after.dtype is not before.dtype:
            return 0
    else:
        with graph.inserting_before(write):
            result = graph.call_method("clone", (target,))
        result.meta = dict(target.meta)
        write.replace_input_with(target, result)
    position = positions_of(list(graph.nodes))
    for user in list(target.users):
        if user is not write and user is not result and position[user] > position[write]:
            user.replace_input_with(target, result)
    return 1


def _pure_twin(write: fx.Node) -> tuple[str, object] | None:
    """(op, target) of the out-of-place form with the same arguments, where there is one that keeps the dtype."""
    if not _keeps_dtype(write):
        return None
    if write.target in IN_PLACE_OPERATORS:
        return "call_function", IN_PLACE_OPERATORS[write.target]  # type: ignore[index]
    if write.op == "call_method" and write.target in ("add_", "sub_", "mul_", "div_"):
        return "call_method", str(write.target)[:-1]
    return None


def _keeps_dtype(write: fx.Node) -> bool:
    """Whether the out-of-place form yields the dtype and shape that the in-place form must keep."""
    first = tensor_of(write.args[0]) if write.args and isinstance(write.args[0], fx.Node) else None
    if first is None or not first.dtype.is_floating_point:
        return False
    for other in write.args[1:]:
        if isinstance(other, fx.Node):
            tensor = tensor_of(other)
            if tensor is not None and tensor.dim() and tensor.dtype is not first.dtype:
                return False
            if tensor is not None and tensor.dim() > first.dim():
                return False
        elif isinstance(other, complex):
            return False
    return True
