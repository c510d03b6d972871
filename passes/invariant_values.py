"""Tells which values of an outlined piece do not depend on the sample, and where the piece may be cut.

    silu(temb) ─► linear ─► chunk ─► 1 + scale ─► ... * hidden
                       └ cut here: the value lies in memory, and one cut serves all slices

A cut must change no bit. Pieces that run as captured may be cut anywhere. A compiler may fuse the operations of a piece
and keep their values wider than their dtype. A compiled piece is cut only at values that lie in memory anyway: what a
matrix product, convolution or attention reads or writes. Views are made again by their readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import fx
from torch._prims_common import is_contiguous_or_false
from torch.fx.experimental.symbolic_shapes import free_symbols

from .base import module_of
from .graph_aliases import Memory, memory_of, written_by
from .graph_cost import hint, inner_size, numel_of
from .graph_values import body_nodes, input_nodes, open_contexts, target_name, tensor_of, value_of
from .infer_dependence import Source, own_source

Label = frozenset[int] | None
"""The graph inputs that a value depends on, weights left out, by index; None if the value must be computed in place."""

_PRODUCTS = frozenset({"linear", "addmm", "mm", "bmm", "matmul", "baddbmm"})
_HEAVY = _PRODUCTS | {"conv1d", "conv2d", "conv3d"}
SMALL = 16
"""Inductor unfolds the product of a single row with a matrix of at most so many rows and columns, on a CPU."""
_NORMS = frozenset({"rms_norm", "layer_norm", "group_norm", "batch_norm", "instance_norm"})
FEW = 3
"""Computing a value again is cheaper than keeping it, if it takes fewer operations than these and no matrix product. A
norm counts as several."""


class InvariantPiece:
    """What may be hoisted out of one piece.

    Args:
        call: of the piece, in the outer graph.
        labels: of the outer graph's nodes.
        is_compiled: whether an inner compiler compiles the piece.
        returned: memory of the outer graph's results, which the caller may write to.

    Attributes:
        labels: of the nodes of the piece.
        outer: input of the piece -> the node of the outer graph.
        results: of the piece, in order.
    """

    def __init__(
        self,
        call: fx.Node,
        module: fx.GraphModule,
        labels: Mapping[fx.Node, Label],
        is_compiled: bool,
        returned: frozenset[Memory],
    ) -> None:
        self.call, self.module, self.is_compiled = call, module, is_compiled
        self.nodes = list(module.graph.nodes)
        self.inputs = [node for node in self.nodes if node.op == "placeholder"]
        self.outer = dict(zip(self.inputs, call.args, strict=True))
        self.results: list[fx.Node] = list(self.nodes[-1].args[0])
        self.symbols = {
            value.node.expr: node
            for node in self.inputs
            if isinstance(value := value_of(node), torch.SymInt) and value.node.expr.is_symbol
        }
        body = body_nodes(module.graph)
        fixed = returned | {memory for node in body for target in written_by(node) for memory in memory_of(target)}
        in_context = {node for low, high in open_contexts(body) for node in body[low : high + 1]}
        self.labels: dict[fx.Node, Label] = {}
        for node in self.nodes:
            if node.op == "placeholder":
                self.labels[node] = labels.get(self.outer[node])
            elif node.op == "get_attr":
                self.labels[node] = None if tensor_of(node) is None else frozenset()
            else:
                has_effect = value_of(node) is None  # such as a check
                is_fixed = has_effect or node in in_context or not memory_of(node).isdisjoint(fixed)
                is_fixed = is_fixed or (is_compiled and _is_rounded_by_chance(node))
                self.labels[node] = None if is_fixed else self._label(node)

    def _label(self, node: fx.Node) -> Label:
        """The union of the labels of a node's inputs, and of the inputs that hold its shape."""
        if node.op == "output" or own_source(self.module, node) is Source.SAMPLE:
            return None
        parts = [self.labels[source] for source in self.sources(node)]
        known = [part for part in parts if part is not None]
        return frozenset().union(*known) if len(known) == len(parts) else None

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """What a copy of the node needs: the node's inputs, and the piece's inputs that hold its symbolic sizes."""
        inputs = node.all_input_nodes[:1] if _casts_as_another(node) else node.all_input_nodes
        return [*inputs, *self._sizes(node)]

    def _sizes(self, node: fx.Node) -> list[fx.Node]:
        value = value_of(node)
        values = value if isinstance(value, (tuple, list)) else (value,)
        symbols = {s for each in values if isinstance(each, (torch.Tensor, torch.SymInt)) for s in free_symbols(each)}
        return [self.symbols[symbol] for symbol in sorted(symbols, key=str) if symbol in self.symbols]

    def may_leave(self, node: fx.Node) -> bool:
        """Whether the node's value can be a hoisted value: a tensor that depends on some inputs, not on the sample."""
        is_made = node.op in ("call_function", "call_method")
        return is_made and bool(self.labels[node]) and type(tensor_of(node)) not in (type(None), torch.nn.Parameter)

    def may_be_cut(self, node: fx.Node) -> bool:
        """Whether a cut at the node's value changes no bit, and saves work."""
        return (
            self.may_leave(node)
            and not _is_view(node)
            and (not self.is_compiled or _is_in_memory(node) or self._is_read_from_memory(node))
            and self.is_worth_it(node)
        )

    def _is_read_from_memory(self, node: fx.Node) -> bool:
        return all(
            user.op == "output" or _is_in_memory(user) or (_is_view(user) and self._is_read_from_memory(user))
            for user in node.users
        )

    def is_worth_it(self, node: fx.Node) -> bool:
        """Whether keeping the value is cheaper than computing it again, from matrix products and the piece's inputs."""
        if _is_heavy(node):
            return True
        pending, visited, count = [node], {node}, 0
        while pending:
            each = pending.pop()
            if tensor_of(each) is not None and not _is_view(each):
                count += FEW if target_name(each) in _NORMS else 1
            for source in each.all_input_nodes:
                if source not in visited and source.op in ("call_function", "call_method") and not _is_heavy(source):
                    visited.add(source)
                    pending.append(source)
        return count >= FEW

    def plan(self, wanted: Iterable[fx.Node], label: Label) -> tuple[set[fx.Node], set[fx.Node]]:
        """The nodes that must be copied to compute `wanted` in a piece of this label, and the values it takes in."""
        copied: set[fx.Node] = set()
        taken: set[fx.Node] = set()
        pending = list(wanted)
        while pending:
            node = pending.pop()
            if node in copied or node in taken:
                continue
            if self.labels[node] is not None and self.labels[node] != label and self.may_be_cut(node):
                taken.add(node)
                continue
            copied.add(node)
            pending += self.sources(node)
        return copied, taken

    def copy(
        self, name: str, copied: set[fx.Node], taken: Sequence[fx.Node], results: Sequence[fx.Node]
    ) -> tuple[fx.GraphModule, list[fx.Node]]:
        """A module of the copied nodes: its inputs are those of the piece that it needs, then the values it takes."""
        inputs = [node for node in self.inputs if node in copied]
        members = [node for node in self.nodes if node in copied and node.op != "placeholder"]
        return module_of(self.module, name, (*inputs, *taken), members, results, _copy), inputs


def _copy(graph: fx.Graph, node: fx.Node, local: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """Copy a node into another graph. A cast to the dtype of another tensor does without the other tensor."""
    if _casts_as_another(node):
        return graph.call_method("to", (local(cast(fx.Node, node.args[0])), value_of(node).dtype))
    return graph.node_copy(node, local)


def _is_view(node: fx.Node) -> bool:
    """Whether the node's value lies in the memory of an input of the node, or is a tuple of such values."""
    memory = memory_of(node)
    return bool(memory) and any(not memory.isdisjoint(memory_of(source)) for source in node.all_input_nodes)


def _casts_as_another(node: fx.Node) -> bool:
    """Whether the node gives its first input the dtype of another tensor on the same device."""
    tensors = [tensor_of(each) if isinstance(each, fx.Node) else None for each in node.args]
    if target_name(node) not in ("type_as", "to") or len(tensors) != 2 or node.kwargs:
        return False
    return all(each is not None for each in tensors) and len({each.device for each in tensors if each is not None}) == 1


def _is_rounded_by_chance(node: fx.Node) -> bool:
    """Whether a compiler may fuse the node with some of its users, which read a wider value then, and not with others.

    Which users it fuses depends on the whole piece, and so do the bits of their results.
    """
    tensor = tensor_of(node)
    if tensor is None or tensor.dtype not in (torch.bfloat16, torch.float16) or _is_view(node) or _is_in_memory(node):
        return False
    readers = _readers(node)
    return len(readers) > 1 and any(reader.op != "output" and not _is_in_memory(reader) for reader in readers)


def _readers(node: fx.Node) -> set[fx.Node]:
    """The users of a value and of its views."""
    return {reader for user in node.users for reader in (_readers(user) if _is_view(user) else {user})}


def _is_heavy(node: fx.Node) -> bool:
    """Whether the node multiplies matrices, convolves or attends, or runs a kernel that torch does not have."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace not in ("aten", "prims") or _has_heavy_name(node)
    return node.op in ("call_function", "call_method") and _has_heavy_name(node)


def _has_heavy_name(node: fx.Node) -> bool:
    return target_name(node) in _HEAVY or target_name(node).endswith("_attention")


def _is_in_memory(node: fx.Node) -> bool:
    """Whether compilers read the node's inputs from memory, and write its value there."""
    return _is_heavy(node) and not (_is_unfolded(node) or _is_joined(node) or _has_separate_bias(node))


def _is_unfolded(node: fx.Node) -> bool:
    """Whether inductor may write a matrix product as a sum of products, which it fuses: a small one, of one row."""
    result = tensor_of(node)
    inner = inner_size(node) if target_name(node) in _PRODUCTS else None
    if inner is None or result is None or not result.dim():
        return False
    columns = hint(result.shape[-1])
    rows = numel_of(node) // max(1, columns)
    return inner == 1 or (rows == 1 and (columns == 1 or max(inner, columns) <= SMALL))


def _is_joined(node: fx.Node) -> bool:
    """Whether inductor may join a product with the sum that is its only user, into one product with an addend."""
    result = tensor_of(node)
    is_bare = target_name(node) in ("mm", "matmul") or (
        target_name(node) == "linear" and len(node.all_input_nodes) == 2
    )
    sums = [user for user in node.users if target_name(user) in ("add", "add_", "iadd")]
    return is_bare and result is not None and result.dim() == 2 and len(sums) == len(node.users) == 1


def _has_separate_bias(node: fx.Node) -> bool:
    """Whether inductor adds the bias in an operation after the product, which it fuses with others.

    torch makes a product and a sum of a linear layer on a tensor that is not contiguous. Inductor does so with a
    convolution on anything but a CPU.
    """
    inputs = [source for source in input_nodes(node) if tensor_of(source) is not None]
    name, first = target_name(node), tensor_of(inputs[0]) if inputs else None
    if len(inputs) < 3 or first is None:
        return False
    if name == "linear":
        return first.dim() != 2 and not _is_contiguous(inputs[0])
    return name.startswith("conv") and first.device.type != "cpu"


def _is_contiguous(node: fx.Node) -> bool:
    """Whether a tensor is contiguous, as recorded and as inductor lays it out.

    Inductor takes a concatenation of one tensor with empty ones for that tensor, whatever its layout.
    """
    pending, visited = [node], {node}
    while pending:
        each = pending.pop()
        if not _is_recorded_contiguous(each):
            return False
        if target_name(each) == "cat":
            parts = [part for part in each.all_input_nodes if numel_of(part)]
            sources = parts if len(parts) == 1 else []
        elif _is_heavy(each):
            sources = []
        else:  # a view, or an operation on each number, has the layout of its input
            alike = (source for source in each.all_input_nodes if numel_of(source) == numel_of(each))
            sources = [source for source in alike if _is_recorded_contiguous(source)]
        pending += [source for source in sources if source not in visited]
        visited.update(sources)
    return True


def _is_recorded_contiguous(node: fx.Node) -> bool:
    tensor = tensor_of(node)
    return tensor is None or is_contiguous_or_false(tensor)
