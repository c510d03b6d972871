"""Makes in-place writes pure if they would cross a cut, and keeps tuple values from crossing one.

    h += a                      h_1 = h + a
    q, k = x.chunk(2)    ->     (getitems moved up next to the chunk, so that tensors cross cuts, never tuples)
    x[:, :n] = y                x_1 = x.clone(); x_1[:, :n] = y     (and every later use of x takes x_1)
    s0 + s1                     (moved to the front: dynamo computes a length when the first block needs it)

A block that adds to its input in place would make its own residual zero, and bypassing the block would omit the write.
A write through a view goes to a copy, and the views that are still in use are made again from the copy.

Some buffers are made and filled before they are read: rotary embeddings through `empty_like` and `setitem`, experts
that add to zeros. Their writes cross nothing and stay, since rewriting them would only cost copies. A value written to
a graph input is written back to the input at the graph's end, so that the caller sees the write.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from .base import Facts, FlatGraph, Rewrite, Rewritten
from .graph_aliases import IN_PLACE_OPERATORS, aliases, is_factory, mutated_input, root_of
from .graph_values import body_nodes, positions_of, tensor_of, value_of


@dataclass(frozen=True)
class Normalized:
    """Fact: no in-place write and no tuple crosses the border of a block. A rewrite that adds neither preserves it."""


class Normalize(Rewrite):
    """Makes in-place writes pure, and puts getitems next to their producers."""

    name: ClassVar[str] = "normalize"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph,)
    provides: ClassVar[tuple[type, ...]] = (Normalized,)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph,)

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        matches = _gather_getitems(gm.graph) + _lift_lengths(gm.graph) + _purify_writes(gm.graph)
        return Rewritten(gm, matches, (Normalized(),))


def _gather_getitems(graph: fx.Graph) -> int:
    """Move `producer[i]` directly after a producer whose value is a tuple. Returns the number of moves."""
    moves = 0
    for producer in body_nodes(graph):
        if not isinstance(value_of(producer), (list, tuple)):
            continue
        anchor = producer
        for user in sorted(producer.users):
            if user.target is operator.getitem and isinstance(user.args[1], int):
                if anchor.next is not user:
                    anchor.append(user)
                    user.meta["nn_module_stack"] = producer.meta.get("nn_module_stack")
                    moves += 1
                anchor = user
    return moves


def _lift_lengths(graph: fx.Graph) -> int:
    """Move whole numbers that depend on graph inputs alone to directly after the last input. Returns how many moved.

    Without the move they stay in the first block, and become an input of every block but the first.
    """
    lengths = {node for node in graph.nodes if node.op == "placeholder" and _is_length(node)}
    if not lengths:
        return 0
    anchor = next(node for node in reversed(graph.nodes) if node.op == "placeholder")
    moves = 0
    for node in body_nodes(graph):
        if not _is_length(node) or not node.all_input_nodes or not lengths.issuperset(node.all_input_nodes):
            continue
        lengths.add(node)
        if anchor.next is not node:
            anchor.append(node)
            node.meta.pop("nn_module_stack", None)
            moves += 1
        anchor = node
    return moves


def _is_length(node: fx.Node) -> bool:
    return isinstance(value_of(node), (int, torch.SymInt))


def _purify_writes(graph: fx.Graph) -> int:
    """Make every in-place write that may cross a cut pure. Returns the number of changed writes."""
    changes = 0
    # Graph input -> the value that replaces it now, and back.
    latest: dict[fx.Node, fx.Node] = {}
    sources: dict[fx.Node, fx.Node] = {}
    for node in body_nodes(graph):
        target = mutated_input(node)
        if target is None:
            continue
        root = root_of(target)
        names = aliases(root)
        position = positions_of(list(graph.nodes))
        if _is_filled_where_made(root, node) and not _is_read_before(node, root, names, position):
            continue
        earlier = [name for name in names if position[name] < position[node]]
        if target is root and not any(position[user] > position[node] for name in earlier for user in name.users):
            result = _make_pure(graph, node, root, position)
        else:
            result = _write_to_copy(graph, node, root, earlier, position)
        changes += 1
        source = sources.get(root, root)
        if source.op in ("placeholder", "get_attr"):
            latest[source], sources[result] = result, source
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    with graph.inserting_before(output):
        for source, result in latest.items():
            # An input's meta names the module that used it first, and would extend that block to the graph's end.
            write_back = graph.call_method("copy_", (source, result))
            write_back.meta = {key: value for key, value in source.meta.items() if key != "nn_module_stack"}
    return changes


def _is_filled_where_made(root: fx.Node, write: fx.Node) -> bool:
    """Whether the write fills a new buffer in the module call that made it."""
    root_modules, write_modules = (list(node.meta.get("nn_module_stack") or ()) for node in (root, write))
    return is_factory(root) and root_modules == write_modules


def _is_read_before(write: fx.Node, root: fx.Node, names: Sequence[fx.Node], position: Mapping[fx.Node, int]) -> bool:
    """Whether a node read the buffer `root` before the write. The write then does not belong to filling the buffer."""
    writers = {root, *names}
    return any(user not in writers and position[user] < position[write] for name in writers for user in name.users)


def _make_pure(graph: fx.Graph, write: fx.Node, target: fx.Node, position: Mapping[fx.Node, int]) -> fx.Node:
    """Replace the write by a new value, and return it. Every later use of `target` takes the new value."""
    pure = _pure_form(write)
    if pure is not None:
        write.op, write.target = pure
        result = write
    else:
        with graph.inserting_before(write):
            result = graph.call_method("clone", (target,))
        result.meta = _meta_at(write, target)
        write.replace_input_with(target, result)
    _use_from(write, {target: result}, position)
    return result


def _write_to_copy(
    graph: fx.Graph, write: fx.Node, root: fx.Node, names: Sequence[fx.Node], position: Mapping[fx.Node, int]
) -> fx.Node:
    """Let the write, and all nodes after it, use a copy of `root`, and return the copy.

    Views among `names`, the earlier names of the same memory in graph order, are made again from the copy.
    """
    with graph.inserting_before(write):
        copy = graph.call_method("clone", (root,))
        copy.meta = _meta_at(write, root)
        copies = {root: copy}
        for name in names:
            target = mutated_input(name)
            if target is not None:
                copies[name] = copies[target]
            else:
                copies[name] = graph.node_copy(name, lambda value: copies.get(value, value))
                copies[name].meta = _meta_at(write, name)
    arguments = {old: new for old, new in copies.items() if old in write.all_input_nodes}
    for old, new in arguments.items():
        write.replace_input_with(old, new)
    _use_from(write, copies, position)
    for name in reversed([*names, *(view for view in copies.values() if view is not copy)]):
        if not name.users and mutated_input(name) is None and name.graph is graph and not name._erased:
            graph.erase_node(name)
    return copy


def _use_from(write: fx.Node, copies: Mapping[fx.Node, fx.Node], position: Mapping[fx.Node, int]) -> None:
    """Let every node after `write` use the new nodes in place of the old ones."""
    for old, new in copies.items():
        for user in list(old.users):
            if user is not new and position.get(user, -1) > position[write]:
                user.replace_input_with(old, new)


def _meta_at(place: fx.Node, value: fx.Node) -> dict[str, Any]:
    """The meta of `value`, for a node that belongs to the module that `place` belongs to."""
    meta = dict(value.meta)
    meta.pop("nn_module_stack", None)
    return meta | {key: place.meta[key] for key in ("nn_module_stack",) if key in place.meta}


def _pure_form(write: fx.Node) -> tuple[str, Callable[..., Any] | str] | None:
    """(op, target) of the out-of-place form with the same arguments; None if no such form keeps the dtype."""
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
