"""Draws `links.png`: time of a step by link speed, a line for each kind of split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachedit_fx.report.plots import BLUE, DASHES, FAINT, GREEN, GREY, SHADE, SKY, VERMILION, new_figure, tidy

_LOOKS: tuple[tuple[str, Any, str], ...] = (
    (GREY, DASHES, "o"),
    (GREY, "-", "o"),
    (VERMILION, "-", "s"),
    ("#E69F00", "-", "P"),
    (BLUE, "-", "^"),
    ("#CC79A7", "-", "v"),
    (GREEN, "-", "D"),
    (SKY, "-", "X"),
)
"""Colour, stroke and marker of each kind of split, in their order."""

GROUND = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
TICKS = (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50)


@dataclass(frozen=True)
class Panel:
    """One model: kind of split -> (GB/s, time over a perfect division's) of the points of its line."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def save_links(
    rows: Sequence[Sequence[Panel]],
    marks: Sequence[Mapping[str, float]],
    labels: Sequence[str],
    tops: Sequence[float],
    path: Path,
) -> None:
    """A row of panels for each kind of link; both axes are logarithmic.

    Args:
        marks: for each row, name of a link -> its GB/s, drawn as vertical lines.
        labels: of each row's horizontal axis.
        tops: of each row's vertical axis. What lies above is not drawn.
        path: the file.
    """
    figure = new_figure(3.1 * max(map(len, rows)) + 0.6, 3.3 * len(rows) + 0.6)
    grid = figure.subplots(len(rows), max(map(len, rows)), squeeze=False)
    handles: dict[str, Any] = {}
    for row, panels in enumerate(rows):
        for axes, panel in zip(grid[row], panels, strict=True):
            for (name, points), (colour, stroke, marker) in zip(panel.lines.items(), _LOOKS, strict=False):
                if not points:
                    continue
                speeds, times = zip(*points, strict=True)
                every = max(1, len(points) // 6)
                look = {"color": colour, "linestyle": stroke, "marker": marker, "markevery": every, "markersize": 4}
                (handles[name],) = axes.plot(speeds, times, linewidth=1.3, label=name, **look)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylim(0.95, tops[row])
            axes.set_yticks([tick for tick in TICKS if tick <= tops[row]])
            axes.set_title(panel.title, fontsize=9, loc="left")
            axes.grid(color=SHADE, linewidth=0.6, which="major")
            axes.set_axisbelow(True)
            for name, speed in marks[row].items():
                axes.axvline(speed, color=FAINT, linewidth=0.8, linestyle=DASHES, zorder=0)
                place = {"transform": axes.get_xaxis_transform(), "rotation": 90, "va": "top", "ha": "right"}
                axes.text(speed, 0.99, f" {name}", fontsize=6, color=GREY, bbox=GROUND, zorder=4, **place)
            axes.set_xlabel(labels[row], fontsize=8)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.set_minor_formatter(lambda value, _: "")
            tidy(axes)
        grid[row][0].set_ylabel("time over a perfect division's", fontsize=9)
    look = {"ncols": 7, "fontsize": 8, "frameon": False, "handlelength": 4}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", **look)
    figure.savefig(path)
