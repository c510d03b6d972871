"""Times steps of a random FLUX that two ranks share, over those of one rank and of cache-dit's Ulysses, on a CPU.

rank 0   alone ─► its part ─► its part by cache-dit ─► alone ─► ...       one process and one thread a rank, gloo
rank 1   waits ─► its part ─► its part by cache-dit ─► waits ─► ...
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

import cachedit_fx
from cachedit_fx.bench.flux import STEP, Size, inputs, make
from cachedit_fx.bench.peers import cache_dit_ulysses
from cachedit_fx.bench.process import answer_of
from cachedit_fx.bench.two_ranks import FREE, RANKS, Times, answer_of_ranks, cores, everywhere, ratio, share_of_core
from cachedit_fx.report.tables import Table

UNCACHED, COMPUTED, CACHED = "no cache", "computed", "cached"
"""Kinds of steps; the last two are those of a model with a cache."""
ALONE, SHARED, PEER = "one rank", "two ranks", "cache-dit"
"""Who makes them."""
WARMUP = 3
"""Rounds before those that count."""


@dataclass(frozen=True)
class Timing:
    """What was measured of one size of model, inputs and inner backend.

    Attributes:
        tokens: of the image.
        cpu: kind of step -> who makes it -> CPU seconds a rank, round by round.
        wall: likewise, the slowest rank's wall time.
        share: the least share of a core that a rank got, from 0 to 1.
        errors: who -> largest difference from one rank's result, over its largest value.
    """

    tokens: int
    inner_backend: str
    cpu: Times
    wall: Times
    share: float
    errors: dict[str, float]

    def ratio(self, kind: str, above: str, below: str) -> float:
        """Median over the rounds of CPU seconds a rank over those of another."""
        return ratio(self.cpu[kind], above, below)

    def wall_ratio(self, kind: str) -> float | None:
        """Likewise of wall times, of two ranks over one. None: there were no cores for both."""
        return ratio(self.wall[kind], SHARED, ALONE) if self.share >= FREE else None


def measure(size: Size, rounds: int, inner_backend: str, peer_python: str | None = None) -> Timing:
    """Time steps by turns, on two ranks that are started for it.

    Args:
        rounds: steps of each kind.
        inner_backend: what compiles ours. "inductor": cache-dit's model is compiled by torch.compile too.
        peer_python: the interpreter of an environment that has cache-dit. None = without cache-dit.

    Raises:
        BenchmarkError: if a rank fails.
    """
    request = {"size": size, "rounds": rounds, "inner_backend": inner_backend, "has_peer": peer_python is not None}
    command = ["cachedit_fx.bench.ulysses_times", json.dumps(request)]
    return Timing(size.side**2, inner_backend, **answer_of(command, "a rank", peer_python))


def table(rows: Sequence[Timing]) -> Table:
    """A line for each kind of step."""
    headings = ("", "image\ntokens", "step", "one\nrank", "two\nranks", "two over\none")
    result = Table((*headings, "cache-dit", "two over\ncache-dit", "wall"), texts=(0, 2))
    for row in rows:
        for kind, cpu in row.cpu.items():
            seconds = {who: f"{median(each):.3f}" for who, each in cpu.items()}
            wall = row.wall_ratio(kind)
            result.add(
                row.inner_backend,
                str(row.tokens),
                kind,
                seconds[ALONE],
                seconds[SHARED],
                f"{row.ratio(kind, SHARED, ALONE):.3f}",
                seconds.get(PEER, ""),
                f"{row.ratio(kind, SHARED, PEER):.3f}" if PEER in cpu else "",
                f"{wall:.2f}" if wall is not None else "",
            )
    return result


def notes(rows: Sequence[Timing]) -> list[str]:
    """What else was found, a sentence for each timing."""
    results = []
    for row in rows:
        errors = ", ".join(f"{who} {error:.1e}" for who, error in row.errors.items() if who != ALONE)
        results.append(
            f"{row.inner_backend}, {row.tokens} image tokens: {cores(row.share)}. Largest difference from one rank's "
            f"result, over its largest value: {errors}."
        )
    return results


# ---------------------------------------------------------------------------------------------------------------------
# One rank


def _answer(size: Sequence[int], rounds: int, inner_backend: str, has_peer: bool) -> dict[str, Any]:
    """The fields of a `Timing`; complete on rank 0 only."""
    module, arguments = make(Size(*size)), inputs(Size(*size))
    models = _models(module, inner_backend, has_peer)
    cpu: Times = {kind: {} for kind in (UNCACHED, COMPUTED, CACHED)}
    wall: Times = {kind: {} for kind in cpu}
    outputs: dict[str, torch.Tensor] = {}
    shares = [share_of_core()]
    for turn in range(WARMUP + rounds):
        for (who, kinds), model in models.items() if turn % 2 else reversed(models.items()):
            for number, kind in enumerate(kinds):
                arguments["timestep"] = torch.tensor([1 - (2 * turn + number) * STEP])
                seconds, slowest, output = _timed(model, arguments, who == ALONE)
                if turn >= WARMUP:
                    cpu[kind].setdefault(who, []).append(seconds)
                    wall[kind].setdefault(who, []).append(slowest)
                if kind == UNCACHED:
                    outputs[who] = output
    shares.append(share_of_core())
    largest = outputs[ALONE].abs().max()
    errors = {who: ((output - outputs[ALONE]).abs().max() / largest).item() for who, output in outputs.items()}
    return {"cpu": cpu, "wall": wall, "share": min(shares), "errors": errors}


def _models(module: Any, inner_backend: str, has_peer: bool) -> dict[tuple[str, tuple[str, ...]], Any]:
    """(who, kinds of steps in turn) -> a compiled copy of the module."""
    mask = {"steps_computation_mask": "10" * 500, "steps_computation_policy": "static", "Fn_compute_blocks": 1}
    settings: dict[tuple[str, ...], dict[str, Any]] = {(UNCACHED,): {"cache": None}, (COMPUTED, CACHED): mask}
    models = {
        (who, kinds): cachedit_fx.compile(
            copy.deepcopy(module), dynamic=False, inner_backend=inner_backend, ulysses_size=ranks, **options
        )
        for kinds, options in settings.items()
        for who, ranks in ((ALONE, 1), (SHARED, RANKS))
    }
    if has_peer:
        models[PEER, (UNCACHED,)] = peer = copy.deepcopy(module)
        cache_dit_ulysses(peer, RANKS)
        if inner_backend != "eager":
            peer.compile(backend=inner_backend, dynamic=False)
    return models


def _timed(model: Any, arguments: dict[str, Any], is_alone: bool) -> tuple[float, float, torch.Tensor]:
    """CPU seconds a rank, the slowest rank's wall time, and the output. With `is_alone` rank 0 calls the model."""
    dist.barrier()
    if is_alone and dist.get_rank():
        return 0.0, 0.0, torch.zeros(())
    wall, cpu = time.perf_counter(), time.process_time()
    (output,) = model(**arguments)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if is_alone:
        return cpu, wall, output
    seconds = everywhere(cpu)
    return sum(seconds) / RANKS, max(everywhere(wall)), output


if __name__ == "__main__":
    answer_of_ranks(_answer, json.loads(sys.argv[1]))
