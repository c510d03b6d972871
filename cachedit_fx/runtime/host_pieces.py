"""Runs hoisted pieces on the host, with weights that lie there.

timestep, conditions ─► to the host ─► piece ─► values that the graph takes ─► to the model's device
                                            └─► values that only such pieces take stay on the host
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx

from cachedit_fx.passes.graph_values import tensor_of, value_of
from cachedit_fx.passes.hoist_invariants import Hoisted
from cachedit_fx.passes.manager import Outcome
from cachedit_fx.passes.outline_blocks import KIND
from cachedit_fx.passes.time_weights import pieces_on_host, readers_of
from cachedit_fx.runtime.host_tensor import HOST, HostWeight, host_weight_error, stand_in, to_host

ON_HOST = "cachedit_on_host"
"""Key in the meta of a graph input: whether it is a weight that lies on the host."""

Function = Callable[..., tuple[torch.Tensor, ...]]


def mark_weights(gm: fx.GraphModule) -> None:
    """Let the passes see weights that lie on the host as weights on the model's device, marked."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if isinstance(value, HostWeight):
            node.meta |= {"example_value": stand_in(value), ON_HOST: True}


def refuse_weights(inputs: Sequence[Any], reason: str) -> None:
    """Raise `HostWeightError` if a weight among a graph's inputs lies on the host."""
    layers = [value.layer for value in inputs if isinstance(value, HostWeight)]
    if layers:
        raise host_weight_error(layers, reason)


def claim_pieces(outcome: Outcome, inputs: Sequence[Any]) -> None:
    """Leave the pieces that run on the host to the host: the inner compiler is not asked for them.

    Raises:
        HostWeightError: if anything but a piece behind the timestep reads a weight that lies on the host.
    """
    hoisted = outcome.facts.get(Hoisted)
    allowed = set(hoisted.time_weights) if hoisted is not None else set()
    others = [value for place, value in enumerate(inputs) if place not in allowed]
    refuse_weights(others, "these inputs make another graph, in which more than the timestep's values depend on it")
    if hoisted is not None:
        names = {hoisted.pieces[number].name for number in pieces_on_host(hoisted.pieces, weights_on_host(hoisted))}
        for node in hoisted.graph_module.graph.find_nodes(op="call_module"):
            if node.target in names:
                node.meta.pop(KIND, None)


def weights_on_host(hoisted: Hoisted) -> tuple[int, ...]:
    """The graph inputs that are weights on the host."""
    inputs = hoisted.graph_module.graph.find_nodes(op="placeholder")
    return tuple(place for place, node in enumerate(inputs) if ON_HOST in node.meta)


def functions_of(hoisted: Hoisted) -> tuple[list[Function], list[Function]]:
    """Each piece as a function in its compiled form, and as captured, for batches. Some of them run on the host."""
    compiled: list[Function] = [getattr(hoisted.graph_module, piece.name) for piece in hoisted.pieces]
    captured: list[Function] = [piece.code for piece in hoisted.pieces]
    numbers = pieces_on_host(hoisted.pieces, weights_on_host(hoisted))
    for number in numbers:
        results = hoisted.pieces[number].results
        leaves = [index in hoisted.inputs or readers_of(hoisted.pieces, [index]) - numbers for index in results]
        compiled[number] = captured[number] = HostPiece(hoisted.pieces[number].code, list(map(bool, leaves)))
    return compiled, captured


class HostPiece:
    """A hoisted piece that runs on the host, whatever device its arguments lie on.

    Args:
        code: as captured for the model's device.
        leaves: for each result, whether it goes to the model's device.
    """

    def __init__(self, code: fx.GraphModule, leaves: Sequence[bool]) -> None:
        *_, output = code.graph.nodes
        results = [tensor_of(node) for node in output.args[0]]
        inputs = [tensor_of(node) for node in code.graph.find_nodes(op="placeholder")]
        self.device = next(value.device for value in [*results, *inputs] if value is not None)
        self.leaves = list(leaves)
        self.code = _for_host(code, self.device)

    def __call__(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        moved = [to_host(value) if isinstance(value, torch.Tensor) else value for value in arguments]
        with self._autocast():
            results = self.code(*moved)
        return tuple(
            result.to(self.device) if leaves else result for result, leaves in zip(results, self.leaves, strict=True)
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        """The autocast of the model's device, on the host."""
        kind = self.device.type
        if kind in (HOST.type, "meta") or not torch.is_autocast_enabled(kind):
            return nullcontext()
        return torch.autocast(HOST.type, torch.get_autocast_dtype(kind))


def _for_host(code: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The same code with the host in place of the device, where it names one."""
    graph = copy.deepcopy(code.graph)

    def moved(value: Any) -> Any:
        is_name = isinstance(value, str) and value.split(":")[0] == device.type
        return HOST if is_name or (isinstance(value, torch.device) and value.type == device.type) else value

    constants: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(value := getattr(code, node.target), torch.Tensor):
            constants[node.target] = value.to(HOST)
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
        if node.op == "call_method" and node.target == device.type:
            node.target, node.args, node.kwargs = "cpu", node.args[:1], {}
    module = fx.GraphModule(code, graph)
    for name, value in constants.items():
        setattr(module, name, value)
    return module
