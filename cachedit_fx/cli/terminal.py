"""What the commands share: consoles, silence while libraries are imported, files that are whole or not there."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def machine() -> str:
    """What the figures of a table were made on: `a 2-core x86_64 CPU`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"a {cores}-core {platform.machine()} CPU"


def check_folder(folder: Path) -> str | None:
    """What keeps files from being written into `folder`, which need not exist; None where nothing does."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        return f"{existing} is a file; give a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"no permission to write into {existing}; give another folder"
    return None


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """Gives a folder to write files into; they move to `folder`, which is made, once all of them are written.

    Whatever ends the block early, Ctrl-C included, leaves `folder` as it was.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    try:
        yield staging
        for file in sorted(staging.iterdir()):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
