"""Every picture that the commands draw, in one style.

save_quality       `bench.png`: quality over work, a look for each system, and the Pareto front
save_grid          `grid.png`: pictures, a strip for each configuration
save_differences   `differences.png`: why each step was cached or computed
save_bandwidth     `bandwidth.png`: the kernels' bandwidth over a copy's
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cachedit_fx.runtime.policies.base import Action, Reason

if TYPE_CHECKING:
    import torch

    from cachedit_fx.bench.kernels_bandwidth import Timed
    from cachedit_fx.bench.measure import Measured
    from cachedit_fx.runtime.stats import CacheStats

# Okabe and Ito's colours, with a shape each: told apart in grey and by the colour-blind.
BLUE, VERMILION, GREEN, SKY = "#0072B2", "#D55E00", "#009E73", "#56B4E9"
GREY, FAINT, SHADE = "#6B6B6B", "#BBBBBB", "#EDEDED"
DASHES = (0, (5, 3))


def _figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure; the sides are in inches."""
    return Figure(figsize=(width, height), dpi=120, facecolor="white", layout=layout)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


LOOKS: dict[str, dict[str, Any]] = {
    "uncached": {"color": GREY, "marker": "D", "s": 34, "label": "fewer steps, no cache"},
    "diffusers": {"color": GREEN, "marker": "^", "s": 34, "label": "diffusers"},
    "cache-dit": {"color": VERMILION, "marker": "s", "s": 62, "label": "cache-dit"},
    "cachedit_fx": {"color": BLUE, "marker": "o", "s": 34, "label": "cachedit_fx"},
}
"""Of each system, from the lowest layer to the highest: at equal points ours lies on a larger square."""
_LABEL_DISTANCE = 0.045
"""The least distance between two labels, as a share of the axis."""


def save_quality(rows: Sequence[Measured], front: Sequence[Measured], title: str, path: Path) -> None:
    """PSNR over work. Rows with pictures identical to the uncached ones have no place on the axis and are left out.

    Args:
        rows: every row but the uncached run.
        front: the rows on the Pareto front, from much work to little. They are labelled.
        title: the conditions.
        path: the file.
    """
    rows, front = ([row for row in some if math.isfinite(row.mean_psnr)] for some in (rows, front))
    figure = _figure(9, 5.6)
    axes = figure.subplots()
    axes.plot(
        [row.work for row in front],
        [row.mean_psnr for row in front],
        color="black",
        linewidth=1,
        linestyle=DASHES,
        drawstyle="steps-pre",  # from much work to little: nothing lies between two rows
        zorder=1,
        label="Pareto front",
    )
    for layer, (system, look) in enumerate(LOOKS.items(), 3):
        own = sorted((row for row in rows if row.system == system), key=lambda row: row.work)
        if not own:
            continue
        work, quality = [row.work for row in own], [row.mean_psnr for row in own]
        if system == "uncached":
            axes.plot(work, quality, color=look["color"], linewidth=1, zorder=1)
        axes.scatter(work, quality, zorder=layer, edgecolors="white", linewidths=0.6, **look)
    axes.set_xlabel("work: FLOPs over the uncached run's")
    axes.set_ylabel("PSNR against the uncached pictures, dB")
    axes.set_xlim(0, 1)
    axes.margins(y=0.12)
    axes.grid(color=SHADE, linewidth=0.6)
    axes.set_axisbelow(True)
    _tidy(axes)
    _label(axes, front)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.set_title(title, fontsize=9.5, loc="left")
    figure.savefig(path)


def _label(axes: Any, rows: Sequence[Measured]) -> None:
    """Names of rows, left of and above their points, pushed apart if they would meet."""
    low, high = axes.get_ylim()
    room = math.inf
    for row in sorted(rows, key=lambda row: -row.mean_psnr):
        wanted = (row.mean_psnr - low) / (high - low) + 0.025
        room = min(wanted, room - _LABEL_DISTANCE)
        axes.annotate(
            row.name,
            (row.work, row.mean_psnr),
            xytext=(max(row.work - 0.03, 0.01), room),
            textcoords=("data", "axes fraction"),
            fontsize=7.5,
            ha="right" if row.work > 0.25 else "left",
            va="bottom",
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkB": 4},
        )


@dataclass(frozen=True)
class Strip:
    """The pictures of one configuration."""

    name: str
    figures: str
    """Below the name; may have several lines."""
    pictures: torch.Tensor
    """[N, 3, height, width], floats in 0..1."""
    captions: Sequence[str]
    """Below each picture."""
    is_quiet: bool = False
    """Whether the name is in grey."""


_SIDE, _COLUMN, _ROW, _LABELS = 0.8, 0.92, 1.02, 1.85
"""Of the grid, in inches: a picture (96 dots, 3 a pixel), distances from one to the next, the room for labels."""


def save_grid(strips: Sequence[Strip], prompts: Sequence[str], path: Path) -> None:
    """Pictures: a row for each strip, a column for each prompt."""
    heading = 0.14 * max(len(_wrapped(prompt).splitlines()) for prompt in prompts) + 0.12
    width, height = _LABELS + _COLUMN * len(prompts), heading + _ROW * len(strips)
    figure = _figure(width, height, layout=None)
    for number, strip in enumerate(strips):
        top = height - heading - _ROW * number
        weight, color = ("normal", GREY) if strip.is_quiet else ("bold", "black")
        middle = (top - 0.3) / height
        figure.text(0.1 / width, middle, strip.name, fontsize=8, va="bottom", weight=weight, color=color)
        below = middle - 0.03 / height
        figure.text(0.1 / width, below, strip.figures, fontsize=8, va="top", color=GREY, linespacing=1.25)
        for column, (picture, caption) in enumerate(zip(strip.pictures, strip.captions, strict=True)):
            left = _LABELS + _COLUMN * column
            axes = figure.add_axes((left / width, (top - _SIDE) / height, _SIDE / width, _SIDE / height))
            axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(linewidth=0.5, color=FAINT)
            axes.set_xlabel(caption, fontsize=6.5, color=GREY, labelpad=2)
    for column, prompt in enumerate(prompts):
        middle = _LABELS + _COLUMN * column + _SIDE / 2
        figure.text(middle / width, 1 - 0.07 / height, _wrapped(prompt), fontsize=6.5, ha="center", va="top")
    figure.savefig(path)


def _wrapped(prompt: str) -> str:
    return "\n".join(textwrap.wrap(prompt, 15)) or "(empty prompt)"


def save_differences(panels: Sequence[tuple[float, CacheStats]], path: Path) -> None:
    """The measured difference by step, and the decisions. A panel for each threshold and its run's statistics."""
    figure = _figure(8, 0.75 + 1.75 * len(panels))
    rows = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (threshold, stats) in zip(rows, panels, strict=True):
        decisions = stats.branch(0).decisions
        warmup = [step for step, decision in decisions.items() if decision.reason is Reason.WARMUP]
        if warmup:
            axes.axvspan(min(warmup) - 0.5, max(warmup) + 0.5, color=SHADE, zorder=0)
        axes.axhline(threshold, color="black", linewidth=0.9, linestyle=DASHES, zorder=1)
        for step, decision in decisions.items():
            if decision.difference is None:
                continue
            is_cached = decision.action is Action.REUSE
            color = BLUE if is_cached else VERMILION
            axes.vlines(step, 0, decision.difference, color=color, linewidth=1, alpha=0.4, zorder=2)
            look = {"marker": "o"} if is_cached else {"marker": "s", "facecolors": "white"}
            axes.scatter(step, decision.difference, s=30, edgecolors=color, color=color, zorder=3, **look)
        counts = f"{len(stats.cached_steps)} of {stats.executed_steps} steps cached, work {stats.work:.0%}"
        axes.set_title(f"threshold {threshold:g}: {counts}", loc="left", fontsize=9.5)
        axes.set_xlim(-0.7, max(decisions) + 0.7)
        _tidy(axes)
    rows[0].set_ylim(0, None)
    rows[-1].set_xlabel("denoising step", fontsize=9)
    figure.supylabel("difference since the last computed step", fontsize=9)
    handles = [
        _marker("o", BLUE, BLUE, "cached: middle blocks bypassed"),
        _marker("s", VERMILION, "white", "computed"),
        Line2D([], [], color="black", linewidth=0.9, linestyle=DASHES, label="threshold"),
        Patch(color=SHADE, label="warm-up, always computed"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=8.5)
    figure.savefig(path)


def _marker(shape: str, color: str, face: str, label: str) -> Line2D:
    return Line2D([], [], linestyle="", marker=shape, color=color, markerfacecolor=face, markersize=6, label=label)


def save_bandwidth(rows: Sequence[Timed], title: str, path: Path) -> None:
    """Bars: a line of panels for each dtype, the share of a copy's bandwidth on the left, plain torch on the right."""
    names, shapes, dtypes = (
        list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("kernel", "shape", "dtype")
    )
    height = 0.19 * len(names) * len(shapes) + 0.5
    figure = _figure(11, 1.0 + (height + 0.5) * len(dtypes))
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(dtypes), 2, squeeze=False, sharey=True, sharex="col")
    thick = 0.8 / len(shapes)
    colours = (SKY, BLUE, VERMILION, GREEN)
    panels = (("share", "bandwidth, of a copy's"), ("speedup", "times as fast as plain torch"))
    for dtype, line in zip(dtypes, grid, strict=True):
        for axes, (key, heading) in zip(line, panels, strict=True):
            for number, shape in enumerate(shapes):
                chosen = [row for row in rows if (row.shape, row.dtype) == (shape, dtype)]
                places = [names.index(row.kernel) + (number - (len(shapes) - 1) / 2) * thick for row in chosen]
                values = [getattr(row, key) for row in chosen]
                bars = axes.barh(places, values, thick * 0.92, color=colours[number % len(colours)], label=shape)
                texts = [f"{value:.0%}" if key == "share" else f"{value:.1f}" for value in values]
                ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
                axes.bar_label(bars, texts, padding=3, fontsize=7, color="#333333", bbox=ground)
            axes.axvline(1, color="black", linewidth=1, linestyle=DASHES, zorder=0)
            axes.set_title(f"{dtype}: {heading}", fontsize=9, loc="left")
            axes.set_yticks(range(len(names)), names)
            axes.margins(x=0.12)
            _tidy(axes)
        line[0].xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        line[0].set_ylim(len(names) - 0.5, -0.5)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(shapes), fontsize=8, frameon=False)
    figure.savefig(path)
