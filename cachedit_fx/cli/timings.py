"""`cachedit bench --cold` and `--overhead`: what start-up costs, and what a step costs beyond the pieces it runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from cachedit_fx.cli.terminal import console, errors, progress_bar, quiet
from cachedit_fx.report.files import machine, whole_files

if TYPE_CHECKING:
    from cachedit_fx.bench.cold import Start
    from cachedit_fx.bench.overhead import Line, Overhead

DEPTHS = (18, 57)
Cells = list[list[str]]


def cold(depths: Sequence[int], ways: Sequence[str], out: Path) -> None:
    """Measure start-up at each depth, show the table, and write `cold.md`. Ctrl-C keeps what is measured."""
    from cachedit_fx.bench.cold import CAPTURE, WAYS, measure

    chosen = [way for way in WAYS if way == CAPTURE or not ways or any(text in way for text in ways)]
    found: list[Start] = []
    with progress_bar(2 * len(depths) * len(chosen), "processes") as (progress, task):

        def tell(what: str) -> None:
            progress.update(task, description=what)

        def told(failure: str) -> None:
            errors.print(f"[yellow]{escape(failure)}[/yellow]")

        try:
            for start in measure(depths, chosen, tell, told):
                found.append(start)
                progress.update(task, advance=1)
        except KeyboardInterrupt:
            errors.print("interrupted: what follows is what was measured")
    _write("cold", [("Start-up", cold_cells(found), _COLD)], out)


def overhead(depths: Sequence[int], rounds: int, first: int, inner: str, out: Path) -> None:
    """Measure steps at each depth, show the tables, and write `overhead.md`: steps with real pieces, the Python of a
    step with pieces that compute nothing, and profiles of it."""
    with quiet():
        from cachedit_fx.bench.flux import size_of
        from cachedit_fx.bench.overhead import (
            KINDS,
            NOTHING,
            PIECES,
            SHORT_CACHED,
            SHORT_COMPUTED,
            SHORT_KINDS,
            measure,
            measure_peer,
            profile,
        )
        from cachedit_fx.bench.process import BenchmarkError

    found: list[Overhead] = []
    python: list[Overhead] = []
    profiles: dict[str, list[Line]] = {}
    with progress_bar(4 * len(depths) + 2, "models") as (progress, task):

        def tell(what: str) -> None:
            progress.update(task, description=what)

        with quiet():
            for blocks in depths:
                for kinds, turns in (([kind for kind in KINDS if kind != PIECES], rounds), (SHORT_KINDS, 2 * rounds)):
                    found.append(measure(size_of(blocks), turns, first, tell, kinds, inner_backend=inner))
                    progress.update(task, advance=1)
                tell(f"cache-dit, {blocks} blocks")
                try:
                    found.append(measure_peer(size_of(blocks), rounds, first, inner))
                except BenchmarkError as error:
                    errors.print(f"[yellow]{escape(str(error))}[/yellow]")
                progress.update(task, advance=1)
            for blocks in depths:
                python.append(measure(size_of(blocks, **_TINY), rounds, first, tell, **_nothing(NOTHING)))
                progress.update(task, advance=1)
            deepest = size_of(max(depths), **_TINY)
            for kind in (SHORT_CACHED, SHORT_COMPUTED):
                tell(f"profile: {kind}")
                profiles[kind] = profile(deepest, kind, PROFILED, first, **_nothing(NOTHING))
                progress.update(task, advance=1)
    tables = [
        (f"Steps, F = {first}, inner backend {inner}", overhead_cells(found), _OVERHEAD),
        ("The Python of a step", python_cells(python), _PYTHON),
        *(
            (f"Its profile: {kind}, {deepest.blocks} blocks", profile_cells(lines[:12]), _PROFILE)
            for kind, lines in profiles.items()
        ),
    ]
    _write("overhead", tables, out)


PROFILED = 100
"""Steps in a profile."""
_TINY = {"width": 64, "side": 2}


def _nothing(backend: Any) -> dict[str, Any]:
    return {"inner_backend": backend, "compiled_pieces": "all"}


_COLD = (
    "Seconds from the call of `compile` to the end of four steps (ours: two computed, two cached), one thread, in a "
    "new process; cold: an empty folder for inductor's caches, warm: the same folder in another process. `- capture`: "
    'less the time of `backend="eager"`, dynamo\'s own. `sizes`: the first call at three resolutions, warm.'
)
_OVERHEAD = (
    "Medians over calls by turns, one thread, batch 1; ahead of each that is timed, three more of its kind. `pieces "
    "alone`: the compiled pieces of a cached step, one after the other; by turns with cached steps only, twice the "
    'rounds. `past guards`: with `guards="generation"`, calls behind the first two of a generation.'
)
_PYTHON = (
    "The same kinds of steps on tiny tensors, with pieces that compute nothing: what remains is Python, ours and "
    "dynamo's. A block: the step over the number of blocks."
)
_PROFILE = (
    f"cProfile over {PROFILED} steps, which makes each call several times slower than it is: shares are what to read. "
    "Milliseconds a step."
)


def cold_cells(found: Sequence[Start]) -> Cells:
    """The table of start-up, a row for each way and depth, headings first."""
    from cachedit_fx.bench.cold import CAPTURE, REPEATED

    by = {(start.way, start.blocks, start.warm): start for start in found}
    cells = [["blocks", "compiled by", "cold", "- capture", "over repeated", "warm", "- capture", "sizes"]]
    for way, blocks in dict.fromkeys((start.way, start.blocks) for start in found):
        row = [str(blocks), way]
        capture, repeated = by.get((CAPTURE, blocks, False)), by.get((REPEATED, blocks, False))
        for warm in (False, True):
            start = by.get((way, blocks, warm))
            own = start and capture and way not in (CAPTURE, REPEATED) and start.seconds - capture.seconds
            row += [f"{start.seconds:.1f}" if start else "", f"{own:.1f}" if own else ""]
            if not warm:
                row.append(f"{own / repeated.seconds:.2f}" if own and repeated else "")
        last = by.get((way, blocks, True))
        cells.append([*row, ", ".join(f"{size:.1f}" for size in last.sizes) if last else ""])
    return cells


def overhead_cells(found: Sequence[Overhead]) -> Cells:
    """The table of steps: every kind's milliseconds, then ratios; headings first."""
    from cachedit_fx.bench.overhead import RATIOS

    cells = [["blocks", "step", "ms", "over", "ratio", "extra ms"]]
    for item in found:
        for name, seconds in item.seconds.items():
            cells.append([str(item.blocks), name, f"{1e3 * median(seconds):.2f}", "", "", ""])
        for above, below in RATIOS:
            if not {above, below} <= item.seconds.keys():
                continue
            ratio, extra = item.ratio(above, below), 1e3 * item.extra(above, below)
            cells.append([str(item.blocks), above, "", below, f"{ratio:.3f}", f"{extra:+.2f}"])
    return cells


def python_cells(found: Sequence[Overhead]) -> Cells:
    """The table of what Python takes, a row for each kind of step, headings first."""
    from cachedit_fx.bench.overhead import EAGER

    cells = [["blocks", "step", "ms", "us a block"]]
    for item in found:
        for name, seconds in item.seconds.items():
            if name != EAGER:
                middle = median(seconds)
                cells.append([str(item.blocks), name, f"{1e3 * middle:.2f}", f"{1e6 * middle / item.blocks:.1f}"])
    return cells


def profile_cells(lines: Sequence[Line]) -> Cells:
    """The table of a profile, headings first."""
    rows = [[f"{n.calls:.0f}", n.function, f"{1e3 * n.own:.3f}", f"{1e3 * n.total:.3f}"] for n in lines]
    return [["calls", "function", "own", "with what it calls"], *rows]


def _write(name: str, tables: Sequence[tuple[str, Cells, str]], out: Path) -> None:
    """Show tables of title, cells and explanation, and write them to one file, with the command that made them."""
    command = shlex.join(["cachedit", *sys.argv[1:]])
    lines = [f"`{command}`, on {machine()}, torch {version('torch')}.", ""]
    for title, (headings, *rows), explanation in tables:
        table = Table(title=title, box=box.SIMPLE_HEAD)
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="left" if index == 1 else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        lines += [f"# {title}", "", explanation, ""]
        lines += [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows)]
        lines.append("")
    with whole_files(out) as folder:
        (folder / f"{name}.md").write_text("\n".join(lines))
    console.print(f"written: {out / f'{name}.md'}")
