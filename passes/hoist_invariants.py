"""Takes what does not depend on the sample out of an outlined graph's pieces: loop-invariant code motion.

    blocks_3 = self.blocks_3(hidden, temb, w_mod, ...)   ->   blocks_3 = self.blocks_3(hidden, modulation, ...)
                                                              and, in a graph of its own:
                                                              modulation = self.blocks_3_time(temb, w_mod)

Each hoisted value becomes an input of the outer graph. The run time computes it when a piece asks for it, and keeps it
(`cachedit_fx.runtime.hoisting`). So a piece that does not run asks for nothing, and blocks stay alike.

A hoisted piece holds nodes of one piece that depend on the same graph inputs, weights left out. It is named by what its
values change with, `conditions` or `time`. Both levels come from `infer_dependence`.

The cuts change no bit; `invariant_values` says where they may be.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

from torch import fx

from .base import Facts, Interface, Rewrite, Rewritten, make_module
from .block_loops import Detection
from .find_timestep import TimestepSource, source_name
from .graph_aliases import memory_of, writes_to_inputs
from .graph_cost import bytes_of, numel_of
from .graph_values import body_nodes, meta_of_value, tensor_of, value_of
from .infer_dependence import Dependence, Source
from .invariant_values import InvariantPiece, Label
from .outline_blocks import KIND, Outline, branch_values
from .plan_regions import RegionReport
from .time_weights import time_weights

HOISTED = "cachedit_hoisted"
"""Key in the meta of a graph input that is a hoisted value: its index."""


class Argument(NamedTuple):
    """An argument of a hoisted piece: the graph input, or the hoisted value, at this place."""

    place: int
    is_value: bool


@dataclass(frozen=True)
class HoistedPiece:
    """One piece of the graph of hoisted values.

    Attributes:
        name: of its module in `Hoisted.graph_module`.
        code: the module as captured, whatever the inner compiler makes of it.
        arguments: in order.
        results: the indices of its values.
        inputs: the graph inputs that its values depend on, weights left out: all of the pieces before it as well.
        weights: the weights and buffers among its arguments, as graph inputs.
        is_timed: whether its values change with the timestep.
    """

    name: str
    code: fx.GraphModule = field(repr=False)
    arguments: tuple[Argument, ...]
    results: tuple[int, ...]
    inputs: tuple[int, ...]
    weights: tuple[int, ...]
    is_timed: bool


@dataclass(frozen=True)
class Hoisted(Interface):
    """Fact: values that do not depend on the sample are inputs of the graph, after all others.

    Attributes:
        graph_module: from the graph's inputs to the hoisted values; its pieces are the modules that it calls.
        pieces: in an order in which they can run.
        names: the names of the graph's inputs.
        inputs: the indices of the hoisted values that the graph takes as inputs, in order.
        timestep: the index of the timestep among the graph's inputs; None if there is none.
        time_weights: the parameters that only pieces behind the timestep read, as graph inputs.
    """

    graph_module: fx.GraphModule = field(repr=False)
    pieces: tuple[HoistedPiece, ...]
    names: tuple[str, ...] = field(repr=False)
    inputs: tuple[int, ...] = field(repr=False)
    timestep: int | None = None
    time_weights: tuple[int, ...] = field(default=(), repr=False)

    @property
    def count(self) -> int:
        """The number of hoisted values."""
        return sum(len(piece.results) for piece in self.pieces)

    @property
    def time_bytes(self) -> int:
        """The size in bytes of the parameters that only pieces behind the timestep read."""
        inputs = self.graph_module.graph.find_nodes(op="placeholder")
        return sum(bytes_of(inputs[place]) for place in self.time_weights)

    def by_inputs(self) -> dict[tuple[str, ...], HoistedShare]:
        """Names of the inputs that values depend on -> how many values, how large, and what they would read."""
        inputs = self.graph_module.graph.find_nodes(op="placeholder")
        values = cast("tuple[fx.Node, ...]", self.graph_module.graph.output_node().args[0])
        shares: dict[tuple[str, ...], HoistedShare] = {}
        for piece in self.pieces:
            names = tuple(self.names[place] for place in piece.inputs)
            share = shares.get(names, HoistedShare(0, 0, 0))
            shares[names] = HoistedShare(
                share.values + len(piece.results),
                share.bytes + sum(bytes_of(values[index]) for index in piece.results),
                share.weights + sum(numel_of(inputs[place]) for place in piece.weights),
            )
        return shares


class HoistedShare(NamedTuple):
    """A number of hoisted values, their size in bytes, and the number of elements of the weights behind them."""

    values: int
    bytes: int
    weights: int


class HoistInvariants(Rewrite):
    """Makes values that do not depend on the sample inputs of the graph, computed by a graph of their own.

    Args:
        is_compiled: whether an inner compiler compiles pieces of a kind.
    """

    name: ClassVar[str] = "hoist_invariants"
    requires: ClassVar[tuple[type, ...]] = (Outline, Detection, RegionReport)
    uses: ClassVar[tuple[type, ...]] = (Dependence, TimestepSource)
    provides: ClassVar[tuple[type, ...]] = (Outline, Hoisted)
    preserves: ClassVar[tuple[type, ...]] = (TimestepSource, Dependence, Detection, RegionReport)

    def __init__(self, is_compiled: Callable[[str], bool] = lambda kind: False) -> None:
        self.is_compiled = is_compiled

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        pieces = (module.graph for _, module in _pieces_of(gm))
        if Dependence not in facts or not facts[RegionReport].regions or writes_to_inputs(gm.graph, *pieces):
            return Rewritten(gm, 0)
        hoister = _Hoister(gm, facts, self.is_compiled)
        hoister.run()
        if not hoister.values:
            return Rewritten(gm, 0)
        timestep = facts.get(TimestepSource)
        hoisted = hoister.hoisted(timestep.input_index if timestep is not None else None)
        gm.delete_all_unused_submodules()
        return Rewritten(gm, hoisted.count, (hoister.outline(), hoisted))


def _pieces_of(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.GraphModule]]:
    """The calls of pieces in the outer graph, and the pieces."""
    calls = [node for node in gm.graph.nodes if node.op == "call_module" and KIND in node.meta]
    modules = [(call, gm.get_submodule(str(call.target))) for call in calls]
    return [(call, module) for call, module in modules if isinstance(module, fx.GraphModule)]


class _Hoister:
    """Rewrites one outlined graph, from its last piece to its first: later pieces ask earlier ones for values.

    Attributes:
        values: (piece, inner node) -> the index of the hoisted value.
    """

    def __init__(self, gm: fx.GraphModule, facts: Facts, is_compiled: Callable[[str], bool]) -> None:
        outline, regions = facts[Outline], facts[RegionReport].regions
        self.gm = gm
        self.inputs = gm.graph.find_nodes(op="placeholder")
        self.places = {node: place for place, node in enumerate(self.inputs)}
        self.names = list(outline.pieces)
        self.origin = dict(outline.origin)
        self._flat: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        """Node of the outer graph -> the nodes of the flat graph whose value it has."""
        for flat, outer in outline.origin.items():
            self._flat[outer].append(flat)
        self._needed = {self.origin.get(value) for region in regions for value in branch_values(region)}
        """Values that the cache branch will read."""
        self._results = {self.origin.get(value) for region in regions for value in region.live_outs}
        self.values: dict[tuple[InvariantPiece, fx.Node], int] = {}
        self._wanted: dict[InvariantPiece, dict[fx.Node, None]] = {}
        """Values of a piece that were asked for, by hoisted pieces or by the outer graph."""
        self._groups: list[tuple[HoistedPiece, InvariantPiece, list[fx.Node]]] = []
        self._holders: dict[int, fx.Node] = {}
        """Index of a hoisted value -> the input of the outer graph."""
        self._makers: dict[fx.Node, tuple[InvariantPiece, fx.Node]] = {}
        """Result of a piece in the outer graph -> the piece, and the result in it."""
        sources = {
            self.origin[flat]: source for flat, source in facts[Dependence].sources.items() if flat.op == "placeholder"
        }
        self.timed = {self.places[node] for node, source in sources.items() if Source.TIME in source}
        carried = (value for loop in facts[Detection].chain_loops for each in loop.carried for value in each.inputs)
        streams = {self.origin[value] for value in carried if value in self.origin}
        labels: dict[fx.Node, Label] = {
            node: None
            if Source.SAMPLE in source
            else frozenset({self.places[node]} if source or tensor_of(node) is None else ())
            for node, source in sources.items()
        }
        returned = frozenset(memory for node in gm.graph.output_node().all_input_nodes for memory in memory_of(node))
        self.pieces: list[InvariantPiece] = []
        in_blocks = labels | dict.fromkeys(streams)  # the first block must stay identical to the others
        for call, module in _pieces_of(gm):
            kind = call.meta[KIND]
            known = in_blocks if kind in ("block", "region") else labels
            piece = InvariantPiece(call, module, known, is_compiled(kind), returned)
            self.pieces.append(piece)
            for getitem in call.users:
                result = piece.results[int(str(getitem.args[1]))]
                self._makers[getitem] = piece, result
                labels[getitem] = piece.labels[result] if piece.may_leave(result) else None
                in_blocks[getitem] = None if getitem in streams else labels[getitem]

    def run(self) -> None:
        for piece in reversed(self.pieces):
            self._rewrite(piece)
            self._make_groups(piece)

    def hoisted(self, timestep: int | None) -> Hoisted:
        """The graph of the hoisted values."""
        graph, local = fx.Graph(), dict[int, fx.Node]()
        root: dict[str, Any] = {}
        inputs = []
        for node in self.inputs:
            inputs.append(graph.placeholder(node.name))
            inputs[-1].meta = meta_of_value(node)
        groups = self._groups[::-1]
        for group, piece, results in groups:
            root[group.name] = group.code
            arguments = tuple(local[at.place] if at.is_value else inputs[at.place] for at in group.arguments)
            call = graph.call_module(group.name, arguments)
            call.meta = {"example_value": tuple(map(value_of, results)), KIND: piece.call.meta[KIND]}
            for place, (index, node) in enumerate(zip(group.results, results, strict=True)):
                local[index] = graph.call_function(operator.getitem, (call, place))
                local[index].meta = {"example_value": value_of(node)}
        graph.output(tuple(local[index] for index in range(len(local))))
        module = make_module(root, graph, "HoistedValues")
        names = tuple(source_name(self._flat[node][0]) for node in self.inputs)
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        taken = tuple(node.meta[HOISTED] for node in placeholders if HOISTED in node.meta)
        pieces = tuple(group for group, *_ in groups)
        return Hoisted(module, pieces, names, taken, timestep, time_weights(self.inputs, pieces))

    def outline(self) -> Outline:
        """The outline of the outer graph as it is now."""
        return Outline(tuple(self.names), self.origin)

    def _rewrite(self, piece: InvariantPiece) -> None:
        """Leave out of the piece what is hoisted."""
        getitems = sorted(piece.call.users)
        made = {node: self._makers[node][1] for node in getitems}
        is_asked = piece in self._wanted  # some results may no longer be read then
        read = [
            node
            for node in getitems
            if not is_asked or node.users or node in self._needed or not piece.may_leave(made[node])
        ]
        leaving = [
            node
            for node in read
            if piece.may_leave(made[node]) and piece.is_worth_it(made[node]) and node not in self._results
        ]
        staying = [node for node in read if node not in leaving]
        fixed = [node for node in body_nodes(piece.module.graph) if piece.labels[node] is None]
        copied, taken = piece.plan([*fixed, *(made[node] for node in staying)], None)
        if not leaving and not taken and len(staying) == len(getitems):
            return
        values = [node for node in piece.nodes if node in taken]
        holders = {node: self._holder(piece, node) for node in (*values, *(made[node] for node in leaving))}
        for node in leaving:
            self._replace(node, holders[made[node]])
        new = self._new_call(piece, copied, values, staying, holders) if fixed or staying else None
        if new is None:
            self.names.remove(str(piece.call.target))
        name = piece.call.name
        for node in (*getitems, piece.call):
            self.gm.graph.erase_node(node)
        if new is not None:
            new.name = name
        for flat in (flat for node in getitems if node not in read for flat in self._flat[node]):
            del self.origin[flat]

    def _new_call(
        self,
        piece: InvariantPiece,
        copied: set[fx.Node],
        values: Sequence[fx.Node],
        staying: Sequence[fx.Node],
        holders: Mapping[fx.Node, fx.Node],
    ) -> fx.Node:
        """Call what stays of the piece, with the hoisted values that it takes."""
        name, call = str(piece.call.target), piece.call
        results = [self._makers[node][1] for node in staying]
        module, inputs = piece.copy(name, copied, values, results)
        setattr(self.gm, name, module)
        with self.gm.graph.inserting_before(call):
            arguments = (*(piece.outer[node] for node in inputs), *(holders[node] for node in values))
            new = self.gm.graph.call_module(name, arguments)
            new.meta = dict(call.meta) | {"example_value": tuple(map(value_of, results))}
            for place, node in enumerate(staying):
                getitem = self.gm.graph.call_function(operator.getitem, (new, place))
                getitem.meta = meta_of_value(node)
                self._replace(node, getitem)
        return new

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        """Let `new` take the place of a result in the outer graph."""
        node.replace_all_uses_with(new)
        self.origin |= dict.fromkeys(self._flat[node], new)

    def _holder(self, piece: InvariantPiece, node: fx.Node) -> fx.Node:
        """The input of the outer graph that holds a hoisted value."""
        index = self._value(piece, node)
        if index not in self._holders:
            last = self.gm.graph.find_nodes(op="placeholder")[-1]
            with self.gm.graph.inserting_after(last):
                holder = self.gm.graph.placeholder(f"{node.name}_hoisted")
            holder.target = holder.name
            holder.meta = {"example_value": value_of(node), HOISTED: index}
            self._holders[index] = holder
        return self._holders[index]

    def _value(self, piece: InvariantPiece, node: fx.Node) -> int:
        """The index of a hoisted value, which is asked for."""
        self._wanted.setdefault(piece, {}).setdefault(node)
        return self.values.setdefault((piece, node), len(self.values))

    def _make_groups(self, piece: InvariantPiece) -> None:
        """Make the hoisted pieces that compute the values that were asked for, those with the most inputs first."""
        wanted = self._wanted.get(piece, {})
        while wanted:
            label = max(
                (piece.labels[node] or frozenset() for node in wanted), key=lambda each: (len(each), sorted(each))
            )
            results = [node for node in piece.nodes if node in wanted and piece.labels[node] == label]
            copied, taken = piece.plan(results, label)
            values = [node for node in piece.nodes if node in taken]
            for node in values:
                self._value(piece, node)
            self._make_group(piece, label, copied, values, results)
            for node in results:
                del wanted[node]

    def _make_group(
        self,
        piece: InvariantPiece,
        label: frozenset[int],
        copied: set[fx.Node],
        values: Sequence[fx.Node],
        results: list[fx.Node],
    ) -> None:
        is_timed = not self.timed.isdisjoint(label)
        name = self._unique(f"{piece.call.target}_{'time' if is_timed else 'conditions'}")
        module, inputs = piece.copy(name, copied, values, results)
        arguments = [*(self._argument(piece.outer[node]) for node in inputs)]
        arguments += [Argument(self._value(piece, node), is_value=True) for node in values]
        places = (at.place for at in arguments if not at.is_value and at.place not in label)
        weights = tuple(place for place in places if tensor_of(self.inputs[place]) is not None)  # others are sizes
        indices = tuple(self.values[piece, node] for node in results)
        group = HoistedPiece(name, module, tuple(arguments), indices, tuple(sorted(label)), weights, is_timed)
        self._groups.append((group, piece, results))

    def _argument(self, outer: fx.Node) -> Argument:
        """A node of the outer graph as an argument of a hoisted piece: an input, or a value of an earlier piece."""
        if outer in self.places:
            return Argument(self.places[outer], is_value=False)
        return Argument(self._value(*self._makers[outer]), is_value=True)

    def _unique(self, name: str) -> str:
        names = {group.name for group, *_ in self._groups}
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
        return next(candidate for candidate in candidates if candidate not in names)
