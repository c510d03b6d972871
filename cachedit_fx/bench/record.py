"""A run as it stands, and the file that it is kept in: `bench.json`, from which a run can be resumed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cachedit_fx.bench.measure import Measured, Settings
from cachedit_fx.bench.resume import ResumeError, kept_rows, save_page
from cachedit_fx.bench.rows import UNCACHED, Row

FILE = "bench.json"
_UNKEPT = ("pictures", "stats")
"""Fields of `Measured` that are not JSON's."""


@dataclass
class Record:
    """A run as it stands."""

    settings: Settings
    command: str
    """What was typed."""
    machine: str
    versions: dict[str, str]
    rows: list[Measured] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a reader must know besides."""

    def find(self, row: Row) -> Measured | None:
        """The measured row of that name.

        Raises:
            ResumeError: if it was measured with other arguments.
        """
        for measured in self.rows:
            if measured.name == row.name:
                arguments = json.loads(json.dumps(dict(row.arguments), default=str))
                if measured.arguments != arguments:
                    raise ResumeError(
                        f"row {row.name!r} was measured with {measured.arguments}, and is {dict(row.arguments)} now: "
                        "give it another name, or measure into another folder"
                    )
                return measured
        return None

    def pareto(self) -> list[Measured]:
        """Rows than which none is better at equal or less work; from much work to little, uncached left out."""
        front: list[Measured] = []
        for row in sorted(self.rows, key=lambda row: (row.work, -row.mean_psnr)):
            better_than_all = not front or row.mean_psnr > front[-1].mean_psnr
            if row.name != UNCACHED and better_than_all:
                front.append(row)
        return front[::-1]

    def by_work(self) -> list[Measured]:
        """The rows from much work to little, uncached first."""
        return sorted(self.rows, key=lambda row: (row.name != UNCACHED, -row.work))

    def save(self, folder: Path) -> None:
        """Write `bench.json`, whole or not at all."""
        page = {
            "command": self.command,
            "machine": self.machine,
            "versions": self.versions,
            "settings": self.settings.plain_values(),
            "notes": self.notes,
            "rows": [_as_json(row) for row in self.rows],
        }
        save_page(folder / FILE, page)


def _as_json(row: Measured) -> dict[str, Any]:
    psnr = row.mean_psnr
    derived = {"mean_psnr": psnr if math.isfinite(psnr) else None, "mean_ssim": row.mean_ssim, "wall": row.wall}
    values = {item.name: getattr(row, item.name) for item in fields(row) if item.name not in _UNKEPT}
    return {"name": row.name} | derived | values


def load_rows(folder: Path, settings: Settings) -> list[Measured]:
    """The rows of an earlier run in `folder`.

    Raises:
        ResumeError: if there is none, or it was made with other settings.
    """
    rows = kept_rows(folder / FILE, "cachedit bench", settings.plain_values(), Settings(()).plain_values())
    names = {item.name for item in fields(Measured)} - set(_UNKEPT)
    return [Measured(**{name: value for name, value in row.items() if name in names}) for row in rows]
