"""What the commands share: consoles, silence while libraries are imported, files that are whole or not there."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

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
