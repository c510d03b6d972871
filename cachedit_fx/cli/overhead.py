"""`cachedit bench overhead`: what a step costs beyond the compiled pieces it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachedit_fx.cli.options import DEPTHS, Blocks, InnerBackend, check_compiler, check_out
from cachedit_fx.cli.terminal import command_line, console, progress, quiet, reported, show, warn
from cachedit_fx.report.files import machine, versions, whole_files
from cachedit_fx.report.tables import page


def overhead(
    blocks: Blocks = None,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, max=100, help="Timed calls of each kind of step, by turns.")
    ] = 25,
    inner_backend: Annotated[
        InnerBackend,
        typer.Option(case_sensitive=False, help="What compiles the pieces, the uncached model and cache-dit's."),
    ] = InnerBackend.inductor,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for [b]overhead.md[/b].")] = Path("cachedit-bench"),
) -> None:
    """Time a cached and a computed step of a random FLUX, and the Python in them.

    Steps take turns with the compiled pieces alone, the same graph without a cache, torch.compile and eager. If
    cache-dit is installed, a cached step of cache-dit is measured too. Then all of it runs again on pieces that compute
    nothing, which leaves the Python; a profile of that Python comes last.

    For a look: [bold]cachedit bench overhead --blocks 18 --rounds 5 --inner-backend eager[/bold].
    """
    check_out(out)
    check_compiler(inner_backend.value)
    with reported(lambda: f"; nothing was written to {out}"), progress("models") as tell, quiet():
        from cachedit_fx.bench import overhead as bench

        result = bench.run(blocks or DEPTHS, rounds, 1, inner_backend.value, tell, warn)
    parts = bench.parts(result)
    show(*parts)
    made_by = f"`{command_line()}`, on {machine()}, torch {versions('torch')['torch']}."
    with whole_files(out) as folder:
        (folder / "overhead.md").write_text(page(made_by, *parts))
    console.print(f"\n{out / 'overhead.md'}  [dim]these tables[/dim]")
