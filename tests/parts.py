"""Runs the test suite in parts, and keeps docs/tested.md, a table of each part's last run.

    make test-all               every part that has not passed on this tree with these versions
    make test-all PART=zoo      that part, whatever the table says

A test belongs to the part that its marker `full` names, else to `default`. The table is written after every part, so an
interrupted run goes on at the part that it was in.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import typer

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path("docs/tested.md")
MINUTES = 60
"""What a part may take, by the wall."""

DEFAULT = "default"
PARTS = {
    DEFAULT: "what `make test` runs, lint and types aside",
    "zoo": "every transformer class of diffusers through all of `cachedit coverage`: captured anew for each setting, "
    "and at a second resolution; graphs of some, in forms that the default part leaves out",
    "variants": "every transformer class of diffusers with each boolean, optional or enumerated argument changed alone",
    "families": "the pipelines of every model family that the default part leaves out",
    "elsewhere": "models from outside diffusers: a second resolution, dynamic shapes, a third layout, no names",
    "wrappings": "LoRA, other wrappings of a transformer and its inputs, in the forms that the default part leaves out",
    "fuzz": "500 random models",
    "motion": "code motion on and off, for every transformer class of diffusers by inductor, in float32 and bfloat16",
    "soak": "200 generations of each policy, which hold no more memory than 60; a server of 200 requests",
    "kernels": "every specialisation of the Triton kernels, compiled ahead of time; numerics in float16 and float32",
    "peers": "the same settings run by cache-dit itself, in the environment that PEERS_PYTHON names, and the order of "
    "calls in its scripts with inductor",
    "parallel": "every transformer class of diffusers on two ranks of gloo, against one: by tokens, in a ring, by "
    "branches; pipelines whose branches two ranks share; ranks compiled by inductor; `examples/ulysses.py`",
    "quality": "a plan of quantization on the bundled model against other choices of its size",
    "packaging": "every module imported from each place that Python may start in; the backend found by its name",
}
"""Part -> what it runs. `tests/conftest.py` accepts no other name in a `full` marker."""

NEVER = "never"
DEFAULT_ARGUMENTS = ("-n", "auto", "--dist", "loadgroup")
PACKAGES = ("torch", "diffusers", "transformers", "triton", "peft")


@dataclass(frozen=True)
class Run:
    """One line of the table: a part's last run.

    Attributes:
        date: when it ended, UTC.
        commit: of the tree; with a "+" if the tree had changes on top.
        minutes: by the wall.
        cpu_minutes: of all processes.
    """

    part: str
    date: str
    commit: str
    minutes: float
    cpu_minutes: float
    tests: int
    failures: int
    versions: str

    @property
    def has_passed(self) -> bool:
        return self.tests > 0 and self.failures == 0


# ---------------------------------------------------------------------------------------------------------------------
# The table


def read(record: Path) -> dict[str, Run]:
    """The table's runs, by part; empty if there is no file yet."""
    runs = {}
    for line in record.read_text().splitlines() if record.exists() else ():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0] in PARTS and cells[1] != NEVER and len(cells) == len(fields(Run)):
            part, date, commit, minutes, cpu_minutes, tests, failures, versions = cells
            runs[part] = Run(
                part, date, commit, float(minutes), float(cpu_minutes), int(tests), int(failures), versions
            )
    return runs


def write(record: Path, runs: Mapping[str, Run]) -> None:
    """The table, with an empty line for every part that never ran."""
    headings = ("part", "date", "commit", "minutes", "CPU minutes", "tests", "failures", "versions")
    rows = [headings, ("---",) * len(headings)]
    rows += [astuple(runs[part]) if part in runs else (part, NEVER, *("",) * (len(headings) - 2)) for part in PARTS]
    text = [
        "# What was tested, and when",
        "",
        "Written by `make test-all`, which runs the test suite in parts. `make test-all PART=zoo` runs one of them.",
        f"A part takes at most {MINUTES} minutes. A commit with a + had changes on top.",
        "",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
        "",
        *(f"- **{part}**: {content}." for part, content in PARTS.items()),
    ]
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("\n".join(text) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The tree and the versions


def git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)


def is_unchanged(root: Path, commit: str) -> bool:
    """Whether the working tree, the table aside, is that of `commit`."""
    others = ["--", ".", f":(exclude){RECORD}"]
    untracked = git(root, "ls-files", "--others", "--exclude-standard", *others)
    return git(root, "diff", "--quiet", commit, *others).returncode == 0 and untracked.stdout == ""


def present_commit(root: Path) -> str:
    """The commit that is checked out, with a "+" if the tree has changes on top; "unknown" outside git."""
    head = git(root, "rev-parse", "--short=12", "HEAD")
    if head.returncode != 0:
        return "unknown"
    commit = head.stdout.strip()
    return commit if is_unchanged(root, commit) else f"{commit}+"


def present_versions() -> str:
    """Of Python and of the packages that results depend on most."""
    versions = [f"Python {sys.version.partition(' ')[0]}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(versions)


def is_current(run: Run, root: Path) -> bool:
    """Whether `run` passed on this very tree, with these versions."""
    return run.has_passed and run.versions == present_versions() and is_unchanged(root, run.commit)


# ---------------------------------------------------------------------------------------------------------------------
# Running


def run_part(part: str, root: Path, arguments: Sequence[str] = DEFAULT_ARGUMENTS, minutes: float = MINUTES) -> Run:
    """Run one part with pytest, `arguments` added, and say how it went. Its output goes to the terminal.

    A part that takes longer than `minutes` is stopped, and counts as failed.
    """
    commit, before, start = present_commit(root), sum(os.times()[:4]), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # With a space, pytest would take "kernels" for the folder of that name, and load no conftest of tests/.
        command = [sys.executable, "-m", "pytest", f"--part={part}", f"--junitxml={report}", *arguments]
        try:
            has_passed = subprocess.run(command, cwd=root, timeout=60 * minutes).returncode == 0
        except subprocess.TimeoutExpired:
            typer.echo(f"{part}: stopped after {minutes:g} minutes; a part must take less")
            has_passed = False
        tests, failures = counts(report)
    return Run(
        part,
        datetime.now(UTC).strftime("%Y-%m-%d"),
        commit,
        round((time.monotonic() - start) / 60, 1),
        round((sum(os.times()[:4]) - before) / 60, 1),
        tests,
        failures if has_passed else max(failures, 1),
        present_versions(),
    )


def counts(report: Path) -> tuple[int, int]:
    """(tests run, failures and errors) of a JUnit report; zeros if pytest wrote none."""
    if not report.exists():
        return 0, 0
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    total: Counter[str] = Counter()
    for suite in suites:
        total.update({name: int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors")})
    return total["tests"] - total["skipped"], total["failures"] + total["errors"]


def run_parts(
    parts: Iterable[str], root: Path, arguments: Sequence[str], again: bool, minutes: float = MINUTES
) -> bool:
    """Run those of `parts` that are not current, all of them if `again`. True if every one has passed."""
    record = root / RECORD
    all_passed = True
    for part in parts:
        last = read(record).get(part)
        if last is not None and not again and is_current(last, root):
            typer.echo(f"{part}: passed on {last.date} at {last.commit}, {last.tests} tests")
            continue
        typer.echo(f"{part}: {PARTS[part]}")
        run = run_part(part, root, arguments, minutes)
        write(record, read(record) | {part: run})
        typer.echo(f"{part}: {run.tests} tests, {run.failures} failures, {run.minutes} minutes")
        all_passed &= run.has_passed
    return all_passed


def main(
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments for pytest, after a --.")] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="A part to run, passed before or not; may be repeated.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Run parts that have passed on this tree too.")] = False,
    minutes: Annotated[float, typer.Option(help="Stop a part after this time; more for a busy machine.")] = MINUTES,
) -> None:
    """Run the parts of the test suite, and keep docs/tested.md."""
    unknown = set(part or ()) - set(PARTS)
    if unknown:
        raise typer.BadParameter(f"no part is called {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    if not run_parts(part or PARTS, ROOT, arguments or DEFAULT_ARGUMENTS, again or bool(part), minutes):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
