"""The statistics of a generation as tables, for a terminal and as Markdown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cachedit_fx.report import tables
from cachedit_fx.report.tables import Table
from cachedit_fx.runtime.policies.base import Action
from cachedit_fx.runtime.stats import BranchStats, CacheStats

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

PERCENTILES = {"P00": 0, "P25": 25, "P50": 50, "P75": 75, "P95": 95, "Min": 0, "Max": 100}
_COLUMNS = ("branch", "F+mid+B", "cached", "work", *PERCENTILES)
_ONE_COLUMN = 30
"""Steps up to which the table by step has one column; more stand in two, which fit into 100 characters."""


def percentiles(differences: Iterable[float]) -> dict[str, float]:
    """The keys of `PERCENTILES`, interpolated linearly; empty if there is no finite difference."""
    import numpy as np

    finite = [difference for difference in differences if math.isfinite(difference)]
    return {name: float(np.percentile(finite, q)) for name, q in PERCENTILES.items()} if finite else {}


def _lines(region: CacheStats) -> list[tuple[str, ...]]:
    """The cells below `_COLUMNS`, a line for each branch."""
    blocks = f"{region.first}+{region.num_blocks - region.first - region.last}+{region.last}"
    lines = []
    for index, branch in enumerate(region.branches or [BranchStats()]):
        cached = f"{len(branch.cached_steps)}/{branch.executed_steps}"
        values = percentiles(branch.differences)
        shared = ("", "") if index else (blocks, f"{region.work:.0%}")
        cells = (f"{values[name]:.3f}" if values else "-" for name in PERCENTILES)
        lines.append((str(index), shared[0], cached, shared[1], *cells))
    return lines


def markdown(stats: Sequence[CacheStats]) -> str:
    """The summary as a Markdown table, a line for each branch of each region."""
    table = Table(("region", *_COLUMNS))
    for region in stats:
        for cells in _lines(region):
            table.add(region.name, *cells)
    return tables.markdown(table)


def render(stats: Sequence[CacheStats], *, details: bool = False) -> Group:
    """A summary of each region that rich can print, with `details` every step's action, reason and difference too."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RichTable | Text] = []
    for region in stats:
        table = Table(_COLUMNS, texts=(), title=region.name)
        for cells in _lines(region):
            table.add(*cells)
        summary = tables.terminal(table)
        summary.caption, summary.caption_justify = Text(region._summary), "left"
        parts.append(summary)
        if details:
            parts += [_step_table(region.name, index, branch) for index, branch in enumerate(region.branches)]
    return Group(*parts, *(_legend(stats) if details else ()))


def _step_table(name: str, index: int, branch: BranchStats) -> RichTable:
    from rich.table import Table as RichTable
    from rich.text import Text

    decisions = branch.decisions
    steps = sorted(decisions)
    height = len(steps) if len(steps) <= _ONE_COLUMN else math.ceil(len(steps) / 2)
    columns = [steps[start : start + height] for start in range(0, len(steps), height)]
    table = RichTable(title=Text(f"{name}, branch {index}"))
    for _ in columns:
        table.add_column("step", justify="right", no_wrap=True)
        for title in ("action", "reason", "difference"):
            table.add_column(title, no_wrap=True)
    for row in range(height):
        cells: list[Text] = []
        for column in columns:
            if row < len(column):
                decision = decisions[column[row]]
                difference = "" if decision.difference is None else f"{decision.difference:.4f}"
                style = "green" if decision.action is Action.REUSE else ""
                parts = branch.parts[column[row]]
                action = decision.action.value
                if None not in parts and decision.action is Action.REUSE:
                    pruned = sum(part.action is Action.REUSE for part in parts.values())
                    action = f"prune {pruned} of {len(parts)}"
                form = sorted(name for name, taken in branch.form_steps.items() if column[row] in taken)
                action = f"{action} ({', '.join(form)})" if form else action
                texts = (str(column[row]), action, decision.reason.value, difference)
                cells += [Text(text, style=style) for text in texts]
        table.add_row(*cells)
    return table


def _legend(stats: Sequence[CacheStats]) -> list[Text]:
    from rich.text import Text

    counts = Counter(decision.reason for region in stats for decision in region._every_decision)
    return [Text(f"{count:4} x {reason.value}: {reason.explanation}") for reason, count in counts.items()]
