"""`cachedit bench quantized`: what quantization saves of a step's time, with the cache and without."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachedit_fx.cli.options import check_compiler, check_out
from cachedit_fx.cli.terminal import progress, quiet, reported, save
from cachedit_fx.report.tables import Heading, Part

HEAD = 64
"""Width of a head of the model that is timed."""
DTYPES = ("float32", "bfloat16")
TIMES = (
    "CPU seconds as ratios: medians of steps by turns, one thread. A FLUX of 2 + 4 blocks with random weights, 256 "
    "image tokens and 64 text tokens, compiled by inductor; a reused step computes the first block. `computed`, "
    "`reused`: quantized over unquantized, both with the cache. `low`, `full`: computed steps of a model with "
    "`precision`, over those of the quantized and of the unquantized one; its first block is never quantized. `half "
    "reused`: every other step reused, over plain `torch.compile` of the unquantized model; `not quantized`: the same "
    "of the cached model without quantization."
)
LADDER = (
    "CPU seconds over the eager model's without a cache. With the cache every other step is reused, by its static mask."
)


def quantized(
    width: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=HEAD, help="Width, a multiple of 64; may be repeated. 1024 if left out."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="[b]float32[/b] or [b]bfloat16[/b]; may be repeated. The first if left out."),
    ] = None,
    kind: Annotated[str, typer.Option(metavar="NAME", help="Kind of quantization (docs/quantization.md).")] = "int8",
    rounds: Annotated[int, typer.Option(metavar="N", min=1, max=200, help="Timed rounds of four steps.")] = 10,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for [b]quantized.md[/b].")] = Path("cachedit-bench"),
) -> None:
    """Time steps of a random FLUX, quantized and not, with the cache, and with precision by step.

    Some two minutes for each width and dtype, most of them compiling. Ratios of one thread's CPU seconds, models by
    turns.

    For a look: [bold]cachedit bench quantized --width 256 --rounds 3[/bold].
    """
    check_out(out)
    widths, dtypes = width or [1024], dtype or ["float32"]
    for each in widths:
        if each % HEAD:
            raise typer.BadParameter(f"{each} is no multiple of {HEAD}, the width of a head", param_hint="--width")
    for name in dtypes:
        if name not in DTYPES:
            raise typer.BadParameter(f"{name!r} is neither {' nor '.join(DTYPES)}", param_hint="--dtype")
    check_compiler("inductor")
    with quiet():
        import torch

        from cachedit_fx.bench.quantized_times import ladder_table, measure, time_table
        from cachedit_fx.config.rules import OptionError
        from cachedit_fx.quantization.kinds import kind_of
        from cachedit_fx.quantization.selection import check_torchao

        try:
            kind_of(kind, "--kind")
            check_torchao()
        except (OptionError, ImportError) as error:
            raise typer.BadParameter(str(error), param_hint="--kind") from None
    with reported(lambda: f"; nothing was written to {out}"), progress("rounds") as tell, quiet():
        try:
            rows = [measure(each, getattr(torch, name), kind, rounds, tell) for name in dtypes for each in widths]
        except OptionError as error:
            raise typer.BadParameter(str(error), param_hint="--kind") from None
    parts: list[Part] = [Heading("Ladder", 2), LADDER, ladder_table(rows), Heading("Time", 2), TIMES, time_table(rows)]
    save(out / "quantized.md", "Time of quantized models", parts)
