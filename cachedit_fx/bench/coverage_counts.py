"""Counts on a model's graph what code motion takes out of a step, what two ranks divide, and its calls of attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from cachedit_fx.bench import coverage_attention, motion, ulysses
from cachedit_fx.bench.coverage_attention import AttentionCounts
from cachedit_fx.bench.coverage_steps import Make
from cachedit_fx.bench.graphs import largest_graph
from cachedit_fx.bench.motion import Reads, shares_table
from cachedit_fx.bench.ulysses import Share
from cachedit_fx.passes.graph_aliases import writes_to_inputs
from cachedit_fx.report.tables import Heading, Part, Table
from cachedit_fx.runtime.branches import branch_obstacle

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
    "operations of the blocks that need them whole. FP8: with `ulysses_float8` and keys too, the values that travel in "
    "eight bits. Ring: with `ring_size=2`, the calls of attention that pass keys and values around, and the values "
    "that each rank gets whole. CFG: with `cfg_parallel=True`, whether a rank can leave a call to the other one. "
    "Counted on the largest graph for ranks that do not exist; the part `parallel` of the tests runs every class on "
    "two real ones. A class with one head in the zoo has fewer heads than ranks."
)


@dataclass(frozen=True)
class RankCounts:
    """What one of two ranks does in a step of a model.

    Attributes:
        share: if they exchange heads; None if they divide nothing.
        ring: if they pass keys and values around.
        in_float8: values that change hands in eight bits.
        branch_obstacle: why no call can be left to the other rank; None if calls can.
    """

    share: Share | None
    ring: Share | None
    in_float8: int
    branch_obstacle: str | None

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> RankCounts:
        """The counts as `asdict` and JSON have left them."""
        shares = {
            name: None if row[name] is None else Share(**{**row[name], "tokens": tuple(row[name]["tokens"])})
            for name in ("share", "ring")
        }
        return cls(**{**row, **shares})


Counts: TypeAlias = tuple[Reads | None, RankCounts, AttentionCounts | None]


def counts_of(name: str, make: Make) -> Counts:
    """What code motion takes out of a step of a model, what one of two ranks does in it, its calls of attention."""
    module, inputs = make()
    gm = largest_graph(module, inputs(1))
    calls = coverage_attention.count(name, gm)  # before the others, which rewrite the graph
    sent = ulysses.count(name, module, gm, 2, float8=True)
    ranks = RankCounts(
        ulysses.count(name, module, gm, 2),
        ulysses.count(name, module, gm, 2, "ring_size"),
        0 if sent is None else sent.in_float8,
        branch_obstacle(gm, writes_to_inputs(gm.graph)),
    )
    return motion.count(name, module, gm), ranks, calls


def count_tables(reads: Sequence[Reads | None], ranks: Sequence[RankCounts | None]) -> list[Part]:
    """The tables of models that were counted; nothing if none was."""
    parts: list[Part] = []
    counted = [row for row in reads if row is not None]
    if counted:
        parts += [Heading("Code motion", 2), MOTION, shares_table(counted)]
    divided = [row for row in ranks if row is not None and row.share is not None]
    if divided:
        headings = ("model", "FLOPs divided", "exchanges", "gathers", "whole for", "FP8", "ring", "gathers with ring")
        table = Table((*headings, "CFG"), texts=(0, 4, 8))
        for row in divided:
            share, ring = row.share, row.ring
            assert share is not None
            passed = ("", "") if ring is None else (str(ring.rings), str(ring.gathers))
            counts = f"{share.divided:.1%}", str(share.exchanges), str(share.gathers), share.whole, str(row.in_float8)
            table.add(share.model, *counts, *passed, row.branch_obstacle or "yes")
        parts += [Heading("Two ranks", 2), RANKS, table]
    return parts
