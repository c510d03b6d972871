"""Measures what caching costs and saves on the bundled model: the figures behind `cachedit demo`.

    uncached, all steps ─► reference pictures
    each threshold: DBCache, repeating what was stored ─┐
                    DBCache, predicting with TaylorSeer ├► pictures, work (block executions over the uncached run's),
                    fewer steps at that work ───────────┘  PSNR against the reference

Fewer steps are what a user could have had by asking for them, with no cache at all.

Then all of them again, in rounds, for time. All runs start from the same noise, on one thread.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

import cachedit_fx
from cachedit_fx import CacheWarning, CalibratorConfig, DBCacheConfig, TaylorSeerCalibratorConfig
from cachedit_fx.cli.terminal import quiet
from cachedit_fx.runtime.stats import CacheStats

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
from cachedit_fx.metrics.image import mean_psnr, psnr

POLICY = DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=4)
"""One of the 18 blocks decides. Its thresholds are the comparison's."""


TAYLOR = TaylorSeerCalibratorConfig(taylorseer_order=1)


@dataclass(frozen=True)
class Settings:
    """What is compared."""

    prompts: tuple[str, ...]
    steps: int = 28
    thresholds: tuple[float, ...] = (0.08, 0.12, 0.2)
    inner_backend: str = "inductor"
    seed: int = 0
    rounds: int = 5
    """Timed runs of each configuration."""

    @property
    def runs(self) -> int:
        """Pipeline runs, those that compile left out."""
        return (1 + 3 * len(self.thresholds)) * (1 + self.rounds)


@dataclass
class Row:
    """One configuration and what came of it."""

    steps: int
    config: DBCacheConfig | None
    """None: no cache."""
    pictures: torch.Tensor
    """float32 [prompts, 3, 32, 32] in 0..1."""
    work: float
    """Block executions over the uncached run's."""
    psnr: list[float]
    """Of each picture against the uncached one, in dB; infinite where they are equal."""
    stats: CacheStats | None = None
    calibrator: CalibratorConfig | None = None
    """None: what was stored last is repeated."""
    seconds: list[float] = field(default_factory=list)
    """Of each timed run, all pictures."""
    ratios: list[float] = field(default_factory=list)
    """`seconds` over the uncached run's in the same round."""

    @property
    def cached_steps(self) -> int:
        return len(self.stats.cached_steps) if self.stats else 0

    @property
    def mean_psnr(self) -> float:
        """Over the pictures that differ from the uncached ones; infinite if none does."""
        return mean_psnr(self.psnr)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def compare(settings: Settings, tell: Callable[[str, int], None]) -> list[Row]:
    """Run everything: the uncached row, then for each threshold three: DBCache, DBCache with TaylorSeer, fewer steps.

    Args:
        settings: what is compared.
        tell: called with what happens next, and the pipeline runs done since the last call.
    """
    with quiet():
        tell("loading the model", 0)
        from cachedit_fx.shapes import load_pipeline

        plain, cached = load_pipeline(), load_pipeline()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheWarning)
            return _compare(settings, plain, cached, tell)
    finally:
        torch.set_num_threads(threads)


def _compare(
    settings: Settings, plain: DiffusionPipeline, cached: DiffusionPipeline, tell: Callable[[str, int], None]
) -> list[Row]:
    from cachedit_fx.shapes import generate

    def run(steps: int, config: DBCacheConfig | None, calibrator: CalibratorConfig | None) -> torch.Tensor:
        if config is None:
            return generate(plain, settings.prompts, steps, settings.seed)
        cachedit_fx.enable_cache(cached, config, calibrator, inner_backend=settings.inner_backend)
        return generate(cached, settings.prompts, steps, settings.seed)

    def add(steps: int, config: DBCacheConfig | None = None, calibrator: CalibratorConfig | None = None) -> Row:
        pictures = run(steps, config, calibrator)
        against = psnr(pictures, rows[0].pictures if rows else pictures)
        (stats,) = cachedit_fx.summary(cached) if config else (None,)
        work = stats.work if stats else steps / settings.steps
        rows.append(Row(steps, config, pictures, work, against, stats, calibrator))
        return rows[-1]

    tell(f"compiling with {settings.inner_backend}", 0)
    cachedit_fx.compile(plain.transformer, cache=None, inner_backend=settings.inner_backend)
    run(2, None, None), run(2, POLICY, None)

    rows: list[Row] = []
    tell("uncached", 0)
    add(settings.steps)
    for threshold in settings.thresholds:
        config = POLICY.reset(residual_diff_threshold=threshold)
        tell(f"threshold {threshold:g}", 1)
        work = add(settings.steps, config).work
        tell(f"{threshold:g} with TaylorSeer", 1)
        add(settings.steps, config, TAYLOR)
        steps = max(1, round(settings.steps * work))
        tell(f"{steps} steps", 1)
        add(steps)
    for number in range(settings.rounds):
        tell(f"timing, round {number + 1} of {settings.rounds}", 1)
        _time_round(rows, run, tell, backwards=bool(number % 2))
    tell("done", 1)
    return rows


def _time_round(
    rows: Sequence[Row],
    run: Callable[[int, DBCacheConfig | None, CalibratorConfig | None], torch.Tensor],
    tell: Callable[[str, int], None],
    backwards: bool,
) -> None:
    """Time every row once. Every other round runs backwards, so that a machine that slows down favours none."""
    for index, row in enumerate(reversed(rows) if backwards else rows):
        if index:
            tell("", 1)
        start = time.perf_counter()
        run(row.steps, row.config, row.calibrator)
        row.seconds.append(time.perf_counter() - start)
    for row in rows:
        row.ratios.append(row.seconds[-1] / rows[0].seconds[-1])
