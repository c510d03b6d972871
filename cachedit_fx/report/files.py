"""Files that are whole or not there, and the machine that figures were made on."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def machine() -> str:
    """The processor: `a 2-core x86_64 CPU`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"a {cores}-core {platform.machine()} CPU"


def hardware(device: torch.device) -> str:
    """A device and the libraries that drive it: `NVIDIA H100 80GB HBM3, torch 2.13.0, triton 3.7.1`."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{machine()}, one thread"
    names = ("torch", "triton")
    installed = versions(*names)
    return ", ".join([name, *(f"{n} {installed[n]}" if n in installed else f"no {n}" for n in names)])


def versions(*names: str) -> dict[str, str]:
    """The versions of those distributions that are installed."""
    installed = {}
    for name in names:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def check_folder(folder: Path) -> str | None:
    """The obstacle to writing into `folder`, which need not exist; None if there is none."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        return f"{existing} is a file; give a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"no permission to write into {existing}; give another folder"
    return None


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A folder to write files into; they move to `folder`, which is made, after all of them are written.

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
