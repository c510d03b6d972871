"""CPU seconds: a budget for every test, and where those of a run went.

Wall time says little on a shared machine. CPU time here is user and system time of the process and of the children that
it has waited for, xdist's workers included. A child counts once it has ended.

CPU time differs too: the same work takes twice the seconds while others use the processor's caches and threads. So a
test that is over its budget is measured against a fixed piece of work, done right after it. The end of the run lists
the tests that are over what they may take even so. One that takes twice as long fails: the machine's speed may have
changed meanwhile, but hardly by that much.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Generator

import pytest
import torch
from parts import DEFAULT

BUDGET = 20.0
"""CPU seconds that a test may take, the set-up of its fixtures aside."""

RUN_BUDGET = 1440.0
"""CPU seconds that the default run may take: 1,200, and 240 for the tests of ranks."""

REFERENCE = 0.2
"""CPU seconds of `_work` on the machine that the budgets were chosen on, while it is idle."""

FAILING = 2.0
"""How many times the CPU seconds that a test may take make it fail."""

SHOWN_FILES = 15
PROPERTY, OVER = "cpu_seconds", "over_budget"


def cpu_seconds() -> float:
    """CPU time of this process and of its ended children, in seconds."""
    return sum(os.times()[:4])


def slowness() -> float:
    """How many times as long as on the idle machine work takes now; 1 at least."""
    start = time.process_time()
    _work()
    return max(1.0, (time.process_time() - start) / REFERENCE)


def _work() -> None:
    """Products of matrices, and as much Python."""
    matrix, count = torch.ones(256, 256), 0
    for _ in range(300):
        matrix = (matrix @ matrix).clamp_(0, 1)
        for number in range(5000):
            count += number


class CpuTime:
    """A plugin of pytest: fails a test far over its budget, and ends the run with a table of the costliest files.

    Each phase of a test (set-up, call, tear-down) lasts from the end of the one before. Its report carries the seconds
    as a property, so that those of xdist's workers reach the process that prints the table.
    """

    def __init__(self) -> None:
        self.by_file: defaultdict[str, float] = defaultdict(float)
        self.over: list[str] = []
        self.before = 0.0

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        self.before = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        now = cpu_seconds()
        seconds, self.before, allowed = now - self.before, now, allowed_seconds(item)
        report.user_properties.append((PROPERTY, seconds))
        if report.when == "call" and report.passed and seconds > allowed:
            times = seconds / (allowed * slowness())
            if times > 1:
                report.user_properties.append((OVER, f"{seconds:.1f} CPU seconds, {allowed:g} allowed"))
            if times > FAILING:
                report.outcome = "failed"
                report.longrepr = (
                    f"{seconds:.1f} CPU seconds, {allowed:g} allowed. Make the test cheaper, move it to a part of "
                    '`make test-all` with @pytest.mark.full("part"), or allow more with '
                    '@pytest.mark.budget(seconds, "reason").'
                )
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        seconds = properties.get(PROPERTY, 0.0)
        assert isinstance(seconds, float)
        self.by_file[report.nodeid.partition("::")[0]] += seconds
        if OVER in properties:
            self.over.append(f"over budget: {report.nodeid}: {properties[OVER]}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        """Total and costliest files. By now xdist's workers have ended, so their time counts as that of children."""
        if hasattr(config, "workerinput") or not self.by_file:
            return
        total = cpu_seconds()
        files = sorted(self.by_file.items(), key=lambda row: -row[1])
        rows = [(seconds, name) for name, seconds in files[:SHOWN_FILES]]
        rows.append((sum(seconds for _, seconds in files[SHOWN_FILES:]), "other files"))
        rows.append((total - sum(self.by_file.values()), "imports and collection"))
        is_over = total > RUN_BUDGET and config.getoption("part") == DEFAULT
        rows.append((total, "in all" + f", more than the {RUN_BUDGET:g} of the default run" * is_over))
        terminalreporter.section("CPU seconds")
        for seconds, name in rows:
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")
        for line in self.over:
            terminalreporter.write_line(line)


def allowed_seconds(item: pytest.Item) -> float:
    """CPU seconds that the test may take: those of its `budget` marker, or `BUDGET`."""
    marker = item.get_closest_marker("budget")
    if marker is None:
        return BUDGET
    seconds, reason = marker.args
    assert reason, f"{item.nodeid}: a budget needs its reason"
    return float(seconds)
