"""`cachedit bench links`: which split of a step over several cards is the fastest, by link speed and by formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachedit_fx.cli.options import OnlyModels, check_out, models_of
from cachedit_fx.cli.terminal import progress, quiet, reported, save


def links(
    only: OnlyModels = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for [b]links.md[/b] and [b]links.png[/b].")] = Path(
        "cachedit-bench"
    ),
) -> None:
    """Estimate the time of a step on 2 to 64 cards: branches of guidance, Ulysses, ring and their mixtures, by link.

    Formulas give each split's time for three large models, five kinds of cards, and other link speeds. They are checked
    against published times. Needs neither weights nor cards, and takes half a minute.
    """
    check_out(out)
    with quiet():
        from cachedit_fx.bench import links as bench
        from cachedit_fx.bench import links_page
    names = models_of(bench.MODELS, only)
    with reported(lambda: f"; nothing was written to {out}"), progress("models") as tell, quiet():
        models = []
        for name in names:
            tell(name)
            models.append(bench.MODELS[name](bench.counted))
        parts = links_page.parts(models)
    draw = {links_page.PICTURE: lambda path: links_page.save_picture(models, path)}
    save(out / "links.md", "Cards that share a step", parts, draw)
