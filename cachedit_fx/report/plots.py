"""Every picture that the commands draw, in one style.

save_quality       `bench.png`: quality over work, a look for each system, and the Pareto front
save_grid          `grid.png`: pictures, a strip for each configuration
save_differences   `differences.png`: why each step was cached or computed
save_bandwidth     `bandwidth.png`: the kernels' bandwidth over a copy's
save_sensitivity   `sensitivity.png`: the error of each group of layers, and the plan
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from cachedit_fx.runtime.policies.base import Action, Reason

if TYPE_CHECKING:
    import torch

    from cachedit_fx.bench.kernels_bandwidth import Timed
    from cachedit_fx.bench.measure import Measured
    from cachedit_fx.bench.sensitivity import Measurement
    from cachedit_fx.runtime.stats import CacheStats

# Okabe and Ito's colours, with a shape each: told apart in grey and by the colour-blind.
BLUE, VERMILION, GREEN, SKY = "#0072B2", "#D55E00", "#009E73", "#56B4E9"
GREY, FAINT, SHADE = "#6B6B6B", "#BBBBBB", "#EDEDED"
DASHES = (0, (5, 3))


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure; the sides are in inches."""
    return Figure(figsize=(width, height), dpi=120, facecolor="white", layout=layout)


def tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


LOOKS: dict[str, dict[str, Any]] = {
    "uncached": {"color": GREY, "marker": "D", "s": 34, "label": "fewer steps, no cache"},
    "diffusers": {"color": GREEN, "marker": "^", "s": 34, "label": "diffusers"},
    "cache-dit": {"color": VERMILION, "marker": "s", "s": 62, "label": "cache-dit"},
    "cachedit_fx": {"color": BLUE, "marker": "o", "s": 34, "label": "cachedit_fx"},
}
"""Of each system, from the lowest layer to the highest: at equal points ours lies on a larger square."""
_DIRECTIONS = ((-1, 1), (1, 1), (-1, 0), (1, 0), (-1, -1), (1, -1), (0, 1), (0, -1))
"""Of a label from its point, the best first."""
_DISTANCES = (5, 9, 14, 19)
"""Of a label from its point, in typographic points."""


def save_quality(rows: Sequence[Measured], front: Sequence[Measured], title: str, path: Path) -> None:
    """PSNR over work. Rows with pictures identical to the uncached ones have no place on the axis and are left out.

    Args:
        rows: every row but the uncached run.
        front: the rows on the Pareto front, from much work to little. Their names are bold. The names of all others
            follow as far as there is room: first the best of each system.
        title: the conditions.
        path: the file.
    """
    rows, front = ([row for row in some if math.isfinite(row.mean_psnr)] for some in (rows, front))
    figure = new_figure(9, 5.6)
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
    tidy(axes)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.set_title(title, fontsize=9.5, loc="left")
    _label(figure, axes, rows, front)
    figure.savefig(path)


def _label(figure: Figure, axes: Any, rows: Sequence[Measured], front: Sequence[Measured]) -> None:
    """Put names where they cover no point, no line and no other name. Names without room are left out."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    area = axes.get_window_extent()
    points, lines = _shown_points(axes)
    taken = [axes.get_legend().get_window_extent(), *(_around(x, 6) for x in points), *(_around(x, 2) for x in lines)]
    for row in _by_importance(rows, front):
        quiet = {"fontsize": 6.5, "color": LOOKS[row.system]["color"]}
        look = {"fontsize": 7.5, "weight": "bold"} if row in front else quiet
        for distance, direction in itertools.product(_DISTANCES, _DIRECTIONS):
            label = axes.annotate(
                row.name.removeprefix(f"{row.system} "),
                (row.work, row.mean_psnr),
                xytext=(distance * direction[0], distance * direction[1] * 0.8),
                textcoords="offset points",
                ha={-1: "right", 0: "center", 1: "left"}[direction[0]],
                va={-1: "top", 0: "center", 1: "bottom"}[direction[1]],
                arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
                **look,
            )
            label.get_window_extent()  # puts the text into its place
            box = Text.get_window_extent(label)
            is_inside = area.x0 < box.x0 and box.x1 < area.x1 and area.y0 < box.y0 and box.y1 < area.y1
            if is_inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def _by_importance(rows: Sequence[Measured], front: Sequence[Measured]) -> list[Measured]:
    """The front, then for each system the rows than which none of its own is better, then the others."""

    def is_best(row: Measured) -> bool:
        own = (other for other in rows if other.system == row.system and other is not row)
        return not any(other.work <= row.work and other.mean_psnr >= row.mean_psnr for other in own)

    others = [row for row in rows if row not in front]
    return [*front, *sorted(others, key=lambda row: (row.system == "uncached", not is_best(row), -row.mean_psnr))]


Pixel = tuple[float, float]


def _shown_points(axes: Any) -> tuple[list[Pixel], list[Pixel]]:
    """Pixels of all markers, and pixels on all lines."""
    markers = [pixel for group in axes.collections for pixel in axes.transData.transform(group.get_offsets())]
    on_lines: list[Pixel] = []
    for line in axes.lines:
        corners = list(line.get_xydata())
        if line.get_drawstyle() == "steps-pre":
            corners = [point for (x, _), (u, v) in itertools.pairwise(corners) for point in ((x, v), (u, v))]
        for (x, y), (u, v) in itertools.pairwise(map(tuple, axes.transData.transform(corners or [(0, 0)]))):
            count = max(1, round(math.hypot(u - x, v - y) / 4))
            on_lines += [(x + (u - x) * k / count, y + (v - y) * k / count) for k in range(count + 1)]
    return markers, on_lines


def _around(pixel: Pixel, reach: float) -> Bbox:
    x, y = pixel
    return Bbox([[x - reach, y - reach], [x + reach, y + reach]])


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
    figure = new_figure(width, height, layout=None)
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
    figure = new_figure(8, 0.75 + 1.75 * len(panels))
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
        tidy(axes)
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
    figure = new_figure(11, 1.0 + (height + 0.5) * len(dtypes))
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
            tidy(axes)
        line[0].xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        line[0].set_ylim(len(names) - 0.5, -0.5)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(shapes), fontsize=8, frameon=False)
    figure.savefig(path)


_PARTS = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), (SKY, "D"), ("#CC79A7", "v"), ("#E69F00", "P"), (GREY, "X"))
"""A look for each part of a block; after the last one they begin again."""


def save_sensitivity(groups: Sequence[Measurement], chosen: Collection[tuple[str, str]], path: Path) -> None:
    """The output over its error by block: a panel for each kind, a look for each part of a block.

    Args:
        groups: of layers, in the model's order.
        chosen: (group, kind) of those that a plan quantizes, which are filled.
        path: the file.
    """
    kinds, blocks, parts = (
        list(dict.fromkeys(getattr(group, key) for group in groups)) for key in ("kind", "block", "part")
    )
    figure = new_figure(max(7, 2 + 0.3 * len(blocks)), 1.6 + 2.6 * len(kinds))
    rows = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, kind in zip(rows, kinds, strict=True):
        for number, part in enumerate(parts):
            colour, marker = _PARTS[number % len(_PARTS)]
            own = [group for group in groups if (group.kind, group.part) == (kind, part) and group.error]
            places = [blocks.index(group.block) for group in own]
            values = [-10 * math.log10(group.error) for group in own]
            faces = [colour if (group.group, kind) in chosen else "white" for group in own]
            axes.scatter(places, values, s=34, marker=marker, c=faces, edgecolors=colour, linewidths=1.2, zorder=3)
        axes.set_ylabel("output over error, dB", fontsize=9)
        axes.set_title(kind, loc="left", fontsize=9.5)
        axes.grid(color=SHADE, linewidth=0.6)
        axes.set_axisbelow(True)
        tidy(axes)
    rows[-1].set_xticks(range(len(blocks)), blocks, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    handles = [_marker(_PARTS[at % len(_PARTS)][1], _PARTS[at % len(_PARTS)][0], "white", part)
               for at, part in enumerate(parts)]  # fmt: skip
    if chosen:
        handles.append(_marker("o", GREY, GREY, "filled: quantized by the plan"))
    figure.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    figure.savefig(path)
