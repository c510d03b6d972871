"""A run of `cachedit coverage` as it stands, and the file beside its table that it is kept in until it is finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cachedit_fx.bench.coverage import NO_ENTRY, Covered
from cachedit_fx.bench.coverage_attention import AttentionCounts
from cachedit_fx.bench.coverage_counts import RankCounts
from cachedit_fx.bench.motion import Reads
from cachedit_fx.bench.resume import kept_rows, save_page
from cachedit_fx.bench.variants import VariantResult


class CoverageRecord:
    """The models that are checked.

    Args:
        path: the file, written anew after every model; None keeps nothing.
        settings: what the rows depend on. A run with other settings does not go on from the file.

    Attributes:
        rows: name of a model -> what was seen of it.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.rows: dict[str, Covered] = {}

    def resume(self, path: Path) -> None:
        """Take over the rows of a file. Models without an entry are looked for again.

        Raises:
            ResumeError: if there is no such file, or it was made with other settings.
        """
        rows = map(_covered, kept_rows(path, "cachedit coverage", self.settings))
        self.rows = {row.name: row for row in rows if row.reason != NO_ENTRY}

    def add(self, row: Covered) -> None:
        """Keep another row."""
        self.rows[row.name] = row
        if self.path is not None:
            save_page(self.path, {"settings": self.settings, "rows": list(map(asdict, self.rows.values()))})

    def finish(self) -> None:
        """Remove the file: a table has taken its place."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _covered(row: Mapping[str, Any]) -> Covered:
    """A row as `asdict` and JSON have left it."""
    variants, reads, ranks, calls = (row[name] for name in ("variants", "reads", "ranks", "calls"))
    values = {
        "loops": tuple(row["loops"]),
        "variants": None if variants is None else tuple(VariantResult(**variant) for variant in variants),
        "reads": None if reads is None else Reads(**reads),
        "ranks": None if ranks is None else RankCounts.read(ranks),
        "calls": None if calls is None else AttentionCounts(**calls),
    }
    return Covered(**{**row, **values})
