"""Finds the loops of transformer blocks in a graph, and among them the chain that the hidden states run through.

    [prologue] [block 0][block 1] ... [block N-1] [glue] [block 0] ... [block M-1] [epilogue]
               └────────── loop A ────────────┘        └────── loop B ──────┘          chain = (A, B)

A block loop is a run of alike sub-graphs in which each takes what the one before it made. Two sources of evidence:

* names: the `nn_module_stack` on the nodes, where blocks are numbered members of a container (ModuleList, Sequential,
  ModuleDict, attributes that end in a number);
* structure: tandem repeats in the sequence of node fingerprints, for graphs without names (make_fx, torch.export,
  plain functions) and for parts of a graph that the names leave open.

Whatever the source, the dataflow decides: without a value of constant shape that is carried from block to block there
is no loop.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Container, Hashable, Sequence
from typing import ClassVar

from torch import fx

from .base import NOTHING_KNOWN, Analysis, Facts, FlatGraph, Traced
from .block_loops import BlockLoop, Detection
from .choose_chain import choose_chain
from .classify_values import build_loop
from .graph_values import (
    body_nodes,
    fingerprint,
    is_data_movement,
    same_kind,
)
from .loops_by_name import Span, alike_parts, are_alike, repeats_itself, spans_by_name
from .loops_by_structure import tandem_repeats
from .normalize import Normalized


class DetectBlockLoops(Analysis[Detection]):
    """Finds the block loops and chooses the chain.

    Args:
        loops: names of the loops that make up the chain; None chooses them.
        use_names: whether module names may be used as evidence. Structure alone must do if not.
        traced: what is known of the module that the graph is, or is a part of.
    """

    name: ClassVar[str] = "detect_block_loops"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized)
    provides: ClassVar[type] = Detection

    def __init__(
        self, loops: Sequence[str] | None = None, use_names: bool = True, traced: Traced = NOTHING_KNOWN
    ) -> None:
        self.loops = tuple(loops) if loops is not None else None
        self.use_names = use_names
        self.traced = traced

    def run(self, gm: fx.GraphModule, facts: Facts) -> Detection:
        return detect(gm, self.loops, self.use_names, self.traced)


def detect(
    gm: fx.GraphModule,
    chosen: Sequence[str] | None = None,
    use_names: bool = True,
    traced: Traced = NOTHING_KNOWN,
) -> Detection:
    """Find the loops of `gm` and choose the chain. See `DetectBlockLoops`."""
    nodes = body_nodes(gm.graph)
    prints = [fingerprint(node) for node in nodes]
    loops: list[BlockLoop] = []
    for span in spans_by_name(nodes) if use_names else []:
        whole = build_loop(span, nodes, prints, "names") if repeats_itself(span, prints) else None
        parts = [whole] if whole else [build_loop(part, nodes, prints, "names") for part in alike_parts(span, prints)]
        loops.extend(loop for loop in parts if loop)
    loops = _outermost(loops)
    unnamed = 0
    for start, end in _gaps(loops, len(nodes)):
        for repeats in tandem_repeats(nodes, prints, start, end):
            name = f"loop_{unnamed}"
            span = Span(name, [f"{name}.{index}" for index in range(len(repeats))], repeats)
            loop = build_loop(span, nodes, prints, "structure")
            if loop is not None:
                loops.append(loop)
                unnamed += 1
    loops.sort(key=lambda loop: loop.start)
    ends = [*(loop.start for loop in loops[1:]), len(nodes)]
    loops = [_grown(loop, nodes, prints, end) for loop, end in zip(loops, ends, strict=False)]
    chain, hidden, notes = choose_chain(gm, nodes, loops, chosen, traced)
    return Detection(tuple(loops), chain, hidden, tuple(notes), len(nodes))


def _outermost(loops: list[BlockLoop]) -> list[BlockLoop]:
    """Drop loops that lie inside a block of another. Of two that run in turns (spatial, temporal, spatial, ...) the one
    that cuts finer is kept, of equals the first: its blocks have taken in the other's."""

    def holds(outer: BlockLoop, inner: BlockLoop) -> bool:
        return any(block.start <= inner.start and inner.end <= block.end for block in outer.blocks)

    kept: list[BlockLoop] = []
    outer = [loop for loop in loops if not any(holds(other, loop) for other in loops if other is not loop)]
    for loop in sorted(outer, key=lambda item: (-item.num_blocks, item.start - item.end, item.start)):
        if all(loop.end <= other.start or loop.start >= other.end for other in kept):
            kept.append(loop)
    return kept


def _grown(loop: BlockLoop, nodes: Sequence[fx.Node], prints: Sequence[Hashable], limit: int) -> BlockLoop:
    """Take in what goes on as the loop does, up to `limit`: blocks just like the last one, whatever they are called;
    and where structure alone is known, a last block that differs (one that drops a stream, as a rule)."""
    while True:
        last = loop.blocks[-1]
        end = last.end + last.num_nodes
        exact = end <= limit and list(prints[last.end : end]) == list(prints[last.start : last.end])
        if not exact and loop.evidence == "structure":
            end = _end_of_unlike(loop, prints, limit)
        elif not exact:
            return loop
        larger = build_loop(
            Span(
                loop.name,
                [*(block.name for block in loop.blocks), f"{loop.name}.{loop.num_blocks}"],
                [*((block.start, block.end) for block in loop.blocks), (last.end, end)],
            ),
            nodes,
            prints,
            loop.evidence,
        )
        if larger is None or len(larger.carried) < len(loop.carried) or not _hands_on(larger):
            return loop
        loop = larger
        if not exact:
            return loop


def _hands_on(loop: BlockLoop) -> bool:
    return any(item.outputs[-1] is not None for item in loop.carried)


def _end_of_unlike(loop: BlockLoop, prints: Sequence[Hashable], limit: int) -> int:
    """Where a block behind the last one of `loop`, like it but not equal, hands on what it carries; `loop.end` if there
    is none. The two are matched as two texts are; what hands a value on stands at the same place in both."""
    last = loop.blocks[-1]
    window = prints[last.end : min(limit, last.end + 2 * last.num_nodes)]
    pairs = difflib.SequenceMatcher(None, prints[last.start : last.end], window, autojunk=False).get_matching_blocks()
    twin = {last.nodes[a + i]: last.end + b + i for a, b, size in pairs for i in range(size)}
    handing = [_moved_by(out, twin) for item in loop.carried if (out := item.outputs[-1]) is not None]
    end = max((twin[node] + 1 for node in handing if node is not None), default=last.end)
    return end if are_alike(prints, (last.start, last.end), (last.end, end)) else last.end


def _moved_by(out: fx.Node, known: Container[fx.Node]) -> fx.Node | None:
    """`out`, or what it is made of by data movement (streams sliced and joined again): the first that is `known`."""
    pending, seen = [out], {out}
    while pending:
        node = pending.pop(0)
        if node in known and same_kind(node, out):
            return node
        sources = [item for item in node.all_input_nodes if is_data_movement(node) and item not in seen]
        pending.extend(sources)
        seen.update(sources)
    return None


def _gaps(loops: Sequence[BlockLoop], end: int) -> list[tuple[int, int]]:
    """Ranges of positions that no loop covers."""
    edges = [0, *itertools.chain.from_iterable((x.start, x.end) for x in sorted(loops, key=lambda x: x.start)), end]
    return list(zip(edges[::2], edges[1::2], strict=True))
