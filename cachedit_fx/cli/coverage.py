"""`cachedit coverage`: which models the cache works with, seen and not promised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachedit_fx.bench.errors import RequestError
from cachedit_fx.cli.options import check_out
from cachedit_fx.cli.terminal import console, progress, quiet, reported, show
from cachedit_fx.report.files import machine, versions, whole_files

if TYPE_CHECKING:
    from cachedit_fx.bench.coverage import Covered
    from cachedit_fx.bench.coverage_record import CoverageRecord


def coverage(
    models: Annotated[
        str,
        typer.Argument(
            metavar="MODELS",
            help="A Python file, a package's folder or an importable module. It holds [b]ZOO[/b], a dict from names to "
            "functions that return (module, inputs). [i]inputs(size)[/i] gives the keyword arguments of one forward at "
            "size 1 or 2, two resolutions. Optional: [b]BLOCKS[/b], from names to blocks of the chain; "
            "[b]EXCLUDED[/b], from names to reasons for leaving them out; [b]MISSING[/b], names that should be there.",
        ),
    ] = "tests/lib/zoo",
    only: Annotated[
        list[str] | None,
        typer.Option("--only", "-k", metavar="TEXT", help="Only models whose name contains TEXT; may be repeated."),
    ] = None,
    variants: Annotated[
        bool,
        typer.Option(
            "--variants",
            help="Try the variants of every model too: each boolean, optional or enumerated argument of its "
            "constructor and forward, changed alone. Takes an hour or more for diffusers' classes.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the table there too, as Markdown ([i]docs/models.md[/i]). Until it is finished, "
            "[b]models-unfinished.json[/b] beside it has every model that is checked.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run that was to write --out: models that it has checked are not checked again. It "
            "must have been made with the same settings.",
        ),
    ] = False,
) -> None:
    """Put every model of a zoo through everything the cache promises, and print a table of what held.

    In a clone, [bold]cachedit coverage[/bold] runs over diffusers' transformer classes made tiny. [bold]cachedit
    coverage my_models.py[/bold] runs over models of your own. No model has an adapter: a new one is a function that
    makes it and its inputs. A row takes some seconds, mostly dynamo's captures; the inner backend is eager.

    The exit code is 1 if a row falls short. Ctrl-C keeps the rows if there is an [bold]--out[/bold], and
    [bold]--resume[/bold] goes on.
    """
    if out is not None:
        check_out(out.parent)
    elif resume:
        raise typer.BadParameter("say by --out what was to be written", param_hint="--resume")
    if (models.endswith(".py") or "/" in models) and not Path(models).exists():  # said before torch is imported
        raise typer.BadParameter(f"{models} cannot be imported: there is no such file or folder", param_hint="MODELS")
    with quiet():
        from cachedit_fx.bench import coverage as bench
        from cachedit_fx.bench.coverage_record import CoverageRecord
        from cachedit_fx.bench.variant_checks import vocabulary_of, with_variants

        try:
            whole = bench.load_zoo(models)
            zoo = whole.only(only or ())
        except RequestError as error:
            raise typer.BadParameter(str(error), param_hint="MODELS") from None
    if not zoo.models:
        raise typer.BadParameter(f"no name contains {' or '.join(only or ())}; see {models}", param_hint="--only")
    installed = versions("torch", "diffusers")
    unfinished = out.with_name(f"{out.stem}-unfinished.json") if out is not None else None
    record = CoverageRecord(unfinished, {"models": models, "variants": variants} | installed)
    rows: list[Covered] = []
    with reported(lambda: _interrupted(record, len(zoo.models))):
        if resume and unfinished is not None:
            record.resume(unfinished)
        rest = zoo.without(record.rows)
        try:
            with progress("models") as tell, quiet():
                checked = bench.check_all(rest, tell)
                if variants:
                    checked = with_variants(checked, rest, vocabulary_of(whole))
                for row in checked:
                    record.add(row)
        finally:
            rows += [record.rows[name] for name in (*zoo.models, *zoo.missing) if name in record.rows]
            show(bench.table(rows, is_narrow=True), bench.LEGEND)
    console.print(f"\n[bold]{bench.summary(rows)}[/bold]")
    show(*(f"{row.name}: {row.reason}" for row in rows if row.reason))
    show(*(f"{row.name}, {variant}" for row in rows for variant in row.variants_that("wrong")))
    if out is not None:
        command = f"cachedit coverage {models}{' --variants' if variants else ''}"
        packages = ", ".join(f"{name} {version}" for name, version in installed.items())
        made_by = f"Made by `{command}` on {machine()}, {packages}"
        with whole_files(out.parent) as folder:
            (folder / out.name).write_text(bench.markdown(rows, made_by, zoo.excluded))
        record.finish()
        console.print(f"\n{out}  [dim]this table[/dim]")
    if not all(row.is_full for row in rows):
        raise typer.Exit(1)


def _interrupted(record: CoverageRecord, count: int) -> str:
    """What is left to do of `count` models, and what is kept."""
    kept = f"{record.path} has them, --resume goes on" if record.path and record.rows else "nothing was written"
    return f" after {len(record.rows)} of {count} models; {kept}"
