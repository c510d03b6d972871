"""Ours against cache-dit 1.5.3, in pairs of identical settings, prompts and noise: the same steps cached, in less time?

Both systems of a pair live in processes of their own and take turns within each prompt, so that a busy machine disturbs
both. Times are compared prompt by prompt, and the medians of these ratios are told.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from cachedit_fx.bench.measure import Measured
from cachedit_fx.bench.rows import CACHE_DIT, OURS, Row, RowError
from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.report.tables import Table

THRESHOLDS = (0.08, 0.12, 0.2)
STEPS_TOLERANCE = 1
"""Cached steps of a picture may differ from cache-dit's by this many."""
PSNR_TOLERANCE = 0.5
"""dB by which the PSNR may lie below cache-dit's."""

_SHARED = {item.name for item in fields(DBCacheConfig)} - {"downsample_factor"} | {"mask_policy", "calibrator"}
"""Arguments that both systems know by one name."""


def paired_rows() -> list[Row]:
    """Ours at three thresholds: the first block decides, none is recomputed at the end, four steps warm up."""
    policy = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 4}
    return [
        Row(f"F1 R{threshold:g}", arguments=policy | {"residual_diff_threshold": threshold}) for threshold in THRESHOLDS
    ]


def peer_of(row: Row) -> Row:
    """cache-dit's row of the same settings.

    Raises:
        RowError: if the row is not ours, or cache-dit has no such settings.
    """
    arguments: dict[str, Any] = dict(row.arguments)
    foreign = [name for name in arguments if name not in _SHARED]
    calibrator = arguments.get("calibrator", "taylorseer")
    kind = calibrator if isinstance(calibrator, str) else calibrator.get("name")
    if row.system != OURS or foreign or kind != "taylorseer":
        names = ", ".join(foreign) or (f"system={row.system!r}" if row.system != OURS else f"calibrator={kind!r}")
        raise RowError(
            f"row {row.name!r} has no counterpart in cache-dit ({names}): --against takes rows of ours with the "
            "settings of DBCacheConfig and the calibrator taylorseer; -k picks them by name"
        )
    if isinstance(mask := arguments.get("steps_computation_mask"), str):
        arguments["steps_computation_mask"] = [int(digit) for digit in mask]
    return Row(_peer_name(row.name), CACHE_DIT, arguments)


def _peer_name(name: str) -> str:
    return f"{CACHE_DIT} {name}"


@dataclass(frozen=True)
class Pair:
    """Two rows of the same settings, which took turns."""

    ours: Measured
    peer: Measured

    @property
    def step_difference(self) -> int:
        """How many cached steps more or fewer than the peer, the most over all calls."""
        pairs = zip(self.ours.cached_by_call, self.peer.cached_by_call, strict=True)
        return max(abs(len(ours or ()) - len(theirs or ())) for ours, theirs in pairs)

    @property
    def has_same_steps(self) -> bool:
        """Whether both cached the very same steps at every call."""
        return self.ours.cached_by_call == self.peer.cached_by_call

    @property
    def more_psnr(self) -> float:
        """PSNR less the peer's, in dB; 0 if both have the uncached pictures."""
        both_equal = math.isinf(self.ours.mean_psnr) and math.isinf(self.peer.mean_psnr)
        return 0.0 if both_equal else self.ours.mean_psnr - self.peer.mean_psnr

    def ratios(self, clock: str = "seconds") -> list[float]:
        """Times over the peer's, call by call, sorted; `clock` is "seconds" or "cpu_seconds"."""
        return sorted(a / b for a, b in zip(getattr(self.ours, clock), getattr(self.peer, clock), strict=True))


def pairs_of(rows: Sequence[Measured]) -> list[Pair]:
    """Rows of ours with a counterpart among `rows`."""
    peers = {row.name: row for row in rows if row.system == CACHE_DIT}
    return [Pair(row, peers[_peer_name(row.name)]) for row in rows if _peer_name(row.name) in peers]


def spread(values: Sequence[float]) -> str:
    """The median, and the quartiles in brackets; empty if there are no values."""
    if not values:
        return ""
    middle = f"{statistics.median(values):.2f}"
    if len(values) < 4:
        return middle
    low, _, high = statistics.quantiles(values, n=4)
    return f"{middle} ({low:.2f}-{high:.2f})"


def table(pairs: Sequence[Pair]) -> Table:
    """A line for each pair."""
    result = Table(("against cache-dit", "cached", "differ", "dB more", "wall", "CPU"))
    for pair in pairs:
        same = " =" if pair.has_same_steps else ""
        times = (spread(pair.ratios(clock)) for clock in ("seconds", "cpu_seconds"))
        result.add(
            pair.ours.name,
            f"{pair.ours.cached_steps:.1f}",
            f"{pair.step_difference}{same}",
            f"{round(pair.more_psnr, 1) + 0.0:+.1f}",  # + 0.0: no -0.0
            *times,
        )
    return result


LEGEND = (
    "Against cache-dit: cached steps, and by how many they differ at most from its own over the calls; = if they are "
    "the very same steps. dB more: PSNR less cache-dit's. wall, CPU: times over cache-dit's for the same call in the "
    "same round, medians and quartiles. CPU time leaves out waiting for a core: the better guide on a busy machine."
)


def verdicts(pairs: Sequence[Pair]) -> list[tuple[bool, str]]:
    """What is promised of every pair, and whether it holds."""
    results = []
    for pair in pairs:
        name, difference, wall = pair.ours.name, pair.step_difference, pair.ratios()
        results += [
            (
                difference <= STEPS_TOLERANCE,
                f"{name}: number of cached steps within {STEPS_TOLERANCE} of cache-dit's at every call (largest "
                f"difference {difference})",
            ),
            (
                pair.more_psnr >= -PSNR_TOLERANCE,
                f"{name}: PSNR {pair.ours.mean_psnr:.2f} dB, cache-dit's {pair.peer.mean_psnr:.2f} dB",
            ),
        ]
        if wall:
            ratio = statistics.median(wall)
            results.append((ratio <= 1, f"{name}: wall time {ratio:.2f} times cache-dit's"))
    return results
