"""Files that are whole or not there, and what a table was made on."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
