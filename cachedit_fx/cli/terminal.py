"""What the commands share: consoles, progress, pages, errors in words, silence while libraries are imported."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from cachedit_fx.bench.errors import BenchmarkError, RequestError
from cachedit_fx.bench.progress import Tell
from cachedit_fx.report.files import machine, versions, whole_files
from cachedit_fx.report.tables import Heading, Part, Table, page, terminal

console = Console(highlight=False)
"""Standard output: results."""


errors = Console(stderr=True, highlight=False)
"""Standard error: progress and errors, so that results can be piped."""


def command_line() -> str:
    """What was typed."""
    return shlex.join(["cachedit", *sys.argv[1:]])


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back warnings, of loggers and of `warnings`, while the libraries below us are imported.

    transformers 5.23 says that torchvision is missing, torchao 0.18 that its CUDA libraries are: neither is used.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def progress(unit: str) -> Iterator[Tell]:
    """A bar on standard error, gone when the block ends; its total grows with the work that is reported."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
    )
    # Few refreshes: on one core they would be part of what is measured.
    with Progress(*columns, console=errors, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("starting", total=None)

        def tell(what: str = "", done: int = 0, more: int = 0) -> None:
            total = (bar.tasks[0].total or 0) + more
            bar.update(task, advance=done, total=total or None, description=escape(what) or None)

        yield tell


@contextmanager
def reported(interrupted: Callable[[], str]) -> Iterator[None]:
    """Turn errors that a user can mend, and Ctrl-C, into a line on standard error and an exit code.

    Exit codes: 2 for a request that cannot be, 1 for what failed on the way, 130 for Ctrl-C.

    Args:
        interrupted: what to say after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"interrupted{interrupted()}", markup=False)
        raise typer.Exit(130) from None
    except (RequestError, BenchmarkError, OSError) as error:
        errors.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, RequestError) else 1) from None


def warn(message: str) -> None:
    """A line in yellow on standard error."""
    errors.print(f"[yellow]{escape(message)}[/yellow]")


def show(*parts: Part) -> None:
    """Print a page, a blank line before each part."""
    for part in parts:
        if not part:
            continue
        console.print()
        if isinstance(part, Table):
            console.print(terminal(part))
        elif isinstance(part, Heading):
            console.print(Text(part.text, "bold"))
        elif isinstance(part, str):
            console.print(part, markup=False)
        else:
            for text in part:
                console.print(f"- {text}", markup=False)


def save(
    file: Path, title: str, parts: Sequence[Part], pictures: Mapping[str, Callable[[Path], None]] | None = None
) -> None:
    """Show tables that were counted on diffusers' models, and write them as a page that names the command.

    Args:
        pictures: name of a file beside the page -> draws it.
    """
    show(*parts)
    libraries = ", ".join(f"{name} {version}" for name, version in versions("torch", "diffusers").items())
    made_by = f"`{command_line()}`, on {machine()}, {libraries}."
    with whole_files(file.parent) as folder:
        (folder / file.name).write_text(page(Heading(title), made_by, *parts))
        for name, draw in (pictures or {}).items():
            draw(folder / name)
    console.print(f"\n{file}  [dim]these tables[/dim]")
