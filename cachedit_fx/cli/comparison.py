"""Measures what caching costs and saves on the bundled model: the figures behind `cachedit demo`.

    uncached, all steps ─► reference pictures
    DBCache, each threshold ─► pictures, work (block executions over the uncached run's), PSNR against the reference
    fewer steps at that work ─► the same: what a user could have had by asking for fewer steps, with no cache at all

Then all of them again, in rounds, for time. All runs start from the same noise, on one thread.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cachedit_fx import CacheWarning, DBCacheConfig, compile, enable_cache, refresh_context, summary
from cachedit_fx.cli.terminal import quiet
from cachedit_fx.runtime.stats import CacheStats

if TYPE_CHECKING:
    from diffusers import FluxPipeline

POLICY = DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=4)
"""One of the 18 blocks decides. Its thresholds are the comparison's."""


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
        return (1 + 2 * len(self.thresholds)) * (1 + self.rounds)


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
        finite = [value for value in self.psnr if math.isfinite(value)]
        return statistics.mean(finite) if finite else math.inf

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def psnr(pictures: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Peak signal-to-noise ratio of each picture of a batch, values in 0..1, in dB."""
    errors = (pictures.double() - reference.double()).square().flatten(1).mean(1).tolist()
    return [-10 * math.log10(error) if error else math.inf for error in errors]


def compare(settings: Settings, tell: Callable[[str, int], None]) -> list[Row]:
    """Run everything: the uncached row, then for each threshold its row and that of fewer steps at equal work.

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
    settings: Settings, plain: FluxPipeline, cached: FluxPipeline, tell: Callable[[str, int], None]
) -> list[Row]:
    from cachedit_fx.shapes import generate

    def run(config: DBCacheConfig | None, steps: int) -> torch.Tensor:
        pipe = plain
        if config is not None:
            pipe = refresh_context(cached, cache_config=config)
        return generate(pipe, settings.prompts, steps, settings.seed)

    def row(config: DBCacheConfig | None, steps: int) -> Row:
        pictures = run(config, steps)
        against = psnr(pictures, rows[0].pictures if rows else pictures)
        (stats,) = summary(cached) if config else (None,)
        return Row(steps, config, pictures, stats.work if stats else steps / settings.steps, against, stats)

    tell(f"compiling with {settings.inner_backend}", 0)
    compile(plain.transformer, cache=None, inner_backend=settings.inner_backend)
    enable_cache(cached, POLICY, inner_backend=settings.inner_backend)
    run(None, 2), run(POLICY, 2)

    rows: list[Row] = []
    tell("uncached", 0)
    rows.append(row(None, settings.steps))
    for threshold in settings.thresholds:
        tell(f"threshold {threshold:g}", 1)
        rows.append(row(POLICY.reset(residual_diff_threshold=threshold), settings.steps))
        steps = max(1, round(settings.steps * rows[-1].work))
        tell(f"{steps} steps", 1)
        rows.append(row(None, steps))
    for number in range(settings.rounds):
        tell(f"timing, round {number + 1} of {settings.rounds}", 1)
        _time_round(rows, run, tell, backwards=bool(number % 2))
    tell("done", 1)
    return rows


def _time_round(
    rows: Sequence[Row],
    run: Callable[[DBCacheConfig | None, int], torch.Tensor],
    tell: Callable[[str, int], None],
    backwards: bool,
) -> None:
    """Time every row once. Every other round runs backwards, so that a machine that slows down favours none."""
    for index, row in enumerate(reversed(rows) if backwards else rows):
        if index:
            tell("", 1)
        start = time.perf_counter()
        run(row.config, row.steps)
        row.seconds.append(time.perf_counter() - start)
    for row in rows:
        row.ratios.append(row.seconds[-1] / rows[0].seconds[-1])
