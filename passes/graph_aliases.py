"""Answers which nodes name the same memory, and which nodes write to it. Nothing here rewrites.

    v = x.data[:, 1:]        memory_of(v) == memory_of(x)
    v.copy_(y)               written_by(copy_) == (v,)

Two values name one memory if the tracer recorded one storage for both. No table of view operations is needed. A value
without a storage, as of a sparse tensor, names the memory of its argument if the operation's name is that of a view.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import numpy_method_wrapper
from torch.fx.node import map_arg

from .graph_values import function_of, target_name, tensor_of, value_of

Memory = Hashable
"""What a tensor's numbers lie in."""

REPLACED = "cachedit_memory"
"""Key in a node's meta: recorded memory -> the memory that takes its place since a write was made pure."""

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

_IN_PLACE_METHODS = frozenset({"__setitem__", *(f"__{function.__name__}__" for function in IN_PLACE_OPERATORS)})
_NUMPY_IN_PLACE = frozenset({"fill", "itemset", "partition", "put", "sort", *_IN_PLACE_METHODS})
_ONLY_FLAGS = frozenset({"requires_grad_", "detach_", "share_memory_"})

# fmt: off
_VIEW_NAMES = frozenset({
    "alias", "as_strided", "broadcast_to", "chunk", "detach", "diagonal", "expand", "expand_as", "getattr", "getitem",
    "mT", "movedim", "narrow", "permute", "reshape", "select", "split", "squeeze", "t", "T", "to", "transpose",
    "unbind", "unflatten", "unsqueeze", "view", "view_as", "_get_data_attr",
})
_FACTORIES = frozenset({
    "clone", "empty", "empty_like", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_empty",
    "new_zeros", "new_ones", "new_full", "rand", "randn", "rand_like", "randn_like",
})
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def memory_of(node: fx.Node) -> frozenset[Memory]:
    """The memory that the node's value names; of all its tensors, if it is a tuple."""
    memories = frozenset(_memories(node, value_of(node)))
    replaced = node.meta.get(REPLACED)
    return frozenset(replaced.get(memory, memory) for memory in memories) if replaced else memories


def _memories(node: fx.Node, value: Any) -> Iterator[Memory]:
    if isinstance(value, (list, tuple)):
        for element in value:
            yield from _memories(node, element)
    elif isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _memories(node, getattr(value, name))
            return
        try:
            yield value.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # sparse tensors, and subclasses without a storage
            source = node.args[0] if node.args else None
            if target_name(node) in _VIEW_NAMES and isinstance(source, fx.Node):
                yield from memory_of(source)
            else:
                yield node


def returns_its_input(node: fx.Node) -> bool:
    """Whether the node is a dropout that does nothing. In eager mode it returns its input; the tracer shows a copy."""
    if node.op not in ("call_function", "call_method") or "dropout" not in target_name(node):
        return False
    arguments = arguments_of(node)
    training = arguments.get("training", arguments.get("train", True))
    return bool(node.all_input_nodes) and (training is False or arguments.get("p") == 0)


def replace_memory(node: fx.Node, replacements: Mapping[Memory, Memory]) -> None:
    """Let the node name other memory than before."""
    present = node.meta.get(REPLACED, {})
    recorded = {memory: present.get(memory, memory) for memory in _memories(node, value_of(node))}
    node.meta[REPLACED] = {memory: replacements.get(new, new) for memory, new in recorded.items()}


def names_by_memory(graph: fx.Graph) -> dict[Memory, list[fx.Node]]:
    """Memory -> every node that names it, in graph order."""
    names: dict[Memory, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        for memory in memory_of(node):
            names[memory].append(node)
    return names


def is_factory(node: fx.Node) -> bool:
    """Whether the node returns memory that nothing else holds."""
    return node.op in ("call_function", "call_method") and target_name(node) in _FACTORIES


# ---------------------------------------------------------------------------------------------------------------------
# Writes


def written_by(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes whose tensors `node` writes to in place: none for most nodes, several for `torch._foreach_add_`.

    The targets of `out=` count, and the running statistics of a norm in training.
    """
    if node.op not in ("call_function", "call_method"):
        return ()
    targets = dict.fromkeys(_nodes_in(_written_arguments(node)))
    return tuple(target for target in targets if memory_of(target))


def writes_to_inputs(graph: fx.Graph, *pieces: fx.Graph, counts: Callable[[fx.Node], bool] = lambda node: True) -> bool:
    """Whether a node of the graph, or of the pieces that it calls, writes in place to memory of an input that counts.

    Args:
        counts: whether an input counts; by default all do.
    """
    inputs = (node for node in graph.nodes if node.op == "placeholder" and counts(node))
    memory = {each for node in inputs for each in memory_of(node)}
    targets = (target for each in (graph, *pieces) for node in each.nodes for target in written_by(node))
    return any(not memory.isdisjoint(memory_of(target)) for target in targets)


def _written_arguments(node: fx.Node) -> list[Any]:
    first, name = node.args[:1], target_name(node)
    target = function_of(node.target)
    if isinstance(target, numpy_method_wrapper):
        return [*first] if target.method in _NUMPY_IN_PLACE else []
    written: list[Any] = [node.kwargs.get("out")]
    if target in IN_PLACE_OPERATORS or target is operator.setitem or name in _IN_PLACE_METHODS:
        return [*first]
    if getattr(target, "__module__", None) == "_operator" or name in _ONLY_FLAGS:
        return []  # and_, or_, not_: the underscore only keeps them apart from keywords
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _written_by_higher_order(node)
    operation = _operation(target)
    names = _written_parameters(operation) if operation is not None else ()
    if names:
        arguments = arguments_of(node)
        written += [arguments.get(name) for name in names]
    elif name.endswith("_") and not name.startswith("_") and not name.endswith("__"):
        written += first
    if not _CONDITIONS.isdisjoint(_parameters(target)):
        written += _written_on_condition(arguments_of(node))
    return written


def _nodes_in(value: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    map_arg(value, nodes.append)
    return nodes


def _written_on_condition(arguments: Mapping[str, Any]) -> list[Any]:
    """Arguments that are written because of another argument's value: `inplace=True`, `training=True`, `max_norm=1`."""
    written = []
    if arguments.get("inplace") is True:
        written.append(next(iter(arguments.values())))
    if any(arguments.get(flag) not in (None, False) for flag in ("training", "use_input_stats", "train")):
        written += [arguments.get(name) for name in ("running_mean", "running_var")]
    if arguments.get("max_norm") is not None:
        written.append(arguments.get("weight"))
    return written


_CONDITIONS = frozenset({"inplace", "running_mean", "running_var", "max_norm"})

Operation = torch._ops.OpOverload | torch._ops.OpOverloadPacket


def _operation(target: Any) -> Operation | None:
    """The operation that has the target's schema, called as such or by a method or function of its name."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return target
    if isinstance(target, str):
        return _aten(target)
    is_builtin = inspect.isbuiltin(target) or inspect.ismethoddescriptor(target)
    return _aten(getattr(target, "__name__", "")) if is_builtin else None


@functools.lru_cache(maxsize=4096)
def _aten(name: str) -> Operation | None:
    packet = getattr(torch.ops.aten, name, None) if name and not name.startswith("__") else None
    return packet if isinstance(packet, torch._ops.OpOverloadPacket) else None


def overloads_of(target: Any) -> list[torch._ops.OpOverload]:
    """The overloads of the operation that has the target's schema; none for functions written in Python."""
    operation = _operation(function_of(target))
    return [] if operation is None else _overloads(operation)


def _overloads(operation: Operation) -> list[torch._ops.OpOverload]:
    if isinstance(operation, torch._ops.OpOverload):
        return [operation]
    return [getattr(operation, overload) for overload in operation.overloads()]


@functools.lru_cache(maxsize=4096)
def _written_parameters(operation: Operation) -> frozenset[str]:
    """Names of the parameters that the operation's schema marks as written to, results of `out=` left out."""
    return frozenset(
        argument.name
        for overload in _overloads(operation)
        for argument in overload._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write and not argument.is_out
    )


@functools.lru_cache(maxsize=4096)
def _is_inplace_view(operation: Operation) -> bool:
    return any(torch.Tag.inplace_view in overload.tags for overload in _overloads(operation))


def changes_form(node: fx.Node) -> bool:
    """Whether the node changes sizes, strides or the storage of its argument, as `resize_`, `t_` and `set_` do."""
    operation = _operation(function_of(node.target))
    return operation is not None and target_name(node) not in _ONLY_FLAGS and _is_inplace_view(operation)


def is_assignment(node: fx.Node) -> bool:
    """Whether the node is `x.data = y`. It changes which memory x names, and writes to none.

    The tracer of torch 2.13 records `set_`, that of 2.14 `shallow_copy_data_`.
    """
    if target_name(node) not in ("set_", "shallow_copy_data_") or node.kwargs or len(node.args) != 2:
        return False
    return all(isinstance(argument, fx.Node) and tensor_of(argument) is not None for argument in node.args)


def _parameters(target: Any) -> Mapping[str, Any]:
    """Parameter -> its default (`inspect.Parameter.empty` if it has none), in order; empty if nothing tells."""
    if inspect.isfunction(target):
        return _function_parameters(target)
    operation = _operation(target)
    return _operation_parameters(operation) if operation is not None else {}


def _function_parameters(function: FunctionType) -> Mapping[str, Any]:
    """The same of a Python function. Nothing here may keep the function alive."""
    code, defaults = function.__code__, function.__defaults__ or ()
    positional = code.co_varnames[: code.co_argcount]
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    values = dict(zip(positional[len(positional) - len(defaults) :], defaults, strict=True))
    values |= function.__kwdefaults__ or {}
    return {name: values.get(name, inspect.Parameter.empty) for name in names}


@functools.lru_cache(maxsize=4096)
def _operation_parameters(operation: Operation) -> Mapping[str, Any]:
    return {
        argument.name: argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        for argument in _overloads(operation)[0]._schema.arguments
    }


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Parameter -> argument or default of the call, in the order of the parameters."""
    parameters = _parameters(function_of(node.target))
    arguments = {name: default for name, default in parameters.items() if default is not inspect.Parameter.empty}
    values = dict(zip(parameters, node.args, strict=False)) | dict(node.kwargs)
    return {
        name: values.get(name, arguments.get(name)) for name in [*parameters, *values] if name in values | arguments
    }


def _written_by_higher_order(node: fx.Node) -> list[Any]:
    """The arguments that a Triton kernel, or one of the graphs that the operation calls, writes to."""
    kwargs = node.kwargs
    if "kernel_idx" in kwargs:
        from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors

        tensors: Any = kwargs["kwargs"]
        values = {name: value_of(each) if isinstance(each, fx.Node) else each for name, each in tensors.items()}
        kernel: dict[str, Any] = {
            name: kwargs.get(name, {}) for name in ("kernel_idx", "constant_args_idx", "tma_descriptor_metadata")
        }
        return [tensors[name] for name in get_mutated_tensors(kwargs=values, **kernel)]
    owner = node.graph.owning_module
    bodies = [each for each in node.all_input_nodes if each.op == "get_attr"]
    operands = [each for each in _nodes_in((node.args, node.kwargs)) if each.op != "get_attr"]
    written: list[Any] = []
    for body in bodies:
        module = functools.reduce(getattr, str(body.target).split("."), owner)
        if isinstance(module, fx.GraphModule):
            inputs = [each for each in module.graph.nodes if each.op == "placeholder"]
            writes = {memory for each in module.graph.nodes for to in written_by(each) for memory in memory_of(to)}
            if any(writes & memory_of(each) for each in inputs):
                written += operands  # which operand is which input differs from operation to operation
    return written


# ---------------------------------------------------------------------------------------------------------------------
# Dependence


def dependents(sources: Iterable[fx.Node], within: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes of `within` (in graph order) that depend on one of `sources`.

    A node depends on a source if it uses the source or another dependent node. The names of memory that a dependent
    node writes to depend on the source too, and so do their later users.
    """
    origins = set(sources)
    users: set[fx.Node] = set()
    tainted: set[Memory] = set()
    for node in within:
        inputs = node.all_input_nodes
        if any(value in origins for value in inputs) or (
            tainted and any(not tainted.isdisjoint(memory_of(value)) for value in inputs)
        ):
            origins.add(node)
            users.add(node)
            for target in written_by(node):
                tainted |= memory_of(target)
    if tainted:
        users.update(node for node in within if not tainted.isdisjoint(memory_of(node)))
    return users


def write_spans(nodes: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """Position ranges [second name, write] in which two names of the written memory must stay names of one memory.

    A value that crosses a cut may become another tensor, a graph input never. One name may become another tensor, since
    all later names are made from it.
    """
    spans: list[tuple[int, int]] = []
    writes = [(node, target) for node in nodes if not is_assignment(node) for target in written_by(node)]
    if not writes:
        return spans
    position = {node: index for index, node in enumerate(nodes)}
    names = names_by_memory(nodes[0].graph)
    for write, target in writes:
        in_use = {
            name
            for memory in memory_of(target)
            for name in names[memory]
            if name < write and tensor_of(name) is not None and any(not user < write for user in name.users)
        }
        positions = sorted(position[name] for name in in_use if name in position)
        crossing = positions if len(positions) < len(in_use) else positions[1:]
        if crossing:
            spans.append((crossing[0], position[write]))
    return spans
