"""Counts on a model's graph what code motion takes out of a step, what two ranks divide, and its calls of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from cachedit_fx.bench import coverage_attention, motion, ulysses
from cachedit_fx.bench.coverage_attention import AttentionCounts
from cachedit_fx.bench.coverage_steps import Make
from cachedit_fx.bench.graphs import largest_graph
from cachedit_fx.bench.motion import Reads, shares_table
from cachedit_fx.bench.ulysses import Share
from cachedit_fx.report.tables import Heading, Part, Table

MOTION = (
    "Shares of the weights that a step reads without code motion: those whose results change with the timestep "
    "alone, with the timestep and conditions, and with conditions alone. The hoisted values, and their size for a "
    "step and for a prompt. The weights that a computed step still reads if all values are kept. The configurations "
    "are tiny, so the shares are not those of the models that people run, which performance/motion.md has. If a "
    "model's capture breaks, the largest graph is counted, and what it takes from an earlier graph counts as a "
    "condition."
)
RANKS = (
    "Of a step on two ranks that share a sample: with `ulysses_size=2`, the share of the blocks' linear FLOPs that the "
    "ranks divide, the values that change hands by an all-to-all, those that each rank gets whole, and the "
    "operations of the blocks that need them whole; with `ring_size=2`, the calls of attention that pass keys and "
    "values around, and the values that each rank gets whole. Counted on the largest graph for ranks that do not "
    "exist; the part `parallel` of the tests runs every class on two real ones. A class with one head in the zoo has fewer "
    "heads than ranks."
)


Counts: TypeAlias = tuple[Reads | None, Share | None, Share | None, AttentionCounts | None]


def counts_of(name: str, make: Make) -> Counts:
    """What code motion takes out of a step of a model, what one of two ranks does in it, its calls of attention.

    The ranks exchange heads; and then, they pass keys and values around.
    """
    module, inputs = make()
    gm = largest_graph(module, inputs(1))
    calls = coverage_attention.count(name, gm)  # before the others, which rewrite the graph
    shares = ulysses.count(name, module, gm, 2), ulysses.count(name, module, gm, 2, "ring_size")
    return motion.count(name, module, gm), *shares, calls


def count_tables(
    reads: Sequence[Reads | None], shares: Sequence[Share | None], rings: Sequence[Share | None]
) -> list[Part]:
    """The tables of models that were counted; nothing if none was."""
    parts: list[Part] = []
    counted = [row for row in reads if row is not None]
    if counted:
        parts += [Heading("Code motion", 2), MOTION, shares_table(counted)]
    divided = [(row, ring) for row, ring in zip(shares, rings, strict=True) if row is not None]
    if divided:
        headings = ("model", "FLOPs divided", "exchanges", "gathers", "whole for", "ring", "gathers with ring")
        table = Table(headings, texts=(0, 4))
        for row, ring in divided:
            passed = ("", "") if ring is None else (str(ring.rings), str(ring.gathers))
            table.add(row.model, f"{row.divided:.1%}", str(row.exchanges), str(row.gathers), row.whole, *passed)
        parts += [Heading("Two ranks", 2), RANKS, table]
    return parts
