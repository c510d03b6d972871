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

import difflib
import inspect
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Container, Hashable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from cachedit_fx.passes.base import Pass, PassResult, facts
from cachedit_fx.passes.find_timestep import source_name
from cachedit_fx.passes.graph_analysis import (
    body_nodes,
    closes_context,
    cost_of,
    dependents,
    describe_shape,
    describe_value,
    fingerprint,
    input_nodes,
    is_compute,
    is_data_movement,
    is_weight,
    live_ins,
    live_outs,
    numel,
    numel_of,
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
# Of a module that is several graphs: a chain with less than this share of the weights of the largest container, which
# lies in another graph, is a refiner.
MIN_GRAPH_SHARE = 0.4


@dataclass(frozen=True)
class ModuleFacts:
    """What is known of a module ahead of its graphs.

    Attributes:
        sample: name of its first argument, which is the noisy sample; None: the sample is known by its looks.
        parameters: numbers in all its weights.
        largest: numbers in the weights of its largest ModuleList.
    """

    sample: str | None = None
    parameters: int = 0
    largest: int = 0

    @classmethod
    def of(cls, module: torch.nn.Module) -> ModuleFacts:
        def count(part: torch.nn.Module) -> int:
            return sum(parameter.numel() for parameter in part.parameters())

        sample = next(iter(inspect.signature(module.forward).parameters), None)
        containers = (part for part in module.modules() if isinstance(part, torch.nn.ModuleList))
        return cls(sample, count(module), max(map(count, containers), default=0))


NOTHING_KNOWN = ModuleFacts()


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

    @property
    def weights(self) -> set[fx.Node]:
        """The weights that its blocks take."""
        return {value for block in self.blocks for value in block.live_ins if is_weight(value)}


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
        module: what is known of the module that the graph is, or is a part of.
    """

    name: ClassVar[str] = "detect_block_loops"
    requires: ClassVar[frozenset[str]] = frozenset({"normalized"})
    provides: ClassVar[frozenset[str]] = frozenset({"block_loops"})

    def __init__(
        self,
        loops: Sequence[str] | None = None,
        use_names: bool = True,
        module: ModuleFacts = NOTHING_KNOWN,
    ) -> None:
        self.loops = tuple(loops) if loops is not None else None
        self.use_names = use_names
        self.module = module

    def run(self, gm: fx.GraphModule) -> PassResult:
        detection = detect(gm, self.loops, self.use_names, self.module)
        facts(gm)["block_loops"] = detection
        return PassResult(gm, len(detection.loops))


def detect(
    gm: fx.GraphModule,
    chosen: Sequence[str] | None = None,
    use_names: bool = True,
    module: ModuleFacts = NOTHING_KNOWN,
) -> Detection:
    """Find the loops of `gm` and choose the chain. See `DetectBlockLoops`."""
    nodes = body_nodes(gm.graph)
    prints = [fingerprint(node) for node in nodes]
    loops: list[BlockLoop] = []
    for span in _spans_by_name(nodes) if use_names else []:
        whole = _build_loop(span, nodes, prints, "names") if _repeats(span, prints) else None
        parts = [whole] if whole else [_build_loop(part, nodes, prints, "names") for part in _alike_parts(span, prints)]
        loops.extend(loop for loop in parts if loop)
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
    ends = [*(loop.start for loop in loops[1:]), len(nodes)]
    loops = [_grown(loop, nodes, prints, end) for loop, end in zip(loops, ends, strict=False)]
    chain, hidden, notes = _choose_chain(gm, nodes, loops, chosen, module)
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
    kinds: list[Any] = field(default_factory=list)  # their classes, where they are modules


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


def _spans_by_name(nodes: Sequence[fx.Node]) -> list[_Span]:
    """A span for each family of numbered members that follow one another."""
    families: dict[str, dict[str, list[int]]] = defaultdict(dict)
    kinds: dict[str, Any] = {}
    for position, node in enumerate(nodes):
        for key, entry in (node.meta.get("nn_module_stack") or {}).items():
            path = module_path(entry[0])
            family = _family(path)
            if family is None:
                continue
            # The key tells two calls of one module apart ("id@1"), the path two modules.
            call = f"{path}@{key.partition('@')[2]}" if "@" in str(key) else path
            kinds[call] = entry[1]
            span = families[family[0]].setdefault(call, [position, position])
            span[1] = position
    spans: list[_Span] = []
    for family_name, calls in families.items():
        members = sorted((first, last + 1, name) for name, (first, last) in calls.items())
        overlap = any(after[0] < before[1] for before, after in itertools.pairwise(members))
        if len(members) >= MIN_BLOCKS and not overlap:
            name = family_name.removesuffix("#").rstrip("._") or family_name
            called = [item[2] for item in members]
            spans.append(_Span(name, called, [item[:2] for item in members], [kinds[call] for call in called]))
    return spans


def _repeats(span: _Span, prints: Sequence[Hashable]) -> bool:
    """Whether a member is like its neighbour or the one after, by its class or by what it does: others may stand
    between (dense and expert blocks)."""
    members = list(zip(span.kinds, span.ranges, strict=True))
    return any(
        kind == other_kind or _alike(prints, here, there)
        for gap in (1, 2)
        for (kind, here), (other_kind, there) in zip(members, members[gap:], strict=False)
    )


def _alike_parts(span: _Span, prints: Sequence[Hashable]) -> list[_Span]:
    """The span cut between members that are not alike; parts of one member are left out."""
    cuts = [index for index, pair in enumerate(itertools.pairwise(span.ranges), start=1) if not _alike(prints, *pair)]
    edges = [0, *cuts, len(span.ranges)]
    return [
        _Span(span.name, span.block_names[start:end], span.ranges[start:end])
        for start, end in itertools.pairwise(edges)
        if end - start >= MIN_BLOCKS
    ]


def _alike(prints: Sequence[Hashable], a: tuple[int, int], b: tuple[int, int]) -> bool:
    first, second = Counter(prints[a[0] : a[1]]), Counter(prints[b[0] : b[1]])
    return sum((first & second).values()) >= MIN_LIKENESS * max(first.total(), second.total())


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
        larger = _build_loop(
            _Span(
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
    return end if _alike(prints, (last.start, last.end), (last.end, end)) else last.end


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
    """(start, period, length) of the repeat that covers most in whole periods (what stands beyond them may belong to
    the loop beside it); of equals the one of the shortest period, so that a stack of (linear, relu) shows as what it
    is, a repeat too short to be a block."""
    best: tuple[int, int, int] | None = None
    covered = 0
    size = len(codes)
    for period in range(1, size // 2 + 1):
        same = codes[:-period] == codes[period:]
        edges = np.flatnonzero(np.diff(np.concatenate(([False], same, [False])).astype(np.int8)))
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            length = int(last - first) + period
            if last - first >= period and length - length % period > covered:
                best, covered = (int(first), period, length), length - length % period
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
    result: list[Carried] = []
    for slot in range(len(slots)):
        values = [column[slot] for column in columns]
        if any(value is None for value in values):
            continue
        inner = [value for value in values if value is not None]
        first = _entering_first(blocks, inner[0], prints, {item.inputs[0] for item in result})
        last = _leaving_last(blocks, inner[-1], prints, {item.outputs[-1] for item in result})
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


def _entering_first(
    blocks: Sequence[Block], second: fx.Node, prints: Sequence[Hashable], taken: AbstractSet[fx.Node]
) -> fx.Node | None:
    """The value that enters block 0 where `second` enters block 1: at the same argument if the two blocks are alike
    node for node. Otherwise a live-in of its shape that is not `taken`: rather one that does not enter block 1 too (a
    time embedding for each token has the shape of the hidden states), one of its dtype, one that the block's work
    depends on, one that is used alike."""
    zero, one = blocks[0], blocks[1]
    if _identical(zero, one, prints):
        for mine, twin in zip(zero.nodes, one.nodes, strict=True):
            for value, other in zip(input_nodes(mine), input_nodes(twin), strict=True):
                if other is second:
                    return value
    alike = [v for v in zero.live_ins if v.op != "get_attr" and v not in taken and _same_shape(v, second)]
    wanted = _uses(second, one)

    def unlikeness(value: fx.Node) -> tuple[bool, bool, bool, int]:
        drives = any(is_compute(node) for node in dependents({value}, zero.nodes))
        return value in one.live_ins, not same_kind(value, second), not drives, -(wanted & _uses(value, zero)).total()

    return min(alike, key=unlikeness, default=None)


def _uses(value: fx.Node, block: Block) -> Counter[Hashable]:
    """How `block` uses `value`: what is called, and at which of its arguments."""
    users = value.users.keys() & set(block.nodes)
    return Counter((user.target, at) for user in users for at, item in enumerate(input_nodes(user)) if item is value)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Autocast may hand the first block another dtype than the blocks hand on."""
    first, second = tensor_of(a), tensor_of(b)
    if first is None or second is None or not first.dtype.is_floating_point:
        return False
    return describe_shape(first.shape) == describe_shape(second.shape)


def _leaving_last(
    blocks: Sequence[Block], previous: fx.Node, prints: Sequence[Hashable], taken: AbstractSet[fx.Node | None]
) -> fx.Node | None:
    """The value that leaves the last block where `previous` leaves the one before it; None if nothing there is used."""
    last, before = blocks[-1], blocks[-2]
    if _identical(last, before, prints):
        twin = last.nodes[before.nodes.index(previous)]
        return twin if twin in last.live_outs else None
    entering = dependents({previous}, last.nodes)
    alike = [v for v in last.live_outs if v in entering and v not in taken and same_kind(v, previous)]
    before_alike = [v for v in before.live_outs if same_kind(v, previous)]
    place = before_alike.index(previous)
    return alike[place] if len(alike) == len(before_alike) else next(reversed(alike), None)


def _identical(a: Block, b: Block, prints: Sequence[Hashable]) -> bool:
    return list(prints[a.start : a.end]) == list(prints[b.start : b.end])


# ---------------------------------------------------------------------------------------------------------------------
# The chain and the hidden-states stream
# ---------------------------------------------------------------------------------------------------------------------


def _choose_chain(
    gm: fx.GraphModule,
    nodes: Sequence[fx.Node],
    loops: Sequence[BlockLoop],
    chosen: Sequence[str] | None,
    module: ModuleFacts,
) -> tuple[tuple[int, ...], tuple[int, ...], list[str]]:
    notes: list[str] = []
    named = next((node for node in gm.graph.nodes if _is_sample(node, module.sample)), None)
    sample = named or _sample_input(gm)
    made = dependents({sample}, nodes) | {sample} if sample is not None else set()
    streamed = [any(item.inputs[0] in made for item in loop.carried) for loop in loops]
    if not loops:
        return (), (), ["no block loop: no run of alike sub-graphs in which each takes what the one before it made"]
    inside = sum(map(numel_of, filter(is_weight, gm.graph.nodes)))
    elsewhere = module.parameters - inside
    if chosen is not None:
        by_name = {loop.name: index for index, loop in enumerate(loops)}
        unknown = [name for name in chosen if name not in by_name]
        if unknown and elsewhere > inside:
            return (), (), [f"no chain: {unknown[0]} is not in this part of the model"]
        if unknown:
            raise LoopNotFound(f"no block loop is called {unknown[0]!r}; this graph has {sorted(by_name)}")
        chain = sorted(by_name[name] for name in chosen)
        notes.append(f"chain chosen by option: {', '.join(loops[i].name for i in chain)}")
    elif named is not None and not any(streamed):
        return (), (), [f"no chain: {module.sample} runs through none of {', '.join(loop.name for loop in loops)}"]
    else:
        chain = _connected_bulk(nodes, loops, streamed, notes)
        own = sum(numel_of(value) for index in chain for value in loops[index].weights)
        if own < MIN_GRAPH_SHARE * min(elsewhere, module.largest):
            names = " + ".join(loops[index].name for index in chain)
            return (
                (),
                (),
                [*notes, f"no chain: the weights of {names} are few beside those of blocks outside this graph"],
            )
    hidden: list[int] = []
    for index in chain:
        hidden.append(_hidden_slot(nodes, loops[index], sample, loops[chain[0]] if hidden else None, hidden))
    return tuple(chain), tuple(hidden), notes


def _connected_bulk(
    nodes: Sequence[fx.Node], loops: Sequence[BlockLoop], streamed: Sequence[bool], notes: list[str]
) -> list[int]:
    """The largest loop that carries the hidden states (of all, where that cannot be told), and those before and after
    it that feed it or are fed by it, that carry them if it does, and that are not small beside it."""
    main = max(range(len(loops)), key=lambda index: (streamed[index], loops[index].cost))
    chain = [main]
    for index, loop in enumerate(loops):
        if index == main:
            continue
        share = _share(loop, loops[main])
        first, second = sorted((index, main))
        source = {v for item in loops[first].carried for v in item.outputs[-1:] if v is not None}
        reached = dependents(source, nodes[loops[first].start :])
        feeds = any(item.inputs[0] in source or item.inputs[0] in reached for item in loops[second].carried)
        if not feeds:
            why = "what it hands on does not become a carried value of the chain"
        elif share < MIN_CHAIN_SHARE:
            why = f"its work is {share:.1%} of {loops[main].name}'s"
        elif streamed[main] and not streamed[index]:
            why = "the hidden states do not run through it"
        else:
            chain.append(index)
            continue
        notes.append(f"{loop.name} is left out of the chain: {why}")
    return sorted(chain)


def _share(loop: BlockLoop, main: BlockLoop) -> float:
    """The work of `loop` over that of `main`; their weights instead where a length that depends on data leaves the work
    unknown."""
    sizes = [size for item in (*loop.carried, *main.carried) for size in item.shape]
    if any(isinstance(size, torch.SymInt) and has_free_unbacked_symbols(size) for size in sizes):
        return sum(map(numel_of, loop.weights)) / max(sum(map(numel_of, main.weights)), 1)
    return loop.cost / max(main.cost, 1)


def _is_sample(node: fx.Node, name: str | None) -> bool:
    tensor = tensor_of(node) if node.op == "placeholder" and name is not None else None
    return tensor is not None and tensor.dtype.is_floating_point and source_name(node) == name


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
        same = sum(a == b for a, b in zip(describe_shape(tensor.shape), describe_shape(like.shape), strict=True))
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
