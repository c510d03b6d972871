"""Cuts the flat graph into pieces. Each piece is a separate graph module that takes its weights as inputs.

    x = linear(...); ...            prologue = self.prologue(hidden_states, ...)
    ... 130 nodes ...        ->     blocks_0 = self.blocks_0(hidden, text, temb, weight_0, ...)
    ... 130 nodes ...               blocks_1 = self.blocks_1(hidden_1, text_1, temb, weight_1, ...)

Identical blocks become identical modules: inputs are in the order of first use, outputs in the order they are made. The
lowering then compiles one module for all. With `granularity="block"` every block of the chain is a piece; with "region"
the pieces are head, region and tail. Glue that only moves data stays in the outer graph.

With `canonical_layout`, carried values and a region's results leave their pieces contiguous. Otherwise a block that
hands on a slice of a larger tensor would give the next block other strides, and so cause another compilation. Restored
results have the strides that the next piece was compiled for.
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
from .graph_aliases import write_spans
from .graph_values import body_nodes, input_nodes, is_data_movement, meta_of_value, open_contexts, tensor_of, value_of
from .infer_dependence import Dependence
from .normalize import Normalized
from .plan_regions import RegionPlan, RegionReport

# Keys in the meta of outer nodes: the position of body nodes at which the node's piece begins; the piece's kind; for a
# result of a piece, the name of the flat graph's node that has the value.
PLACE, KIND, ORIGIN = "cachedit_place", "cachedit_kind", "cachedit_origin"

Kind = Literal["prologue", "block", "glue", "region", "epilogue"]


@dataclass(frozen=True)
class Piece:
    """Body nodes that become one module of the outer graph.

    Attributes:
        kind: "block" for one block of the chain; "region" for any other piece that holds blocks of a loop.
        start: position of the first body node; -1 for nodes that are hoisted out of a region, and belong to none.
    """

    name: str
    kind: Kind
    start: int
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Outline:
    """Fact: the graph is outlined.

    Attributes:
        pieces: names of the pieces' modules, in order.
        origin: node of the flat graph -> the node of this graph that has its value.
    """

    pieces: tuple[str, ...]
    origin: Mapping[fx.Node, fx.Node] = field(repr=False)


class OutlineBlocks(Rewrite):
    """Makes each block a separate module, and the nodes between blocks too.

    Args:
        granularity: the size of a piece, "block" or "region".
        canonical_layout: make carried values and region results contiguous when they leave a piece.
    """

    name: ClassVar[str] = "outline_blocks"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, Detection)
    uses: ClassVar[tuple[type, ...]] = (RegionReport, Normalized)
    provides: ClassVar[tuple[type, ...]] = (Outline,)
    preserves: ClassVar[tuple[type, ...]] = (TimestepSource, Dependence, Detection, RegionReport)

    def __init__(self, granularity: str = "block", canonical_layout: bool = True) -> None:
        self.granularity = granularity
        self.canonical_layout = canonical_layout

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        detection, report = facts[Detection], facts.get(RegionReport)
        regions = report.regions if report else ()
        normalized = facts.get(Normalized)
        if not detection.chain or (normalized is not None and normalized.impurities):
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
        read_by_branch = {value for region in regions for value in branch_values(region)}
        outliner = _Outliner(gm, pieces, read_by_branch, streams if self.canonical_layout else set())
        outer = outliner.run()
        return Rewritten(outer, len(pieces), (Outline(tuple(outliner.names), outliner.outer),))


def branch_values(region: RegionPlan) -> Iterable[fx.Node]:
    """Values of the flat graph that the cache branch reads, so that they must leave their pieces."""
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
    for low, high in (*open_contexts(nodes), *write_spans(nodes)):
        cuts = {at: label for at, label in cuts.items() if not low < at <= high}
    cuts.setdefault(0, ("prologue", "prologue"))

    hoisted = {node for region in regions for node in region.hoisted}
    pieces: list[Piece] = []
    edges = [*sorted(at for at in cuts if at < len(nodes)), len(nodes)]
    for start, end in zip(edges, edges[1:], strict=False):
        prelude = tuple(node for region in regions if region.start == start for node in region.hoisted)
        if prelude:
            pieces.append(Piece("hoisted", "glue", -1, prelude))
        name, kind = cuts[start]
        if kind != "block" and any(start <= block.start < end for loop in detection.loops for block in loop.blocks):
            kind = "region"
        pieces.append(Piece(name, kind, start, tuple(node for node in nodes[start:end] if node not in hoisted)))
    return [piece for piece in pieces if piece.nodes]


def _identifier(name: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in name)


class _Outliner:
    """Builds the outer graph piece by piece.

    Args:
        gm: the flat graph.
        pieces: in an order in which they can run.
        branch_values: values that must leave their pieces because the cache branch reads them.
        streams: values that leave their pieces contiguous.
    """

    def __init__(
        self, gm: fx.GraphModule, pieces: Sequence[Piece], branch_values: set[fx.Node], streams: set[fx.Node]
    ) -> None:
        self.gm = gm
        self.pieces = pieces
        self.branch_values = branch_values
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
            copy.target = copy.name  # otherwise the code begins by renaming each of a thousand weights
        return copy

    def _outline(self, piece: Piece) -> None:
        inside = set(piece.nodes)
        outs = [n for n in piece.nodes if n in self.branch_values or any(user not in inside for user in n.users)]
        results = list(dict.fromkeys(value for node in outs for value in _crossing(node, inside)))
        inner = fx.Graph()
        root: dict[str, Any] = {}
        local: dict[fx.Node, fx.Node] = {}
        inputs = self._inputs(piece)
        for value in inputs:
            local[value] = inner.placeholder(_identifier(value.name))
            # Dynamo's mark of a static input is left out: a piece is called with the weights of many blocks.
            local[value].meta = {k: v for k, v in meta_of_value(self.outer[value]).items() if k != "tensor_dict"}

        def take(node: fx.Node) -> fx.Node:
            """The node's local copy. A value that cannot cross a cut (a submodule, a size tuple) is made again here."""
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
            getitem.meta = meta_of_value(node) | meta_of_value(outputs[index]) | {PLACE: piece.start, ORIGIN: node.name}
            getitem.name = self.graph._graph_namespace.create_name(node.name, getitem)
            self.outer[node] = getitem

    def _inputs(self, piece: Piece) -> list[fx.Node]:
        """Live-ins in the order of first use, then the symbols in their shapes.

        Whole graphs have the symbols as inputs too: inductor writes its guards in terms of these inputs.
        """
        inside = set(piece.nodes)
        inputs: dict[fx.Node, None] = {}

        def visit(node: fx.Node) -> None:
            for source in input_nodes(node):
                if source in inside or source in inputs:
                    continue
                if _can_cross(source):
                    inputs.setdefault(source)
                else:
                    visit(source)

        for node in piece.nodes:
            visit(node)
        symbols: set[Any] = set()
        for node in (*inputs, *piece.nodes):
            value = value_of(node)
            for element in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(element, (torch.Tensor, torch.SymInt)):
                    symbols |= free_symbols(element)
        for symbol in sorted(symbols, key=str):
            if symbol in self.symbols:
                inputs.setdefault(self.symbols[symbol])
        return list(inputs)

    def _symbol_inputs(self) -> dict[Any, fx.Node]:
        """Symbol -> the graph input that holds it."""
        inputs: dict[Any, fx.Node] = {}
        for node in self.gm.graph.nodes:
            value = value_of(node) if node.op == "placeholder" else None
            if isinstance(value, torch.SymInt) and value.node.expr.is_symbol:
                inputs.setdefault(value.node.expr, node)
        return inputs

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
    """The values that cross the border for `node`: the node itself, or the values that it is made again from."""
    if _can_cross(node):
        yield node
    else:
        for source in node.all_input_nodes:
            if source in inside:
                yield from _crossing(source, inside)


def _can_cross(node: fx.Node) -> bool:
    """Whether the value can be an input of a compiled piece: a tensor or a number, not a tuple or a submodule."""
    return isinstance(value_of(node), (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def _attribute(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    return value
