"""Runs a function on several ranks: processes of one gloo group, forked, so that they import and capture nothing anew.

results = on_ranks(lambda rank: ..., ranks=2)        what each rank returned, by rank
"""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cachedit_fx.kernels import cpu
from cachedit_fx.runtime.grid import Mesh, Sizes, grid_of
from cachedit_fx.runtime.ranks import Ranks

SECONDS = 120
"""What a collective may wait for other ranks; a rank that died ends it at once."""


def on_ranks(
    function: Callable[[int], Any], ranks: int = 2, seconds: float = SECONDS, ending: Collection[int] = ()
) -> list[Any]:
    """What `function(rank)` returns on each rank.

    Args:
        seconds: what a collective may wait for other ranks.
        ending: ranks whose processes end in `function`; None stands for what they return.

    Raises:
        AssertionError: with the traceback of the ranks that raised, the first failure first.
    """
    cpu.library()  # a fork while another thread compiles it would wait for ever
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        store, end_of_all = Path(folder) / "store", context.Event()
        arguments = [(function, rank, ranks, seconds, store, pipe[1], end_of_all) for rank, pipe in enumerate(pipes)]
        processes = [context.Process(target=_run, args=each, daemon=True) for each in arguments]
        for process, (_, end) in zip(processes, pipes, strict=True):
            process.start()
            end.close()
        outcomes = [_outcome_of(pipe[0], process) for pipe, process in zip(pipes, processes, strict=True)]
        end_of_all.set()
        for process in processes:
            process.join(SECONDS)
    errors = [f"rank {rank}:\n{error}" for rank, (error, _) in enumerate(outcomes) if error and rank not in ending]
    assert not errors, "\n".join(errors)
    return [result for _, result in outcomes]


def _outcome_of(pipe: Connection, process: BaseProcess) -> tuple[str, Any]:
    wait([pipe, process.sentinel])  # ranks that were forked before hold the pipe's other end as well
    if not pipe.poll():
        return "the process died without a word", None
    outcome: tuple[str, Any] = pickle.loads(pipe.recv_bytes())
    return outcome


def _run(
    function: Callable[[int], Any],
    rank: int,
    ranks: int,
    seconds: float,
    store: Path,
    pipe: Connection,
    end_of_all: Event,
) -> None:
    gc.freeze()  # a collection would copy all that the parent holds
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            rank=rank,
            world_size=ranks,
            store=dist.FileStore(str(store), ranks),
            timeout=timedelta(seconds=seconds),
        )
        pipe.send_bytes(pickle.dumps(("", function(rank))))  # `send` would share memory that dies with the rank
        end_of_all.wait(SECONDS)  # a barrier fails at once where the group is broken, and others may look at this rank
    except BaseException:
        pipe.send_bytes(pickle.dumps((traceback.format_exc(), None)))
    finally:
        dist.destroy_process_group()


def close(left: Any, right: Any, tolerance: float = 2e-5) -> bool:
    """Whether two tensors are equal up to `tolerance` of the largest element."""
    difference = (left.double() - right.double()).abs().max() if left.numel() else torch.zeros(())
    return left.shape == right.shape and bool(difference <= tolerance * right.double().abs().max().clamp(min=1e-30))


def ranks_of(size: int, mesh: Mesh | None = None) -> Ranks | None:
    """The ranks that share a sample under `ulysses_size`."""
    grid = grid_of(Sizes(ulysses=size), mesh)
    return None if grid is None else grid.everyone
