"""What `cachedit sensitivity` shows and leaves behind: `sensitivity.json`, `.md`, `.png` and `plan.json`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path

from cachedit_fx.bench.sensitivity import EVERYWHERE, PLAN, WHOLE, Drawing, Measurement, Record
from cachedit_fx.quantization.kinds import KINDS
from cachedit_fx.quantization.plan import Plan
from cachedit_fx.report.files import whole_files
from cachedit_fx.report.tables import Heading, Part, Table, page

MIB = 2**20
TITLE = "Sensitivity to quantization"


def summary(record: Record, plan: Plan | None, drawings: Sequence[Drawing]) -> list[Part]:
    """What the plan is worth, and what the figures mean."""
    comparison: list[Part] = [comparison_table(record, drawings), *_verdict(drawings)] if drawings else []
    planned = [] if plan is None else [_plan_in_words(record, plan)]
    return [*comparison, [*planned, *_additivity(record), *_explanations(record, drawings)]]


def groups_table(record: Record, plan: Plan | None) -> Table:
    """A line for each group of layers, in the model's order."""
    kinds = record.settings.kinds
    chosen = set() if plan is None else {(candidate.group, candidate.kind) for candidate in plan.candidates}
    headings = [f"{kind.replace('_', ' ')} dB" for kind in kinds]  # a heading breaks between words alone
    table = Table(("block", "layers", "MiB", *headings), (0, 1))
    groups = list(dict.fromkeys((each.block, each.part) for each in record.groups))
    for index, (block, part) in enumerate(groups):
        rows = [record.find(block, part, kind) for kind in kinds]
        before = max(row.before for row in rows if row is not None)
        errors = ["" if row is None else _marked(row, chosen) for row in rows]
        is_last = index + 1 < len(groups) and groups[index + 1][0] != block
        table.add(block, part, f"{before / MIB:.3g}", *errors, ends_group=is_last)
    return table


def _marked(row: Measurement, chosen: Collection[tuple[str, str]]) -> str:
    return ("* " if (row.group, row.kind) in chosen else "") + decibels(row.error)


def comparison_table(record: Record, drawings: Sequence[Drawing]) -> Table:
    """A line for each choice of layers; the random ones as one."""
    table = Table(("choice", "MiB", "size", "output dB", "summed dB", "PSNR dB"))
    for name, rows in _lines(drawings).items():
        sizes = statistics.fmean(row.bytes for row in rows)
        table.add(
            name,
            f"{sizes / MIB:.2f}",
            f"{sizes / record.bytes:.1%}",
            f"{statistics.fmean(_decibels(row.error) for row in rows):.1f}",
            f"{statistics.fmean(_decibels(_sum_for(record, row)) for row in rows):.1f}",
            _mean_psnr(rows),
            stands_out=name == PLAN,
        )
    return table


def _lines(drawings: Sequence[Drawing]) -> dict[str, list[Drawing]]:
    """The drawings by the line that they are in."""
    random = [drawing for drawing in drawings if drawing.name.startswith("random ")]
    lines = {drawing.name: [drawing] for drawing in drawings if drawing not in random}
    return lines | ({f"random, mean of {len(random)}": random} if random else {})


def _sum_for(record: Record, drawing: Drawing) -> float:
    """The error that the groups of a choice add up to."""
    candidates = [each for each in record.candidates if all(drawing.kinds.get(x) == each.kind for x in each.layers)]
    return Plan(tuple(candidates)).error


def _mean_psnr(rows: Sequence[Drawing]) -> str:
    mean = statistics.fmean(row.mean_psnr for row in rows)
    return f"{mean:.1f}" if math.isfinite(mean) else "identical"


def _verdict(drawings: Sequence[Drawing]) -> list[str]:
    """How far the plan is above the best rival of its size; nothing without rivals."""
    means = {name: statistics.fmean(row.mean_psnr for row in rows) for name, rows in _lines(drawings).items()}
    plan = means.pop(PLAN, None)
    others = {name: value for name, value in means.items() if not name.endswith(EVERYWHERE)}
    if plan is None or not others:
        return []
    best = max(others, key=lambda name: others[name])
    gain = plan - others[best]
    place = "above" if gain >= 0 else "below"
    return [f"The plan is {abs(gain):.1f} dB {place} the best other choice of its size ({best})."]


def _plan_in_words(record: Record, plan: Plan) -> str:
    after = record.bytes - plan.saved
    groups = len({candidate.group for candidate in record.candidates})
    drawn = next((each for each in record.drawings if each.kinds == plan.kinds and _is_own(record, each)), None)
    quality = f" Its PSNR is {_mean_psnr([drawn])} dB on the prompts that errors were measured on." if drawn else ""
    return (
        f"The plan quantizes {len(plan.candidates)} of {groups} groups: all weights {record.bytes / MIB:.2f} MiB "
        f"before, {after / MIB:.2f} MiB after ({after / record.bytes:.1%}).{quality}"
    )


def _is_own(record: Record, drawing: Drawing) -> bool:
    """Whether a drawing is of the prompts that errors were measured on."""
    return drawing.prompts == record.settings.prompts


def _additivity(record: Record) -> list[str]:
    """How well the errors of groups add up to the error of all groups together."""
    sentences = []
    for kind in record.settings.kinds:
        whole = record.find(WHOLE, "", kind)
        alone = [each for each in record.groups if each.kind == kind]
        if whole is not None and whole.error:
            ratio = sum(each.error for each in alone) / whole.error
            sentences.append(
                f"{kind}: the errors of {len(alone)} groups, each alone, add up to {ratio:.2f} of the error of all "
                f"together, {decibels(whole.error)} dB."
            )
    return sentences


def _explanations(record: Record, drawings: Sequence[Drawing]) -> list[str]:
    """The columns and the conditions."""
    settings = record.settings
    model = "the bundled model" if settings.entry is None else settings.entry
    guidance = f"guidance {settings.guidance:g}" if settings.guidance != 1 else "no guidance"
    stand_ins = {kind: KINDS[kind].stands_in_for for kind in settings.kinds if KINDS[kind].stands_in_for}
    return [
        "dB of a group: the model's output over its error if this group alone is quantized, in squares; higher is "
        "better. The same calls of the model on the unquantized model's own trajectory count for every group. * in the "
        "plan.",
        *(
            "size: of all weights, over the unquantized ones. output dB: as for a group, for all layers of a choice "
            "together; summed: as the errors of its groups add up. PSNR: against the unquantized pictures from the "
            f"same noise, the mean over {len(drawing.prompts)} prompts "
            "that no error was measured on."
            for drawing in drawings[:1]
        ),
        *(
            f"{kind} is a stand-in. It rounds like {original}, and its MiB are those of {original}."
            for kind, original in stand_ins.items()
        ),
        f"Errors: {len(settings.prompts)} prompts, {settings.steps} steps, one call of {settings.every}, {model}, "
        f"{guidance}, {settings.batch} at a time, eager.",
        f"{record.machine}; {', '.join(f'{name} {version}' for name, version in record.versions.items())}.",
        f"Made by `{record.command}`.",
    ]


def decibels(error: float) -> str:
    """A squared error over the square of the output, in dB."""
    return f"{_decibels(error):.1f}" if error else "no error"


def _decibels(error: float) -> float:
    return -10 * math.log10(error) if error else math.inf


def save(record: Record, plan: Plan | None, drawings: Sequence[Drawing], folder: Path) -> list[str]:
    """Write the files, and return their names."""
    record.save(folder)
    with whole_files(folder) as staging:
        (staging / "sensitivity.md").write_text(
            page(Heading(TITLE), *summary(record, plan, drawings), groups_table(record, plan))
        )
        save_picture(record, plan, staging / "sensitivity.png")
        if plan is not None:
            per_layer = plan.per_layer(record.candidates)
            (staging / "plan.json").write_text(json.dumps(per_layer, indent=1) + "\n")
        return ["sensitivity.json", *sorted(path.name for path in staging.iterdir())]


def save_picture(record: Record, plan: Plan | None, path: Path) -> None:
    """Draw the groups' errors by block."""
    from cachedit_fx.report.plots import save_sensitivity

    groups: list[Measurement] = record.groups
    chosen = frozenset() if plan is None else frozenset((each.group, each.kind) for each in plan.candidates)
    save_sensitivity(groups, chosen, path)
