"""`cachedit coverage`: which models the cache works with, seen and not promised."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from cachedit_fx.cli.terminal import console, errors, progress_bar, quiet
from cachedit_fx.report.files import check_folder, machine, whole_files

if TYPE_CHECKING:
    from cachedit_fx.bench.coverage import Row

NO_ENTRY = "no entry in the zoo: nobody has written a configuration and inputs for it"


def coverage(
    models: Annotated[
        str,
        typer.Argument(
            metavar="MODELS",
            help="A Python file, a package's folder or an importable module that holds [b]ZOO[/b]: name → function "
            "that returns (module, inputs), where [i]inputs(size)[/i] gives the keyword arguments of one forward at "
            "size 1 or 2, two resolutions. Optional: [b]BLOCKS[/b], name → blocks of the chain; [b]EXCLUDED[/b], name "
            "→ why it is not in the zoo; [b]MISSING[/b], names that should be.",
        ),
    ] = "tests/lib/zoo",
    only: Annotated[
        list[str] | None,
        typer.Option("--only", "-k", metavar="TEXT", help="Only models whose name contains TEXT; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the table there too, as Markdown ([i]docs/models.md[/i])."),
    ] = None,
) -> None:
    """Put every model of a zoo through everything the cache promises, and print a table of what held.

    In a clone, [bold]cachedit coverage[/bold] runs over diffusers' transformer classes made tiny; over models of your
    own with [bold]cachedit coverage my_models.py[/bold]. No model has an adapter: a new one is a function that makes
    it and its inputs. A row takes some seconds, mostly dynamo's captures; the inner backend is eager.

    The exit code is 1 if a row falls short.
    """
    zoo = _load(models)
    names = [name for name in zoo.ZOO if not only or any(text.lower() in name.lower() for text in only)]
    missing = [] if only else list(getattr(zoo, "MISSING", ()))
    if not names:
        raise typer.BadParameter(f"no name contains {' or '.join(only or ())}; see {models}", param_hint="--only")
    obstacle = check_folder(out.parent) if out else None
    if obstacle:
        raise typer.BadParameter(obstacle, param_hint="--out")

    import torch

    from cachedit_fx.bench.coverage import Row, check

    torch.set_num_threads(1)
    rows: list[Row] = []
    try:
        with progress_bar(len(names), "models") as (progress, task):
            for name in names:
                progress.update(task, description=name)
                with quiet():
                    rows.append(check(name, zoo.ZOO[name], getattr(zoo, "BLOCKS", {}).get(name)))
                progress.update(task, advance=1)
    except KeyboardInterrupt:
        console.print(table(rows))
        errors.print(f"interrupted after {len(rows)} of {len(names)} models; nothing was written")
        raise typer.Exit(130) from None
    rows.extend(Row(name, reason=NO_ENTRY) for name in missing)

    console.print(table(rows))
    for line in _told(rows):
        console.print(f"[bold]{line}[/bold]")
    for row in rows:
        if not row.is_full:
            console.print(f"\n[bold]{row.name}[/bold]: {escape(row.reason)}")
    if out is not None:
        with whole_files(out.parent) as folder:
            (folder / out.name).write_text(markdown(rows, models, getattr(zoo, "EXCLUDED", {})))
        console.print(f"\n{out}  [dim]this table[/dim]")
    if not all(row.is_full for row in rows):
        raise typer.Exit(1)


def _load(models: str) -> ModuleType:
    """The module that holds the zoo."""
    path = Path(models)
    file = path / "__init__.py" if path.is_dir() else path
    try:
        with quiet(), _importable(file):
            name = (path.name if path.is_dir() else path.stem) if file.is_file() else models
            found = importlib.import_module(name)
    except ImportError as error:
        raise typer.BadParameter(
            f"{models} cannot be imported ({error}). Give a Python file, a package's folder or a module; "
            "the zoo of diffusers' classes is tests/lib/zoo in a clone of the project",
            param_hint="MODELS",
        ) from None
    if not isinstance(getattr(found, "ZOO", None), dict) or not found.ZOO:
        raise typer.BadParameter(
            f"{models} has no ZOO, a dict from names to functions that return (module, inputs); see "
            "cachedit coverage --help",
            param_hint="MODELS",
        )
    return found


@contextmanager
def _importable(file: Path) -> Iterator[None]:
    """With `file`, or the package that it begins, ahead on the path of imports."""
    folder = file.parent.parent if file.name == "__init__.py" else file.parent
    before = list(sys.path)
    if file.is_file():
        sys.path.insert(0, str(folder.absolute()))
    try:
        yield
    finally:
        sys.path[:] = before


def _headings() -> tuple[str, ...]:
    from cachedit_fx.bench.coverage import CHECKS

    return ("model", "chain", *CHECKS, "FLOPs")


def _cells(row: Row, yes: str, no: str, unknown: str) -> tuple[str, ...]:
    from cachedit_fx.bench.coverage import CHECKS

    marks = {True: yes, False: no, None: unknown}
    checks = (marks[row.passed.get(check)] for check in CHECKS)
    return (row.name, " + ".join(row.loops), *checks, "" if row.work is None else f"{row.work:.0%}")


def table(rows: Sequence[Row]) -> Table:
    """The table for a terminal; rows that fall short stand out."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for heading in _headings():
        made.add_column(heading, justify="right" if heading == "FLOPs" else "left", overflow="fold")
    for row in rows:
        made.add_row(
            *_cells(row, "[green]✓[/green]", "[red]✗[/red]", "[dim]-[/dim]"), style="" if row.is_full else "bold"
        )
    return made


def _told(rows: Sequence[Row]) -> list[str]:
    full = sum(row.is_full for row in rows)
    return [f"{full} of {len(rows)} models pass every check."]


def markdown(rows: Sequence[Row], models: str, excluded: dict[str, str]) -> str:
    """The table as a file: what the columns mean, what falls short and why, what was left out."""
    from cachedit_fx.bench.coverage import CHECKS

    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    lines = [
        "# Which models it works with",
        "",
        f"Made by `cachedit coverage {models}` on {machine()}, {versions}: tiny configurations, random weights, "
        "float32, inner backend eager, F1B0, everything reused from the second step on.",
        "",
        *_told(rows),
        "",
        *(f"- **{name}**: {meaning}." for name, meaning in CHECKS.items()),
        "- **FLOPs**: of a reused step, over a computed one's.",
        "",
        _line(_headings()),
        _line(["---"] * (len(CHECKS) + 2) + ["---:"]),
        *(_line(_cells(row, "✓", "✗", "-")) for row in rows),
    ]
    short = [row for row in rows if not row.is_full]
    if short:
        lines += [
            "",
            "## Rows that fall short",
            "",
            *(f"- **{row.name}**: {_short_paths(row.reason)}" for row in short),
        ]
    if excluded:
        lines += ["", "## Left out", "", *(f"- **{name}**: {reason}" for name, reason in excluded.items())]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _short_paths(text: str) -> str:
    """Without the folder that packages are installed in, which says nothing to others."""
    for folder in sorted(sys.path, key=len, reverse=True):
        if folder:
            text = text.replace(folder.rstrip("/") + "/", "")
    return text
