"""What a run of `cachedit bench` shows and leaves behind: `bench.json`, `bench.md` and `bench.png`."""

from __future__ import annotations

import math
from pathlib import Path

from cachedit_fx.bench import against
from cachedit_fx.bench.measure import Measured
from cachedit_fx.bench.record import Record
from cachedit_fx.bench.rows import UNCACHED
from cachedit_fx.report.files import whole_files
from cachedit_fx.report.tables import Heading, Part, Table, page

HEADINGS = ("row", "steps", "cached", "work", "wall", "PSNR dB", "SSIM", "right", "MiB held")
WEIGHTS = "weights MiB"
"""A column of runs with quantized rows."""


def table(record: Record) -> Table:
    """A line for each row, from much work to little; those on the Pareto front stand out."""
    is_quantized = len({row.weight_bytes for row in record.rows if row.weight_bytes is not None}) > 1
    result = Table((*HEADINGS, *([WEIGHTS] if is_quantized else [])))
    front = {row.name for row in record.pareto()}
    for row in record.by_work():
        is_front = row.name in front
        weights = "" if row.weight_bytes is None else f"{row.weight_bytes / 2**20:.1f}"
        cells = (*_cells(row), *([weights] if is_quantized else []))
        result.add(*cells, stands_out=is_front, style="dim" if row.system == UNCACHED else "")
    return result


def _cells(row: Measured) -> tuple[str, ...]:
    psnr = f"{row.mean_psnr:.1f}" if math.isfinite(row.mean_psnr) else "identical"
    is_reference = row.name == UNCACHED
    return (
        row.name,
        str(row.steps),
        "" if row.system == UNCACHED else f"{row.cached_steps:.1f}",
        f"{row.work:.2f}",
        "" if row.wall is None else f"{row.wall:.2f}",
        "" if is_reference else psnr,
        "" if is_reference or row.mean_ssim is None else f"{row.mean_ssim:.4f}",
        "" if row.accuracy is None else f"{row.accuracy['all']:.0%}",
        "" if not row.bytes_held else f"{row.bytes_held / 2**20:.2f}",
    )


FIDELITY = ("config", "CLIP score", "ImageReward", "PSNR dB", "TFLOPs", "speed-up")


def fidelity(record: Record) -> Table:
    """The table of cache-dit's README: scores with the prompt, PSNR, TFLOPs of a picture, speed-up.

    Columns without a value are left out.
    """
    lines = [_fidelity_cells(row) for row in record.by_work()]
    kept = [column for column in range(len(FIDELITY)) if any(line[column] for line in lines)]
    result = Table(tuple(FIDELITY[column] for column in kept))
    for line in lines:
        result.add(*(line[column] for column in kept))
    return result


def _fidelity_cells(row: Measured) -> tuple[str, ...]:
    clip, reward = row.mean_clip_score, row.mean_image_reward
    *_, psnr, _, _, _ = _cells(row)
    return (
        row.name,
        "" if clip is None else f"{clip:.4f}",
        "" if reward is None else f"{reward:.4f}",
        psnr,
        "" if row.flops is None else f"{row.flops / 1e12:.4g}",
        "" if row.wall is None else f"{1 / row.wall:.2f}x",
    )


def _fidelity_legend(record: Record) -> list[str]:
    """What the columns of `fidelity` are, and why others are left out."""
    reasons = [
        "TFLOPs: of the transformer's calls for one picture; a multiply-add is 2. speed-up: 1 / wall. CLIP score: 100 "
        "times the cosine of picture and prompt."
    ]
    if all(row.clip_score is None for row in record.rows):
        reasons.append("No CLIP score: no CLIP of transformers in the hub's cache; --clip names a folder.")
    if all(row.image_reward is None for row in record.rows):
        reasons.append("No ImageReward: --image-reward names the folder of its weights.")
    if all(row.wall is None for row in record.rows):
        reasons.append("No speed-up: nothing was timed (--rounds 0).")
    return reasons


def _has_fidelity(record: Record) -> bool:
    settings = record.settings
    return settings.clip is not None or settings.image_reward is not None


def explanations(record: Record) -> list[str]:
    """The meaning of the columns, the conditions, and what makes the figures hard to compare."""
    settings = record.settings
    model = "the bundled model" if settings.entry is None else settings.entry
    guidance = f"guidance {settings.guidance:g}" if settings.guidance != 1 else "no guidance"
    threads = "one thread" if settings.threads == 1 else f"{settings.threads} threads"
    return [
        f"{len(settings.prompts)} prompts, picture i from the noise of seed {settings.seed} + i, {settings.steps} "
        f"steps, {model}, {guidance}, {settings.batch} at a time; inner backend {settings.inner_backend}, {threads}.",
        "work: FLOPs of the transformer's calls over the uncached run's. wall: time of a call over the uncached run's "
        "for the same prompt in the same round, the median. PSNR, SSIM: against the uncached pictures from the same "
        "noise, means; identical pictures are left out of PSNR's. cached: steps of a generation that ran less than the "
        "whole model. right: pictures that show what the prompt says. MiB held: stored values, if the system tells.",
        "N steps: no cache, as many steps as cost the same work as a cached row. In bold: on the Pareto front, no row "
        "being better at equal or less work.",
        *(_fidelity_legend(record) if _has_fidelity(record) else []),
        *([against.LEGEND] if against.pairs_of(record.rows) else []),
        f"{record.machine}; {', '.join(f'{name} {version}' for name, version in record.versions.items())}.",
        f"Made by `{record.command}`.",
        *record.notes,
        *_doubts(record),
    ]


def _doubts(record: Record) -> list[str]:
    doubts: dict[str, None] = {}
    if all(row.ssim is None for row in record.rows):
        doubts["No SSIM: torchmetrics is not installed (pip install 'cachedit-fx[metrics]')."] = None
    for row in record.rows:
        for name, here in record.versions.items():
            there = row.versions.get(name, here)
            if there != here:
                doubts[f"Not a fair comparison: {name} is {here} here and {there} in the peers' environment."] = None
    return list(doubts)


def parts(record: Record) -> list[Part]:
    """The tables and what they say."""
    pairs = against.pairs_of(record.rows)
    verdicts = [f"{'yes' if holds else 'NO'}: {words}" for holds, words in against.verdicts(pairs)]
    compared: list[Part] = [against.table(pairs), verdicts] if pairs else []
    scores: list[Part] = [fidelity(record)] if _has_fidelity(record) else []
    return [table(record), *scores, *compared, explanations(record)]


def markdown(record: Record) -> str:
    """`bench.md`: the same, and accuracy by category if it is known."""
    first, *others = parts(record)
    checked = [row for row in record.by_work() if row.accuracy and len(row.accuracy) > 2]
    by_category: list[Part] = []
    if checked:
        categories = list(checked[0].accuracy or {})
        shares = Table(("row", *categories))
        for row in checked:
            shares.add(row.name, *(f"{(row.accuracy or {}).get(category, math.nan):.0%}" for category in categories))
        by_category = ["Right, by category:", shares]
    return page(Heading("cachedit bench"), first, *by_category, *others)


def save(record: Record, folder: Path) -> None:
    """Write the three files."""
    record.save(folder)
    with whole_files(folder) as staging:
        (staging / "bench.md").write_text(markdown(record))
        save_picture(record, staging / "bench.png")


def save_picture(record: Record, path: Path) -> None:
    """Draw quality over work."""
    from cachedit_fx.report.plots import save_quality

    settings = record.settings
    title = f"{settings.steps} steps, {len(settings.prompts)} prompts; in bold: on the Pareto front"
    save_quality([row for row in record.rows if row.name != UNCACHED], record.pareto(), title, path)
