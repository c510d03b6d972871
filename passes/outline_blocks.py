"""Cuts the flat graph into pieces, each a graph module of its own that takes its weights as inputs.

    x = linear(...); ...            prologue = self.prologue(hidden_states, ...)
    ... 130 nodes ...        ->     blocks_0 = self.blocks_0(hidden, text, temb, weight_0, ...)
    ... 130 nodes ...               blocks_1 = self.blocks_1(hidden_1, text_1, temb, weight_1, ...)

Alike blocks become alike modules (inputs in the order of first use, outputs in the order they are made), so that the
lowering compiles one of them for all. With `granularity="block"` every block of the chain is a piece; with "region"
the pieces are head, region and tail. Glue that only moves data stays in the outer graph.

With `canonical_layout`, carried values and a region's results leave their pieces contiguous: a block that hands on a
slice of a larger tensor would otherwise give its successor other strides than its own, and so another compilation;
and what is restored from the store has the strides that were compiled for.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.fx.node import map_arg

from .base import Facts, FlatGraph, Rewrite, Rewritten, make_module
from .block_loops import Detection
from .find_timestep import TimestepSource
from .graph_values import body_nodes, input_nodes, is_data_movement, open_contexts, tensor_of, value_of
from .plan_regions import RegionPlan, RegionReport

# Where in the order of body nodes an outer node's piece begins, and of which kind the piece is.
PLACE, KIND = "cachedit_place", "cachedit_kind"

Kind = Literal["prologue", "block", "glue", "region", "epilogue"]


@dataclass(frozen=True)
class Piece:
    """A stretch of body nodes that becomes one module of the outer graph.

    `start` is where it begins in the order of body nodes; -1 for what is hoisted out of a region, and belongs to none.
    `kind` is "block" or "region" exactly where it holds one block or a stretch of them.
    """

    name: str
    kind: Kind
    start: int
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Outline:
    """Fact: the graph is outlined.

    Attributes:
        pieces: names of the modules that the pieces became, in order.
        origin: node of the flat graph -> the node of this graph that has its value.
    """

    pieces: tuple[str, ...]
    origin: Mapping[fx.Node, fx.Node] = field(repr=False)


class OutlineBlocks(Rewrite):
    """Makes each block a module of its own, and what lies between them too.

    Args:
        granularity: "block" or "region".
        canonical_layout: make carried values and region results contiguous when they leave a piece.
    """

    name: ClassVar[str] = "outline_blocks"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, Detection)
    uses: ClassVar[tuple[type, ...]] = (RegionReport,)
    provides: ClassVar[tuple[type, ...]] = (Outline,)
    preserves: ClassVar[tuple[type, ...]] = (TimestepSource, Detection, RegionReport)

    def __init__(self, granularity: str = "block", canonical_layout: bool = True) -> None:
        self.granularity = granularity
        self.canonical_layout = canonical_layout

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        detection, report = facts[Detection], facts.get(RegionReport)
        regions = report.regions if report else ()
        if not detection.chain:
            return Rewritten(gm, 0)
        nodes = body_nodes(gm.graph)
        pieces = plan_pieces(nodes, detection, regions, self.granularity)
        streams = {
            value
            for loop in detection.chain_loops
            for carried in loop.carried
            for value in (*carried.inputs, *carried.outputs)
            if value is not None
        }
        streams |= {value for region in regions for value in region.live_outs}
        wanted = {value for region in regions for value in _outer_values(region)}
        outliner = _Outliner(gm, pieces, wanted, streams if self.canonical_layout else set())
        outer = outliner.run()
        return Rewritten(outer, len(pieces), (Outline(tuple(outliner.names), outliner.outer),))


def _outer_values(region: RegionPlan) -> Iterable[fx.Node]:
    """Values that the cache branch reads and that must therefore leave their pieces."""
    yield from region.bases.inputs
    if region.hidden_out is not None:
        yield region.hidden_out
    if region.reference is not None:
        yield from region.reference.inputs


def plan_pieces(
    nodes: Sequence[fx.Node],
    detection: Detection,
    regions: Sequence[RegionPlan],
    granularity: str,
) -> list[Piece]:
    """Divide all body nodes into pieces, in an order in which they can run."""
    cuts: dict[int, tuple[str, Kind]] = {}
    end_of_last = 0
    if granularity == "block":
        for loop in detection.chain_loops:
            for index, block in enumerate(loop.blocks):
                cuts[block.start] = (f"{_identifier(loop.name)}_{index}", "block")
                cuts.setdefault(block.end, ("glue", "glue"))
                end_of_last = max(end_of_last, block.end)
    for number, region in enumerate(regions):
        if granularity == "region":
            cuts[region.start] = (f"middle_{number}", "region")
            cuts[region.end] = ("tail", "glue")
            end_of_last = max(end_of_last, region.end)
        elif region.start:
            cuts.setdefault(region.start, ("glue", "glue"))
    if not cuts:
        return [Piece("model", "region", 0, tuple(nodes))]
    cuts[end_of_last] = ("epilogue", "epilogue")
    for low, high in open_contexts(nodes):
        cuts = {at: label for at, label in cuts.items() if not low < at <= high}
    cuts.setdefault(0, ("prologue", "prologue"))

    hoisted = {node for region in regions for node in region.hoisted}
    pieces: list[Piece] = []
    edges = [*sorted(at for at in cuts if at < len(nodes)), len(nodes)]
    for start, end in zip(edges, edges[1:], strict=False):
        early = tuple(node for region in regions if region.start == start for node in region.hoisted)
        if early:
            pieces.append(Piece("hoisted", "glue", -1, early))
        name, kind = cuts[start]
        if kind != "block" and any(start <= block.start < end for loop in detection.loops for block in loop.blocks):
            kind = "region"
        pieces.append(Piece(name, kind, start, tuple(node for node in nodes[start:end] if node not in hoisted)))
    return [piece for piece in pieces if piece.nodes]


def _identifier(name: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in name)


class _Outliner:
    """Builds the outer graph piece by piece."""

    def __init__(
        self, gm: fx.GraphModule, pieces: Sequence[Piece], wanted: set[fx.Node], streams: set[fx.Node]
    ) -> None:
        self.gm = gm
        self.pieces = pieces
        self.wanted = wanted
        self.streams = streams
        self.graph = fx.Graph()
        self.outer: dict[fx.Node, fx.Node] = {}
        self.names: list[str] = []
        self.symbols = self._symbol_inputs()

    def run(self) -> fx.GraphModule:
        for node in self.gm.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.outer[node] = self._copy_outer(node)
        for piece in self.pieces:
            if piece.kind == "glue" and all(is_data_movement(node) for node in piece.nodes):
                for node in piece.nodes:
                    self.outer[node] = self._copy_outer(node)
                    self.outer[node].meta[PLACE] = piece.start
            else:
                self._outline(piece)
        output = next(node for node in reversed(self.gm.graph.nodes) if node.op == "output")
        self.graph.output(map_arg(output.args[0], self.outer.__getitem__)).meta = dict(output.meta)
        return make_module(self.gm, self.graph, "CachedTransformer")

    def _copy_outer(self, node: fx.Node) -> fx.Node:
        copy = self.graph.node_copy(node, self.outer.__getitem__)
        copy.meta = dict(node.meta)
        if copy.op == "placeholder":
            copy.target = copy.name  # else the code begins by giving each of a thousand weights another name
        return copy

    def _outline(self, piece: Piece) -> None:
        inside = set(piece.nodes)
        leaving = [n for n in piece.nodes if n in self.wanted or any(user not in inside for user in n.users)]
        results = list(dict.fromkeys(item for node in leaving for item in _crossing(node, inside)))
        inner = fx.Graph()
        root: dict[str, Any] = {}
        local: dict[fx.Node, fx.Node] = {}
        inputs = self._inputs(piece)
        for value in inputs:
            local[value] = inner.placeholder(_identifier(value.name))
            # Without dynamo's mark of a static input: a piece is called with the weights of many blocks.
            local[value].meta = {k: v for k, v in self.outer[value].meta.items() if k != "tensor_dict"}

        def take(node: fx.Node) -> fx.Node:
            """The local twin; what cannot cross a cut (a submodule, a size tuple) is made again here."""
            if node not in local:
                if node.op == "get_attr":
                    root[str(node.target)] = _attribute(self.gm, str(node.target))
                local[node] = inner.node_copy(node, take)
                local[node].meta = dict(node.meta)
            return local[node]

        for node in piece.nodes:
            take(node)
        outputs = tuple(self._canonical(inner, node, local[node]) for node in results)
        inner.output(outputs)
        name = self._unique(piece.name)
        self.gm.add_module(name, make_module(root, inner, name))
        call = self.graph.call_module(name, tuple(self.outer[value] for value in inputs))
        call.meta = {"example_value": tuple(value_of(node) for node in outputs), KIND: piece.kind, PLACE: piece.start}
        for index, node in enumerate(results):
            getitem = self.graph.call_function(operator.getitem, (call, index))
            getitem.meta = dict(node.meta) | dict(outputs[index].meta) | {PLACE: piece.start}
            getitem.name = self.graph._graph_namespace.create_name(node.name, getitem)
            self.outer[node] = getitem

    def _inputs(self, piece: Piece) -> list[fx.Node]:
        """Live-ins in the order of first use; then the symbols in their shapes, as whole graphs have them too: inductor
        writes its guards in terms of such inputs."""
        inside = set(piece.nodes)
        found: dict[fx.Node, None] = {}

        def visit(node: fx.Node) -> None:
            for item in input_nodes(node):
                if item in inside or item in found:
                    continue
                if _can_cross(item):
                    found.setdefault(item)
                else:
                    visit(item)

        for node in piece.nodes:
            visit(node)
        needed: set[Any] = set()
        for node in (*found, *piece.nodes):
            value = value_of(node)
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(item, (torch.Tensor, torch.SymInt)):
                    needed |= free_symbols(item)
        for symbol in sorted(needed, key=str):
            if symbol in self.symbols:
                found.setdefault(self.symbols[symbol])
        return list(found)

    def _symbol_inputs(self) -> dict[Any, fx.Node]:
        """Symbol -> the graph input that holds it."""
        found: dict[Any, fx.Node] = {}
        for node in self.gm.graph.nodes:
            value = value_of(node) if node.op == "placeholder" else None
            if isinstance(value, torch.SymInt) and value.node.expr.is_symbol:
                found.setdefault(value.node.expr, node)
        return found

    def _canonical(self, inner: fx.Graph, node: fx.Node, local: fx.Node) -> fx.Node:
        tensor = tensor_of(node)
        if node not in self.streams or tensor is None or tensor.is_contiguous():
            return local
        result = inner.call_method("contiguous", (local,))
        result.meta = {"example_value": tensor.contiguous()}
        return result

    def _unique(self, name: str) -> str:
        candidate, number = name, 0
        while candidate in self.names or hasattr(self.gm, candidate):
            number += 1
            candidate = f"{name}_{number}"
        self.names.append(candidate)
        return candidate


def _crossing(node: fx.Node, inside: set[fx.Node]) -> Iterator[fx.Node]:
    """The node itself, or what it is made again from on the other side where it cannot cross."""
    if _can_cross(node):
        yield node
    else:
        for item in node.all_input_nodes:
            if item in inside:
                yield from _crossing(item, inside)


def _can_cross(node: fx.Node) -> bool:
    """Whether the value can be an input of a compiled piece: a tensor or a number, not a tuple or a submodule."""
    return isinstance(value_of(node), (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def _attribute(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value
