"""Questions that several passes ask of a graph: values, fingerprints, aliases, cost. Nothing here rewrites.

A *body node* is one that computes: neither a placeholder nor an attribute nor the output. Positions count body nodes in
graph order, so a contiguous range of positions is always a convex sub-graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._dynamo.utils import numpy_method_wrapper, numpy_operator_wrapper, numpy_to_tensor_wrapper
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols, optimization_hint
from torch.fx.node import map_arg

_OUTSIDE_BODY = frozenset({"placeholder", "get_attr", "output"})


def body_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that compute, in graph order."""
    return [node for node in graph.nodes if node.op not in _OUTSIDE_BODY]


def value_of(node: fx.Node) -> Any:
    """The fake value that the tracer recorded: a tensor, a number, or a tuple of such; None where there is none."""
    if "example_value" in node.meta:
        return node.meta["example_value"]
    return node.meta.get("val")


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The recorded fake tensor, or None where the node's value is not a single tensor."""
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def input_nodes(node: fx.Node) -> list[fx.Node]:
    """Every argument node of `node` in the order it stands in args and kwargs, repeats included."""
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def describe_shape(shape: Sequence[Any]) -> tuple[str, ...]:
    """Sizes as text, equal for two shapes that are alike. A size that depends on data has a symbol of its own wherever
    it is read, though it may be one number: such sizes count as equal."""
    return tuple(
        "?" if isinstance(size, torch.SymInt) and has_free_unbacked_symbols(size) else str(size) for size in shape
    )


def describe_value(value: Any) -> Hashable:
    """Shape, dtype and device of a value, without strides: what must agree for two values to be alike."""
    if isinstance(value, torch.Tensor):
        return (type(value).__name__, describe_shape(value.shape), value.dtype, str(value.device))
    if isinstance(value, (list, tuple)):
        return tuple(describe_value(item) for item in value)
    return type(value).__name__


def same_kind(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes carry values of one shape, dtype and device."""
    return describe_value(value_of(a)) == describe_value(value_of(b))


def target_name(node: fx.Node) -> str:
    """A readable name of what the node calls: `cat` for `torch.cat`, a method and `torch.ops.aten.cat.default`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def fingerprint(node: fx.Node) -> Hashable:
    """What a node does and to what kinds of values, without saying to which: equal for a block's node and its twin.

    Constants are left out on purpose, as a layer's index or scale may differ from block to block; the lowering, which
    must not confuse two blocks, keys on them.
    """
    inputs = tuple(describe_value(value_of(item)) for item in input_nodes(node))
    target: Hashable = target_key(node.target) if node.op != "call_module" else "call_module"
    return (node.op, target, inputs, describe_value(value_of(node)))


def target_key(target: Any) -> Hashable:
    """What a node calls. Dynamo wraps a numpy function anew at every call of it: there the function is meant, not the
    wrapper."""
    if isinstance(target, (numpy_to_tensor_wrapper, numpy_method_wrapper, numpy_operator_wrapper)):
        return (type(target).__name__, *vars(target).values())
    return target if isinstance(target, str) else (target, id(target))


def positions_of(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Node -> its index in `nodes`."""
    return {node: index for index, node in enumerate(nodes)}


def holds_weight(node: fx.Node) -> bool:
    """Whether a graph input is a parameter."""
    return isinstance(value_of(node), torch.nn.Parameter) or "_parameters_" in str(node.target)


def live_ins(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Values that `nodes` take from outside, in the order of their first use."""
    inside = set(nodes)
    found: dict[fx.Node, None] = {}
    for node in nodes:
        for item in input_nodes(node):
            if item not in inside:
                found.setdefault(item)
    return tuple(found)


def live_outs(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Values made by `nodes` that others use, in the order they are made."""
    inside = set(nodes)
    return tuple(node for node in nodes if any(user not in inside for user in node.users))


def dependents(sources: Iterable[fx.Node], within: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes of `within` (in graph order) that use one of `sources`, directly or through others of `within`, or
    through memory that these write to."""
    reached = set(sources)
    found: set[fx.Node] = set()
    for node in within:
        if any(item in reached for item in node.all_input_nodes):
            reached.add(node)
            found.add(node)
            written = mutated_input(node)
            if written is not None:
                reached |= {written, root_of(written)}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Mutation and aliasing
# ---------------------------------------------------------------------------------------------------------------------

# Python's in-place operators write to their first argument when it is a tensor.
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

# Methods and functions that may return a view of their first argument. `to`, `contiguous`, `reshape`, `flatten`,
# `type_as` and `dropout` (outside training it returns its input) do so for some inputs only; for safety they count.
# fmt: off
_VIEW_NAMES = frozenset({
    "alias", "as_strided", "broadcast_to", "chunk", "contiguous", "cpu", "cuda", "detach", "diagonal", "dropout",
    "expand", "expand_as", "flatten", "float", "half", "bfloat16", "double", "to", "type_as", "ravel", "getitem",
    "hsplit", "movedim", "moveaxis", "mT", "mH", "narrow", "permute", "real", "imag", "reshape", "reshape_as", "rot90",
    "select", "slice", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t", "T", "tensor_split",
    "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as", "view_as_complex", "view_as_real",
    "vsplit", "getattr",
})
# fmt: on

# Those among them that return a copy where they must, and a view elsewhere; the tracer's values tell which. (Dropout
# outside training is a view for eager mode, and a copy for the tracer.)
_SOMETIMES_VIEWS = frozenset({
    "contiguous", "cpu", "cuda", "float", "half", "bfloat16", "double", "to", "type_as", "ravel", "reshape",
    "reshape_as", "flatten", "unflatten",
})  # fmt: skip

# fmt: off
_FACTORIES = frozenset({
    "clone", "empty", "empty_like", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_empty",
    "new_zeros", "new_ones", "new_full", "rand", "randn", "rand_like", "randn_like",
})
# fmt: on


def mutated_input(node: fx.Node) -> fx.Node | None:
    """The node whose tensor `node` writes to in place, or None. (`out=` counts.)"""
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
    """`F.dropout(x, p, training, inplace)` and `F.silu(x, inplace)` and their like, called by position."""
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
        return False  # one of several results of its own: of sort, topk, max
    return name not in _SOMETIMES_VIEWS or not _is_copy(node)


def _is_copy(node: fx.Node) -> bool:
    """Whether the tracer saw the node return other memory than its first argument's."""
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    before, after = (tensor_of(source) if source is not None else None), tensor_of(node)
    if before is None or after is None or before.layout is not torch.strided or after.layout is not torch.strided:
        return False
    try:
        return before.untyped_storage()._cdata != after.untyped_storage()._cdata
    except NotImplementedError:  # tensor subclasses that have no storage of their own
        return False


def aliases(root: fx.Node) -> list[fx.Node]:
    """Every other node that may name `root`'s memory, in graph order: views of it, and in-place writes to it."""
    found: set[fx.Node] = set()
    pending = [root]
    while pending:
        name = pending.pop()
        for user in name.users:
            source = mutated_input(user)
            if source is None and is_view(user):
                source = user.args[0] if isinstance(user.args[0], fx.Node) else None
            if source is name and user not in found:
                found.add(user)
                pending.append(user)
    return sorted(found)


def is_factory(node: fx.Node) -> bool:
    """Whether the node returns memory that nothing else holds."""
    return node.op in ("call_function", "call_method") and target_name(node) in _FACTORIES


def root_of(node: fx.Node) -> fx.Node:
    """The node whose memory `node` may be a view of: itself where it is none."""
    while is_view(node) or mutated_input(node) is not None:
        source = mutated_input(node)
        if source is None:
            source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None:
            return node
        node = source
    return node


# ---------------------------------------------------------------------------------------------------------------------
# Pure data movement
# ---------------------------------------------------------------------------------------------------------------------

# fmt: off
_DATA_MOVEMENT = frozenset({
    "cat", "concat", "concatenate", "stack", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "getitem",
    "narrow", "select", "slice", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "permute",
    "transpose", "swapaxes", "movedim", "squeeze", "unsqueeze", "contiguous", "expand", "expand_as", "repeat", "clone",
    "alias",
})
# fmt: on


def is_data_movement(node: fx.Node) -> bool:
    """Whether the node only moves numbers: concatenates, slices, reshapes."""
    return node.op in ("call_function", "call_method") and target_name(node) in _DATA_MOVEMENT


# ---------------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------------

UNKNOWN_SIZE = 512
"""Stands for a length read from a mask, say, where costs are compared: the order of a sequence's."""

_MATMULS = frozenset({"linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "__matmul__"})


def hint(size: Any) -> int:
    """A concrete number for a size that may be symbolic; `UNKNOWN_SIZE` for a part that depends on data."""
    return optimization_hint(size, fallback=UNKNOWN_SIZE)


def numel(tensor: torch.Tensor) -> int:
    """Number of elements, symbols replaced by their hints."""
    return math.prod(hint(size) for size in tensor.shape)


def numel_of(node: fx.Node) -> int:
    """Number of elements of the node's tensor; 0 where it has none."""
    tensor = tensor_of(node)
    return 0 if tensor is None else numel(tensor)


def is_weight(node: fx.Node) -> bool:
    """Whether the node is a graph input that holds a parameter."""
    return node.op == "placeholder" and isinstance(value_of(node), torch.nn.Parameter)


def is_compute(node: fx.Node) -> bool:
    """Whether the node multiplies matrices, convolves or attends."""
    name = target_name(node)
    return name in _MATMULS or name.startswith("conv") or "attention" in name


def cost_of(node: fx.Node) -> int:
    """An estimate of the node's floating-point operations, from shapes alone. Good for comparing, not for timing."""
    output = value_of(node)
    if isinstance(output, (list, tuple)):
        output = next((item for item in output if isinstance(item, torch.Tensor)), None)
    if not isinstance(output, torch.Tensor):
        return 0
    name = target_name(node)
    inputs = [tensor for item in input_nodes(node) if (tensor := tensor_of(item)) is not None]
    if name in _MATMULS and inputs and inputs[0].dim():
        left = inputs[1] if name in ("addmm", "baddbmm") else inputs[0]
        return 2 * numel(output) * hint(left.shape[-1])
    if "attention" in name and len(inputs) > 1 and inputs[1].dim() > 1:
        return 4 * numel(output) * hint(inputs[1].shape[-2])
    if name.startswith("conv") and len(inputs) > 1 and inputs[1].dim() > 1:
        weight = inputs[1]
        return 2 * numel(output) * (numel(weight) // max(hint(weight.shape[0]), 1))
    return numel(output)


def ordered(nodes: Iterable[fx.Node], position: dict[fx.Node, int]) -> Iterator[fx.Node]:
    """`nodes` in graph order."""
    return iter(sorted(nodes, key=position.__getitem__))


# ---------------------------------------------------------------------------------------------------------------------
# Contexts
# ---------------------------------------------------------------------------------------------------------------------


def closes_context(node: fx.Node) -> bool:
    """Whether the node leaves autocast or inference mode."""
    return target_name(node) in ("_exit_autocast", "_exit_inference_mode")


def open_contexts(nodes: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """Position ranges [enter, exit] within which autocast or the grad mode differs from that at the graph's start."""
    spans: list[tuple[int, int]] = []
    entered: dict[fx.Node, int] = {}
    grad_since: int | None = None
    for position, node in enumerate(nodes):
        name = target_name(node)
        if name in ("_enter_autocast", "_enter_inference_mode"):
            entered[node] = position
        elif closes_context(node):
            opened = next((item for item in node.all_input_nodes if item in entered), None)
            if opened is not None:
                spans.append((entered.pop(opened), position))
        elif name == "_set_grad_enabled":
            if grad_since is None:
                grad_since = position
            else:
                spans.append((grad_since, position))
                grad_since = None
    last = len(nodes)
    spans.extend((position, last) for position in entered.values())
    if grad_since is not None:
        spans.append((grad_since, last))
    return spans
