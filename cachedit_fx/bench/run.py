"""From what was asked for to a record: which rows are measured, in which groups, and how a run goes on.

a file of configurations ─► rows ─┬► a group each, with its rival           `cachedit bench`
                                  └► pairs with cache-dit, with a rival      `cachedit bench --against cache-dit`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachedit_fx.bench.against import paired_rows, peer_of
from cachedit_fx.bench.errors import BenchmarkError
from cachedit_fx.bench.measure import Bench
from cachedit_fx.bench.process import PEER_VERSION, check_peer
from cachedit_fx.bench.record import Record
from cachedit_fx.bench.rows import (
    CACHE_DIT,
    DEFAULT,
    OURS,
    UNCACHED,
    Row,
    RowError,
    named_row,
    peer_rows,
    read_rows,
    select,
)
from cachedit_fx.bench.systems import check_arguments


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    groups: tuple[tuple[Row, ...], ...]
    """Rows that take turns with each other, with the rival of each group's first row and with the uncached run."""
    notes: tuple[str, ...] = ()
    """What must be said of it."""

    @property
    def rows(self) -> list[Row]:
        return [row for group in self.groups for row in group]


def plan_rows(
    config: Path | None, steps: int, only: Sequence[str], peers: bool, peer_python: str, names: Sequence[str] = ()
) -> Plan:
    """A group for each row of `config` (the default ones if None), and for each of the peers'.

    With `names`, rows such as `F8B0_W4MC2_R0.12` take the place of the default ones.
    Rows of cache-dit are left out with a note if `peer_python` does not have it.

    Raises:
        RowError: if the rows cannot be used.
        BenchmarkError: if no row is left.
    """
    own = [named_row(name) for name in names]
    if config is not None or not names:
        own += read_rows(config or DEFAULT, steps)
    rows = _checked(select(own + (peer_rows() if peers else []), only), steps)
    notes: list[str] = []
    if any(row.system == CACHE_DIT for row in rows):
        try:
            notes = _note_of_version(check_peer(peer_python))
        except BenchmarkError as error:
            notes = [f"Rows of cache-dit were skipped: {' '.join(str(error).split())}"]
            rows = [row for row in rows if row.system != CACHE_DIT]
            if not rows:
                raise
    return Plan(tuple((row,) for row in rows), tuple(notes))


def plan_pairs(config: Path | None, steps: int, only: Sequence[str], peer_python: str) -> Plan:
    """A group for each row of `config` (F1 B0 W4 at three thresholds if None): the row, and cache-dit's like it.

    Raises:
        RowError: if the rows cannot be used, or cache-dit has no such settings.
        BenchmarkError: if `peer_python` does not have cache-dit.
    """
    rows = _checked(select(read_rows(config, steps) if config else paired_rows(), only), steps)
    pairs = tuple((row, peer_of(row)) for row in rows)
    return Plan(pairs, tuple(_note_of_version(check_peer(peer_python))))


def _checked(rows: list[Row], steps: int) -> list[Row]:
    """The rows, if ours take their arguments. No model is loaded.

    Raises:
        RowError: if a row's arguments are not taken.
    """
    for row in rows:
        if row.system == OURS:
            try:
                check_arguments(row.arguments, steps)
            except ValueError as error:
                raise RowError(f"row {row.name!r}: {error}") from None
    return rows


def _note_of_version(version: str) -> list[str]:
    return [] if version == PEER_VERSION else [f"cache-dit is {version}; this was written for {PEER_VERSION}."]


def run(bench: Bench, plan: Plan, record: Record, save: Callable[[], None]) -> bool:
    """Measure the plan's groups that `record` lacks, and `save` after each.

    Returns:
        Whether all were measured. Ctrl-C ends a run early; the group under way is lost.

    Raises:
        BenchmarkError: if every group failed. A group that fails among others becomes a note.
    """
    todo = [group for group in plan.groups if any(record.find(row) is None for row in group)]
    settings, failure = bench.settings, None
    bench.tell(more=settings.calls + sum(settings.group_calls(len(group) + 1) for group in todo))
    try:
        reference = bench.draw_reference()
        if not record.rows:
            record.rows.append(reference)
        save()
        for group in todo:
            try:
                _measure(bench, record, group)
            except BenchmarkError as error:  # a peer that this model is too much for; the others go on
                failure = error
                record.notes.append(f"{group[-1].name} failed: {str(error).splitlines()[0]}")
                bench.tell(more=-settings.group_calls(len(group) + 1))
            save()
    except KeyboardInterrupt:
        return False
    if failure is not None and all(row.system == UNCACHED for row in record.rows):
        raise failure
    return True


def _measure(bench: Bench, record: Record, rows: Sequence[Row]) -> None:
    """Measure a group and its rival, unless that was measured before."""
    with bench.group(rows) as group:
        measured = [group.draw(row) for row in rows]
        rival = bench.rival(measured[0])
        if record.find(rival) is None:
            measured.append(group.draw(rival))
        else:
            bench.tell(more=-bench.settings.calls - bench.settings.timed_calls)
        group.time()
    record.rows += measured


def left(plan: Plan, record: Record) -> int:
    """How many of the plan's rows are not measured."""
    return sum(record.find(row) is None for row in plan.rows)
