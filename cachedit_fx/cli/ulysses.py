"""`cachedit bench ulysses`: what each of many ranks does and sends when they share one sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachedit_fx.cli.options import OnlyModels, check_out, models_of
from cachedit_fx.cli.terminal import progress, quiet, reported, save
from cachedit_fx.report.tables import Heading, Part

SHARES = (
    "For the first rank: its part of the hidden states that enter the chain, the share of the chain's linear FLOPs "
    "that the ranks divide, collectives in the graph, bytes that the rank sends in a step, and size of the results "
    "that the cache keeps (F1B0, bfloat16). With more ranks than heads, keys and values are gathered. Counted on "
    "graphs of true configurations: 1024 x 1024 pixels, or 81 frames of 1280 x 720."
)


def ulysses(
    only: OnlyModels = None,
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
    names = models_of(bench.INPUTS, only)
    with reported(lambda: f"; nothing was written to {out}"), progress("models") as tell, quiet():
        rows = []
        for name in names:
            tell(name)
            module, graph = bench.capture(name)
            shares = (bench.count(name, module, graph, number) for number in ranks or bench.RANKS)
            rows += [share for share in shares if share is not None]
    parts: list[Part] = [Heading("Ranks that share one sample", 2), SHARES, bench.table(rows)]
    save(out / "ulysses.md", "Context parallelism", parts)
