"""Hands the pieces of an outlined graph to the inner compiler, once for each distinct piece.

    blocks_0 ─┐
    blocks_1 ─┼─ one key ──► inner compiler ──► one callable, called with each block's own weights
    blocks_2 ─┘

Pieces that hold blocks are compiled, refiners too. Prologue, glue and epilogue run as they were captured, since
compiling them costs more than it saves. `compiled_pieces="all"` compiles them too.

The key is a piece's structure: targets, constants, wiring, and its inputs' shapes, strides, dtypes, devices and
tensor-subclass metadata. Weights are inputs, so two blocks of a model have one key, and a model of 57 blocks has a
handful of distinct pieces. A piece that cannot be keyed is compiled separately.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from cachedit_fx.capture import RECOMPILE_LIMIT, isolated_compile
from cachedit_fx.config.options import Options
from cachedit_fx.passes.graph_aliases import REPLACED, memory_of, written_by
from cachedit_fx.passes.graph_values import target_key, value_of
from cachedit_fx.passes.hoist_invariants import Hoisted
from cachedit_fx.passes.manager import Outcome
from cachedit_fx.passes.outline_blocks import KIND
from cachedit_fx.runtime.progress import report

logger = logging.getLogger(__name__)

InnerCompiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


class Lowered(torch.nn.Module):
    """A compiled piece that replaces its graph module."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = compiled


def lower(outcome: Outcome, options: Options) -> Callable[..., Any] | None:
    """Replace every piece of a rewritten graph by its compiled form, in place; identical pieces share one.

    Returns the graph's forward, or None if the graph has no pieces. With `inner_backend="eager"` a piece is its own
    compiled form. Afterwards the graph can no longer be rewritten.
    """
    gm, hoisted = outcome.graph_module, outcome.facts.get(Hoisted)
    others = [] if hoisted is None else [hoisted.graph_module]
    compiler = inner_compiler(options)
    places: dict[tuple[Hashable, bool], list[tuple[fx.GraphModule, str]]] = {}
    for holder in (gm, *_branches(gm), *others):
        for node in holder.graph.nodes:
            if node.op == "call_module" and KIND in node.meta:
                piece = holder.get_submodule(str(node.target))
                assert isinstance(piece, fx.GraphModule)
                key = structure_key(piece), options.compiles(node.meta[KIND])
                places.setdefault(key, []).append((holder, str(node.target)))
    if not places:
        return None
    compiled, total = 0, sum(is_compiled for _, is_compiled in places)
    for (_, is_compiled), users in places.items():
        holder, name = users[0]
        module: Any = holder.get_submodule(name)
        if is_compiled:
            compiled += 1
            report(f"compiling piece {compiled} of {total}, {name}, for {len(users)} places of the model")
            lowering = compile_late if _lacks_lengths(module) else compile_piece
            module = Lowered(lowering(module, compiler))
        for holder, name in users:
            setattr(holder, name, module)
    logger.info("%d pieces, %d distinct", sum(map(len, places.values())), len(places))
    for holder in (gm, *others):
        _bind(holder)
    _LazyGraphModule.force_recompile(gm)
    forward: Callable[..., Any] = gm.forward
    return forward


def _bind(gm: fx.GraphModule) -> None:
    """Let the code of `gm`, and of its regions' graphs, call its submodules as plain functions.

    Finding a submodule and going through its `__call__` costs 3 microseconds a block, and passing a thousand weights on
    as often costs more.
    """
    for branch in _branches(gm):
        _bind(branch)
    for name, module in gm._modules.items():  # `named_children` leaves repeated modules out
        assert module is not None
        if isinstance(module, fx.GraphModule):
            _LazyGraphModule.force_recompile(module)
        gm.__dict__[name] = module.forward


def _branches(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph modules that `gm` hands to `region_call.run`. They hold pieces too."""
    branches = []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value = getattr(gm, str(node.target), None)
            if isinstance(value, fx.GraphModule):
                branches.append(value)
    return branches


def inner_compiler(options: Options) -> InnerCompiler:
    """The function (graph module, fake inputs) -> callable that `inner_backend`, `inner_options` and `mode` name."""
    inner = options.inner_backend
    extra = dict(options.inner_options or {})
    if callable(inner):
        function = inner
        return lambda gm, inputs: function(gm, inputs, **extra)
    if inner == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = list_mode_options(options.mode) if options.mode else {}
        if options.ulysses_async:
            from cachedit_fx.kept_order import SETTINGS

            patches |= SETTINGS
        patches |= extra
        if patches.get("triton.cudagraphs"):
            # A CUDA graph is recorded for fixed addresses of its weights, or copies the weights in at every replay. A
            # piece that serves many blocks has many weights.
            patches["triton.cudagraphs"] = False
            logger.warning("CUDA graphs are left off: blocks share one compilation, and would copy their weights in")
        inductor: Any = compile_fx  # its declared result covers ahead-of-time packaging too
        return lambda gm, inputs: inductor(gm, inputs, config_patches=patches or None)
    from torch._dynamo.backends.registry import lookup_backend

    backend = lookup_backend(inner)
    return lambda gm, inputs: backend(gm, inputs, **extra)


def compile_piece(piece: fx.GraphModule, compiler: InnerCompiler) -> Callable[..., Any]:
    """Compile one piece under a separate tracing context.

    The surrounding context belongs to the whole graph. Its fake mode is not that of the recorded values. Ahead-of-time
    autograd would leave one piece's results in it, and take them for the next piece's.
    """
    inputs = [_fake_input(node) for node in piece.graph.nodes if node.op == "placeholder"]
    with tracing(TracingContext(_fake_mode(inputs))):
        return compiler(piece, inputs)


ON_NUMBERS: dict[Any, Callable[..., Any]] = {
    torch.sym_sum: sum,
    torch.sym_not: operator.not_,
    torch.sym_max: max,
    torch.sym_min: min,
    torch.sym_int: int,
    torch.sym_float: float,
}
"""Functions of symbols, and what dynamo traces in their place. It writes the former, and refuses them on numbers."""


def compile_late(piece: fx.GraphModule, compiler: InnerCompiler) -> Callable[..., Any]:
    """Have one piece compiled at its first call, by the lengths that come then. Other lengths compile it once more.

    Dynamo guards what the compiled form takes for granted. Without its guards nothing would, as lengths that depend on
    data have no value yet while the graph is compiled. The piece's graph changes in place.
    """
    for node in piece.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_storage_offset.default):
        _drop_checks(node)
    for node in piece.graph.nodes:
        node.target = ON_NUMBERS.get(node.target, node.target)
    piece.recompile()
    _LazyGraphModule.force_recompile(piece)  # otherwise dynamo traces what writes the forward's code, and fails

    def call(*inputs: Any) -> Any:  # dynamo does not trace the forward of its graph as the outermost frame
        return piece.forward(*inputs)

    return isolated_compile(call, compiler, fullgraph=True, recompile_limit=RECOMPILE_LIMIT)


def _drop_checks(offset: fx.Node) -> None:
    """Remove what dynamo asserts of a storage offset. It refuses its own operator when it traces the graph anew."""
    readers = [offset]
    for node in readers:
        readers += node.users
    if all(node.target is torch.ops.aten._assert_scalar.default for node in readers if not node.users):
        for node in dict.fromkeys(reversed(readers)):
            offset.graph.erase_node(node)


def _lacks_lengths(piece: fx.GraphModule) -> bool:
    """Whether sizes of the piece's inputs depend on data, and no input holds the lengths that they are made of."""
    inputs = [value_of(node) for node in piece.graph.find_nodes(op="placeholder")]
    lengths = {value.node.expr for value in inputs if isinstance(value, torch.SymInt)}
    symbols = [free_unbacked_symbols(value) for value in inputs if isinstance(value, torch.Tensor)]
    return not set().union(*symbols) <= lengths


def _fake_input(node: fx.Node) -> Any:
    """The recorded value of an input. Without the storage that it shared before a write was made pure."""
    value = value_of(node)
    if isinstance(value, torch.Tensor) and REPLACED in node.meta:
        return value.new_empty_strided(value.size(), value.stride())
    return value


def _fake_mode(values: Sequence[Any]) -> FakeTensorMode | None:
    for value in values:
        mode = getattr(value, "fake_mode", None)
        if mode is None and hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            mode = _fake_mode([getattr(value, name) for name in names])
        if isinstance(mode, FakeTensorMode):
            return mode
    return None


def structure_key(piece: fx.GraphModule) -> Hashable:
    """A key that is equal for two pieces exactly if one's compiled form serves the other."""
    index: dict[fx.Node, int] = {}
    rows: list[Hashable] = []
    for node in piece.graph.nodes:
        row: list[Hashable] = [node.op, _constant((node.args, dict(node.kwargs)), index)]
        if node.op == "placeholder":
            row.append(_input_key(value_of(node)))
        elif node.op == "get_attr":
            row.append(("attribute", id(piece), str(node.target)))
        elif node.op != "output":
            row.append(target_key(node.target))
        rows.append(tuple(row))
        index[node] = len(index)
    return (*rows, _shared_inputs(piece.graph))


def _shared_inputs(graph: fx.Graph) -> Hashable:
    """The pairs of inputs that share memory, if the graph writes to an input; otherwise none, since it is no matter."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    written = {memory for node in graph.nodes for target in written_by(node) for memory in memory_of(target)}
    if not written or all(written.isdisjoint(memory_of(node)) for node in inputs):
        return ()
    pairs = itertools.combinations(range(len(inputs)), 2)
    return tuple((a, b) for a, b in pairs if not memory_of(inputs[a]).isdisjoint(memory_of(inputs[b])))


def _constant(value: Any, index: Mapping[fx.Node, int]) -> Hashable:
    """A hashable form of an argument: nodes by their index, constants with their type (1, 1.0 and True differ)."""
    if isinstance(value, fx.Node):
        return ("node", index[value])
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, tuple(_constant(element, index) for element in value))
    if isinstance(value, dict):
        return ("dict", tuple((name, _constant(element, index)) for name, element in sorted(value.items())))
    if isinstance(value, slice):
        return ("slice", _constant((value.start, value.stop, value.step), index))
    return (type(value).__name__, repr(value))


def _input_key(value: Any) -> Hashable:
    if not isinstance(value, torch.Tensor):
        return (type(value).__name__, str(value))
    key: tuple[Hashable, ...] = (
        type(value).__name__,
        tuple(str(size) for size in value.shape),
        _strides(value) if value.layout is torch.strided else str(value.layout),
        value.dtype,
        str(value.device),
        value.requires_grad,
        isinstance(value, torch.nn.Parameter),
    )
    if hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        key += (repr(context), *(_input_key(getattr(value, name)) for name in names))
    return key


def _strides(value: torch.Tensor) -> tuple[str, ...]:
    """The strides as text; empty for dimensions of size 1.

    A stride of a dimension of size 1 has no effect, and may be any number. For example, a slice of a stream of batch 1
    is contiguous, but keeps the stride of the larger tensor. Inductor's checks leave these strides out too.
    """
    return tuple("" if str(size) == "1" else str(step) for size, step in zip(value.shape, value.stride(), strict=True))


def compile_whole(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Compile the graph as one piece; with `inner_backend="eager"`, its forward as it is.

    A graph that writes to two inputs that share memory stays as it is too. The cache of compiled graphs of torch 2.13
    takes it for one whose inputs share none (`findings/aot_autograd_cache_ignores_shared_memory.sh`).
    """
    if options.inner_backend == "eager" or _writes_to_shared_memory(gm.graph):
        return gm.forward
    return inner_compiler(options)(gm, list(example_inputs))


def _writes_to_shared_memory(graph: fx.Graph) -> bool:
    """Whether the graph writes in place to memory that two of its inputs name."""
    named = Counter(memory for node in graph.find_nodes(op="placeholder") for memory in memory_of(node))
    return any(named[memory] > 1 for node in graph.nodes for target in written_by(node) for memory in memory_of(target))
