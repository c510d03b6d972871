"""The two pictures of `cachedit demo`: what was drawn, and why the cache decided as it did."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from cachedit_fx.runtime.policies.base import Action, Reason

if TYPE_CHECKING:
    from cachedit_fx.bench.comparison import Row

# Told apart in grey and by the colour-blind too (Okabe and Ito's blue and vermilion), and by their shapes.
CACHED, COMPUTED, QUIET = "#0072B2", "#D55E00", "#6B6B6B"
_DPI = 120
_SIDE, _COLUMN, _ROW, _LABEL = 0.8, 0.92, 1.02, 1.85
"""Of the grid, in inches: a picture (96 dots, 3 a pixel), distances from one to the next, the room for labels."""


def decibels(value: float) -> str:
    """A PSNR for people."""
    return f"{value:.1f} dB" if math.isfinite(value) else "identical"


def row_label(row: Row, index: int) -> str:
    """What stands left of a row of pictures."""
    if index == 0:
        return f"uncached\n{row.steps} steps"
    if row.config is None:
        return f"{row.steps} steps, no cache\nwork {row.work:.0%}\n{decibels(row.mean_psnr)}"
    threshold = f"threshold {row.config.residual_diff_threshold:g}"
    name = f"DBCache, {threshold}" if row.calibrator is None else f"TaylorSeer, {threshold}"
    return f"{name}\nwork {row.work:.0%}\n{decibels(row.mean_psnr)}"


def save_grid(rows: Sequence[Row], prompts: Sequence[str], path: Path) -> None:
    """Rows are configurations, columns prompts; below each picture its PSNR against the uncached one."""
    heading = 0.14 * max(len(_wrapped(prompt).splitlines()) for prompt in prompts) + 0.12
    width, height = _LABEL + _COLUMN * len(prompts), heading + _ROW * len(rows)
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    for number, row in enumerate(rows):
        top = height - heading - _ROW * number
        weight, color = ("bold", "black") if row.config or number == 0 else ("normal", QUIET)
        name, _, figures = row_label(row, number).partition("\n")
        middle = (top - 0.3) / height
        figure.text(0.1 / width, middle, name, fontsize=8, va="bottom", weight=weight, color=color)
        figure.text(0.1 / width, middle - 0.03 / height, figures, fontsize=8, va="top", color=QUIET, linespacing=1.25)
        for column, picture in enumerate(row.pictures):
            left = _LABEL + _COLUMN * column
            axes = figure.add_axes((left / width, (top - _SIDE) / height, _SIDE / width, _SIDE / height))
            axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(linewidth=0.5, color="#BBBBBB")
            if number:
                axes.set_xlabel(decibels(row.psnr[column]), fontsize=6.5, color=QUIET, labelpad=2)
    for column, prompt in enumerate(prompts):
        middle = _LABEL + _COLUMN * column + _SIDE / 2
        figure.text(middle / width, 1 - 0.07 / height, _wrapped(prompt), fontsize=6.5, ha="center", va="top")
    figure.savefig(path)


def _wrapped(prompt: str) -> str:
    return "\n".join(textwrap.wrap(prompt, 15)) or "(empty prompt)"


def save_differences(rows: Sequence[Row], path: Path) -> None:
    """A panel for each threshold: the measured difference by step, the threshold, and what was decided. Those of
    TaylorSeer are left out: it predicts the bypassed blocks, not the difference, and they look alike."""
    shown = [(row.config, row.stats) for row in rows if row.config and row.stats and row.calibrator is None]
    figure = Figure(figsize=(8, 0.75 + 1.75 * len(shown)), dpi=_DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, (config, stats) in zip(panels, shown, strict=True):
        decisions = stats.branch(0).decisions
        warmup = [step for step, decision in decisions.items() if decision.reason is Reason.WARMUP]
        if warmup:
            panel.axvspan(min(warmup) - 0.5, max(warmup) + 0.5, color="#EDEDED", zorder=0)
        threshold = config.residual_diff_threshold
        panel.axhline(threshold, color="black", linewidth=0.9, linestyle=(0, (5, 3)), zorder=1)
        measured = {step: d for step, d in decisions.items() if d.difference is not None}
        for step, decision in measured.items():
            is_cached = decision.action is Action.REUSE
            color = CACHED if is_cached else COMPUTED
            panel.vlines(step, 0, decision.difference, color=color, linewidth=1, alpha=0.4, zorder=2)
            look = {"marker": "o"} if is_cached else {"marker": "s", "facecolors": "white"}
            panel.scatter(step, decision.difference, s=30, edgecolors=color, color=color, zorder=3, **look)
        told = f"threshold {threshold:g}: {len(stats.cached_steps)} of {stats.executed_steps} steps cached"
        panel.set_title(f"{told}, work {stats.work:.0%}", loc="left", fontsize=9.5)
        panel.set_xlim(-0.7, max(decisions) + 0.7)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0, None)
    panels[-1].set_xlabel("denoising step", fontsize=9)
    figure.supylabel("difference since the last computed step", fontsize=9)
    figure.legend(handles=_legend(), loc="outside upper center", ncols=4, frameon=False, fontsize=8.5)
    figure.savefig(path)


def _legend() -> list:  # type: ignore[type-arg]
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def marker(shape: str, color: str, face: str, label: str) -> Line2D:
        return Line2D([], [], linestyle="", marker=shape, color=color, markerfacecolor=face, markersize=6, label=label)

    return [
        marker("o", CACHED, CACHED, "cached: middle blocks bypassed"),
        marker("s", COMPUTED, "white", "computed"),
        Line2D([], [], color="black", linewidth=0.9, linestyle=(0, (5, 3)), label="threshold"),
        Patch(color="#EDEDED", label="warm-up, always computed"),
    ]
