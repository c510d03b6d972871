"""Finds the loops of transformer blocks in a graph, and among them the chain that the hidden states run through.

    [prologue] [block 0][block 1] ... [block N-1] [glue] [block 0] ... [block M-1] [epilogue]
               └────────── loop A ────────────┘        └────── loop B ──────┘          chain = (A, B)

A block loop is a sequence of similar sub-graphs: each takes a value that the previous one made. There are two sources
of evidence:

* names (loops_by_name.py): the `nn_module_stack` on the nodes. Blocks are numbered members of a container (ModuleList,
  Sequential, ModuleDict, attributes that end in a number);
* structure (loops_by_structure.py): tandem repeats in the sequence of node fingerprints. They serve graphs without
  names (make_fx, torch.export, plain functions), and the nodes that no named loop covers.

The dataflow decides in both cases (classify_values.py). Blocks form a loop only if they carry a value of constant shape
from block to block.
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
from .graph_values import body_nodes, fingerprint, is_data_movement, same_kind
from .loops_by_name import Span, are_similar, repeats_itself, similar_spans, spans_by_name
from .loops_by_structure import tandem_repeats
from .normalize import Normalized


class DetectBlockLoops(Analysis[Detection]):
    """Finds the block loops and chooses the chain.

    Args:
        loops: names of the loops that make up the chain; None chooses them.
        use_names: whether module names count as evidence. If not, structure is the only evidence.
        traced: knowledge about the module that the graph is, or is a part of.
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
    names: Sequence[str] | None = None,
    use_names: bool = True,
    traced: Traced = NOTHING_KNOWN,
) -> Detection:
    """Find the loops of `gm` and choose the chain. See `DetectBlockLoops`."""
    nodes = body_nodes(gm.graph)
    prints = [fingerprint(node) for node in nodes]
    loops: list[BlockLoop] = []
    for span in spans_by_name(nodes) if use_names else []:
        whole = build_loop(span, nodes, prints, "names") if repeats_itself(span, prints) else None
        candidates = (
            [whole] if whole else [build_loop(sub, nodes, prints, "names") for sub in similar_spans(span, prints)]
        )
        loops.extend(loop for loop in candidates if loop)
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
    chain, hidden, notes = choose_chain(gm, nodes, loops, names, traced)
    return Detection(tuple(loops), chain, hidden, tuple(notes), len(nodes))


def _outermost(loops: list[BlockLoop]) -> list[BlockLoop]:
    """Drop loops that lie inside a block of another loop, and one of two loops that alternate.

    If two loops alternate (spatial, temporal, spatial, ...), keep the one with more blocks; on a tie, the first. Its
    blocks already contain the other's.
    """

    def holds(outer: BlockLoop, inner: BlockLoop) -> bool:
        return any(block.start <= inner.start and inner.end <= block.end for block in outer.blocks)

    result: list[BlockLoop] = []
    outer = [loop for loop in loops if not any(holds(other, loop) for other in loops if other is not loop)]
    for loop in sorted(outer, key=lambda loop: (-loop.num_blocks, loop.start - loop.end, loop.start)):
        if all(loop.end <= other.start or loop.start >= other.end for other in result):
            result.append(loop)
    return result


def _grown(loop: BlockLoop, nodes: Sequence[fx.Node], prints: Sequence[Hashable], limit: int) -> BlockLoop:
    """Extend the loop after its last block, up to `limit`.

    Blocks identical to the last one join, under any name. If structure is the only evidence, one last block that
    differs joins too; as a rule it drops a stream.
    """
    while True:
        last = loop.blocks[-1]
        end = last.end + last.num_nodes
        exact = end <= limit and list(prints[last.end : end]) == list(prints[last.start : last.end])
        if not exact and loop.evidence == "structure":
            end = _end_of_similar(loop, prints, limit)
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
    return any(value.outputs[-1] is not None for value in loop.carried)


def _end_of_similar(loop: BlockLoop, prints: Sequence[Hashable], limit: int) -> int:
    """The position at which a block after the loop, similar to its last block but not identical, ends.

    The fingerprints of the two blocks are matched as two texts are. The similar block ends after the node that matches
    the last block's hand-over of a carried value. `loop.end` if no block is similar enough.
    """
    last = loop.blocks[-1]
    window = prints[last.end : min(limit, last.end + 2 * last.num_nodes)]
    pairs = difflib.SequenceMatcher(None, prints[last.start : last.end], window, autojunk=False).get_matching_blocks()
    matches = {last.nodes[a + i]: last.end + b + i for a, b, size in pairs for i in range(size)}
    sources = [_moved_by(out, matches) for value in loop.carried if (out := value.outputs[-1]) is not None]
    end = max((matches[node] + 1 for node in sources if node is not None), default=last.end)
    return end if are_similar(prints, (last.start, last.end), (last.end, end)) else last.end


def _moved_by(out: fx.Node, candidates: Container[fx.Node]) -> fx.Node | None:
    """The first candidate among `out` and the values that data movement makes it of (streams sliced and joined)."""
    pending, visited = [out], {out}
    while pending:
        node = pending.pop(0)
        if node in candidates and same_kind(node, out):
            return node
        sources = [source for source in node.all_input_nodes if is_data_movement(node) and source not in visited]
        pending.extend(sources)
        visited.update(sources)
    return None


def _gaps(loops: Sequence[BlockLoop], end: int) -> list[tuple[int, int]]:
    """Ranges of positions that no loop covers."""
    edges = [0, *itertools.chain.from_iterable((x.start, x.end) for x in sorted(loops, key=lambda x: x.start)), end]
    return list(zip(edges[::2], edges[1::2], strict=True))
