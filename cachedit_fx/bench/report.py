"""What a run leaves behind: `bench.json`, from which it can be resumed, `bench.md` and `bench.png`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cachedit_fx.bench.measure import UNCACHED, Measured, Settings, as_settings
from cachedit_fx.bench.rows import Row
from cachedit_fx.report.files import whole_files

FILE = "bench.json"


class ResumeError(ValueError):
    """A file cannot be continued; the message says why."""


@dataclass
class Report:
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
                if measured.arguments != _plain(row.arguments):
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


def save_json(report: Report, folder: Path) -> None:
    """Write `bench.json`, whole or not at all."""
    page = {
        "command": report.command,
        "machine": report.machine,
        "versions": report.versions,
        "settings": as_settings(report.settings),
        "notes": report.notes,
        "rows": [
            {"name": row.name, **_derived(row), **{k: v for k, v in asdict(row).items() if k != "name"}}
            for row in report.rows
        ],
    }
    with whole_files(folder) as staging:
        (staging / FILE).write_text(json.dumps(page, indent=1, default=str) + "\n")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(dict(value), default=str))


def _derived(row: Measured) -> dict[str, Any]:
    psnr = row.mean_psnr
    return {"mean_psnr": psnr if math.isfinite(psnr) else None, "mean_ssim": row.mean_ssim, "wall": row.wall}


def load_rows(folder: Path, settings: Settings) -> list[Measured]:
    """The rows of an earlier run in `folder`.

    Raises:
        ResumeError: if there is none, or it was made with other settings.
    """
    path = folder / FILE
    try:
        page = json.loads(path.read_text())
        before, rows = page["settings"], page["rows"]
    except OSError as error:
        raise ResumeError(f"there is nothing to resume: {path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ResumeError(f"{path} was not written by `cachedit bench`") from None
    now = as_settings(settings)
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        told = ", ".join(f"{name} {_short(before.get(name))} there and {_short(now[name])} now" for name in changed)
        raise ResumeError(f"{path} was made with other settings: {told}. Use the same ones, or another folder")
    names = {item.name for item in fields(Measured)}
    return [Measured(**{name: value for name, value in row.items() if name in names}) for row in rows]


def _short(value: Any) -> str:
    return f"{len(value)} others" if isinstance(value, list) else repr(value)


HEADINGS = ("row", "steps", "cached", "work", "wall", "PSNR dB", "SSIM", "right", "MiB held")


def cells(row: Measured) -> tuple[str, ...]:
    """The text below `HEADINGS`."""
    psnr = f"{row.mean_psnr:.1f}" if math.isfinite(row.mean_psnr) else "identical"
    is_reference = row.name == UNCACHED
    return (
        row.name,
        str(row.steps),
        "" if row.system == UNCACHED else f"{row.cached_steps:.1f}",
        f"{row.work:.2f}",
        "" if row.wall is None else f"{row.wall:.2f}",
        "" if is_reference else psnr,
        "" if is_reference or row.mean_ssim is None else f"{row.mean_ssim:.4f}",
        "" if row.accuracy is None else f"{row.accuracy['all']:.0%}",
        "" if not row.bytes_held else f"{row.bytes_held / 2**20:.2f}",
    )


def by_work(rows: Sequence[Measured]) -> list[Measured]:
    """From much work to little, uncached first."""
    return sorted(rows, key=lambda row: (row.name != UNCACHED, -row.work))


def explanations(report: Report) -> list[str]:
    """What the columns mean, and under what conditions the figures came about."""
    settings = report.settings
    model = "the bundled model" if settings.entry is None else settings.entry
    guidance = f"guidance {settings.guidance:g}" if settings.guidance != 1 else "no guidance"
    found = [
        f"{len(settings.prompts)} prompts, picture i from the noise of seed {settings.seed} + i, {settings.steps} "
        f"steps, {model}, {guidance}, {settings.batch} at a time; inner backend {settings.inner_backend}, one thread.",
        "work: FLOPs of the transformer's calls over the uncached run's. wall: time over the uncached run's, the "
        "median of alternating rounds. PSNR, SSIM: against the uncached pictures from the same noise, means; "
        "identical pictures are left out of PSNR's. cached: steps of a generation that ran less than the whole model. "
        "right: pictures that show what the prompt says. MiB held: stored values, where the system tells.",
        "N steps: no cache, as many steps as cost the same work as a cached row. In bold: on the Pareto front, no row "
        "being better at equal or less work.",
        f"{report.machine}; {', '.join(f'{name} {version}' for name, version in report.versions.items())}.",
        f"Made by `{report.command}`.",
    ]
    return found + report.notes


def markdown(report: Report) -> str:
    """The table, accuracy by category where it is known, and the conditions."""
    front = {row.name for row in report.pareto()}
    page = _table(HEADINGS, [_bold(cells(row)) if row.name in front else cells(row) for row in by_work(report.rows)])
    checked = [row for row in by_work(report.rows) if row.accuracy and len(row.accuracy) > 2]
    if checked:
        categories = list(checked[0].accuracy or {})
        shares = [
            (row.name, *(f"{(row.accuracy or {}).get(category, math.nan):.0%}" for category in categories))
            for row in checked
        ]
        page += ["", "Right, by category:", "", *_table(("row", *categories), shares)]
    return "\n".join(["# cachedit bench", "", *page, "", *(f"- {line}" for line in explanations(report)), ""])


def _bold(texts: tuple[str, ...]) -> tuple[str, ...]:
    return (f"**{texts[0]}**", *texts[1:])


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, ("---", *["---:"] * (len(headings) - 1)), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
