"""What weights and hoisted values take of an accelerator's memory, derived from what `motion.count` counts."""

from __future__ import annotations

from collections.abc import Sequence

from cachedit_fx.bench.motion import STEPS, Reads
from cachedit_fx.config.options import Options
from cachedit_fx.report.tables import Table

CARDS = (24, 48)
"""Memory of accelerators, in GiB."""
ROOM = 4
"""Memory that is left for everything but weights and hoisted values, in GiB, where a model is said to fit."""


def on_device(row: Reads) -> tuple[int, int]:
    """Bytes of weights and of a generation's hoisted values: all on the device, and with weights on the host."""
    values = min(STEPS * row.step_bytes + row.prompt_bytes, Options().hoisted_mib * 2**20)
    return row.bytes + values, row.bytes - row.host_bytes + values


def memory_table(rows: Sequence[Reads]) -> Table:
    """Memory of the accelerator with all weights there, and with weights on the host, a line for each model."""
    left_of = (f"left of\n{card} GiB" for card in CARDS)
    table = Table(("model", "on the host", "peak", 'peak with\n"host"', *left_of))
    for row in rows:
        sizes = [size / 2**30 for size in (row.host_bytes, *on_device(row))]
        left = (f"{card - sizes[1]:.1f} → {card - sizes[2]:.1f}" for card in CARDS)
        table.add(row.model, *(f"{size:.2f}" for size in sizes), *left)
    return table


def cards(rows: Sequence[Reads]) -> list[str]:
    """The models that a card can hold with weights on the host, and not without: a sentence for each card."""
    lines = []
    for card in CARDS:
        room = (card - ROOM) * 2**30
        names = [row.model for row in rows if on_device(row)[1] <= room < on_device(row)[0]]
        lines.append(
            f"A card of {card} GiB can hold, with {ROOM} GiB left for the rest, and could not without the option: "
            f"{', '.join(names) or 'none of these models'}."
        )
    return lines
