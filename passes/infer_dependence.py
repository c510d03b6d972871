"""Infers, for every value of the flat graph, which inputs it depends on.

    linear(silu(time_proj(timestep)), modulation_weight)    TIME          the same for every sample and prompt
    linear(encoder_hidden_states, key_weight)               CONDITIONS    the same for every step of a generation
    attention(hidden_states, ...)                           SAMPLE        new at every step

A value that does not depend on the sample can be computed once and kept. The size of the sample is no dependence on its
numbers: a rotary table for the sample's length counts as a condition. Random numbers, lengths that depend on data, and
what ranks exchange count as the sample, since these values must be computed in their place.

No value's name matters but that of the sample and of the timestep, which other passes and the caller know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Flag, IntEnum, auto
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from cachedit_fx.ring import COMMUNICATING

from .base import Analysis, Facts, FlatGraph
from .choose_chain import sample_input
from .find_timestep import TimestepSource, source_name
from .graph_aliases import Memory, arguments_of, memory_of, overloads_of, written_by
from .graph_cost import numel_of
from .graph_values import is_of_module, is_weight, target_name, tensor_of, value_of
from .normalize import Normalized


class Level(IntEnum):
    """What a value changes with, from the least to the most often."""

    WEIGHTS = 0
    """Only with the module's weights."""
    CONDITIONS = 1
    """With inputs that are neither the sample nor the timestep: text, guidance, sizes."""
    TIME = 2
    """With the timestep, and perhaps with conditions."""
    SAMPLE = 3
    """With the sample, or with random numbers."""


class Source(Flag):
    """The kinds of inputs that a value depends on."""

    NONE = 0
    CONDITION = auto()
    TIME = auto()
    SAMPLE = auto()

    @property
    def level(self) -> Level:
        """The level of a value with these sources."""
        if Source.SAMPLE in self:
            return Level.SAMPLE
        if Source.TIME in self:
            return Level.TIME
        return Level.CONDITIONS if self else Level.WEIGHTS


@dataclass(frozen=True)
class Dependence:
    """Fact: the sources of every value of the flat graph.

    Attributes:
        sources: node -> the inputs that its value depends on, when the node is made. Later writes to its memory do not
            count.
        weights: level -> number of weight elements that serve values of this level at most. A weight that values of
            several levels read counts for the highest.
        timed_weights: number of weight elements that serve values of the timestep alone, conditions left out.
    """

    sources: Mapping[fx.Node, Source] = field(repr=False)
    weights: Mapping[Level, int]
    timed_weights: int

    def level(self, node: fx.Node) -> Level:
        """The level of a node's value."""
        return self.sources[node].level

    def share(self, *levels: Level) -> float:
        """The share of the weights' elements that serve values of these levels, from 0 to 1."""
        return sum(self.weights[level] for level in levels) / max(sum(self.weights.values()), 1)


class InferDependence(Analysis[Dependence]):
    """Infers which inputs each value depends on.

    Args:
        sample: the sample's name as an argument of `forward`; None takes the input that is most like the output.
    """

    name: ClassVar[str] = "infer_dependence"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized)
    uses: ClassVar[tuple[type, ...]] = (TimestepSource,)
    provides: ClassVar[type] = Dependence

    def __init__(self, sample: str | None = None) -> None:
        self.sample = sample

    def run(self, gm: fx.GraphModule, facts: Facts) -> Dependence | None:
        sources = _input_sources(gm, facts.get(TimestepSource), self.sample)
        if Source.SAMPLE not in sources.values():
            return None
        _propagate(gm, sources)
        weights = dict.fromkeys(Level, 0)
        timed = 0
        for node, source in _weight_sources(gm, sources).items():
            weights[source.level] += numel_of(node)
            timed += numel_of(node) if source is Source.TIME else 0
        return Dependence(sources, weights, timed)


def _input_sources(gm: fx.GraphModule, timestep: TimestepSource | None, sample: str | None) -> dict[fx.Node, Source]:
    """The source that each graph input is."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    samples = [node for node in inputs if sample is not None and _is_member(source_name(node), sample)]
    samples = samples or [node for node in (sample_input(gm),) if node is not None]
    sources = dict.fromkeys(inputs, Source.CONDITION)
    sources |= {node: Source.NONE for node in inputs if is_of_module(node)}
    if timestep is not None and timestep.input_index is not None:
        sources[inputs[timestep.input_index]] = Source.TIME
    return sources | dict.fromkeys(samples, Source.SAMPLE)


def _is_member(name: str, argument: str) -> bool:
    """Whether an input is the argument, or a member of it if it is a list: `x_0` of `x`."""
    return re.fullmatch(rf"{re.escape(argument)}(_\d+)*", name) is not None


def _propagate(gm: fx.GraphModule, sources: dict[fx.Node, Source]) -> None:
    """Give every node the sources of the values that it reads, in graph order.

    A write in place adds to the sources of the memory, which every later reader of that memory takes on.
    """
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    targets = ((node, written_by(node)) for node in nodes)
    writes = {node: [memory for to in each for memory in memory_of(to)] for node, each in targets if each}
    written: dict[Memory, int] = dict.fromkeys((memory for each in writes.values() for memory in each), 0)
    names = {node: each for node in gm.graph.nodes if written and (each := memory_of(node) & written.keys())}
    bits = {node: source.value for node, source in sources.items()}  # joining members of a Flag is slow
    for node in nodes:
        read = own_source(gm, node).value
        for source in _value_inputs(node):
            read |= bits[source]
            for memory in names.get(source, ()):
                read |= written[memory]
        bits[node] = read
        for memory in writes.get(node, ()):
            written[memory] |= read
    sources |= {node: Source(each) for node, each in bits.items()}


# fmt: off
_FORMS = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "is_contiguous",
    "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full",
})
_FORM_OF_SECOND = frozenset({"type_as", "view_as", "reshape_as", "expand_as", "to"})
_RANDOM_FUNCTIONS = frozenset({  # written in Python, so they have no schema with tags
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "gumbel_softmax",
    "rrelu", "rrelu_", "fractional_max_pool2d", "fractional_max_pool3d", "multi_head_attention_forward",
})
# fmt: on


def _value_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose numbers the node reads. Of others it reads shape, dtype or device alone."""
    name, inputs = target_name(node), node.all_input_nodes
    first = node.args[0] if node.args else node.kwargs.get("input")
    if name in _FORMS or (name == "getattr" and tensor_of(node) is None):
        return [source for source in inputs if source is not first]
    if name in _FORM_OF_SECOND and isinstance(first, fx.Node):
        return [first]
    return inputs


def own_source(gm: fx.GraphModule, node: fx.Node) -> Source:
    """What a node adds to the sources of its inputs: random numbers, lengths that depend on data, sizes of inputs."""
    if node.op == "get_attr":
        return Source.NONE
    if node.target in COMMUNICATING:
        return Source.SAMPLE
    if node.op == "call_module" or is_random(gm, node) or _has_data_dependent_size(value_of(node)):
        return Source.SAMPLE
    is_form = node.all_input_nodes and not _value_inputs(node)
    return Source.CONDITION if is_form else Source.NONE


def _has_data_dependent_size(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_data_dependent_size, value))
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    return any(isinstance(size, torch.SymInt) and has_free_unbacked_symbols(size) for size in sizes)


def is_random(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node, or a graph that it calls, draws random numbers. A dropout outside training does not."""
    if node.op not in ("call_function", "call_method"):
        return False
    bodies = [getattr(gm, str(each.target), None) for each in node.all_input_nodes if each.op == "get_attr"]
    if any(is_random(body, each) for body in bodies if isinstance(body, fx.GraphModule) for each in body.graph.nodes):
        return True
    is_tagged = any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads_of(node.target))
    if not is_tagged and target_name(node) not in _RANDOM_FUNCTIONS:
        return False
    arguments = arguments_of(node)
    is_training = arguments.get("training", arguments.get("train", True))
    default = 0.0 if target_name(node) == "scaled_dot_product_attention" else 1.0
    return is_training is not False and arguments.get("p", arguments.get("dropout_p", default)) != 0


def _weight_sources(gm: fx.GraphModule, sources: Mapping[fx.Node, Source]) -> dict[fx.Node, Source]:
    """For each weight, the sources of all values that read it. Values made of weights alone stand for their readers."""
    readers: dict[fx.Node, Source] = {}
    for node in reversed(gm.graph.nodes):
        if node.op != "output" and not sources[node]:
            readers[node] = Source.NONE
            for user in node.users:
                readers[node] |= sources.get(user) or readers.get(user, Source.NONE)
    return {node: readers[node] for node in gm.graph.nodes if is_weight(node) and node in readers}
