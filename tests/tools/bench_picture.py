"""Draws docs/pictures/bench.png anew from the first table of docs/choosing.md: `python -m tools.bench_picture`.

The figures of the table are rounded, so points move by less than their markers' size. `cachedit bench` draws the same
picture from the unrounded ones.
"""

from __future__ import annotations

from pathlib import Path

from cachedit_fx.bench.measure import Measured, Settings
from cachedit_fx.bench.pages import save_picture
from cachedit_fx.bench.record import Record
from cachedit_fx.bench.rows import SYSTEMS, UNCACHED

DOCS = Path(__file__).resolve().parents[2] / "docs"
PROMPTS = 32


def record() -> Record:
    """The rows of the table."""
    text = (DOCS / "choosing.md").read_text()
    section = text[text.index("## 28 steps") : text.index("## 20 and 50 steps")]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    rows = [_row([cell.strip() for cell in cells]) for cells in lines if len(cells) == 7 and cells[1].strip().isdigit()]
    return Record(Settings(("",) * PROMPTS, steps=28), "", "", {}, rows)


def _row(cells: list[str]) -> Measured:
    name, steps, cached, work, psnr = cells[0].strip("*"), int(cells[1]), cells[2], cells[3], cells[4]
    peer = next((system for system in SYSTEMS[1:] if name.startswith(f"{system} ")), SYSTEMS[0])
    system = peer if cached else UNCACHED
    return Measured(name, system, steps, {}, float(work), float(cached or 0), [float(psnr) if psnr else None])


if __name__ == "__main__":
    save_picture(record(), DOCS / "pictures" / "bench.png")
