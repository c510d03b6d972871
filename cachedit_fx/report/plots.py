"""`bench.png`: quality over work, a look for each system, and the Pareto front."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cachedit_fx.bench.measure import UNCACHED, Measured
from cachedit_fx.bench.report import Report

# Okabe and Ito's colours, and a shape each: told apart in grey and by the colour-blind too.
LOOKS: dict[str, dict[str, Any]] = {
    "cachedit_fx": {"color": "#0072B2", "marker": "o", "label": "cachedit_fx"},
    "cache-dit": {"color": "#D55E00", "marker": "s", "label": "cache-dit"},
    "diffusers": {"color": "#009E73", "marker": "^", "label": "diffusers"},
    UNCACHED: {"color": "#6B6B6B", "marker": "D", "label": "fewer steps, no cache"},
}
_LINE = 0.045
"""Least distance between two labels, as a share of the axis."""


def save_plot(report: Report, path: Path) -> None:
    """Draw it. Rows whose pictures are the uncached ones have no place on the axis and are left out."""
    shown = [row for row in report.rows if row.name != UNCACHED and math.isfinite(row.mean_psnr)]
    front = [row for row in report.pareto() if math.isfinite(row.mean_psnr)]
    figure = Figure(figsize=(9, 5.6), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [row.work for row in front],
        [row.mean_psnr for row in front],
        color="black",
        linewidth=1,
        linestyle=(0, (4, 3)),
        drawstyle="steps-pre",  # from much work to little: what is between two rows is not to be had
        zorder=1,
        label="Pareto front",
    )
    for system, look in LOOKS.items():
        rows = sorted((row for row in shown if row.system == system), key=lambda row: row.work)
        if not rows:
            continue
        work, quality = [row.work for row in rows], [row.mean_psnr for row in rows]
        if system == UNCACHED:
            axes.plot(work, quality, color=look["color"], linewidth=1, zorder=1)
        axes.scatter(work, quality, s=34, zorder=3, edgecolors="white", linewidths=0.6, **look)
    axes.set_xlabel("work: FLOPs over the uncached run's")
    axes.set_ylabel("PSNR against the uncached pictures, dB")
    axes.set_xlim(0, 1)
    axes.margins(y=0.12)
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, front)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    settings = report.settings
    axes.set_title(
        f"{settings.steps} steps, {len(settings.prompts)} prompts; labelled: on the Pareto front",
        fontsize=9.5,
        loc="left",
    )
    figure.savefig(path)


def _label(axes: Any, front: list[Measured]) -> None:
    """Names of the front's rows, left of and above their points, pushed apart where they would meet."""
    low, high = axes.get_ylim()
    room = math.inf
    for row in sorted(front, key=lambda row: -row.mean_psnr):
        wanted = (row.mean_psnr - low) / (high - low) + 0.025
        room = min(wanted, room - _LINE)
        axes.annotate(
            row.name,
            (row.work, row.mean_psnr),
            xytext=(max(row.work - 0.03, 0.01), room),
            textcoords=("data", "axes fraction"),
            fontsize=7.5,
            ha="right" if row.work > 0.25 else "left",
            va="bottom",
            arrowprops={"arrowstyle": "-", "color": "#BBBBBB", "linewidth": 0.6, "shrinkB": 4},
        )
