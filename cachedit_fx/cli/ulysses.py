"""`cachedit bench ulysses`: what each of many ranks does and sends when they share one sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachedit_fx.cli.options import check_out
from cachedit_fx.cli.terminal import command_line, console, progress, quiet, reported, show
from cachedit_fx.config.rules import nearest
from cachedit_fx.report.files import machine, versions, whole_files
from cachedit_fx.report.tables import Heading, Part, page

SHARES = (
    "For the first rank: its part of the hidden states that enter the chain, the share of the chain's linear FLOPs "
    "that the ranks divide, collectives in the graph, bytes that the rank sends in a step, and size of the results "
    "that the cache keeps (F1B0, bfloat16). With more ranks than heads, keys and values are gathered. Counted on "
    "graphs of true configurations: 1024 x 1024 pixels, or 81 frames of 1280 x 720."
)


def ulysses(
    only: Annotated[
        list[str] | None,
        typer.Option("--only", "-k", metavar="TEXT", help="Only models with TEXT in their names; may be repeated."),
    ] = None,
    ranks: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=2, help="Number of ranks; may be repeated. 8, 64 and 256 by default."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for [b]ulysses.md[/b].")] = Path("cachedit-bench"),
) -> None:
    """Count what each rank does and sends with [bold]ulysses_size=N[/bold], on the graphs of three large models.

    Needs neither weights nor ranks: models are on the meta device, and the process group only pretends to exist. It
    takes 3 minutes.
    """
    check_out(out)
    with quiet():
        from cachedit_fx.bench import ulysses as bench
    names = [name for name in bench.INPUTS if not only or any(text.lower() in name.lower() for text in only)]
    if not names:
        guess = nearest((only or [""])[0], bench.INPUTS)
        raise typer.BadParameter(f"no model is called so; did you mean {guess!r}?", param_hint="--only")
    with reported(lambda: f"; nothing was written to {out}"), progress("models") as tell, quiet():
        rows = []
        for name in names:
            tell(name)
            module, graph = bench.capture(name)
            shares = (bench.count(name, module, graph, number) for number in ranks or bench.RANKS)
            rows += [share for share in shares if share is not None]
    parts: list[Part] = [Heading("Ranks that share one sample", 2), SHARES, bench.table(rows)]
    show(*parts)
    libraries = ", ".join(f"{name} {version}" for name, version in versions("torch", "diffusers").items())
    made_by = f"`{command_line()}`, on {machine()}, {libraries}."
    with whole_files(out) as folder:
        (folder / "ulysses.md").write_text(page(Heading("Context parallelism"), made_by, *parts))
    console.print(f"\n{out / 'ulysses.md'}  [dim]these tables[/dim]")
