"""Times guided steps of the bundled model whose branches two ranks share, over those of one rank, on a CPU.

    rank 0   both branches ─► branch 0 ─► both, half of the tokens ─► both branches ─► ...
    rank 1   both branches ─► branch 1 ─► both, half of the tokens ─► both branches ─► ...

Alone, each rank draws the picture by itself, both at once: cores that share caches and threads slow each other.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist

import cachedit_fx
from cachedit_fx.bench.process import answer_of
from cachedit_fx.bench.two_ranks import FREE, Times, answer_of_ranks, cores, everywhere, ratio, share_of_core
from cachedit_fx.report.tables import Table
from cachedit_fx.shapes import generate, held_out_prompts, load_pipeline

COMPUTED, CACHED = "computed", "cached"
"""Kinds of generations."""
CACHE = {"Fn_compute_blocks": 1, "max_warmup_steps": 2}
KINDS: dict[str, dict[str, Any]] = {
    COMPUTED: CACHE | {"residual_diff_threshold": 0.0},
    CACHED: CACHE | {"residual_diff_threshold": 0.3},
}
ALONE, BRANCHES, TOKENS = "one rank", "cfg_parallel", "ulysses_size=2"
"""Who makes them."""
SHARING: dict[str, dict[str, Any]] = {ALONE: {}, BRANCHES: {"cfg_parallel": True}, TOKENS: {"ulysses_size": 2}}
STEPS, GUIDANCE = 12, 3.0
WARMUP = 2
"""Rounds before those that count."""


@dataclass(frozen=True)
class Timing:
    """What was measured under one value of `guards` and one inner backend, for one number of pictures.

    Attributes:
        pictures: drawn at once.
        cpu: kind of generation -> who draws it -> CPU seconds a rank and step, round by round.
        wall: likewise, the slowest rank's wall time.
        share: the least share of a core that a rank got, from 0 to 1.
        errors: who -> largest difference from one rank's picture, whose values are from 0 to 1.
    """

    guards: str
    inner_backend: str
    pictures: int
    cpu: Times
    wall: Times
    share: float
    errors: dict[str, float]

    def ratio(self, kind: str, above: str) -> float:
        """Median over the rounds of CPU seconds a rank and step over those of one rank."""
        return ratio(self.cpu[kind], above, ALONE)

    def wall_ratio(self, kind: str) -> float | None:
        """Likewise of the wall times of shared branches. None: there were no cores for both."""
        return ratio(self.wall[kind], BRANCHES, ALONE) if self.share >= FREE else None


def measure(rounds: int, inner_backend: str, guards: str, pictures: int = 1) -> Timing:
    """Time generations by turns, on two ranks that are started for it.

    Args:
        rounds: generations of each kind.
        inner_backend: what compiles the pieces.
        guards: when a call passes dynamo's guards, as in `cachedit_fx.compile`.
        pictures: drawn at once.

    Raises:
        BenchmarkError: if a rank fails.
    """
    request = {"rounds": rounds, "inner_backend": inner_backend, "guards": guards, "pictures": pictures}
    answer = answer_of(["cachedit_fx.bench.branches_times", json.dumps(request)], "a rank")
    return Timing(guards, inner_backend, pictures, **answer)


def table(rows: Sequence[Timing]) -> Table:
    """A line for each kind of generation."""
    shared = "shared\nbranches", "over\none", "shared\ntokens", "over\none"
    headings = ("", "guards", "pictures", "steps", "one\nrank", *shared, "wall")
    result = Table(headings, texts=(0, 1, 3))
    for row in rows:
        for kind, cpu in row.cpu.items():
            figures = (
                text
                for who in (BRANCHES, TOKENS)
                for text in (f"{1000 * median(cpu[who]):.1f}", f"{row.ratio(kind, who):.3f}")
            )
            wall = row.wall_ratio(kind)
            result.add(
                row.inner_backend,
                row.guards,
                str(row.pictures),
                kind,
                f"{1000 * median(cpu[ALONE]):.1f}",
                *figures,
                f"{wall:.2f}" if wall is not None else "",
            )
    return result


def notes(rows: Sequence[Timing]) -> list[str]:
    """What else was found, a sentence for each timing."""
    return [
        f"{row.inner_backend}, guards={row.guards!r}, pictures at once {row.pictures}: {cores(row.share)}. Largest "
        "difference from one rank's picture: "
        + ", ".join(f"{who} {error:.1e}" for who, error in row.errors.items())
        + "."
        for row in rows
    ]


# ---------------------------------------------------------------------------------------------------------------------
# One rank


def _answer(rounds: int, inner_backend: str, guards: str, pictures: int) -> dict[str, Any]:
    """The fields of a `Timing`."""
    pipes = {}
    for kind, settings in KINDS.items():
        for who, sharing in SHARING.items():
            pipes[kind, who] = pipe = load_pipeline()
            cachedit_fx.enable_cache(pipe, inner_backend=inner_backend, guards=guards, **settings, **sharing)
    cpu: Times = {kind: {who: [] for who in SHARING} for kind in KINDS}
    wall: Times = {kind: {who: [] for who in SHARING} for kind in KINDS}
    drawn = {}
    shares = [share_of_core()]
    for turn in range(WARMUP + rounds):
        for kind, who in pipes if turn % 2 else reversed(pipes):
            seconds, slowest, drawn[kind, who] = _timed(pipes[kind, who], pictures)
            if turn >= WARMUP:
                cpu[kind][who].append(seconds)
                wall[kind][who].append(slowest)
    shares.append(share_of_core())
    errors = {
        who: max((drawn[kind, who] - drawn[kind, ALONE]).abs().max().item() for kind in KINDS)
        for who in (BRANCHES, TOKENS)
    }
    return {"cpu": cpu, "wall": wall, "share": min(shares), "errors": errors}


def _timed(pipe: Any, pictures: int) -> tuple[float, float, torch.Tensor]:
    """CPU seconds a rank and step, the slowest rank's wall time of one, and the pictures. Leaves out the first step."""
    ends: list[tuple[float, float]] = []

    def note(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        ends.append((time.process_time(), time.perf_counter()))
        return values

    dist.barrier()
    drawn = generate(pipe, held_out_prompts(pictures, 0), STEPS, true_cfg_scale=GUIDANCE, callback_on_step_end=note)
    (first_cpu, first_wall), (cpu, wall) = ends[0], ends[-1]
    steps = len(ends) - 1
    return mean(everywhere((cpu - first_cpu) / steps)), max(everywhere((wall - first_wall) / steps)), drawn


if __name__ == "__main__":
    answer_of_ranks(_answer, json.loads(sys.argv[1]))
