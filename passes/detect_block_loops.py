"""Finds the loops of transformer blocks in a graph, and among them the chain that the hidden states run through.

    [prologue] [block 0][block 1] ... [block N-1] [glue] [block 0] ... [block M-1] [epilogue]
               └────────── loop A ────────────┘        └────── loop B ──────┘          chain = (A, B)

A block loop is a run of alike sub-graphs in which each takes what the one before it made. Two sources of evidence:

* names: the `nn_module_stack` on the nodes, where blocks are numbered members of a container (ModuleList, Sequential,
  ModuleDict, attributes that end in a number);
* structure: tandem repeats in the sequence of node fingerprints, for graphs without names (make_fx, torch.export,
  plain functions) and for parts of a graph that the names leave open.

Whatever the source, the dataflow decides: without a value of constant shape that is carried from block to block there
is no loop. Analysis only: the graph is not touched. Requires `normalized`; provides `block_loops` (a `Detection`).
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from cachedit_fx.passes.base import Pass, PassResult, facts
from cachedit_fx.passes.graph_analysis import (
    body_nodes,
    closes_context,
    cost_of,
    dependents,
    describe_value,
    fingerprint,
    input_nodes,
    is_compute,
    is_data_movement,
    live_ins,
    live_outs,
    numel,
    positions_of,
    same_kind,
    tensor_of,
    value_of,
)

MIN_BLOCKS = 2
MIN_BLOCK_NODES = 4
# Consecutive blocks must have this share of their fingerprints in common to belong to one loop.
MIN_LIKENESS = 0.5
# A loop whose work is less than this share of the largest loop's is a refiner, and belongs to the prologue.
MIN_CHAIN_SHARE = 0.125


@dataclass(frozen=True)
class Block:
    """One turn of a loop: the body nodes [start, end) in graph order."""

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
    """A value that every block takes from the one before and hands on in the same place.

    `inputs[i]` enters block i and `outputs[i]` leaves it (None where a block, such as a last one that drops the text
    stream, hands nothing on).
    """

    name: str
    shape: tuple[Any, ...]
    dtype: torch.dtype
    inputs: tuple[fx.Node, ...] = field(repr=False)
    outputs: tuple[fx.Node | None, ...] = field(repr=False)


@dataclass(frozen=True)
class BlockLoop:
    """A run of alike blocks, with every value that crosses their borders classified.

    Attributes:
        name: the container's path in the module, or `loop_<k>` where the graph has no names.
        blocks: in order.
        carried: taken from the block before and handed on.
        invariant: the same value enters several blocks (time embedding, rotary tables, masks).
        per_block: enters one block only (weights, ControlNet residuals).
        skips: (value, made by block i, taken by block j), j > i + 1.
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


@dataclass(frozen=True)
class Detection:
    """What was found in one graph.

    Attributes:
        loops: every block loop, in graph order.
        chain: indices into `loops` of those that the hidden states run through and that hold the bulk of the work.
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


class DetectBlockLoops(Pass):
    """Provides a `Detection`.

    Args:
        loops: names of the loops that make up the chain; None chooses them.
        use_names: whether module names may be used as evidence (structure alone must do where False).
    """

    name: ClassVar[str] = "detect_block_loops"
    requires: ClassVar[frozenset[str]] = frozenset({"normalized"})
    provides: ClassVar[frozenset[str]] = frozenset({"block_loops"})

    def __init__(self, loops: Sequence[str] | None = None, use_names: bool = True) -> None:
        self.loops = tuple(loops) if loops is not None else None
        self.use_names = use_names

    def run(self, gm: fx.GraphModule) -> PassResult:
        detection = detect(gm, chosen=self.loops, use_names=self.use_names)
        facts(gm)["block_loops"] = detection
        return PassResult(gm, len(detection.loops))


def detect(gm: fx.GraphModule, chosen: Sequence[str] | None = None, use_names: bool = True) -> Detection:
    """Find the loops of `gm` and choose the chain. See `DetectBlockLoops`."""
    nodes = body_nodes(gm.graph)
    prints = [fingerprint(node) for node in nodes]
    spans = _spans_by_name(nodes, prints) if use_names else []
    loops = [loop for span in spans if (loop := _build_loop(span, nodes, prints, "names"))]
    loops = _outermost(loops)
    unnamed = 0
    for start, end in _gaps(loops, len(nodes)):
        for repeats in _tandem_repeats(nodes, prints, start, end):
            name = f"loop_{unnamed}"
            span = _Span(name, [f"{name}.{index}" for index in range(len(repeats))], repeats)
            loop = _build_loop(span, nodes, prints, "structure")
            if loop is not None:
                loops.append(loop)
                unnamed += 1
    loops.sort(key=lambda loop: loop.start)
    chain, hidden, notes = _choose_chain(gm, nodes, loops, chosen)
    return Detection(tuple(loops), chain, hidden, tuple(notes), len(nodes))


# ---------------------------------------------------------------------------------------------------------------------
# Evidence 1: names
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Span:
    """A candidate loop: the tight [first, last] ranges of its blocks, before gaps are shared out."""

    name: str
    block_names: list[str]
    ranges: list[tuple[int, int]]  # half-open


def module_path(raw: str) -> str:
    """`L['self'].__dict__['_modules']['blocks'].0.attn` -> `blocks.0.attn`."""
    path = re.sub(r"(?:\.?__dict__)?\[['\"]_modules['\"]\]", "", raw)
    path = re.sub(r"\._modules(?=[\[.])", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path)
    path = re.sub(r"^L\.[^.]+\.?", "", path)
    return path.strip(".")


def _family(path: str) -> tuple[str, int] | None:
    """(`blocks.#`, 3) for `blocks.3`; (`block_#`, 3) for `block_3`; None where the last part ends in no number."""
    head, _, last = path.rpartition(".")
    match = re.fullmatch(r"(.*?)(\d+)", last)
    if match is None:
        return None
    return (f"{head}.{match[1]}#" if head else f"{match[1]}#"), int(match[2])


def _spans_by_name(nodes: Sequence[fx.Node], prints: Sequence[Hashable]) -> list[_Span]:
    families: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for position, node in enumerate(nodes):
        for key, entry in (node.meta.get("nn_module_stack") or {}).items():
            path = module_path(entry[0])
            family = _family(path)
            if family is None:
                continue
            # The key tells two calls of one module apart ("id@1"), the path two modules.
            call = f"{path}@{key.partition('@')[2]}" if "@" in str(key) else path
            span = families[family[0]].setdefault(call, [position, position])
            span[1] = position
    spans: list[_Span] = []
    for family_name, calls in families.items():
        ordered = sorted(calls.items(), key=lambda item: item[1][0])
        run: list[tuple[str, tuple[int, int]]] = []
        for name, (first, last) in ordered:
            item = (name, (first, last + 1))
            overlaps = bool(run) and first < run[-1][1][1]
            if overlaps:
                run = []
                break
            if run and not _alike(prints, run[-1][1], item[1]):
                spans.extend(_close_run(family_name, run))
                run = []
            run.append(item)
        spans.extend(_close_run(family_name, run))
    return spans


def _close_run(family: str, run: list[tuple[str, tuple[int, int]]]) -> list[_Span]:
    if len(run) < MIN_BLOCKS:
        return []
    name = family.removesuffix("#").rstrip("._") or family
    return [_Span(name, [item[0] for item in run], [item[1] for item in run])]


def _alike(prints: Sequence[Hashable], a: tuple[int, int], b: tuple[int, int]) -> bool:
    first, second = Counter(prints[a[0] : a[1]]), Counter(prints[b[0] : b[1]])
    return sum((first & second).values()) >= MIN_LIKENESS * max(first.total(), second.total())


def _outermost(loops: list[BlockLoop]) -> list[BlockLoop]:
    """Drop loops that lie inside a block of another, or that interleave with one already kept."""
    kept: list[BlockLoop] = []
    for loop in sorted(loops, key=lambda item: (item.start - item.end, item.start)):
        if all(loop.end <= other.start or loop.start >= other.end for other in kept):
            kept.append(loop)
    return kept


def _gaps(loops: Sequence[BlockLoop], end: int) -> list[tuple[int, int]]:
    """Ranges of positions that no loop covers."""
    edges = [0, *itertools.chain.from_iterable((x.start, x.end) for x in sorted(loops, key=lambda x: x.start)), end]
    return list(zip(edges[::2], edges[1::2], strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Evidence 2: structure
# ---------------------------------------------------------------------------------------------------------------------


def _tandem_repeats(
    nodes: Sequence[fx.Node], prints: Sequence[Hashable], start: int, end: int
) -> list[list[tuple[int, int]]]:
    """Runs of alike neighbours in [start, end): for each run its blocks' ranges, cut where least is carried over."""
    found: list[list[tuple[int, int]]] = []
    codes_of: dict[Hashable, int] = {}
    codes = np.array([codes_of.setdefault(item, len(codes_of)) for item in prints[start:end]], dtype=np.int64)
    pending = [(0, len(codes))]
    while pending:
        low, high = pending.pop()
        best = _longest_repeat(codes[low:high])
        if best is None:
            continue
        first, period, length = best
        first += low
        found.append(_rotate(nodes, start + first, period, length))
        pending += [(low, first), (first + length, high)]
    return sorted(found)


def _longest_repeat(codes: np.ndarray[Any, Any]) -> tuple[int, int, int] | None:
    """(start, period, length) of the repeat that covers most; of equals the one of the shortest period, so that a stack
    of (linear, relu) shows as what it is, a repeat too short to be a block."""
    best: tuple[int, int, int] | None = None
    size = len(codes)
    for period in range(1, size // 2 + 1):
        same = codes[:-period] == codes[period:]
        edges = np.flatnonzero(np.diff(np.concatenate(([False], same, [False])).astype(np.int8)))
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            length = int(last - first) + period
            if last - first >= period and (best is None or length > best[2]):
                best = (int(first), period, length)
    return best


def _rotate(nodes: Sequence[fx.Node], start: int, period: int, length: int) -> list[tuple[int, int]]:
    """Cut a repeat into as many blocks as it holds, at the phase where the fewest values cross."""
    position = {node: start + index for index, node in enumerate(nodes[start : start + length])}
    last_use = {
        position[node]: max((position.get(user, start + length) for user in node.users), default=position[node])
        for node in position
    }

    def crossing(border: int) -> int:
        return sum(1 for at in range(start, border) if last_use[at] >= border)

    def badness(phase: int) -> tuple[int, int, int]:
        count = (length - phase) // period
        return (-count, crossing(start + phase + max(count // 2, 1) * period), phase)

    phase = min(range(min(period, length - 2 * period + 1)), key=badness)
    count = (length - phase) // period
    return [(start + phase + i * period, start + phase + (i + 1) * period) for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Dataflow: from candidate to loop
# ---------------------------------------------------------------------------------------------------------------------


def _build_loop(span: _Span, nodes: Sequence[fx.Node], prints: Sequence[Hashable], evidence: str) -> BlockLoop | None:
    """Share out the gaps, classify the values; None where the blocks are no loop."""
    ranges = _share_gaps(span.ranges, nodes, prints)
    blocks = tuple(_block(name, start, end, nodes) for name, (start, end) in zip(span.block_names, ranges, strict=True))
    if not all(_is_substantial(block) for block in blocks):
        return None
    carried = _carried(blocks, prints)
    if not carried or not all(_is_driven(block, carried, index) for index, block in enumerate(blocks)):
        return None
    inside = nodes[blocks[0].start : blocks[-1].end]
    made_by = {node: index for index, block in enumerate(blocks) for node in block.nodes}
    uses: Counter[fx.Node] = Counter(value for block in blocks for value in block.live_ins)
    streams = {value for item in carried for value in (*item.inputs, *item.outputs) if value is not None}
    outside = [value for value in uses if value not in made_by and value not in streams]
    skips = tuple(
        (value, made_by[value], index)
        for index, block in enumerate(blocks)
        for value in block.live_ins
        if value in made_by and made_by[value] < index - 1
    )
    return BlockLoop(
        name=span.name,
        blocks=blocks,
        carried=carried,
        invariant=tuple(value for value in outside if uses[value] > 1),
        per_block=tuple(value for value in outside if uses[value] == 1),
        skips=skips,
        cost=sum(cost_of(node) for node in inside),
        evidence=evidence,
    )


def _block(name: str, start: int, end: int, nodes: Sequence[fx.Node]) -> Block:
    inside = tuple(nodes[start:end])
    return Block(name, start, end, inside, live_ins(inside), live_outs(inside))


def _is_substantial(block: Block) -> bool:
    return block.num_nodes >= MIN_BLOCK_NODES and any(is_compute(node) for node in block.nodes)


def _is_driven(block: Block, carried: Sequence[Carried], index: int) -> bool:
    """Whether the block's work depends on what it is handed. Parallel experts add to a sum that they do not read."""
    return any(is_compute(node) for node in dependents({item.inputs[index] for item in carried}, block.nodes))


def _share_gaps(
    ranges: Sequence[tuple[int, int]], nodes: Sequence[fx.Node], prints: Sequence[Hashable]
) -> list[tuple[int, int]]:
    """Give the nodes between two blocks to one of them: what uses the block before (a ControlNet residual added,
    its autocast left) to it, what prepares the next (a modulation picked) to that. Ahead of the first and behind
    the last block, as much is taken as looks like what stands between the others."""
    starts = [start for start, _ in ranges]
    ends = [end for _, end in ranges]
    for index in range(len(ranges) - 1):
        gap = range(ends[index], starts[index + 1])
        if not gap:
            continue
        made = nodes[starts[index] : starts[index + 1]]
        of_block = set(made[: ends[index] - starts[index]])
        behind = dependents(of_block, made) | {node for node in made if closes_context(node)}
        cut = max((at + 1 for at in gap if nodes[at] in behind), default=gap.start)
        ends[index] = starts[index + 1] = cut
    lead = starts[1] - ranges[1][0]
    if lead < 0 and starts[0] + lead >= 0:
        here = prints[starts[0] + lead : starts[0]]
        if list(here) == list(prints[starts[1] : ranges[1][0]]):
            starts[0] += lead
    trail = ends[-2] - ranges[-2][1]
    if trail > 0 and list(prints[ends[-1] : ends[-1] + trail]) == list(prints[ranges[-2][1] : ends[-2]]):
        ends[-1] += trail
    return list(zip(starts, ends, strict=True))


def _carried(blocks: Sequence[Block], prints: Sequence[Hashable]) -> tuple[Carried, ...]:
    """The slots of values that are handed from block to block with one shape and dtype."""
    borders = [_handed_over(before, after) for before, after in itertools.pairwise(blocks)]
    slots = min(borders, key=len)
    if not slots:
        return ()
    kinds = [describe_value(value_of(value)) for value in slots]
    columns = [_match_kinds(border, kinds) for border in borders]
    result = []
    for slot in range(len(slots)):
        values = [column[slot] for column in columns]
        if any(value is None for value in values):
            continue
        inner = [value for value in values if value is not None]
        first = _entering_first(blocks, inner[0], prints)
        last = _leaving_last(blocks, inner[-1], prints)
        tensor = tensor_of(inner[0])
        if first is None or tensor is None or not tensor.dtype.is_floating_point:
            continue
        result.append(
            Carried(first.name, tuple(tensor.shape), tensor.dtype, inputs=(first, *inner), outputs=(*inner, last))
        )
    return tuple(result)


def _handed_over(before: Block, after: Block) -> list[fx.Node]:
    made = set(before.nodes)
    return [value for value in after.live_ins if value in made and tensor_of(value) is not None]


def _match_kinds(border: Sequence[fx.Node], kinds: Sequence[Hashable]) -> list[fx.Node | None]:
    """For every kind, in order, the next unused value of that kind."""
    left = list(border)
    result: list[fx.Node | None] = []
    for kind in kinds:
        match = next((value for value in left if describe_value(value_of(value)) == kind), None)
        if match is not None:
            left.remove(match)
        result.append(match)
    return result


def _entering_first(blocks: Sequence[Block], second: fx.Node, prints: Sequence[Hashable]) -> fx.Node | None:
    """The value that enters block 0 where `second` enters block 1: at the same argument if the two blocks are alike
    node for node, otherwise the first live-in of its kind."""
    zero, one = blocks[0], blocks[1]
    if _identical(zero, one, prints):
        for mine, twin in zip(zero.nodes, one.nodes, strict=True):
            for value, other in zip(input_nodes(mine), input_nodes(twin), strict=True):
                if other is second:
                    return value
    alike = [value for value in zero.live_ins if value.op != "get_attr" and _same_shape(value, second)]
    return next((value for value in alike if same_kind(value, second)), next(iter(alike), None))


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Autocast may hand the first block another dtype than the blocks hand on."""
    first, second = tensor_of(a), tensor_of(b)
    if first is None or second is None or not first.dtype.is_floating_point:
        return False
    return [str(size) for size in first.shape] == [str(size) for size in second.shape]


def _leaving_last(blocks: Sequence[Block], previous: fx.Node, prints: Sequence[Hashable]) -> fx.Node | None:
    """The value that leaves the last block where `previous` leaves the one before it; None if nothing there is used."""
    last, before = blocks[-1], blocks[-2]
    if _identical(last, before, prints):
        twin = last.nodes[before.nodes.index(previous)]
        return twin if twin in last.live_outs else None
    entering = dependents({previous}, last.nodes)
    return next((v for v in reversed(last.live_outs) if v in entering and same_kind(v, previous)), None)


def _identical(a: Block, b: Block, prints: Sequence[Hashable]) -> bool:
    return list(prints[a.start : a.end]) == list(prints[b.start : b.end])


# ---------------------------------------------------------------------------------------------------------------------
# The chain and the hidden-states stream
# ---------------------------------------------------------------------------------------------------------------------


def _choose_chain(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], loops: Sequence[BlockLoop], chosen: Sequence[str] | None
) -> tuple[tuple[int, ...], tuple[int, ...], list[str]]:
    notes: list[str] = []
    sample = _sample_input(gm)
    if chosen is not None:
        by_name = {loop.name: index for index, loop in enumerate(loops)}
        unknown = [name for name in chosen if name not in by_name]
        if unknown:
            raise LoopNotFound(f"no block loop is called {unknown[0]!r}; this graph has {sorted(by_name) or 'none'}")
        chain = sorted(by_name[name] for name in chosen)
        notes.append(f"chain chosen by option: {', '.join(loops[i].name for i in chain)}")
    elif loops:
        chain = _connected_bulk(nodes, loops, sample, notes)
    else:
        return (), (), ["no block loop: no run of alike sub-graphs in which each takes what the one before it made"]
    hidden: list[int] = []
    for index in chain:
        hidden.append(_hidden_slot(nodes, loops[index], sample, loops[chain[0]] if hidden else None, hidden))
    return tuple(chain), tuple(hidden), notes


def _connected_bulk(
    nodes: Sequence[fx.Node], loops: Sequence[BlockLoop], sample: fx.Node | None, notes: list[str]
) -> list[int]:
    """The largest loop, and those before and after it that feed it or are fed by it, that carry the hidden states if
    it does (blocks for the text alone may stand beside those for the image), and that are not small beside it."""
    main = max(range(len(loops)), key=lambda index: loops[index].cost)
    chain = [main]
    made = dependents({sample}, nodes) | {sample} if sample is not None else set()
    streamed = [any(item.inputs[0] in made for item in loop.carried) for loop in loops]
    for index, loop in enumerate(loops):
        if index == main:
            continue
        share = loop.cost / max(loops[main].cost, 1)
        first, second = sorted((index, main))
        source = {v for item in loops[first].carried for v in item.outputs[-1:] if v is not None}
        reached = dependents(source, nodes[loops[first].start :])
        feeds = any(item.inputs[0] in source or item.inputs[0] in reached for item in loops[second].carried)
        if not feeds:
            why = "its values do not run into the chain"
        elif share < MIN_CHAIN_SHARE:
            why = f"its work is {share:.1%} of {loops[main].name}'s"
        elif streamed[main] and not streamed[index]:
            why = "the hidden states do not run through it"
        else:
            chain.append(index)
            continue
        notes.append(f"{loop.name} is left out of the chain: {why}")
    return sorted(chain)


def _sample_input(gm: fx.GraphModule) -> fx.Node | None:
    """The graph input that holds the noisy sample: the one that looks most like the output."""
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    results = [tensor for item in input_nodes(output) if (tensor := tensor_of(item)) is not None]
    if not results:
        return None
    like = max(results, key=numel)
    inputs = [
        node
        for node in gm.graph.nodes
        if node.op == "placeholder"
        and (tensor := tensor_of(node)) is not None
        and tensor.dtype.is_floating_point
        and tensor.dim() == like.dim()
        and tensor.dim() >= 3
        and not isinstance(value_of(node), torch.nn.Parameter)
    ]

    def likeness(node: fx.Node) -> tuple[int, int]:
        tensor = tensor_of(node)
        assert tensor is not None
        same = sum(str(a) == str(b) for a, b in zip(tensor.shape, like.shape, strict=True))
        return (same, numel(tensor))

    return max(inputs, key=likeness, default=None)


def _hidden_slot(
    nodes: Sequence[fx.Node],
    loop: BlockLoop,
    sample: fx.Node | None,
    before: BlockLoop | None,
    hidden: Sequence[int],
) -> int:
    """Which carried value is the hidden-states stream: the one made from the sample (in a later loop of the chain,
    from the hidden states that the first loop hands on by data movement); of several, the largest."""
    candidates = list(range(len(loop.carried)))
    if before is not None:
        source = before.carried[hidden[0]].outputs[-1]
        moved = _moved_from(source, nodes) if source is not None else set()
        candidates = [slot for slot in candidates if loop.carried[slot].inputs[0] in moved] or candidates
    elif sample is not None:
        made = dependents({sample}, nodes[: loop.start]) | {sample}
        candidates = [slot for slot in candidates if loop.carried[slot].inputs[0] in made] or candidates

    def size(slot: int) -> int:
        tensor = tensor_of(loop.carried[slot].inputs[0])
        return numel(tensor) if tensor is not None else 0

    return max(candidates, key=size)


def _moved_from(source: fx.Node, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """`source` and whatever is made of it by data movement alone."""
    reached = {source}
    positions = positions_of(nodes)
    for node in nodes[positions[source] + 1 :]:
        if is_data_movement(node) and any(item in reached for item in node.all_input_nodes):
            reached.add(node)
    return reached
