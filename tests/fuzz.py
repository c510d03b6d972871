"""Random block models, held to what must be true of every model.

  python tests/fuzz.py --cases 500 --seed 0

Each case is drawn from its own number: `--first 300` goes on with the same run from case 300, and draws what that run
would have drawn. A failure is made simpler while it stays the same failure, and written to `runs/fuzz` as a program
that shows it again. The strategies, the model and the properties are in `tests/lib/fuzzing.py`, whose tests run a few
cases by hypothesis.
"""

from __future__ import annotations

import os
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).resolve().parent

import torch  # noqa: E402 - after the environment
from lib.fuzz_specs import Spec, spec_of  # noqa: E402 - after the environment
from lib.fuzzing import Outcome, check, expected, simpler  # noqa: E402 - after the environment

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
console = Console(highlight=False)
SHRINK_SECONDS = 60.0

PROGRAM = '''"""Case {case} of seed {seed}, made simpler in {steps} steps. Run it from anywhere: python {file}

{error}
"""

import sys

sys.path.insert(0, {tests!r})

from lib.fuzz_specs import Loop, Spec
from lib.fuzzing import check

# as drawn: {drawn}
check({spec})
'''


@dataclass
class Run:
    """What was seen so far."""

    done: int = 0
    failures: list[Path] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def take(self, spec: Spec, outcome: Outcome) -> None:
        must = expected(spec) is not None
        self.counts["regions that must be found, and are"] += must
        self.counts["regions where not all need be found"] += bool(outcome.regions) and not must
        self.counts["caching"] += bool(outcome.regions)
        self.counts["uncached, with a warning"] += not outcome.regions
        self.counts["reused under the drawn policy"] += outcome.reused > 0


def error_of(spec: Spec) -> Exception | None:
    """What `check` raises."""
    try:
        check(spec)
    except Exception as error:
        return error
    return None


def kind(error: Exception) -> tuple[str, str]:
    """Equal for two errors that are one failure, as far as can be told: type, and the message up to its numbers."""
    return type(error).__name__, str(error).partition(":")[0].partition(",")[0]


def shrink(spec: Spec, error: Exception) -> tuple[Spec, Exception, int]:
    """The simplest Spec found in a minute that fails alike, its error, and how often it was made simpler."""
    steps, until = 0, time.monotonic() + SHRINK_SECONDS
    while time.monotonic() < until:
        for candidate in simpler(spec):
            found = error_of(candidate) if time.monotonic() < until else None
            if found is not None and kind(found) == kind(error):
                spec, error, steps = candidate, found, steps + 1
                break
        else:
            break
    return spec, error, steps


def write_failure(folder: Path, seed: int, case: int, drawn: Spec, error: Exception) -> tuple[Path, Spec, Exception]:
    """Write the program that shows the failure again."""
    spec, error, steps = shrink(drawn, error)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"seed_{seed}_case_{case}.py"
    text = "".join(traceback.format_exception(error)).replace("\\", "/").replace('"""', "'''").strip()
    file.write_text(
        PROGRAM.format(
            case=case,
            seed=seed,
            steps=steps,
            file=file,
            error=text,
            tests=str(TESTS),
            drawn=repr(drawn),
            spec=repr(spec),
        )
    )
    return file, spec, error


@app.command()
def fuzz(
    cases: Annotated[
        int, typer.Option(min=1, help="How many models to try. 500 take some 20 minutes on one core.")
    ] = 500,
    seed: Annotated[int, typer.Option(help="Names the run. The same seed draws the same models.")] = 0,
    first: Annotated[int, typer.Option(min=0, help="Number of the first case: go on where a run was stopped.")] = 0,
    out: Annotated[Path, typer.Option(file_okay=False, help="Where failures are written, a program each.")] = Path(
        "runs/fuzz"
    ),
) -> None:
    """Try random models: loops, streams, glue, skips, in-place writes, dtypes, shapes, policies.

    For each, with `inner_backend="eager"`: **threshold 0** equals the plain module bit for bit, inputs that the model
    writes to included; steps on **identical inputs** that are reused equal the computed one; a **second generation**
    equals the first; the **statistics** add up; blocks in named containers are **found**, all of them; nothing raises.

    A failure is shrunk, printed, and written as a program. Ctrl-C stops the run and says how to go on. Exit code: 0
    where every case passed, 1 where one failed, 130 where it was stopped before.

    Examples

    `python tests/fuzz.py --cases 20` (a look)

    `python tests/fuzz.py --seed 1 --first 120 --cases 380` (the rest of a run stopped at case 120)

    `python runs/fuzz/seed_0_case_17.py` (a failure again)
    """
    torch.set_num_threads(1)
    run, stopped = Run(), False
    columns = (
        TextColumn("case {task.fields[case]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("failed {task.fields[failed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=cases, case=first, failed=0)
        try:
            for case in range(first, first + cases):
                progress.update(task, case=case)
                spec = spec_of(seed, case)
                try:
                    run.take(spec, check(spec))
                except Exception as error:
                    file, spec, error = write_failure(out, seed, case, spec, error)
                    run.failures.append(file)
                    console.print(f"[red]case {case} failed[/red]: {type(error).__name__}: {escape(str(error))}")
                    console.print(f"check({escape(repr(spec))})", soft_wrap=True)
                    console.print(f"again: python {file}", soft_wrap=True)
                run.done += 1
                progress.update(task, completed=run.done, failed=len(run.failures))
        except KeyboardInterrupt:
            stopped = True
    report(run)
    if stopped:
        left = f"--seed {seed} --first {first + run.done} --cases {cases - run.done}"
        console.print(
            f"Stopped after {run.done} of {cases} cases. Go on with: python tests/fuzz.py {left}", soft_wrap=True
        )
    if run.failures:
        raise typer.Exit(1)
    raise typer.Exit(130 if stopped else 0)


def report(run: Run) -> None:
    """The shares of the cases that passed."""
    table = Table("of the cases that passed", "cases", "share", box=None, pad_edge=False)
    passed = run.done - len(run.failures)
    for name, count in run.counts.items():
        table.add_row(name, str(count), f"{count / passed:.0%}")
    if passed:
        console.print(table)
    console.print(f"{run.done} cases, {passed} passed, {len(run.failures)} failed")


if __name__ == "__main__":
    app()
