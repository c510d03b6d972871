"""`cachedit kernels fusion`: what a compiler makes of the neighbours of attention and of linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachedit_fx.cli.options import check_out
from cachedit_fx.cli.terminal import command_line, console, progress, quiet, reported, show
from cachedit_fx.report.files import machine, whole_files
from cachedit_fx.report.tables import Heading, page

EXPLANATION = (
    "What inductor makes of operations around attention and linear layers, in bfloat16. Kernels and bytes are its "
    "scheduler's count; the least is each input and each result once. Times are CPU milliseconds, medians by turns, "
    "one thread. `codes in int8`: the result as the operand of an int8 product, with a scale per row."
)


def fusion(
    tokens: Annotated[int, typer.Option(min=1, help="Rows.")] = 4608,
    width: Annotated[int, typer.Option(min=128, help="Their size, a multiple of 128.")] = 3072,
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each form that are timed.")] = 10,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where [i]fusion.md[/i] goes.")] = Path("runs/kernels"),
) -> None:
    """Count the kernels and bytes of attention's and linear layers' neighbours, compiled for a CPU."""
    if width % 128:
        raise typer.BadParameter(f"{width} is no multiple of 128, which a head has", param_hint="--width")
    check_out(out)
    with quiet():
        import torch

        from cachedit_fx.bench import kernels_fusion as bench
    rows: list[bench.Fused] = []
    with reported(lambda: "; nothing was written"), progress("forms") as tell:
        tell(more=len(bench.FORMS))
        for row in bench.measure(tokens, width, torch.bfloat16, rounds):
            rows.append(row)
            tell(f"{row.neighbour}, {row.form}", done=1)
    table = bench.table(rows)
    show(table)
    made_by = f"`{command_line()}`, on {machine()}. {tokens} tokens of width {width}."
    with whole_files(out) as staging:
        (staging / "fusion.md").write_text(page(Heading("Fusion"), EXPLANATION, table, made_by))
    console.print(f"\nwritten: {out / 'fusion.md'}")
