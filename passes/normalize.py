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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._prims_common import is_non_overlapping_and_dense_or_false

from .base import Facts, FlatGraph, Rewrite, Rewritten
from .find_timestep import source_name
from .graph_aliases import (
    IN_PLACE_OPERATORS,
    Memory,
    changes_form,
    is_assignment,
    is_factory,
    memory_of,
    names_by_memory,
    replace_memory,
    returns_its_input,
    written_by,
)
from .graph_cost import hint
from .graph_values import body_nodes, describe_layout, meta_of_value, target_name, tensor_of, value_of


@dataclass(frozen=True)
class Normalized:
    """Fact: no in-place write and no tuple crosses the border of a block. A rewrite that adds neither preserves it.

    Attributes:
        impurities: why some writes could not be made pure, a sentence each. With one, the graph must stay whole.
    """

    impurities: tuple[str, ...] = ()


class Normalize(Rewrite):
    """Makes in-place writes pure, and puts getitems next to their producers."""

    name: ClassVar[str] = "normalize"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph,)
    provides: ClassVar[tuple[type, ...]] = (Normalized,)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph,)

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        matches = _gather_getitems(gm.graph) + _lift_lengths(gm.graph) + _remove_dropouts(gm.graph)
        purifier = _Purifier(gm.graph)
        return Rewritten(gm, matches + purifier.run(), (Normalized(purifier.reasons),))


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


def _remove_dropouts(graph: fx.Graph) -> int:
    """Remove every dropout that does nothing. Returns how many."""
    dropouts = [node for node in body_nodes(graph) if returns_its_input(node)]
    names = names_by_memory(graph) if dropouts else {}
    for dropout in dropouts:
        source = dropout.all_input_nodes[0]
        for copy, original in zip(memory_of(dropout), memory_of(source), strict=True):
            for name in names[copy]:
                replace_memory(name, {copy: original})
            names[original] += names.pop(copy)
        dropout.replace_all_uses_with(source)
        graph.erase_node(dropout)
    return len(dropouts)


def _is_length(node: fx.Node) -> bool:
    return isinstance(value_of(node), (int, torch.SymInt))


class _Purifier:
    """Makes every in-place write that may cross a cut pure.

    Attributes:
        reasons: why a write cannot be made pure, a sentence each. If there is one, the graph stays as it is.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.writes = [node for node in body_nodes(graph) if written_by(node)]
        self._names = names_by_memory(graph) if self.writes else {}
        """Memory -> the nodes that name it."""
        reasons = (self._obstacle(write) for write in self.writes)
        self.reasons = tuple(dict.fromkeys(reason for reason in reasons if reason))
        self._latest: dict[fx.Node, fx.Node] = {}
        """Graph input -> the value that replaces it now."""
        self._sources: dict[fx.Node, fx.Node] = {}
        """Value that replaces or replaced a graph input -> the input."""

    def run(self) -> int:
        """Returns the number of changed writes."""
        if self.reasons:
            return 0
        changes = sum(map(self._purify, self.writes))
        output = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        for source, result in self._latest.items():
            self._write_back("call_method", "copy_", source, result)
            self._return_views(source, result, output)
        return changes

    # Questions

    def _obstacle(self, write: fx.Node) -> str | None:
        """Why the write cannot be made pure; None if it can, or need not."""
        if is_assignment(write):
            return self._obstacle_to_assignment(write)
        if changes_form(write):
            return f"{write.name} changes the form of a tensor in place"
        for target in written_by(write):
            names = self._names_of(target)
            roots = _roots(names)
            if len(roots) == 1 and self._is_filled_where_made(roots[0], write, names):
                continue
            titles = " and ".join(map(source_name, roots))
            if len(roots) != 1 or memory_of(roots[0]) != memory_of(target):
                return f"{write.name} writes in place to memory that {titles} share"
            if not _is_traced_right(roots[0]):
                return f"{write.name} writes in place to {titles}, whose layout the tracer does not tell"
            if _overlaps(roots[0]):
                return f"{write.name} writes in place to {titles}, whose elements share memory"
            if any(target_name(name) in _BY_LAYOUT for name in names) and not _is_dense(roots[0]):
                return f"{write.name} writes in place to {titles}, whose views depend on its layout"
            if any(target_name(name) == "as_strided" for name in names) and not _is_whole(roots[0]):
                return f"{write.name} writes in place to {titles}, beside which its memory holds more"
        if not memory_of(write).isdisjoint(_memory(written_by(write))) and _target_of(write) is None and write.users:
            return f"the results of {write.name}, which writes in place to several tensors, are used"
        return None

    def _obstacle_to_assignment(self, write: fx.Node) -> str | None:
        """The same of `x.data = y`. The tracer's value of x is the one after the assignment."""
        target, value = write.args
        assert isinstance(target, fx.Node) and isinstance(value, fx.Node)
        before, after = _real_input(target), tensor_of(value)
        if before is None or after is None or describe_layout(before) != describe_layout(after):
            return f"{write.name} gives {source_name(target)} data of another form"
        earlier = [target, *(user for user in target.users if user < write)]
        others = [to for other in self.writes if other is not write for to in written_by(other)]
        if not _memory(earlier).isdisjoint(_memory(others)):
            return f"{write.name} gives other data to {source_name(target)}, which is written to as well"
        return None

    def _names_of(self, node: fx.Node) -> list[fx.Node]:
        """Every node that names memory of `node`, in graph order."""
        return sorted({name for memory in memory_of(node) for name in self._names[memory]})

    def _is_filled_where_made(self, root: fx.Node, write: fx.Node, names: Sequence[fx.Node]) -> bool:
        """Whether the write fills a new buffer in the module call that made it, before anything reads the buffer."""
        root_modules, write_modules = (list(node.meta.get("nn_module_stack") or ()) for node in (root, write))
        if not is_factory(root) or root_modules != write_modules:
            return False
        memory, writes = _memory([root]), set(self.writes)

        def reads(user: fx.Node) -> bool:
            is_fill = user in writes and not memory.isdisjoint(_memory(written_by(user)))
            return user not in names and not is_fill

        return not any(user < write and reads(user) for name in names for user in name.users)

    # Changes

    def _purify(self, write: fx.Node) -> bool:
        """Make the write pure if it may cross a cut. Returns whether it changed."""
        if is_assignment(write):
            self._assign(write)
            return True
        changed = False
        for place in range(len(written_by(write))):
            target = written_by(write)[place]  # those that are left may be views of a copy by now
            names = self._names_of(target)
            (root,) = _roots(names)
            if self._is_filled_where_made(root, write, names):
                continue
            changed = True
            memory, others = memory_of(root), [name for name in names if name is not root and name < write]
            in_use = any(not user < write for name in others for user in name.users)
            pure = _pure_form(write) if target is root and not in_use and not _has_gaps(root) else None
            copies: dict[fx.Node, fx.Node] = {}
            if pure is not None:
                write.op, write.target = pure
                _use_from(write, {root: write})
                result = write
            else:
                copies = self._copy(write, root, others if in_use or target is not root else ())
                result = copies[root]
            self._divide(memory, write, names, [copy for copy in copies.values() if not copy._erased])
            source = self._sources.get(root, root)
            if source.op in ("placeholder", "get_attr"):
                self._latest[source], self._sources[result] = result, source
        return changed

    def _copy(self, write: fx.Node, root: fx.Node, names: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Let the write, and all nodes after it, use a copy of `root`. Returns each old name with its new one.

        The earlier `names` of the same memory, in graph order, are made again from the copy.
        """
        with self.graph.inserting_before(write):
            if _has_gaps(root):
                copy = self.graph.call_function(strided_copy, (root,))
            else:
                copy = self.graph.call_method("clone", (root,))
            copy.meta = _meta_at(write, root)
            copies = {root: copy}
            self._remake(names, copies, write)
        for old in write.all_input_nodes:
            if old in copies:
                write.replace_input_with(old, copies[old])
        _use_from(write, copies)
        views = set(copies.values()) - {copy}
        for name in reversed([*names, *copies.values()]):
            if (name in copies or name in views) and not (name.users or name._erased or written_by(name)):
                self.graph.erase_node(name)
        return copies

    def _remake(self, names: Sequence[fx.Node], copies: dict[fx.Node, fx.Node], place: fx.Node) -> None:
        """Make names of some memory again, from new nodes and for the module of `place`.

        Args:
            names: in graph order.
            copies: old node -> new one; gets those of the names.
        """
        for name in names:
            target = _target_of(name)
            if target is not None:
                copies[name] = copies[target]
            elif not written_by(name) and any(source in copies for source in name.all_input_nodes):
                copies[name] = self.graph.node_copy(name, lambda value: copies.get(value, value))
                copies[name].meta = _meta_at(place, name)

    def _return_views(self, source: fx.Node, result: fx.Node, output: fx.Node) -> None:
        """Let the graph return views of an input, in place of views of the value that it ends with.

        Others may hold the input, and write to it after the call: a buffer, or the caller's tensor.
        """
        views = {result: source}
        with self.graph.inserting_before(output):
            self._remake([name for name in self._names_of(result) if name not in (result, output)], views, output)
        for name, view in views.items():
            output.replace_input_with(name, view)
        for view in reversed(views.values()):
            if view is not source and not view.users:
                self.graph.erase_node(view)

    def _divide(
        self, memory: frozenset[Memory], write: fx.Node, names: Sequence[fx.Node], copies: Sequence[fx.Node]
    ) -> None:
        """From the write on, all names of `memory` name other memory. `names` are those before the change."""
        tokens: dict[Memory, Memory] = {each: object() for each in memory}
        later = [*copies, *(name for name in names if not name._erased and not name < write)]
        for name in later:
            replace_memory(name, tokens)
        for each, token in tokens.items():
            self._names[token] = later
            self._names[each] = [name for name in self._names[each] if not name._erased and name not in later]

    def _assign(self, write: fx.Node) -> None:
        """Replace `x.data = y`: later uses of x take y, and x gets the data at the graph's end."""
        target, value = write.args
        assert isinstance(target, fx.Node) and isinstance(value, fx.Node)
        _use_from(write, {target: value})
        for user in list(write.users):
            if target_name(user) == VERSION_STEP:
                self.graph.erase_node(user)
        write.replace_all_uses_with(value)
        self._write_back(write.op, write.target, target, value)
        self.graph.erase_node(write)

    def _write_back(self, op: str, target: Any, source: fx.Node, value: fx.Node) -> None:
        """Let a graph input have `value` when the graph ends."""
        output = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        with self.graph.inserting_before(output):
            write = self.graph.create_node(op, target, (source, value))
        # An input's meta names the module that used it first, and would extend that block to the graph's end.
        write.meta = {key: each for key, each in source.meta.items() if key != "nn_module_stack"}


VERSION_STEP = "_lower_version_count_by_1"
"""Dynamo's step after `x.data = y`: hides the assignment from autograd, which is off here."""
_BY_LAYOUT = frozenset({"as_strided", "contiguous", "flatten", "ravel", "reshape", "reshape_as", "to", "unflatten"})


def _memory(nodes: Iterable[fx.Node]) -> frozenset[Memory]:
    return frozenset(memory for node in nodes for memory in memory_of(node))


def _roots(names: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of the names that are not made from another one. Of an operation with several results, the results."""
    inside: set[fx.Node] = set()
    roots = []
    for name in names:
        if inside.isdisjoint(name.all_input_nodes):
            if not isinstance(value_of(name), torch.Tensor):
                continue
            roots.append(name)
        inside.add(name)
    return roots


def _target_of(write: fx.Node) -> fx.Node | None:
    """The tensor that the node writes to and returns; None if it does not do that."""
    value = tensor_of(write)
    for target in written_by(write):
        tensor = tensor_of(target)
        if value is None or tensor is None or memory_of(target) != memory_of(write):
            continue
        if tensor.shape == value.shape:
            return target
    return None


def _real_input(node: fx.Node) -> torch.Tensor | None:
    """The tensor of the call that is being captured, if the node is a graph input that dynamo still holds it for."""
    example = getattr(node.meta.get("grapharg"), "example", None) if node.op == "placeholder" else None
    return example if isinstance(example, torch.Tensor) else None


def strided_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, gaps included: a clone has none, and sums over it may be rounded in other ways."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def _has_gaps(node: fx.Node) -> bool:
    """Whether a clone has other strides."""
    tensor = tensor_of(node)
    return tensor is not None and not is_non_overlapping_and_dense_or_false(tensor)


def _overlaps(node: fx.Node) -> bool:
    """Whether elements share memory, as those of an expanded tensor do."""
    tensor = tensor_of(node)
    if tensor is None:
        return False
    axes = sorted((hint(stride), hint(size)) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    reach = 0  # of the axes with smaller strides
    for stride, size in axes:
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _is_traced_right(node: fx.Node) -> bool:
    """Whether a graph input has the strides that the tracer shows: `out=` changes what it shows of its target."""
    real, traced = _real_input(node), tensor_of(node)
    if real is None or traced is None:
        return True
    axes = zip(real.shape, real.stride(), traced.stride(), strict=True)
    return all(size == 1 or stride == hint(shown) for size, stride, shown in axes)


def _is_dense(node: fx.Node) -> bool:
    """Whether a clone has the same layout: no gaps, no overlaps, no offset."""
    tensor = tensor_of(node)
    assert tensor is not None
    return tensor.storage_offset() == 0 and not _has_gaps(node)


def _is_whole(node: fx.Node) -> bool:
    """Whether the tensor's memory holds nothing else."""
    tensor = tensor_of(node)
    assert tensor is not None
    return bool(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize)


def _use_from(write: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> None:
    """Let every node after `write` use the new nodes in place of the old ones."""
    for old, new in copies.items():
        for user in list(old.users):
            if user is not new and write < user:
                user.replace_input_with(old, new)


def _meta_at(place: fx.Node, value: fx.Node) -> dict[str, Any]:
    """The meta of `value`, for a node that belongs to the module that `place` belongs to."""
    meta = meta_of_value(value)
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
    for other in (*write.args[1:], *write.kwargs.values()):
        if isinstance(other, fx.Node):
            tensor = tensor_of(other)
            if tensor is not None and (tensor.dim() or not first.dim()) and tensor.dtype is not first.dtype:
                return False
            if tensor is not None and tensor.dim() > first.dim():
                return False
        elif isinstance(other, complex):
            return False
    return True
