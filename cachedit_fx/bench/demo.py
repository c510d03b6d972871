"""The run behind `cachedit demo`: what caching costs and saves on the bundled model.

    uncached, all steps ─► reference pictures
    each threshold: DBCache, repeating what was stored ─┐
                    DBCache, predicting with TaylorSeer ├► pictures, work (block executions over the uncached run's),
                    fewer steps at that work ───────────┘  PSNR against the reference, wall time by turns

Fewer steps are what a user has by asking for them, without a cache.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cachedit_fx.bench.measure import Bench, Measured, Settings
from cachedit_fx.bench.rows import Row
from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.report.files import machine, whole_files
from cachedit_fx.report.tables import Part, Table, page

PROMPTS = (
    "a large red circle at the center on white",
    "a small yellow square at the top left on navy",
    "a large green triangle at the bottom right on black",
    "a small cyan cross at the right on gray",
    "a small blue diamond left of a large orange circle on white",
    "a large pink square above a small green cross on black",
)
POLICY = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 4}
"""One of the 18 blocks decides. The thresholds are the demo's."""
FILES = {"grid.png": "the pictures", "differences.png": "why each step was cached or not", "table.md": "this table"}


def settings_for(prompts: tuple[str, ...], steps: int, inner_backend: str, seed: int, rounds: int) -> Settings:
    """All pictures in one call; the uncached model is cut into the same pieces, work is counted in blocks."""
    return Settings(
        prompts,
        steps=steps,
        seed=seed,
        inner_backend=inner_backend,
        batch=len(prompts),
        rounds=rounds,
        work="blocks",
        plain="pieces",
    )


@dataclass(frozen=True)
class Threesome:
    """The rows of one threshold."""

    threshold: float
    repeated: Measured
    predicted: Measured
    fewer: Measured


@dataclass(frozen=True)
class Demo:
    """A run's rows."""

    settings: Settings
    uncached: Measured
    groups: list[Threesome]


def cached_rows(threshold: float) -> tuple[Row, Row]:
    """DBCache, repeating what was stored and predicting it."""
    arguments = POLICY | {"residual_diff_threshold": threshold}
    predictor = {"calibrator": {"name": "taylorseer", "taylorseer_order": 1}}
    return (
        Row(f"threshold {threshold:g}", arguments=arguments),
        Row(f"{threshold:g} with TaylorSeer", arguments=arguments | predictor),
    )


def run(bench: Bench, thresholds: Sequence[float]) -> Demo:
    """Draw and time everything."""
    settings = bench.settings
    bench.tell(more=settings.calls + settings.group_calls(3 * len(thresholds)))
    uncached = bench.draw_reference()
    groups = []
    with bench.group() as group:
        for threshold in thresholds:
            repeated, predicted = map(group.draw, cached_rows(threshold))
            groups.append(Threesome(threshold, repeated, predicted, group.draw(bench.rival(repeated))))
        group.time()
    return Demo(settings, uncached, groups)


HEADINGS = ("configuration", "steps", "cached", "work", "time", "PSNR dB")


def table(demo: Demo) -> Table:
    """A line for each row, three for each threshold; 80 characters wide at most."""
    result = Table(HEADINGS)
    result.add("uncached", str(demo.uncached.steps), "", "100%", "100%", "", ends_group=True)
    for group in demo.groups:
        names = (f"DBCache, threshold {group.threshold:g}", "  with TaylorSeer")
        for name, row in zip(names, (group.repeated, group.predicted), strict=True):
            result.add(name, str(row.steps), f"{row.cached_steps:g}", *_figures(row), style="bold")
        fewer = group.fewer
        result.add("fewer steps, equal work", str(fewer.steps), "", *_figures(fewer), style="dim", ends_group=True)
    return result


def _figures(row: Measured) -> tuple[str, str, str]:
    psnr = f"{row.mean_psnr:.1f}" if math.isfinite(row.mean_psnr) else "identical"
    return f"{row.work:.0%}", "" if row.wall is None else f"{row.wall:.0%}", psnr


def verdict(demo: Demo) -> list[str]:
    """Whether each way of caching beats its rival, a sentence for each."""
    sentences = []
    for name, way in (("DBCache", "repeated"), ("DBCache with TaylorSeer", "predicted")):
        results = [f"{_against(getattr(group, way), group.fewer)} at {group.threshold:g}" for group in demo.groups]
        sentences.append(f"At equal work, {name} against fewer steps: {', '.join(results)}.")
    return sentences


def _against(row: Measured, rival: Measured) -> str:
    cached, fewer = row.mean_psnr, rival.mean_psnr
    if math.isinf(cached):
        return "equal" if math.isinf(fewer) else "identical pictures"
    if math.isinf(fewer):
        return "too little cached to compare"
    return f"{abs(cached - fewer):.1f} dB {'ahead' if cached > fewer else 'behind'}"


def notes(demo: Demo) -> list[str]:
    """The conditions, and thresholds that did nothing."""
    import torch

    settings, seconds = demo.settings, demo.uncached.seconds
    pictures = "1 picture" if len(settings.prompts) == 1 else f"{len(settings.prompts)} pictures at a time"
    lines = [
        f"Work: block executions; time: wall time, median of {settings.rounds}; both over uncached, which takes "
        f"{statistics.median(seconds):.2f} s for {pictures}. F1B0, 4 warm-up steps, {settings.inner_backend}, one "
        f"thread of {machine()}, torch {torch.__version__}."
    ]
    spread = max(seconds) / min(seconds)
    if spread > 1.25:
        lines.append(
            f"Busy machine: the uncached run's slowest round took {spread:.1f} x its fastest; doubt the times."
        )
    for group in demo.groups:
        stats = group.repeated.stats
        message = stats and stats.inert_threshold_message(DBCacheConfig(residual_diff_threshold=group.threshold))
        if message:
            lines.append(f"Nothing was cached: {message}.")
    return lines


def markdown(demo: Demo) -> str:
    """`table.md`: the comparison, ready to be pasted, conditions included."""
    return page(table(demo), "\n".join(verdict(demo)), "\n".join(notes(demo)))


def parts(demo: Demo) -> list[Part]:
    """The same for a terminal."""
    return [table(demo), *verdict(demo), *notes(demo)]


def save(demo: Demo, folder: Path) -> None:
    """Write the two pictures and the table, all of them or none."""
    from cachedit_fx.report.plots import save_differences, save_grid

    panels = [(group.threshold, stats) for group in demo.groups if (stats := group.repeated.stats)]
    with whole_files(folder) as staging:
        save_grid(_strips(demo), demo.settings.prompts, staging / "grid.png")
        save_differences(panels, staging / "differences.png")  # a prediction leaves the first block's difference alone
        (staging / "table.md").write_text(markdown(demo))


def _strips(demo: Demo) -> list:  # type: ignore[type-arg]
    from cachedit_fx.report.plots import Strip

    def strip(name: str, row: Measured, is_quiet: bool = False) -> Strip:
        assert row.pictures is not None
        captions = [_decibels(math.inf if value is None else value) for value in row.psnr]
        figures = f"work {row.work:.0%}\n{_decibels(row.mean_psnr)}"
        return Strip(name, figures, row.pictures, captions, is_quiet)

    uncached = demo.uncached
    assert uncached.pictures is not None
    strips = [Strip("uncached", f"{uncached.steps} steps", uncached.pictures, [""] * len(uncached.pictures))]
    for group in demo.groups:
        strips += [
            strip(f"DBCache, threshold {group.threshold:g}", group.repeated),
            strip(f"TaylorSeer, threshold {group.threshold:g}", group.predicted),
            strip(f"{group.fewer.steps} steps, no cache", group.fewer, is_quiet=True),
        ]
    return strips


def _decibels(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "identical"
