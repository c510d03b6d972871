"""Which configurations are measured: those of a TOML file, the presets, and the peers'."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cachedit_fx
from cachedit_fx.bench.errors import RequestError

DEFAULT = Path(__file__).with_name("default.toml")
"""The configurations that are measured if the user names no file."""

UNCACHED = "uncached"
"""The name of the row, and of the system, without a cache."""
OURS, CACHE_DIT, DIFFUSERS = SYSTEMS = ("cachedit_fx", "cache-dit", "diffusers")


class RowError(RequestError):
    """A file of configurations cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Row:
    """One configuration."""

    name: str
    system: str = OURS
    """One of `SYSTEMS`, or `UNCACHED`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the system's cache; see `cachedit_fx.bench.systems.System`."""
    steps: int | None = None
    """Denoising steps; None: the run's."""


def read_rows(path: Path, steps: int) -> list[Row]:
    """The rows of a TOML file: each table is one, its name the row's, its keys keyword arguments of `enable_cache`.

    `quantize = "int8"` quantizes first, and a table in its place has the arguments of `cachedit_fx.quantize`.
    A table without keys may have a name that says them, see `named_arguments`. `presets = true` above the tables adds a
    row for each of `cachedit_fx.presets(steps)`. A table with `system = "cache-dit"` or `"diffusers"` holds that
    system's arguments instead.

    Raises:
        RowError: if the file is missing, is no TOML, or holds something else.
    """
    try:
        page = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RowError(f"{path} cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RowError(f"{path} is not TOML: {error}") from None
    with_presets = page.pop("presets", False)
    rows = []
    for name, arguments in page.items():
        if not isinstance(arguments, dict):
            raise RowError(
                f"{path}: {name} = {arguments!r} belongs to no row; write it below a table, such as "
                f'["DBCache 0.2"], or mean `presets = true`'
            )
        system = arguments.pop("system", OURS)
        if system not in SYSTEMS:
            raise RowError(f"{path}, row {name!r}: system={system!r} is not one of {', '.join(SYSTEMS)}")
        rows.append(Row(name, system, arguments or named_arguments(name) or {}))
    if with_presets:
        rows += preset_rows(steps)
    if not rows:
        raise RowError(f'{path} has no rows: add a table, such as ["DBCache 0.2"], or `presets = true`')
    return rows


_NAME = re.compile(
    r"(?:DBCache_)?F(?P<Fn_compute_blocks>\d+)B(?P<Bn_compute_blocks>\d+)"
    r"_W(?P<max_warmup_steps>\d+)(?:I(?P<warmup_interval>\d+))?"
    r"(?:M(?P<max_cached_steps>\d+))?(?:MC(?P<max_continuous_cached_steps>\d+))?"
    r"_R(?P<residual_diff_threshold>\d+(?:\.\d+)?)(?:_T1O(?P<taylorseer_order>\d))?"
)
"""`F8B0_W4MC2_R0.12`, as cache-dit's tables name a configuration; `_T1O2` at its end is TaylorSeer of order 2."""


def named_arguments(name: str) -> dict[str, Any] | None:
    """The arguments that a name in the style of cache-dit's tables says; None if it is no such name.

    `F8B0_W4MC2_R0.12` has 8 first and 0 last blocks, 4 warm-up steps, at most 2 cached steps in a row, threshold 0.12.
    `I` is the interval of warm-up steps, `M` the limit of cached steps. A limit of 0 is none.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    fields = {field: text for field, text in match.groupdict().items() if text is not None}
    order = fields.pop("taylorseer_order", None)
    threshold = fields.pop("residual_diff_threshold")
    arguments: dict[str, Any] = {field: int(text) for field, text in fields.items()}
    for limit in ("max_cached_steps", "max_continuous_cached_steps"):
        if arguments.get(limit) == 0:
            del arguments[limit]
    arguments["residual_diff_threshold"] = float(threshold)
    if order is not None:
        arguments["calibrator"] = {"name": "taylorseer", "taylorseer_order": int(order)}
    return arguments


def named_row(name: str) -> Row:
    """The row of a name such as `F8B0_W4MC2_R0.12`.

    Raises:
        RowError: if it is no such name.
    """
    arguments = named_arguments(name)
    if arguments is None:
        raise RowError(
            f"{name!r} names no configuration: write one such as F8B0_W4MC2_R0.12 (blocks, warm-up, limit, "
            "threshold), and _T1O2 after it for TaylorSeer of order 2"
        )
    return Row(name, arguments=arguments)


def preset_rows(steps: int) -> list[Row]:
    """A row for each preset, from careful to fast."""
    return [Row(f"preset {name}", arguments={"preset": name, "steps": steps}) for name in cachedit_fx.presets(steps)]


def peer_rows() -> list[Row]:
    """cache-dit and diffusers' own caches, over the settings that matter for each."""
    rows = []
    for threshold in (0.08, 0.12, 0.2, 0.25, 0.3, 0.4):
        for order in (0, 1, 2):
            rows.append(_cache_dit(f"{threshold:g}", order, max_warmup_steps=4, residual_diff_threshold=threshold))
    for threshold in (0.2, 0.25, 0.3):  # fewer warm-up steps: what does best at little work
        for order in (1, 2):
            rows.append(_cache_dit(f"{threshold:g} W2", order, max_warmup_steps=2, residual_diff_threshold=threshold))
    for mask in ("slow", "medium", "fast", "ultra"):
        for order in (1, 2):
            rows.append(_cache_dit(f"SCM {mask}", order, mask_policy=mask, steps_computation_policy="static"))
        dynamic = {"steps_computation_policy": "dynamic", "residual_diff_threshold": 0.2}
        rows.append(_cache_dit(f"SCM {mask} dynamic", 1, mask_policy=mask, **dynamic))
    for threshold in (0.05, 0.1, 0.2):
        rows.append(_diffusers(f"FirstBlockCache {threshold:g}", threshold=threshold))
    for interval in (2, 3, 4):
        for name, lite in (("", False), (" lite", True)):
            rows.append(_diffusers(f"TaylorSeerCache {interval}{name}", cache_interval=interval, use_lite_mode=lite))
    for threshold in (0.06, 0.12, 0.24):
        rows.append(_diffusers(f"MagCache {threshold:g}", threshold=threshold))
    return rows


def _cache_dit(name: str, order: int, **arguments: Any) -> Row:
    """F1 B0, with TaylorSeer of an order or, at 0, without."""
    if order:
        arguments["calibrator"] = {"name": "taylorseer", "taylorseer_order": order}
    arguments = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, **arguments}
    return Row(f"{CACHE_DIT} {name}" + f" TaylorSeer {order}" * bool(order), CACHE_DIT, arguments)


def _diffusers(name: str, **arguments: Any) -> Row:
    return Row(f"{DIFFUSERS} {name}", DIFFUSERS, {"config": f"{name.split()[0]}Config", **arguments})


def fewer_steps(steps: int) -> Row:
    """No cache, and so many denoising steps."""
    return Row(f"{steps} steps", UNCACHED, steps=steps)


def select(rows: Sequence[Row], only: Sequence[str]) -> list[Row]:
    """The rows whose name contains one of the texts; all if there are no texts.

    Raises:
        RowError: if two rows share a name, or none is left.
    """
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RowError(f"two rows are named {twice[0]!r}: give one of them another name")
    left = [row for row in rows if not only or any(text.lower() in row.name.lower() for text in only)]
    if not left:
        raise RowError(f"no row's name contains {' or '.join(map(repr, only))}; --list shows them all")
    return left
