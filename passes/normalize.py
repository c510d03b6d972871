"""Makes in-place writes pure where they would cross a cut, and keeps tuple values from crossing one.

    h += a                      h_1 = h + a
    q, k = x.chunk(2)    ->     (getitems moved up beside the chunk, so that tensors cross cuts, never tuples)
    x[:, :n] = y                x_1 = x.clone(); x_1[:, :n] = y     (and every later use of x takes x_1)
    s0 + s1                     (moved to the front: dynamo computes a length where the first block needs it)

A block that adds to its input in place would make its own residual zero, and a bypassed block would leave the write
undone. A buffer that is made, filled and read in one place (rotary embeddings through `empty_like` and `setitem`)
crosses nothing and is left alone: rewriting it would only cost copies. What is written to a graph input is written back
to it at the graph's end, for the caller to see.

Requires nothing. What it cannot make pure (a write through a view, a write to a graph input's view) stays as it is;
the region analysis then refuses regions that contain it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
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
        matches = _gather_getitems(gm.graph) + _lift_lengths(gm.graph) + _purify_writes(gm.graph)
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
                    user.meta["nn_module_stack"] = producer.meta.get("nn_module_stack")
                    moved += 1
                anchor = user
    return moved


def _lift_lengths(graph: fx.Graph) -> int:
    """Move whole numbers that are made of graph inputs alone behind the last input. Left in the first block, they would
    be an input of every other block but not of that one."""
    early = {node for node in graph.nodes if node.op == "placeholder" and _is_length(node)}
    if not early:
        return 0
    anchor = next(node for node in reversed(graph.nodes) if node.op == "placeholder")
    lifted = 0
    for node in body_nodes(graph):
        if not _is_length(node) or not node.all_input_nodes or not early.issuperset(node.all_input_nodes):
            continue
        early.add(node)
        if anchor.next is not node:
            anchor.append(node)
            node.meta.pop("nn_module_stack", None)
            lifted += 1
        anchor = node
    return lifted


def _is_length(node: fx.Node) -> bool:
    return isinstance(value_of(node), (int, torch.SymInt))


def _purify_writes(graph: fx.Graph) -> int:
    changed = 0
    # Graph input -> the value that stands for it now, and back.
    latest: dict[fx.Node, fx.Node] = {}
    stands_for: dict[fx.Node, fx.Node] = {}
    for node in body_nodes(graph):
        target = mutated_input(node)
        if target is None or is_factory(root_of(target)) or _has_live_views(target, node):
            continue
        result = _make_pure(graph, node, target)
        changed += 1
        source = stands_for.get(target, target)
        if source.op in ("placeholder", "get_attr"):
            latest[source], stands_for[result] = result, source
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    with graph.inserting_before(output):
        for source, result in latest.items():
            graph.call_method("copy_", (source, result)).meta = dict(source.meta)
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


def _make_pure(graph: fx.Graph, write: fx.Node, target: fx.Node) -> fx.Node:
    """Replace the write by a new value, which is returned; every use of `target` behind it takes the new value."""
    pure = _pure_twin(write)
    if pure is not None:
        write.op, write.target = pure
        result = write
    else:
        with graph.inserting_before(write):
            result = graph.call_method("clone", (target,))
        result.meta = dict(target.meta)
        write.replace_input_with(target, result)
    position = positions_of(list(graph.nodes))
    for user in list(target.users):
        if user is not write and user is not result and position[user] > position[write]:
            user.replace_input_with(target, result)
    return result


def _pure_twin(write: fx.Node) -> tuple[str, Callable[..., Any] | str] | None:
    """(op, target) of the out-of-place form with the same arguments, where there is one that keeps the dtype."""
    if not _keeps_dtype(write):
        return None
    if callable(write.target) and write.target in IN_PLACE_OPERATORS:
        return "call_function", IN_PLACE_OPERATORS[write.target]
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
