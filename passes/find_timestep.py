"""Finds the graph input that holds the timestep.

    forward(hidden_states, timestep, ...)     ->     TimestepSource("timestep", input_index=1)

The name is tried first: `timestep` and its usual variants, as the input's source name. Then the use is tried: a small
input that reaches a sine or cosine through element-wise operations alone feeds a sinusoidal time embedding.

A timestep that the tracer saw as a Python number is a constant of the graph, not an input. The number then comes from
the traced frame.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from .base import Analysis, Facts, FlatGraph
from .graph_cost import numel
from .graph_values import is_weight, target_name, tensor_of

logger = logging.getLogger(__name__)

NAMES = ("timestep", "timesteps", "timestep_cond", "t", "time", "noise_labels", "noise_level", "sigma", "sigmas")
# fmt: off
_ELEMENTWISE = frozenset({
    "to", "float", "half", "bfloat16", "double", "type_as", "mul", "add", "sub", "div", "truediv", "neg", "unsqueeze",
    "view", "reshape", "expand", "flatten", "getitem", "repeat", "squeeze", "outer", "log", "clamp",
})
# fmt: on


@dataclass(frozen=True)
class TimestepSource:
    """Fact: the place of a call's timestep, a graph input's index, or the number that the graph was captured for."""

    name: str
    input_index: int | None = None
    constant: float | None = None


def timestep_of(source: TimestepSource | None, args: Sequence[Any]) -> torch.Tensor | float | None:
    """The timestep of a call with these graph inputs: a tensor or a number; None without a source."""
    if source is None:
        return None
    if source.input_index is None:
        return source.constant
    timestep: torch.Tensor | float = args[source.input_index]
    return timestep


class FindTimestep(Analysis[TimestepSource]):
    """Finds the graph input, or the number, that is the timestep.

    Args:
        argument: the timestep's name as an argument of `forward`; None finds it.
        numbers: arguments of the traced frame that are Python numbers, by name.
    """

    name: ClassVar[str] = "find_timestep"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph,)
    provides: ClassVar[type] = TimestepSource

    def __init__(self, argument: str | None = None, numbers: Mapping[str, float] | None = None) -> None:
        self.argument = argument
        self.numbers = dict(numbers or {})

    def run(self, gm: fx.GraphModule, facts: Facts) -> TimestepSource | None:
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        source = self._by_name(inputs) or (self._by_use(inputs) if self.argument is None else None)
        if source is None and self.argument is not None:
            names = sorted({source_name(node) for node in inputs if not is_weight(node)})
            logger.warning("timestep=%r: this graph has no such input; it has %s", self.argument, names)
        return source

    def _by_name(self, inputs: list[fx.Node]) -> TimestepSource | None:
        by_name = {source_name(node): index for index, node in enumerate(inputs) if not is_weight(node)}
        for name in (self.argument,) if self.argument else NAMES:
            if name in by_name:
                return TimestepSource(name, input_index=by_name[name])
            if name in self.numbers:
                return TimestepSource(name, constant=float(self.numbers[name]))
        return None

    def _by_use(self, inputs: list[fx.Node]) -> TimestepSource | None:
        for index, node in enumerate(inputs):
            tensor = tensor_of(node)
            if tensor is None or tensor.dim() > 1 or is_weight(node) or numel(tensor) > 4096:
                continue
            if _reaches_sine(node):
                return TimestepSource(source_name(node), input_index=index)
        return None


def source_name(node: fx.Node) -> str:
    """The argument's name as the user wrote it: `L_kwargs_timestep_` -> `timestep`. The node's own name for others."""
    if node.op != "placeholder":
        return node.name
    return re.sub(r"^L_(?:kwargs_|args_)?", "", str(node.target)).strip("_")


def _reaches_sine(source: fx.Node) -> bool:
    pending, visited = [source], {source}
    while pending:
        for user in pending.pop().users:
            name = target_name(user)
            if name in ("sin", "cos"):
                return True
            if name in _ELEMENTWISE and user not in visited:
                visited.add(user)
                pending.append(user)
    return False
