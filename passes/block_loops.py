"""The types of detection's result: blocks, the values that cross their borders, loops, the chain. Nothing here detects.

BlockLoop `blocks`                 Block 0 ──► Block 1 ──► ... ──► Block N-1      (──► a `Carried` value)
Detection    every loop of the graph, and the chain: the loops that the hidden states run through
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .graph_values import is_weight


@dataclass(frozen=True)
class Block:
    """One iteration of a loop: the body nodes [start, end) in graph order."""

    name: str
    start: int
    end: int
    nodes: tuple[fx.Node, ...] = field(repr=False)
    live_ins: tuple[fx.Node, ...] = field(repr=False)
    live_outs: tuple[fx.Node, ...] = field(repr=False)

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)


@dataclass(frozen=True)
class Carried:
    """A value that every block takes from the previous block and hands on in the same place.

    `inputs[i]` enters block i and `outputs[i]` leaves it. `outputs[i]` is None if block i hands nothing on, as a last
    block does that drops the text stream.
    """

    name: str
    shape: tuple[Any, ...]
    dtype: torch.dtype
    inputs: tuple[fx.Node, ...] = field(repr=False)
    outputs: tuple[fx.Node | None, ...] = field(repr=False)


@dataclass(frozen=True)
class BlockLoop:
    """Consecutive similar blocks, with every value that crosses their borders classified.

    Attributes:
        name: the container's path in the module, or `loop_<k>` if the graph has no names.
        blocks: in order.
        carried: values taken from the previous block and handed on.
        invariant: values that enter several blocks (time embedding, rotary tables, masks).
        per_block: values that enter one block only (weights, ControlNet residuals).
        skips: (value, i, j): block i makes the value and block j takes it, j > i + 1.
        cost: estimated floating-point operations of all blocks.
        evidence: "names" or "structure".
    """

    name: str
    blocks: tuple[Block, ...]
    carried: tuple[Carried, ...]
    invariant: tuple[fx.Node, ...] = field(repr=False)
    per_block: tuple[fx.Node, ...] = field(repr=False)
    skips: tuple[tuple[fx.Node, int, int], ...]
    cost: int
    evidence: str

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def start(self) -> int:
        return self.blocks[0].start

    @property
    def end(self) -> int:
        return self.blocks[-1].end

    @property
    def weights(self) -> set[fx.Node]:
        """The weights that its blocks take."""
        return {value for block in self.blocks for value in block.live_ins if is_weight(value)}


@dataclass(frozen=True)
class Detection:
    """Fact: the block loops of one graph, and the chain among them.

    Attributes:
        loops: every block loop, in graph order.
        chain: indices into `loops`: the loops that the hidden states run through and that do most of the work.
        hidden: for each loop of the chain, the index of the carried value that is the hidden-states stream.
        notes: one sentence per decision, for `explain()`.
        num_nodes: body nodes in the graph.
    """

    loops: tuple[BlockLoop, ...]
    chain: tuple[int, ...]
    hidden: tuple[int, ...]
    notes: tuple[str, ...]
    num_nodes: int

    @property
    def chain_loops(self) -> tuple[BlockLoop, ...]:
        return tuple(self.loops[index] for index in self.chain)


class LoopNotFound(ValueError):
    """`loops=` names a loop that the graph does not have."""
