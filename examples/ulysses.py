"""Several processes draw the same pictures together: context parallelism (Ulysses), without and with the cache.

  torchrun --nproc_per_node=2 examples/ulysses.py

Each process, called a rank, computes a part of every picture's tokens. Two lines make it so in a program of your own:

  torch.distributed.init_process_group()
  cachedit_fx.enable_cache(pipe, ulysses_size=2)

All ranks must ask for the same pictures: one seed, one prompt. Each of them gets the whole result. Here rank 0 first
draws alone, to compare, and then all ranks draw together.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import cachedit_fx
from cachedit_fx.metrics import psnr
from cachedit_fx.shapes import generate, load_pipeline

PROMPTS = (
    "a large red circle at the center on white",
    "a small yellow square at the top left on navy",
    "a large green triangle at the bottom right on black",
    "a small cyan cross at the right on gray",
)
CACHE: dict[str, Any] = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 4,
    "residual_diff_threshold": 0.12,
    "calibrator": "taylorseer",
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {"no cache": {"cache": None}, "cache": CACHE}
console = Console(highlight=False)


@dataclass(frozen=True)
class Drawing:
    """What one rank drew, and what it took.

    Attributes:
        pictures: float32 [B, 3, 32, 32] in 0..1, on the CPU.
        seconds, cpu_seconds: from the prompts to the pictures.
        cached: the cached steps.
        held: bytes of stored residuals.
    """

    pictures: torch.Tensor
    seconds: float
    cpu_seconds: float
    cached: list[int]
    held: int


def main(
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of each picture.")] = 28,
    pictures: Annotated[int, typer.Option(min=1, max=len(PROMPTS), help="Pictures, drawn in one call.")] = 4,
    inner_backend: Annotated[
        str, typer.Option(help="What compiles the model: eager compiles nothing, inductor makes kernels.")
    ] = "eager",
) -> None:
    """Draw pictures of the bundled model by one rank and by all, without and with the cache, and compare.

    Start it with `torchrun --nproc_per_node=2 examples/ulysses.py`: on GPUs where there are any (NCCL), else
    on the CPU (gloo), one thread a rank.

    The table has, for each configuration, the wall and CPU time of a step, the largest difference from what one rank
    drew, PSNR against one rank without a cache, the steps that each rank bypassed, and the residuals that it stores.
    """
    if not dist.is_torchelastic_launched():
        console.print(
            "This program is several processes. Start it with\n\n"
            "  torchrun --nproc_per_node=2 examples/ulysses.py\n\n"
            "torchrun lies beside the python that has cachedit_fx, such as in .venv/bin."
        )
        raise typer.Exit(2)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    try:
        if dist.get_rank():
            warnings.simplefilter("ignore")  # rank 0 speaks for all
        pipe = load_pipeline()
        pipe.transformer.to(device)
        drawings = compare(pipe, PROMPTS[:pictures], steps, inner_backend)
        if dist.get_rank() == 0:
            console.print(table(drawings, steps))
            console.print(notes(drawings))
    finally:
        dist.destroy_process_group()


Drawings = dict[tuple[str, int], list[Drawing]]
"""(configuration, number of ranks) -> the drawing of each of them."""


def compare(pipe: Any, prompts: tuple[str, ...], steps: int, inner_backend: str) -> Drawings:
    """Draw with each configuration, by rank 0 alone and by all ranks. All ranks must call it, and get all drawings."""
    drawings: Drawings = {}
    for name, options in CONFIGURATIONS.items():
        for ranks in sorted({1, dist.get_world_size()}):
            takes_part = dist.get_rank() < ranks
            if takes_part:
                cachedit_fx.enable_cache(pipe, **options, inner_backend=inner_backend, ulysses_size=ranks)
                generate(pipe, prompts, 2)  # captures and compiles the model
            dist.barrier()
            mine = draw(pipe, lambda: generate(pipe, prompts, steps)) if takes_part else None
            everywhere: list[Drawing | None] = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, mine)
            drawings[name, ranks] = [each for each in everywhere if each is not None]
    return drawings


def draw(pipe: Any, call: Callable[[], torch.Tensor]) -> Drawing:
    """What `call` draws on this rank."""
    wall, cpu = time.perf_counter(), time.process_time()
    pictures = call().cpu()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    regions = cachedit_fx.summary(pipe)
    cached = [step for region in regions for step in region.cached_steps]
    return Drawing(pictures, wall, cpu, cached, sum(region.bytes_held for region in regions))


def table(drawings: Drawings, steps: int) -> Table:
    """A line for each configuration and number of ranks."""
    title = f"{steps} steps; times are of a step; two figures are two ranks'; PSNR in dB; stored residuals in KiB"
    result = Table(title=title, box=SIMPLE_HEAD)
    for heading in ("", "ranks", "ms", "CPU ms", "differs", "PSNR", "cached", "stored"):
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    reference, *_ = drawings[next(iter(CONFIGURATIONS)), 1]
    for (name, ranks), of_ranks in drawings.items():
        alone, *_ = drawings[name, 1]
        first = of_ranks[0]
        decibels = sum(psnr(first.pictures, reference.pictures)) / len(first.pictures)
        result.add_row(
            name if ranks == 1 else "",
            str(ranks),
            f"{1e3 * max(each.seconds for each in of_ranks) / steps:.1f}",
            by_rank([f"{1e3 * each.cpu_seconds / steps:.1f}" for each in of_ranks]),
            f"{(first.pictures - alone.pictures).abs().max().item():.1g}" if ranks > 1 else "",
            f"{decibels:.1f}" if first is not reference else "",
            by_rank([str(len(each.cached)) for each in of_ranks]),
            by_rank([f"{each.held / 2**10:.0f}" for each in of_ranks]),
            end_section=ranks > 1,
        )
    return result


def by_rank(figures: list[str]) -> str:
    """The figures of one or two ranks, or the least and the largest of more."""
    if len(figures) <= 2 or len(set(figures)) == 1:
        return ", ".join(figures[:2])
    return f"{min(figures, key=float)} to {max(figures, key=float)}"


def notes(drawings: Drawings) -> str:
    """What the table leaves out: which steps were cached, and whether all ranks agree."""
    *_, (_, of_ranks) = drawings.items()
    is_same = all(each.cached == of_ranks[0].cached for each in of_ranks)
    steps = ", ".join(map(str, of_ranks[0].cached)) or "none"
    pictures = all(torch.equal(each.pictures, of_ranks[0].pictures) for each in of_ranks)
    return (
        f"Cached steps: {steps}; {'the same' if is_same else 'other ones'} on every rank. "
        f"The ranks' pictures are {'equal to the bit' if pictures else 'different'}."
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command()(main)
    app()
