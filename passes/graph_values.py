"""Answers the questions that several passes ask of a graph: values, fingerprints, live-ins and live-outs.

Nothing here rewrites.

A *body node* computes: it is neither a placeholder nor an attribute nor the output. Positions count body nodes in graph
order, so a contiguous range of positions is always a convex sub-graph.
"""

from __future__ import annotations

import dis
from collections import Counter
from collections.abc import Hashable, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import numpy_method_wrapper, numpy_operator_wrapper, numpy_to_tensor_wrapper
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
from torch.fx.node import map_arg

_OUTSIDE_BODY = frozenset({"placeholder", "get_attr", "output"})


def body_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that compute, in graph order."""
    return [node for node in graph.nodes if node.op not in _OUTSIDE_BODY]


def value_of(node: fx.Node) -> Any:
    """The fake value that the tracer recorded: a tensor, a number, or a tuple of these; None if there is none."""
    if "example_value" in node.meta:
        return node.meta["example_value"]
    return node.meta.get("val")


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The recorded fake tensor, or None if the node's value is not a single tensor."""
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def meta_of_value(node: fx.Node) -> dict[str, Any]:
    """The meta of `node` for another node that hands on its value, or a copy of its value.

    A symbol that depends on data stays bound to `node` alone. Compilers refuse a symbol that is bound twice.
    """
    return {key: entry for key, entry in node.meta.items() if key != "unbacked_bindings"}


def input_nodes(node: fx.Node) -> list[fx.Node]:
    """Every argument node of `node` in the order of args and kwargs, repeats included."""
    inputs: list[fx.Node] = []
    map_arg((node.args, node.kwargs), inputs.append)
    return inputs


def describe_shape(shape: Sequence[Any]) -> tuple[str, ...]:
    """Sizes as text, equal for shapes that may be equal.

    Sizes that depend on data count as equal. Each has its own symbol at every place that reads it, though the number
    may be the same.
    """
    return tuple(
        "?" if isinstance(size, torch.SymInt) and has_free_unbacked_symbols(size) else str(size) for size in shape
    )


def describe_value(value: Any) -> Hashable:
    """Type, shape, dtype and device of a value, without strides. Two values of one kind have equal descriptions."""
    if isinstance(value, torch.Tensor):
        return (type(value).__name__, describe_shape(value.shape), value.dtype, str(value.device))
    if isinstance(value, (list, tuple)):
        return tuple(describe_value(element) for element in value)
    return type(value).__name__


def describe_layout(tensor: torch.Tensor) -> Hashable:
    """Shape, strides and dtype."""
    return (describe_shape(tensor.shape), describe_shape(tensor.stride()), tensor.dtype)


def same_kind(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes carry values of one shape, dtype and device."""
    return describe_value(value_of(a)) == describe_value(value_of(b))


def op_counts(gm: fx.GraphModule) -> Counter[str]:
    """Op name -> the number of calls in the graph and in the graphs of its submodules."""
    graphs = (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule))
    nodes = (node for graph in graphs for node in graph.nodes)
    return Counter(target_name(node) for node in nodes if node.op in ("call_function", "call_method"))


def target_name(node: fx.Node) -> str:
    """A readable name of the node's target: `cat` for `torch.cat`, a method and `torch.ops.aten.cat.default`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def fingerprint(node: fx.Node) -> Hashable:
    """The node's target and the kinds of its values, not the values: equal for corresponding nodes of similar blocks.

    Constants are left out on purpose: a layer's index or scale may differ from block to block. The lowering must not
    confuse two blocks, so its key contains the constants.
    """
    inputs = tuple(describe_value(value_of(source)) for source in input_nodes(node))
    target: Hashable = target_key(node.target) if node.op != "call_module" else "call_module"
    return (node.op, target, inputs, describe_value(value_of(node)))


def function_of(target: Any) -> Any:
    """The function that a node calls. Dynamo wraps a numpy function anew at each of its calls."""
    if isinstance(target, numpy_to_tensor_wrapper):
        return target.f
    return target.op if isinstance(target, numpy_operator_wrapper) else target


def target_key(target: Any) -> Hashable:
    """A key of the function or method that a node calls: equal for two functions exactly if they do the same.

    Two plain Python functions do the same if code, defaults and the contents of their closures are equal. Dynamo and
    users define functions anew at each call. Whatever else is called counts by its identity.
    """
    if isinstance(target, (numpy_to_tensor_wrapper, numpy_method_wrapper, numpy_operator_wrapper)):
        return (type(target).__name__, *vars(target).values())
    return target if isinstance(target, str) else _function_key(target, ())


def _function_key(value: Any, outer: tuple[Any, ...]) -> Hashable:
    """The key of a function, or of a value that a function holds. `outer` are the functions around it."""
    if isinstance(value, (tuple, list)):
        return (type(value), *(_function_key(element, outer) for element in value))
    if isinstance(value, (type(None), bool, int, float, complex, str, bytes)):
        return (type(value), repr(value))
    if not isinstance(value, FunctionType) or _keeps_state(value.__code__):
        return _Identity(value)
    if value in outer:
        return ("recursion", outer.index(value))
    inner = (*outer, value)
    contents = [_contents(cell) for cell in value.__closure__ or ()]
    named = sorted(((value.__kwdefaults__ or {}) | vars(value)).items())
    return (
        value.__code__,
        _Identity(value.__globals__),
        *(_function_key(part, inner) for part in (contents, value.__defaults__ or (), named)),
    )


_EMPTY_CELL = object()


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY_CELL


def _keeps_state(code: CodeType) -> bool:
    """Whether the function assigns to a variable of its closure."""
    return bool(code.co_freevars) and any(
        step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in code.co_freevars
        for step in dis.get_instructions(code)
    )


class _Identity:
    """Stands for an object in a key. Holds the object, so that no other one can get its address."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def positions_of(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Node -> its index in `nodes`."""
    return {node: index for index, node in enumerate(nodes)}


def live_ins(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Values that `nodes` take from outside, in the order of their first use."""
    inside = set(nodes)
    values: dict[fx.Node, None] = {}
    for node in nodes:
        for source in input_nodes(node):
            if source not in inside:
                values.setdefault(source)
    return tuple(values)


def live_outs(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """Values made by `nodes` that other nodes use, in the order they are made."""
    inside = set(nodes)
    return tuple(node for node in nodes if any(user not in inside for user in node.users))


# fmt: off
_DATA_MOVEMENT = frozenset({
    "cat", "concat", "concatenate", "stack", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "getitem",
    "narrow", "select", "slice", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "permute",
    "transpose", "swapaxes", "movedim", "squeeze", "unsqueeze", "contiguous", "expand", "expand_as", "repeat", "clone",
    "alias", "cut_sequence", "take_segments", "split_segments",
})
# fmt: on


def is_data_movement(node: fx.Node) -> bool:
    """Whether the node only moves numbers: concatenates, slices, reshapes."""
    return node.op in ("call_function", "call_method") and target_name(node) in _DATA_MOVEMENT


def is_weight(node: fx.Node) -> bool:
    """Whether the node is a graph input that holds a parameter."""
    is_parameter = isinstance(value_of(node), torch.nn.Parameter) or "_parameters_" in str(node.target)
    return node.op == "placeholder" and is_parameter


def is_of_module(node: fx.Node) -> bool:
    """Whether the node is a parameter, a buffer or another tensor of the module, and no argument of the call.

    The tracer names an input by the way to it from the frame's arguments, of which `self` may have another name.
    """
    target = str(node.target).lower()
    is_registered = "_buffers_" in target or "_parameters_" in target
    return node.op == "get_attr" or (node.op == "placeholder" and (is_registered or target.startswith("l_self_")))


def closes_context(node: fx.Node) -> bool:
    """Whether the node leaves autocast or inference mode."""
    return target_name(node) in ("_exit_autocast", "_exit_inference_mode")


def open_contexts(nodes: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """Position ranges [enter, exit] within which autocast or the grad mode differs from that at the graph's start."""
    ranges: list[tuple[int, int]] = []
    entries: dict[fx.Node, int] = {}
    grad_since: int | None = None
    for position, node in enumerate(nodes):
        name = target_name(node)
        if name in ("_enter_autocast", "_enter_inference_mode"):
            entries[node] = position
        elif closes_context(node):
            entry = next((source for source in node.all_input_nodes if source in entries), None)
            if entry is not None:
                ranges.append((entries.pop(entry), position))
        elif name == "_set_grad_enabled":
            if grad_since is None:
                grad_since = position
            else:
                ranges.append((grad_since, position))
                grad_since = None
    last = len(nodes)
    ranges.extend((position, last) for position in entries.values())
    if grad_since is not None:
        ranges.append((grad_since, last))
    return ranges
