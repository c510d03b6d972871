"""Applies each fault of `faults.toml` to a copy of the checkout, and shows that the tests named there fail.

  python tests/faults/run.py

A fault is one line of the package, broken as a slip of the keyboard or of the mind would break it. The tests that the
list names for a fault belong to the default suite. First they all run on the untouched copy and must pass. Then every
fault gets a pytest process of its own, in which each of its tests must fail.

Results are kept in `runs/faults.json`. A run that was stopped goes on there; a change of the sources or of the tests
starts anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("faults.toml")
RESULTS = ROOT / "runs" / "faults.json"
SOURCES = ("cachedit_fx", "kernels", "passes", "tests", "pyproject.toml")
"""What results depend on, `tests/faults` aside."""
TIME_LIMIT = 900
"""Seconds of one pytest process."""

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
console = Console(highlight=False)


@dataclass(frozen=True)
class Fault:
    """One broken line.

    Attributes:
        name: what goes wrong, in a few words.
        file: relative to the checkout.
        before: text of one line, found exactly once in the file.
        after: what takes its place.
        seen_by: node ids of tests that fail then; without parameters, one case at least.
    """

    name: str
    file: str
    before: str
    after: str
    seen_by: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What a pytest process said: node id -> "passed", "failed", "error" or "skipped"; and its CPU seconds."""

    outcomes: Mapping[str, str]
    cpu_seconds: float
    output: str

    def of(self, test: str) -> str:
        """The outcome of a test over all its cases, the worst first; "not run" if there was none."""
        cases = {outcome for name, outcome in self.outcomes.items() if name == test or name.startswith(f"{test}[")}
        return next((outcome for outcome in ("failed", "error", "passed", "skipped") if outcome in cases), "not run")


class FaultError(Exception):
    """The list does not fit the checkout, or a test fails without a fault. The message says which."""


def read_faults(path: Path = LIST) -> list[Fault]:
    """The list, in its order."""
    entries = tomllib.loads(path.read_text())["fault"]
    return [Fault(**entry | {"seen_by": tuple(entry["seen_by"])}) for entry in entries]


def tracked_files(root: Path) -> list[str]:
    """Files of the checkout that git does not ignore, relative to it."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return sorted(name for name in set(names) if name and (root / name).is_file())


def digest_of(root: Path, files: Iterable[str]) -> str:
    """Equal for two checkouts whose sources and tests are equal."""
    digest = hashlib.sha256()
    for name in files:
        if name.startswith(SOURCES) and not name.startswith("tests/faults/"):
            digest.update(f"{name}\0".encode() + hashlib.sha256((root / name).read_bytes()).digest())
    return digest.hexdigest()


class Workspace:
    """A copy of the checkout in which faults are made and tests run.

    Args:
        folder: empty; holds the copy, compiled code, and what tests write.
        files: to copy, relative to the checkout.
    """

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.folder, self.checkout = folder, folder / "checkout"
        for name in files:
            target = self.checkout / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)

    @contextmanager
    def broken_by(self, fault: Fault) -> Iterator[None]:
        """The copy with the fault in it.

        Raises:
            FaultError: if the line is not there, or not once.
        """
        path = self.checkout / fault.file
        source = path.read_text()
        if source.count(fault.before) != 1:
            raise FaultError(f"{fault.name}: {fault.before!r} is {source.count(fault.before)} times in {fault.file}")
        _write(path, source.replace(fault.before, fault.after))
        try:
            yield
        finally:
            _write(path, source)

    def run(self, tests: Sequence[str]) -> Result:
        """Run tests in a process of their own, which Ctrl-C ends with all that it started."""
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", f"--basetemp={self.folder / 'tests'}", *tests]
        # The copy comes first on the path. Examples are the same every time. Compiled code is shared: its keys hold
        # all that it is made from.
        environment = os.environ | {
            "PYTHONPATH": str(self.checkout),
            "CI": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "compiled"),
        }
        before = _cpu_seconds(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(
            command,
            cwd=self.checkout,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            _end(process)
            output = f"stopped after {TIME_LIMIT} s"
        except BaseException:
            _end(process)
            raise
        outcomes = _outcomes(report) if process.returncode in (0, 1) else {}
        return Result(outcomes, _cpu_seconds(resource.RUSAGE_CHILDREN) - before, output)


def _write(path: Path, source: str) -> None:
    """Write a source, and drop its bytecode: Python takes a file of equal size and second for unchanged."""
    path.write_text(source)
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def _end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _cpu_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _outcomes(report: Path) -> dict[str, str]:
    """Node id -> outcome, from pytest's JUnit report."""
    outcomes = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
        file = case.get("classname", "").replace(".", "/") + ".py"
        outcomes[f"{file}::{case.get('name')}"] = "failed" if outcome == "failure" else outcome
    return outcomes


class Record:
    """Results by name, in a file. A result counts only for the very sources and the very entry that it was for."""

    def __init__(self, path: Path, digest: str) -> None:
        self.path, self.digest = path, digest
        self.entries: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def seconds(self, name: str, content: object) -> float | None:
        """CPU seconds of the run in which all was as it must be; None if there was none."""
        entry = self.entries.get(name, {})
        return entry["cpu_seconds"] if entry.get("key") == self._key(content) else None

    def keep(self, name: str, content: object, cpu_seconds: float) -> None:
        self.entries[name] = {"key": self._key(content), "cpu_seconds": round(cpu_seconds, 1)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staging = self.path.with_suffix(".unfinished")
        staging.write_text(json.dumps(self.entries, indent=1) + "\n")
        staging.replace(self.path)

    def _key(self, content: object) -> str:
        return hashlib.sha256(f"{self.digest} {content!r}".encode()).hexdigest()


def check_untouched(workspace: Workspace, faults: Sequence[Fault], record: Record) -> float:
    """Run every named test without a fault; CPU seconds.

    Raises:
        FaultError: if one does not pass.
    """
    tests = sorted({test for fault in faults for test in fault.seen_by})
    seconds = record.seconds("no fault", tests)
    if seconds is None:
        result = workspace.run(tests)
        wrong = {test: result.of(test) for test in tests if result.of(test) != "passed"}
        if wrong:
            told = "".join(f"\n  {test}: {outcome}" for test, outcome in wrong.items())
            raise FaultError(f"{result.output[-3000:]}\nwithout a fault, these tests of the list do not pass:{told}")
        seconds = result.cpu_seconds
        record.keep("no fault", tests, seconds)
    return seconds


def check_fault(workspace: Workspace, fault: Fault, record: Record) -> tuple[dict[str, str], float]:
    """Make the fault and run its tests: the outcomes that are not "failed", by test, and CPU seconds."""
    seconds = record.seconds(fault.name, astuple(fault))
    if seconds is not None:
        return {}, seconds
    with workspace.broken_by(fault):
        result = workspace.run(fault.seen_by)
    blind = {test: result.of(test) for test in fault.seen_by if result.of(test) != "failed"}
    if not blind:
        record.keep(fault.name, astuple(fault), result.cpu_seconds)
    return blind, result.cpu_seconds


def look_for_tests(workspace: Workspace, fault: Fault, tests: Sequence[str]) -> None:
    """Print which of `tests` see the fault."""
    with workspace.broken_by(fault):
        result = workspace.run(tests)
    failed = sorted(test for test, outcome in result.outcomes.items() if outcome in ("failed", "error"))
    console.print(f"{fault.name}: {len(failed)} of {len(result.outcomes)} tests, {result.cpu_seconds:.0f} CPU s")
    for test in failed:
        console.print(f"  {result.outcomes[test]:6} {escape(test)}", soft_wrap=True)
    if not result.outcomes:
        console.print(escape(result.output[-2000:]), soft_wrap=True)


def chosen_faults(only: Sequence[str]) -> list[Fault]:
    """The faults of these names; all, if there are none."""
    faults = read_faults()
    unknown = set(only) - {fault.name for fault in faults}
    if unknown:
        raise typer.BadParameter(f"no fault is called {', '.join(sorted(unknown))}", param_hint="--only")
    return [fault for fault in faults if not only or fault.name in only]


@app.command()
def run(
    only: Annotated[list[str] | None, typer.Option(help="Name of a fault to try; may be repeated.")] = None,
    tests: Annotated[
        list[str] | None,
        typer.Option(help="Look for tests: run this file or node id with each fault, and show what fails."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Leave earlier results out of account.")] = False,
) -> None:
    """Break one line after the other in a copy of the checkout, and show that the default test suite sees it.

    Prints a row for each fault: its CPU seconds, and the tests that failed, as they must. Ctrl-C stops the run, which
    goes on at the same place when it is started again. Exit code: 0 if every fault was seen, 1 if one was not, 2 if the
    list does not fit the checkout or a test fails without a fault, 130 if it was stopped.

    Examples

    `python tests/faults/run.py`

    `python tests/faults/run.py --only branch_memory --again` (one fault, tried before or not)

    `python tests/faults/run.py --only branch_memory --tests tests/runtime/test_dbcache.py` (which tests see it)
    """
    faults = chosen_faults(only or ())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidies up as Ctrl-C does
    try:
        with tempfile.TemporaryDirectory(prefix="cachedit-faults-", ignore_cleanup_errors=True) as folder:
            files = tracked_files(ROOT)
            workspace = Workspace(Path(folder), files)
            if tests:
                for fault in faults:
                    look_for_tests(workspace, fault, tests)
                return
            record = Record(RESULTS, digest_of(ROOT, files))
            if again:
                record.entries = {}
            is_complete = check_all(workspace, faults, record)
    except FaultError as error:
        console.print(escape(str(error)), soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("Stopped. Start it again to go on.")
        raise typer.Exit(130) from None
    raise typer.Exit(0 if is_complete else 1)


def check_all(workspace: Workspace, faults: Sequence[Fault], record: Record) -> bool:
    """Check every fault and print a row for each. True if all were seen."""
    width = max(len(fault.name) for fault in faults)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("no fault", total=len(faults) + 1)
        total = check_untouched(workspace, faults, record)
        console.print(f"{'fault':{width}}  CPU s  tests that fail")
        console.print(f"{'(none)':{width}}  {total:5.1f}  none, as it must be")
        unseen = []
        for fault in faults:
            progress.update(task, description=fault.name, advance=1)
            blind, seconds = check_fault(workspace, fault, record)
            total += seconds
            names = ", ".join(test.partition("::")[2] for test in fault.seen_by)
            if blind:
                unseen.append(fault.name)
                names = "NOT SEEN: " + ", ".join(f"{test} {outcome}" for test, outcome in blind.items())
            console.print(f"{fault.name:{width}}  {seconds:5.1f}  {escape(names)}", soft_wrap=True)
    now = _cpu_seconds(resource.RUSAGE_SELF) + _cpu_seconds(resource.RUSAGE_CHILDREN)
    console.print(f"{len(faults) - len(unseen)} of {len(faults)} faults seen")
    console.print(f"{total / 60:.1f} CPU minutes, of these {now / 60:.1f} now")
    return not unseen


if __name__ == "__main__":
    app()
