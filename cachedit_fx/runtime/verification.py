"""Compares a call with the plain module: the option `verify="first"`.

    the call ──► compiled module ──► results ─┐
        └──────► plain module ─────► results ─┴─► equal, or VerificationError: the first piece that differs

A graph is due until a call has computed all of it, that is, no region was bypassed. Such a call is made again by the
plain module, from the same inputs and random numbers. If the results differ, each piece of the rewritten graph is
compared with the values of the graph that dynamo captured, and the first that differs is named.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from cachedit_fx.passes.graph_values import tensor_of
from cachedit_fx.passes.insert_cache_branch import CacheBranch
from cachedit_fx.passes.manager import Outcome
from cachedit_fx.passes.outline_blocks import ORIGIN
from cachedit_fx.runtime.policies.base import Action
from cachedit_fx.runtime.snapshot import attribute_tensors, call_snapshot, parameter_versions, snapshot
from cachedit_fx.runtime.warning import warn

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Dtype -> the relative error that a compiled graph may have.

An inner compiler fuses operations, and so rounds elsewhere than the plain module does. Inductor on a CPU gave 3e-7 in
float32, 1e-3 in float16 and 9e-3 in bfloat16 on small PixArt and SD3 transformers. The limits are ten times as high; in
float32 they leave room for TF32, whose products have 10 bits. A wrong graph is off by far more.
"""


class VerificationError(RuntimeError):
    """A compiled module's result differs from the plain module's.

    Attributes:
        piece: the first piece of the rewritten graph that differs; None if no piece differs when run alone.
        error: the relative error of the module's result; infinite if shapes, dtypes or places of NaNs differ.
        folder: holds the graphs as Python code, as captured and as rewritten.
    """

    def __init__(self, message: str, piece: str | None, error: float, folder: Path) -> None:
        super().__init__(message)
        self.piece, self.error, self.folder = piece, error, folder


@dataclass(eq=False)
class WatchedGraph:
    """A compiled graph, and the inputs of its first computed run.

    Attributes:
        captured: the graph as dynamo captured it.
        lowered: the rewritten graph, its pieces compiled.
        rewrite: rewrites the captured graph again, and compiles nothing.
        is_due: whether the graph still has to be compared.
        inputs: of the lowered graph, without the region call.
    """

    captured: fx.GraphModule
    lowered: Outcome
    rewrite: Callable[[], Outcome]
    is_due: bool = True
    inputs: Sequence[Any] = ()

    def tolerance(self) -> float:
        """The limit for the coarsest dtype of the graph's values."""
        tensors = (tensor_of(node) for node in self.captured.graph.nodes)
        return max((TOLERANCES.get(tensor.dtype, 0.0) for tensor in tensors if tensor is not None), default=0.0)


@dataclass(frozen=True)
class Deviation:
    """A piece that differs, the captured node whose value it gives, and the relative error."""

    piece: str
    node: fx.Node
    error: float

    def __str__(self) -> str:
        lines = (line.strip() for line in (self.node.stack_trace or "").splitlines())
        places = [line for line in lines if line.startswith("File ")]
        place = f", made at {places[-1]}" if places else ""
        value = f"its value {self.node.name} is off by {self.error:.3g}{place}"
        return f"The first piece that differs is {self.piece}: {value}"


class Verifier:
    """Compares a module's calls with the plain module, until each of its graphs was compared once.

    Args:
        is_exact: whether results must be equal to the bit. They are if the pieces run as they were captured.
    """

    def __init__(self, is_exact: bool) -> None:
        self.is_exact = is_exact
        self._present = threading.local()

    def watch(
        self,
        forward: Callable[..., Any],
        captured: fx.GraphModule,
        lowered: Outcome,
        rewrite: Callable[[], Outcome],
    ) -> Callable[..., Any]:
        """`forward`, a lowered graph's callable, made to report its first computed run. See `WatchedGraph`."""
        graph = WatchedGraph(captured, lowered, rewrite)

        def watched(*inputs: Any) -> Any:
            if not graph.is_due:
                return forward(*inputs)
            if CacheBranch not in lowered.facts:
                results, is_computed = forward(*inputs), True
            else:
                region_call, *inputs = inputs  # type: ignore[assignment]
                noting = _NotingCall(region_call)
                results, is_computed = forward(noting, *inputs), noting.is_computed
            if is_computed:
                graph.inputs = inputs
                self._present.graphs.append(graph)
            return results

        return watched

    def check(
        self, module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], call: Callable[[], Any]
    ) -> Any:
        """The result of `call()`, which calls the compiled module with these arguments.

        Raises:
            VerificationError: if the call was the first computed one of a graph, and the plain module gives another
                result, or leaves other values in arguments, buffers or attributes. These then are as before the call.
        """
        restore = call_snapshot(module, args, kwargs)

        def outcome(result: Any) -> list[torch.Tensor]:
            return copies_of((result, args, kwargs, list(module.buffers()), attribute_tensors(module)))

        graphs: list[WatchedGraph] = []
        self._present.graphs = graphs
        versions = parameter_versions(module)
        result = call()
        written = [name for name, version in parameter_versions(module).items() if version != versions.get(name)]
        if graphs and written:
            warn(f"verify: forward writes to the parameter {written[0]} and cannot be repeated, so nothing is compared")
        elif graphs:
            ours = outcome(result)

            def run_plain() -> list[torch.Tensor]:
                restore()
                return outcome(module._call_impl(*args, **kwargs))

            plain = run_plain()
            error, tolerance = relative_error(ours, plain), self._tolerance(graphs)
            # A plain module may be inexact itself: sums on a GPU whose order varies.
            if error > tolerance and error > 2 * relative_error(run_plain(), plain):
                raise self._failure(module, graphs, error, restore)
        for graph in graphs:
            graph.is_due, graph.inputs = False, ()
        return result

    def _tolerance(self, graphs: Sequence[WatchedGraph]) -> float:
        return 0.0 if self.is_exact else max(graph.tolerance() for graph in graphs)

    def _failure(
        self, module: torch.nn.Module, graphs: Sequence[WatchedGraph], error: float, restore: Callable[[], None]
    ) -> VerificationError:
        """The error, with its graphs in a folder. Restores the state before the call."""
        restore()
        tolerance = self._tolerance(graphs)
        folder = Path(tempfile.mkdtemp(prefix="cachedit_fx_verify_"))
        for number, graph in enumerate(graphs):
            (folder / f"captured_{number}.py").write_text(graph.captured.print_readable(False))
            (folder / f"rewritten_{number}.py").write_text(graph.rewrite().graph_module.print_readable(False))
        deviation, reason = None, "No piece differs if it is run alone"
        try:
            deviation = next(filter(None, (first_deviation(graph, tolerance) for graph in graphs)), None)
        except Exception as failure:  # the comparison of pieces must not hide the error that it is to explain
            reason = f"The pieces could not be compared ({type(failure).__name__}: {failure})"
        finally:
            restore()
            for graph in graphs:
                graph.inputs = ()
        return VerificationError(
            f"{type(module).__name__}: the compiled module's result differs from the plain module's by {error:.3g} "
            f"of its size; {tolerance:.3g} is allowed. {deviation or reason}. The graphs, as captured and as "
            f"rewritten, are in {folder}",
            deviation.piece if deviation else None,
            error,
            folder,
        )


class _NotingCall:
    """A region call that notes whether all regions were computed."""

    def __init__(self, region_call: Any) -> None:
        self.decide = region_call.decide
        self._run = region_call.run
        self.is_computed = True

    def run(self, entry: Any, *arguments: Any) -> Any:
        self.is_computed &= entry.decision.action is Action.COMPUTE
        return self._run(entry, *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


def copies_of(values: Any) -> list[torch.Tensor]:
    """Copies of the tensors in nested containers and dataclasses, in order."""
    return [tensor.detach().clone() for tensor in _tensors(values)]


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors(list(vars(leaf).values()))


def relative_error(values: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest ||a - b|| / ||b|| of the pairs; infinite if shapes, dtypes or the places of NaNs differ."""
    if len(values) != len(expected):
        return float("inf")
    return max(map(_error, values, expected), default=0.0)


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return float("inf")
    if torch.equal(value, expected):
        return 0.0
    same = (value == expected) | (value.isnan() & expected.isnan())
    wide = torch.complex128 if value.is_complex() else torch.float64
    one, two = (tensor.to(wide).masked_fill(same, 0) for tensor in (value, expected))
    error = float((one - two).norm())
    if error == 0.0:
        return 0.0
    size = float(expected.to(wide).nan_to_num(0, 0, 0).norm())
    return error / size if size and not math.isnan(error) else float("inf")


# ---------------------------------------------------------------------------------------------------------------------
# Pieces
# ---------------------------------------------------------------------------------------------------------------------


def first_deviation(graph: WatchedGraph, tolerance: float) -> Deviation | None:
    """The first piece of a graph, run on `graph.inputs`, whose results differ from the captured graph's values."""
    inputs = graph.inputs[0] if graph.inputs and isinstance(graph.inputs[0], (tuple, list)) else graph.inputs
    restore = snapshot([value for value in inputs if not isinstance(value, torch.nn.Parameter)])
    reference = _Reference(graph.captured, set(_origins(graph.lowered.graph_module)))
    reference.run(*inputs)
    restore()
    search = _Search(graph.lowered.graph_module, reference.states, tolerance)
    try:
        search.run(*([search] if CacheBranch in graph.lowered.facts else []), *graph.inputs)
    except _Differs as end:
        nodes = {node.name: node for node in graph.captured.graph.nodes}
        return Deviation(end.piece, nodes[end.origin], end.error)
    finally:
        restore()
    return None


def _origins(gm: fx.GraphModule) -> Iterator[str]:
    """Names of the captured nodes whose values leave the pieces of `gm`, and of its regions."""
    for node in gm.graph.nodes:
        if ORIGIN in node.meta:
            yield node.meta[ORIGIN]
        elif node.op == "get_attr" and isinstance(branch := gm._modules.get(str(node.target)), fx.GraphModule):
            yield from _origins(branch)


class _Reference(fx.Interpreter):
    """Runs a captured graph, and keeps every state that the values of some nodes have on the way.

    A node's tensor may be written to after the node. A piece gives the state that the tensor has at the piece's end.

    Attributes:
        states: name of a node -> copies of its value.
    """

    def __init__(self, gm: fx.GraphModule, names: set[str]) -> None:
        super().__init__(gm)
        self.states: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self._live: dict[str, tuple[torch.Tensor, int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.states and isinstance(value, torch.Tensor):
            self._live[n.name] = value, -1
        for name, (tensor, version) in self._live.items():
            present = 0 if tensor.is_inference() else tensor._version  # inference tensors count no writes
            if present != version:
                self.states[name].append(tensor.detach().clone())
                self._live[name] = tensor, present
        return value


class _Differs(Exception):
    """Ends a search at the first piece that differs."""

    def __init__(self, piece: str, origin: str, error: float) -> None:
        super().__init__(piece)
        self.piece, self.origin, self.error = piece, origin, error


class _Search(fx.Interpreter):
    """Runs a rewritten graph, all regions computed, and compares what leaves its pieces. It is its own region call."""

    def __init__(self, gm: fx.GraphModule, states: Mapping[str, Sequence[torch.Tensor]], tolerance: float) -> None:
        super().__init__(gm)
        self.states, self.tolerance = states, tolerance

    def decide(self, *_: Any) -> None:
        """The entry of a region; no decision is needed."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        states = self.states.get(n.meta.get(ORIGIN, ""))
        if states:
            error = min(relative_error([value], [state]) for state in states)
            if error > self.tolerance:
                raise _Differs(str(n.args[0]), n.meta[ORIGIN], error)  # the node takes one result of a piece
        return value

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and args[0] is self and target == "run":
            _, _, compute, inputs, *_ = args
            return _Search(compute.__self__, self.states, self.tolerance).run(*inputs)
        return super().call_method(target, args, kwargs)
