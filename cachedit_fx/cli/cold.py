"""`cachedit bench cold`: how long a model takes from `compile` to its first steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachedit_fx.cli.options import DEPTHS, Blocks, check_compiler, check_out
from cachedit_fx.cli.terminal import command_line, console, progress, quiet, reported, show, warn
from cachedit_fx.report.files import machine, versions, whole_files
from cachedit_fx.report.tables import Heading, page

if TYPE_CHECKING:
    from cachedit_fx.bench.cold import Start


def cold(
    blocks: Blocks = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            "-k",
            metavar="TEXT",
            help="Only ways to compile whose name contains TEXT; may be repeated. Dynamo's capture is always measured.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for [b]cold.md[/b].")] = Path("cachedit-bench"),
) -> None:
    """Time a random FLUX from `compile` to its first steps, by ours and by others.

    Each way to compile gets a new process and an empty folder for inductor's caches, then another process with the same
    folder. All of it takes an hour, [bold]cachedit bench cold --blocks 18 -k cachedit_fx[/bold] minutes. Ctrl-C shows
    what is measured, and writes nothing.
    """
    check_out(out)
    check_compiler("inductor")
    starts: list[Start] = []
    with quiet():
        from cachedit_fx.bench import cold as bench
    try:
        with reported(lambda: f"; nothing was written to {out}"), progress("processes") as tell:
            starts.extend(bench.measure(blocks or DEPTHS, bench.ways_named(only or ()), tell, warn))
    finally:
        if starts:
            show(bench.table(starts), bench.EXPLANATION)
    made_by = f"`{command_line()}`, on {machine()}, torch {versions('torch')['torch']}."
    with whole_files(out) as folder:
        (folder / "cold.md").write_text(page(made_by, Heading("Start-up"), bench.EXPLANATION, bench.table(starts)))
    console.print(f"\n{out / 'cold.md'}  [dim]this table[/dim]")
