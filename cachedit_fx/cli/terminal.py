"""What the commands share: consoles, silence while libraries are imported, files that are whole or not there."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

console = Console(highlight=False)
"""Standard output: results."""


errors = Console(stderr=True, highlight=False)
"""Standard error: progress and errors, so that results can be piped."""


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
def progress_bar(total: int, unit: str) -> Iterator[tuple[Progress, TaskID]]:
    """A bar on standard error for `total` units of work, gone when the block ends."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
    )
    # Few refreshes: on one core they would be part of what is measured.
    with Progress(*columns, console=errors, transient=True, refresh_per_second=4) as progress:
        yield progress, progress.add_task("starting", total=total)
