"""The statistics of a generation as tables, for a terminal and as Markdown."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cachedit_fx.runtime.policies.base import Action
from cachedit_fx.runtime.stats import BranchStats, CacheStats

PERCENTILES = {"P00": 0, "P25": 25, "P50": 50, "P75": 75, "P95": 95, "Min": 0, "Max": 100}


_ONE_COLUMN = 30
"""Steps up to which the table by step has one column; more stand in two, which fit into 100 characters."""


def percentiles(differences: Iterable[float]) -> dict[str, float]:
    """The keys of `PERCENTILES`, interpolated linearly; empty where there is no finite difference."""
    finite = [difference for difference in differences if math.isfinite(difference)]
    return {name: float(np.percentile(finite, q)) for name, q in PERCENTILES.items()} if finite else {}


_COLUMNS = ("branch", "F+mid+B", "cached", "work", *PERCENTILES)


def _rows(region: CacheStats) -> list[tuple[str, ...]]:
    """The cells below `_COLUMNS`, a row for each branch."""
    blocks = f"{region.first}+{region.num_blocks - region.first - region.last}+{region.last}"
    rows = []
    for index, branch in enumerate(region.branches or [BranchStats()]):
        cached = f"{len(branch.cached_steps)}/{branch.executed_steps}"
        found = percentiles(branch.differences)
        shared = ("", "") if index else (blocks, f"{region.work:.0%}")
        cells = (f"{found[name]:.3f}" if found else "-" for name in PERCENTILES)
        rows.append((str(index), shared[0], cached, shared[1], *cells))
    return rows


def markdown(stats: Sequence[CacheStats]) -> str:
    """The summary as a markdown table."""
    table = [("region", *_COLUMNS), ("---",) * (len(_COLUMNS) + 1)]
    table += [(region.name, *row) for region in stats for row in _rows(region)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table)


def render(stats: Sequence[CacheStats], *, details: bool = False) -> Group:
    """A rich renderable: a summary of each region, and with `details` every step's action, reason and difference."""
    parts: list[Table | Text] = []
    for region in stats:
        # No edges and little padding: all columns fit into 80 characters.
        summary = Table(
            title=Text(region.name),
            title_justify="left",
            caption=Text(region._summary),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            collapse_padding=True,
        )
        for title in _COLUMNS:
            summary.add_column(title, justify="right", no_wrap=True)
        for row in _rows(region):
            summary.add_row(*row)
        parts.append(summary)
        if details:
            parts += [_step_table(region.name, index, branch) for index, branch in enumerate(region.branches)]
    return Group(*parts, *(_legend(stats) if details else ()))


def _step_table(name: str, index: int, branch: BranchStats) -> Table:
    decisions = branch.decisions
    steps = sorted(decisions)
    height = len(steps) if len(steps) <= _ONE_COLUMN else math.ceil(len(steps) / 2)
    columns = [steps[start : start + height] for start in range(0, len(steps), height)]
    table = Table(title=Text(f"{name}, branch {index}"))
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
                texts = (str(column[row]), action, decision.reason.value, difference)
                cells += [Text(text, style=style) for text in texts]
        table.add_row(*cells)
    return table


def _legend(stats: Sequence[CacheStats]) -> list[Text]:
    counts = Counter(decision.reason for region in stats for decision in region._every_decision)
    return [Text(f"{count:4} x {reason.value}: {reason.explanation}") for reason, count in counts.items()]
