"""Time of a step on several cards by the formulas of `parallel_plan`: models, cards, tables. Nothing is run.

model on the meta device, three blocks of each kind ──► graph ──► its blocks' work ──► seconds of each split
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from cachedit_fx.backend import rewrite
from cachedit_fx.bench.graphs import largest_graph
from cachedit_fx.bench.known_models import make
from cachedit_fx.bench.ulysses import INPUTS, pretended
from cachedit_fx.config.options import parse_options
from cachedit_fx.parallel_plan.cards import A100, BETWEEN_LATENCY, H100, H100_PCIE, H200, INSIDE_LATENCY, L20
from cachedit_fx.parallel_plan.choice import choose, splits_of
from cachedit_fx.parallel_plan.costs import Cost, cost, refusal
from cachedit_fx.parallel_plan.counts import blocks_of
from cachedit_fx.parallel_plan.descriptions import Blocks, Cards, Float8, Link, Model, Split
from cachedit_fx.passes.base import Traced
from cachedit_fx.passes.block_loops import Detection
from cachedit_fx.passes.infer_sequence_axes import SequenceAxes
from cachedit_fx.report.tables import Table

# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------

DEPTH = 3
"""Blocks of each kind in the graph that is read: as few as a loop is found in. All of a kind are alike."""
LATER = ("insert_ulysses", "plan_regions", "outline_blocks", "hoist_invariants", "insert_cache_branch", "gather_inputs")
FLUX, QWEN, WAN = INPUTS
WAN_480, WAN_720 = "Wan 480p", "Wan 720p"
WAN_480_TOKENS = 21 * 30 * 52
"""Of 81 frames of 832 x 480: latents of 21 x 60 x 104, in patches of 1 x 2 x 2."""


@functools.cache
def counted(name: str) -> tuple[Blocks, ...]:
    """The blocks of a known model in its true configuration, with the tokens of `bench.ulysses.INPUTS`."""
    module, arguments = make(name)
    counts = {path: len(each) for path, each in module.named_children() if isinstance(each, nn.ModuleList)}
    for path in counts:
        setattr(module, path, getattr(module, path)[:DEPTH])
    with torch.device("meta"):
        arguments |= INPUTS[name]()
    settings = {"ulysses_size": 2, "inner_backend": "aot_eager", "passes": dict.fromkeys(LATER, False)}
    graph = largest_graph(module, arguments)
    with pretended(2):
        outcome = rewrite(graph, parse_options(settings), Traced.of(module))
    found = blocks_of(outcome.graph_module, outcome.facts[Detection], outcome.facts[SequenceAxes])
    return tuple(replace(blocks, count=counts[blocks.name]) for blocks in found)


Counted = Callable[[str], tuple[Blocks, ...]]
PACKED = 4096 * 64 * 2
"""Bytes of a result of FLUX.1-dev and Qwen-Image at 1024 x 1024."""


def _film(height: int, width: int) -> int:
    """Bytes of a result of Wan 2.1: 16 channels of 21 frames."""
    return 16 * 21 * (height // 8) * (width // 8) * 2


MODELS: dict[str, Callable[[Counted], Model]] = {
    FLUX: lambda count: Model(FLUX, count(FLUX), PACKED),
    QWEN: lambda count: Model(QWEN, count(QWEN), PACKED, branches=2),
    WAN_480: lambda count: Model(
        WAN_480, tuple(each.resized(WAN_480_TOKENS) for each in count(WAN)), _film(480, 832), branches=2
    ),
    WAN_720: lambda count: Model(WAN_720, count(WAN), _film(720, 1280), branches=2),
}
"""Name -> the model of a step, by the function that counts its blocks' work."""


# ---------------------------------------------------------------------------------------------------------------------
# Cards
# ---------------------------------------------------------------------------------------------------------------------

KINDS = (L20, A100, H100_PCIE, H100, H200)
RANKS = (2, 4, 8, 16, 32, 64)
SPEEDS = (3, 12, 25, 50, 100, 400)
"""GB/s of one direction inside a node."""
BETWEEN_SPEEDS = (1, 5, 10, 40, 80)
"""GB/s that a card gets between nodes."""

SCAN = tuple(10 ** (place / 50) for place in range(151))
"""GB/s from 1 to 1000."""

Fits = Callable[[Split], bool]
FAMILIES: dict[str, Fits] = {
    "U": lambda split: split.cfg == split.ring == 1 and not split.is_async,
    "Ua": lambda split: split.cfg == split.ring == 1 and split.is_async,
    "R": lambda split: split.cfg == split.ulysses == 1,
    "R U": lambda split: split.cfg == 1 and min(split.ring, split.ulysses) > 1,
    "C U": lambda split: split.cfg > split.ring == 1,
    "C R": lambda split: split.cfg > split.ulysses == 1 < split.ring,
    "C R U": lambda split: min(split.cfg, split.ring, split.ulysses) > 1,
}
"""Kinds of splits by the dimensions that they have, as in `title`. Of those after `Ua` either form may be taken."""
NAMES = dict(
    zip(
        FAMILIES,
        ("Ulysses", "Ulysses, async", "ring", "ring x Ulysses", "CFG x Ulysses", "CFG x ring", "CFG x ring x Ulysses"),
        strict=True,
    )
)
"""Of the kinds, for people."""


def fastest(model: Model, cards: Cards, ranks: int, fits: Fits) -> tuple[Split, Cost] | None:
    """The fastest split of a family, whatever its doubts, and its cost; None if none is possible."""
    found = [split for split in splits_of(ranks) if fits(split) and not refusal(model, split)]
    costs = [(split, cost(model, cards, split)) for split in found]
    return min(costs, key=lambda each: each[1].seconds, default=None)


def at_speed(cards: Cards, speed: float, is_between: bool = False) -> Cards:
    """The cards with another link inside a node, or between nodes."""
    link = Link(speed, BETWEEN_LATENCY if is_between else INSIDE_LATENCY)
    return replace(cards, between=link) if is_between else replace(cards, inside=link)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def cards_table() -> Table:
    """The inputs: cards."""
    result = Table(
        ("card", "TFLOP/s", "reached", "memory\nGB/s", "link", "GB/s", "400 Gb/s adapters\nof 8 cards"), (0, 4)
    )
    for kind in KINDS:
        numbers = f"{kind.tflops:g}", f"{kind.share:.0%}", f"{kind.memory:g}"
        result.add(kind.name, *numbers, kind.wire, f"{kind.link:g}", str(kind.adapters))
    return result


def models_table(some: Sequence[Model]) -> Table:
    """The inputs: models, by the kinds of their blocks."""
    headings = ("model", "blocks", "tokens", "heads", "branches", "linear\nTFLOP", "beside", "attention", "weights\nGB")
    result = Table((*headings, "result\nMB"), (0, 2))
    for model in some:
        for each in model.blocks:
            work = each.token_flops, each.beside_flops, each.attention_flops
            result.add(
                model.name,
                str(each.count),
                " + ".join(map(str, each.segments)),
                f"{each.heads} x {each.head_size}",
                str(model.branches),
                *(f"{each.count * flops / 1e12:.1f}" for flops in work),
                f"{each.count * each.weight_bytes / 1e9:.1f}",
                f"{model.result_bytes / 1e6:.1f}",
            )
    return result


def choices_table(some: Sequence[Model]) -> Table:
    """What `choose` takes for each model, number of cards and kind of card."""
    result = Table(("model", "cards", *(f"{kind.name},\n{kind.wire}" for kind in KINDS)), range(7))
    for model in some:
        for ranks in (1, *RANKS):
            cells = (_best_cell(model, kind.cards(), ranks) for kind in KINDS)
            result.add(model.name, str(ranks), *cells, ends_group=ranks == RANKS[-1])
    return result


def _best_cell(model: Model, cards: Cards, ranks: int) -> str:
    best = choose(model, cards, ranks).best
    if best is None:
        return "none"
    time = milliseconds(best.cost.seconds)
    return time if ranks == 1 else f"{title(best.split)}: {time}, {best.speed:.1f}x"


def speeds_table(some: Sequence[Model], cards: Cards, ranks: int, is_between: bool) -> Table:
    """Time of a step by link speed: a line for each family, then the fastest split."""
    speeds = BETWEEN_SPEEDS if is_between else SPEEDS
    result = Table(("model", "split", *(f"{speed:g}\nGB/s" for speed in speeds)), (0, 1))
    for model in some:
        all_cards = [at_speed(cards, speed, is_between) for speed in speeds]
        for name, fits in FAMILIES.items():
            found = [fastest(model, each, ranks, fits) for each in all_cards]
            if any(found):
                result.add(model.name, name, *("" if each is None else milliseconds(each[1].seconds) for each in found))
        best = (fastest(model, each, ranks, lambda split: True) for each in all_cards)
        titles = ("" if each is None else title(each[0]) for each in best)
        result.add(model.name, "fastest", *titles, stands_out=True, ends_group=True)
    return result


def parts_table(some: Sequence[Model], cards: Cards, ranks: int) -> Table:
    """What the time of each family's fastest split is made of, and what a rank sends."""
    headings = ("model", "split", "ms", "linear", "attention", "packing", "heads", "ring", "results", "GB\nsent")
    result = Table(headings, (0, 1))
    for model in some:
        found = (fastest(model, cards, ranks, fits) for fits in FAMILIES.values())
        rows = [(Split(), cost(model, cards, Split())), *(each for each in found if each is not None)]
        for split, each in rows:
            heads, ring = (each.waiting.get(kind, 0.0) for kind in ("ulysses", "ring"))
            results = sum(each.waiting.values()) - heads - ring
            seconds = each.seconds, each.linear, each.attention, each.packing, heads, ring, results
            sent = f"{sum(each.sent.values()) / 1e9:.2f}"
            result.add(model.name, title(split), *map(milliseconds, seconds), sent, ends_group=split is rows[-1][0])
    return result


FORMS: tuple[tuple[str, bool, Float8], ...] = (
    ("plain", False, False),
    ("async", True, False),
    ("float8", False, True),
    ("float8 with keys", False, "with_keys"),
    ("async, float8", True, True),
)


def forms_table(some: Sequence[Model], ranks: int) -> Table:
    """What the forms of the exchange of heads gain: all ranks exchange, after branches have been shared."""
    result = Table(("model", "card", "split", *(name for name, _, _ in FORMS)), (0, 1, 2))
    for model in some:
        for kind in KINDS:
            plain = Split(model.branches, 1, ranks // model.branches)
            splits = (replace(plain, is_async=is_async, float8=float8) for _, is_async, float8 in FORMS)
            times = (milliseconds(cost(model, kind.cards(), split).seconds) for split in splits)
            result.add(model.name, kind.name, title(plain), *times, ends_group=kind is KINDS[-1])
    return result


def curve(model: Model, cards: Cards, ranks: int, fits: Fits, is_between: bool) -> list[tuple[float, float]]:
    """GB/s, and the time of a family's fastest split over an equal part of one card's; empty if none is possible."""
    drawn = BETWEEN_SPEEDS if is_between else SPEEDS
    speeds = [speed for speed in SCAN[::3] if drawn[0] <= speed <= 1.2 * drawn[-1]]
    found = ((speed, fastest(model, at_speed(cards, speed, is_between), ranks, fits)) for speed in speeds)
    part = cost(model, cards, Split()).seconds / ranks
    return [(speed, each[1].seconds / part) for speed, each in found if each is not None]


def winners(some: Sequence[Model], cards: Cards, ranks: int) -> list[str]:
    """A sentence for each model: which family is the fastest, by link speed inside a node."""
    return [f"{model.name}: {_ranges(model, cards, ranks)}." for model in some]


def _ranges(model: Model, cards: Cards, ranks: int) -> str:
    runs: list[tuple[str, float]] = []
    for speed in SCAN:
        found = {name: fastest(model, at_speed(cards, speed), ranks, fits) for name, fits in FAMILIES.items()}
        times = {name: each[1].seconds for name, each in found.items() if each is not None}
        name = min(times, key=lambda each: times[each])
        if not runs or runs[-1][0] != name:
            runs.append((name, speed))
    texts = [f"{NAMES[name]} from {speed:.0f} GB/s on" for name, speed in runs]
    return f"{NAMES[runs[0][0]]} at every speed" if len(runs) == 1 else ", ".join(texts)


def last_gains(some: Sequence[Model]) -> list[str]:
    """A sentence for each model: up to how many cards a step gets faster by a tenth each time they double."""
    texts = []
    for model in some:
        limits = ", ".join(f"{_last_gain(model, kind.cards())} {kind.name}" for kind in KINDS)
        texts.append(f"{model.name}: up to {limits}.")
    return texts


def _last_gain(model: Model, cards: Cards) -> int:
    last, seconds = 1, cost(model, cards, Split()).seconds
    for ranks in RANKS:
        best = choose(model, cards, ranks).best
        if best is None or best.cost.seconds > 0.9 * seconds:
            break
        last, seconds = ranks, best.cost.seconds
    return last


def title(split: Split) -> str:
    """A few letters for a split: `C2 R2 U4a`; `a` for asynchronous."""
    letters = (("C", split.cfg), ("R", split.ring), ("U", split.ulysses))
    words = " ".join(f"{letter}{size}" for letter, size in letters if size > 1) or "alone"
    return words + ("a" if split.is_async else "") + (" float8" if split.float8 else "")


def milliseconds(seconds: float) -> str:
    """With three digits that count."""
    number = seconds * 1e3
    return f"{number:.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 0.05 else "0"
