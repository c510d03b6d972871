"""`cachedit bench branches`: how long a guided step takes whose two branches are computed by two ranks."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from cachedit_fx.cli.options import InnerBackend, check_compiler, check_out
from cachedit_fx.cli.terminal import progress, quiet, reported, save

TIMES = (
    "Milliseconds of CPU a rank and step: medians of generations by turns. The bundled model draws one picture, or "
    "several at once, in 12 steps at guidance 3. So each step has two branches; the first step is left out. Its cache "
    "computes the first block (F1B0, two warm-up steps), at threshold 0, where every step is computed, and at 0.3. "
    "Ranks are processes of one thread, joined by gloo. As one rank each of them draws the pictures by itself, both at "
    "the same time. They share branches by cfg_parallel=True, and tokens by ulysses_size=2. The last column is the "
    "wall time of shared branches over that of one rank, told only if both ranks had a core."
)


def branches(
    rounds: Annotated[int, typer.Option(metavar="N", min=1, max=200, help="Timed generations of each kind.")] = 10,
    inner_backend: Annotated[
        list[InnerBackend] | None,
        typer.Option(case_sensitive=False, help="What compiles the model; may be repeated."),
    ] = None,
    pictures: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=1, max=64, help="Pictures drawn at once; may be repeated. 1 and 4 if left out."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for [b]branches.md[/b].")] = Path("cachedit-bench"),
) -> None:
    """Time guided steps with [bold]cfg_parallel=True[/bold] on two ranks, and with [bold]ulysses_size=2[/bold].

    The ranks are processes of this machine. It takes some 15 minutes for each inner backend.
    """
    check_out(out)
    backends = [each.value for each in inner_backend or [InnerBackend.eager]]
    for backend in backends:
        check_compiler(backend)
    with quiet():
        from cachedit_fx.bench import branches_times as bench
    with reported(lambda: f"; nothing was written to {out}"), progress("settings") as tell, quiet():
        rows = []
        for backend, guards, number in product(backends, ("always", "generation"), pictures or [1, 4]):
            tell(f"{backend}, guards={guards}, pictures at once {number}")
            rows.append(bench.measure(rounds, backend, guards, number))
    save(out / "branches.md", "Two branches on two ranks", [TIMES, bench.table(rows), bench.notes(rows)])
