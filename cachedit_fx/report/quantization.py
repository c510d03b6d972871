"""The report of `quantize` as tables, for a terminal: one line for layers that differ by numbers alone."""

from __future__ import annotations

import re
from collections import defaultdict
from io import StringIO
from typing import TYPE_CHECKING

from cachedit_fx.quantization.report import QuantizationReport
from cachedit_fx.report import tables
from cachedit_fx.report.tables import Table

if TYPE_CHECKING:
    from rich.console import Group

WIDTH = 100
"""Characters of a line of the report as text."""


def render(report: QuantizationReport) -> Group:
    """The report as rich can print it."""
    from rich.console import Group
    from rich.text import Text

    count = len(report.layers) + len(report.kept)
    share = f"{report.bytes_after / report.bytes_before:.0%} of before" if report.bytes_before else "empty"
    summary = (
        f"{report.title}: {len(report.layers)} of {count} linear layers quantized; all weights "
        f"{size(report.bytes_before)} before, {size(report.bytes_after)} after ({share})"
    )
    lines = [tables.terminal(table) for table in (_quantized(report), _kept(report)) if table.lines]
    return Group(Text(summary), *lines, *(Text(f"Note: {note}") for note in report.notes))


def text(report: QuantizationReport) -> str:
    """The report as plain text."""
    from rich.console import Console

    console = Console(file=StringIO(), width=WIDTH, color_system=None)
    console.print(render(report))
    lines: list[str] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)


def size(count: int) -> str:
    """A number of bytes in words."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"


def _quantized(report: QuantizationReport) -> Table:
    groups = defaultdict(list)
    for layer in report.layers:
        groups[_pattern(layer.name), layer.kind, layer.shape].append(layer)
    table = Table(("layers", "kind", "number", "out x in", "before", "after"), texts=(0, 1))
    for (pattern, kind, (outputs, inputs)), layers in groups.items():
        before, after = sum(layer.bytes_before for layer in layers), sum(layer.bytes_after for layer in layers)
        table.add(pattern, kind, str(len(layers)), f"{outputs} x {inputs}", size(before), size(after))
    return table


def _kept(report: QuantizationReport) -> Table:
    groups = defaultdict(list)
    for layer in report.kept:
        groups[_pattern(layer.name), layer.reason].append(layer)
    table = Table(("left as they are", "reason", "number", "bytes"), texts=(0, 1))
    for (pattern, reason), layers in groups.items():
        table.add(pattern, reason, str(len(layers)), size(sum(layer.bytes for layer in layers)))
    return table


def _pattern(name: str) -> str:
    """A layer's name with `*` for each part that is a number."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
