"""Counts the weights that code motion takes out of a step, on the rewritten graph of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import fx, nn

from cachedit_fx.backend import rewrite
from cachedit_fx.capture import copy_of
from cachedit_fx.config.options import parse_options
from cachedit_fx.passes.base import Traced
from cachedit_fx.passes.graph_cost import bytes_of, numel_of
from cachedit_fx.passes.graph_values import is_weight
from cachedit_fx.passes.hoist_invariants import HOISTED, Hoisted
from cachedit_fx.passes.insert_cache_branch import CacheBranch
from cachedit_fx.passes.manager import Outcome
from cachedit_fx.report.tables import Table

STEPS = 28
"""Of a generation, if the modulations are computed for all steps at once."""


@dataclass(frozen=True)
class Reads:
    """What a step of one model reads, in elements of weights, and what is kept.

    "Today" is a step without the pass.

    Attributes:
        parameters: of the model.
        today, cached_today: a computed and a cached step without code motion; a cached one computes the first block.
        rest, cached_rest: the same steps, what is hoisted left out.
        timed: elements behind values that change with the timestep alone.
        prompted: elements behind values that change with the timestep and conditions.
        conditions: elements behind values that change with conditions alone.
        values: number of hoisted values.
        step_bytes: of the values that change with the timestep, for one step.
        prompt_bytes: of the values that change with conditions alone.
        bytes: of the parameters.
        host_bytes: of the parameters that leave the device with `time_weights="host"`.
    """

    model: str
    parameters: int
    today: int
    cached_today: int
    rest: int
    cached_rest: int
    timed: int = 0
    prompted: int = 0
    conditions: int = 0
    values: int = 0
    step_bytes: int = 0
    prompt_bytes: int = 0
    bytes: int = 0
    host_bytes: int = 0

    @property
    def kept(self) -> float:
        """A computed step that finds all values, over today's."""
        return self.rest / self.today

    @property
    def same_steps(self) -> float:
        """A new prompt with steps that came before, over today: only values of the timestep alone are kept."""
        return (self.rest + self.prompted) / self.today

    @property
    def batched(self) -> float:
        """A generation of `STEPS` steps whose values are all computed at once, over today."""
        return (self.rest + (self.prompted + self.timed) / STEPS) / self.today

    @property
    def cached(self) -> float:
        """A cached step that finds all values, over today's."""
        return self.cached_rest / self.cached_today


def count(name: str, module: nn.Module, gm: fx.GraphModule) -> Reads | None:
    """Count the weights that steps of a model read, on its largest graph. None: no chain of blocks was found.

    Args:
        name: the model's, for the result.
        gm: the graph, as dynamo captured it. No weight is looked at.
    """
    settings = {"Fn_compute_blocks": 1, "inner_backend": "aot_eager"}
    outcomes = []
    for hoists in (False, True):
        options = parse_options(settings | {"passes": {"gather_inputs": False, "hoist_invariants": hoists}})
        outcomes.append(rewrite(copy_of(gm), options, Traced.of(module)))
    plain, moved = outcomes
    if CacheBranch not in plain.facts or CacheBranch not in moved.facts:
        return None
    reads = _reads(name, sum(parameter.numel() for parameter in module.parameters()), plain, moved)
    return replace(reads, bytes=sum(parameter.nbytes for parameter in module.parameters()))


def _reads(name: str, parameters: int, plain: Outcome, moved: Outcome) -> Reads:
    (today, cached_today), (rest, cached_rest) = _taken(plain), _taken(moved)
    hoisted = moved.facts.get(Hoisted)
    if hoisted is None:
        return Reads(name, parameters, today, cached_today, rest, cached_rest)
    values = cast("tuple[fx.Node, ...]", hoisted.graph_module.graph.output_node().args[0])
    inputs = [node for node in _inputs(moved) if HOISTED not in node.meta]
    read_by_pieces = {place for place, node in enumerate(inputs) if is_weight(node) and not node.users}
    taken = set(hoisted.inputs)
    places: dict[tuple[bool, bool], set[int]] = defaultdict(set)
    sizes: dict[bool, int] = {True: 0, False: 0}
    for piece in hoisted.pieces:
        places[piece.is_timed, piece.inputs != (hoisted.timestep,)] |= read_by_pieces.intersection(piece.weights)
        sizes[piece.is_timed] += sum(bytes_of(values[index]) for index in piece.results if index in taken)
    weights = {key: sum(numel_of(inputs[place]) for place in kind) for key, kind in places.items()}
    return Reads(
        name,
        parameters,
        today,
        cached_today,
        rest,
        cached_rest,
        weights.get((True, False), 0),
        weights.get((True, True), 0),
        weights.get((False, True), 0),
        hoisted.count,
        sizes[True],
        sizes[False],
        host_bytes=hoisted.time_bytes,
    )


def _inputs(outcome: Outcome) -> list[fx.Node]:
    """The graph's inputs after `region_call`."""
    return outcome.graph_module.graph.find_nodes(op="placeholder")[1:]


def _taken(outcome: Outcome) -> tuple[int, int]:
    """Elements of the weights that a computed and a cached step take: the second does not call the region's graph."""
    weights = [node for node in _inputs(outcome) if is_weight(node) and node.users]
    runs = outcome.graph_module.graph.find_nodes(op="call_method", target="run")
    inside = {value for run in runs for value in cast("tuple[fx.Node, ...]", run.args[3])}
    outside = {node for node in weights if node not in inside or any(user not in runs for user in node.users)}
    return sum(map(numel_of, weights)), sum(map(numel_of, outside))


def shares_table(rows: Sequence[Reads]) -> Table:
    """What the weights that a step reads are behind, what is kept, and what is still read, a line for each model."""
    table = Table(
        ("model", "weights", "time", "time and\nconditions", "conditions", "values", "a step", "a prompt", "read")
    )
    for row in rows:
        shares = (f"{part / row.today:.1%}" for part in (row.timed, row.prompted, row.conditions))
        sizes = (_size(size) for size in (row.step_bytes, row.prompt_bytes))
        table.add(row.model, _count(row.parameters), *shares, str(row.values), *sizes, f"{row.kept:.3f}")
    return table


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e3:.0f} k"


def _size(size: int) -> str:
    return f"{size / 2**20:.2f} MiB" if size >= 2**17 or not size else f"{size / 2**10:.1f} KiB"


def reads_table(rows: Sequence[Reads]) -> Table:
    """The weights that steps read, a line for each model."""
    table = Table(("model", "step by step", f"{STEPS} steps at once", "cached step"))
    for row in rows:
        table.add(row.model, *(f"{ratio:.3f}" for ratio in (row.same_steps, row.batched, row.cached)))
    return table
