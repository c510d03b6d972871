"""Two ranks on a CPU for measurements: processes of one thread each, joined by gloo.

CPU seconds are told, since a rank that waits for the other one takes none. Wall times are told only if both ranks had a
core each, which a loop before and after the steps shows.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

RANKS = 2
FREE = 0.95
"""The least share of a core that counts as a whole one."""

Seconds = list[float]
Times = dict[str, dict[str, Seconds]]
"""Kind of step -> who makes it -> seconds, round by round."""


def ratio(seconds: dict[str, Seconds], above: str, below: str) -> float:
    """Median over the rounds of one's seconds over another's."""
    return median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def share_of_core() -> float:
    """The share of a core that each rank gets at least if all of them compute, from 0 to 1."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < 0.5:
        pass
    return min(everywhere((time.process_time() - cpu) / (time.perf_counter() - wall)))


def cores(share: float) -> str:
    """Whether the ranks had a core each, in words."""
    outcome = "both ranks had a core" if share >= FREE else "other processes ran at the same time: no wall times"
    return f"each rank got at least {share:.0%} of a core, so {outcome}"


def everywhere(number: float) -> list[float]:
    """The number of each rank, by rank."""
    numbers = [torch.zeros(1, dtype=torch.float64) for _ in range(RANKS)]
    dist.all_gather(numbers, torch.tensor([number], dtype=torch.float64))
    return [each.item() for each in numbers]


def answer_of_ranks(answer: Callable[..., dict[str, Any]], request: dict[str, Any]) -> None:
    """Start the ranks, and print what `answer(**request)` returns on the first one, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = str(Path(folder) / "store"), answer, request
        multiprocessing.start_processes(_rank, arguments, nprocs=RANKS, start_method="spawn")


def _rank(rank: int, store: str, answer: Callable[..., dict[str, Any]], request: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, store=dist.FileStore(store, RANKS))
    with torch.no_grad():
        found = answer(**request)
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()
