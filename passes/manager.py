"""Runs the passes: orders them by their contracts, keeps facts fresh, checks, times, logs and dumps. It alone lints and
recompiles.

    for each pass:  facts that it needs and that are not known ──► their analyses
                    a rewrite that matched ──► drop the facts that it does not preserve

`TORCH_TRACE=dir` records the graph before the first pass and after each pass that changed it, as artifacts named
`cachedit_fx_<pass>`. `TORCH_LOGS="+cachedit_fx"` shows a line for each pass, with the difference in op counts.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch._logging import trace_structured

from .base import Analysis, Facts, FlatGraph, Pass, Rewrite
from .graph_values import op_counts

logger = logging.getLogger(__name__)


class PassOrderError(ValueError):
    """The passes cannot be ordered, or a name does not name a pass."""


class PassContractError(RuntimeError):
    """A pass did not do what its contract says."""


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Attributes:
        matches: places that a rewrite matched; 1 or 0 for an analysis, by whether it found anything.
        seconds: wall time.
        skipped: why it did not run; None if it did.
        ops: op name -> how many more there are after the pass; filled in at log level INFO.
    """

    name: str
    matches: int = 0
    seconds: float = 0.0
    skipped: str | None = None
    ops: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What all passes together made of a graph: the graph module, what is known of it, and a report for each run."""

    graph_module: fx.GraphModule
    facts: Facts
    reports: tuple[PassReport, ...]


class PassManager:
    """Runs passes in the order that their contracts ask for, otherwise in the order given.

    Args:
        passes: every required fact must be provided by one of them, or be `FlatGraph`.
        enabled: pass name -> bool; passes that are not named are on.

    Raises:
        PassOrderError: if no pass provides a required fact, or two analyses provide one fact, or passes wait for each
            other, or a name in `enabled` is no pass.
    """

    def __init__(self, passes: Sequence[Pass], enabled: Mapping[str, bool] | None = None) -> None:
        self.passes = order(passes)
        names = [item.name for item in self.passes]
        for name in enabled or {}:
            if name not in names:
                raise PassOrderError(f"no pass is called {name!r}; the passes are {', '.join(names)}")
        self.enabled = dict.fromkeys(names, True) | dict(enabled or {})
        self._analyses = {item.provides: item for item in self.passes if isinstance(item, Analysis)}

    def run(self, gm: fx.GraphModule) -> Outcome:
        """Run the enabled passes on `gm`. A pass that lacks a fact is skipped.

        Raises:
            PassContractError: if an analysis changed the graph, or a pass did not provide its facts.
        """
        return _Run(self, gm).outcome()


class _Run:
    """One graph on its way through the passes."""

    def __init__(self, manager: PassManager, gm: fx.GraphModule) -> None:
        self.manager, self.gm = manager, gm
        self.facts = Facts([FlatGraph()])
        self.barren: set[type] = set()
        """Facts that were looked for in this very graph and are not to be had."""
        self.reports: list[PassReport] = []

    def outcome(self) -> Outcome:
        self._record("before")
        for item in self.manager.passes:
            if not self.manager.enabled[item.name]:
                self._report(PassReport(item.name, skipped="switched off"))
            elif isinstance(item, Analysis):
                self._establish(item.provides)
            elif isinstance(item, Rewrite):
                self._rewrite(item)
        return Outcome(self.gm, self.facts, tuple(self.reports))

    def _establish(self, kind: type) -> bool:
        """Whether the fact is known; its analysis is run if need be."""
        analysis = self.manager._analyses.get(kind)
        if kind in self.facts or kind in self.barren or analysis is None or not self.manager.enabled[analysis.name]:
            return kind in self.facts
        missing = self._missing(analysis)
        if missing is None:
            self._analyse(analysis)
        else:
            self.barren.add(kind)
            self._report(PassReport(analysis.name, skipped=missing))
        return kind in self.facts

    def _missing(self, item: Pass) -> str | None:
        """Why the pass cannot run; None if all that it requires is known."""
        for kind in item.uses:
            self._establish(kind)
        missing = [kind.__name__ for kind in item.requires if not self._establish(kind)]
        return f"nothing provides {', '.join(missing)}" if missing else None

    def _analyse(self, analysis: Analysis[Any]) -> None:
        before, start = _nodes_of(self.gm), time.perf_counter()
        fact = analysis.run(self.gm, self.facts)
        seconds = time.perf_counter() - start
        if _nodes_of(self.gm) != before:
            raise PassContractError(f"analysis {analysis.name!r} changed the graph; only a Rewrite may")
        if fact is None:
            self.barren.add(analysis.provides)
        else:
            self._check_provided(analysis, [fact], [analysis.provides])
            self.facts.put(fact)
        self._report(PassReport(analysis.name, int(fact is not None), seconds))

    def _rewrite(self, rewrite: Rewrite) -> None:
        missing = self._missing(rewrite)
        if missing is not None:
            self._report(PassReport(rewrite.name, skipped=missing))
            return
        if FlatGraph in self.facts and FlatGraph not in rewrite.preserves:
            for kind in rewrite.preserves:  # the last chance to learn them
                self._establish(kind)
        ops = op_counts(self.gm) if logger.isEnabledFor(logging.INFO) else Counter()
        before, start = _nodes_of(self.gm), time.perf_counter()
        result = rewrite.run(self.gm, self.facts)
        self.gm = result.graph_module
        if result.matches:
            self.gm.graph.lint()
            self.gm.recompile()
            self.facts.keep(rewrite.preserves)
            self.barren.clear()
        elif _nodes_of(self.gm) != before:
            raise PassContractError(f"rewrite {rewrite.name!r} changed the graph and says that it matched nothing")
        self._check_provided(rewrite, result.facts, rewrite.provides if result.matches else ())
        for fact in result.facts:
            self.facts.put(fact)
        seconds = time.perf_counter() - start
        after = op_counts(self.gm) if ops else Counter()
        change = {name: after[name] - ops[name] for name in sorted(ops | after) if after[name] != ops[name]}
        self._report(PassReport(rewrite.name, result.matches, seconds, ops=change))
        if result.matches:
            self._record(rewrite.name)

    @staticmethod
    def _check_provided(item: Pass, facts: Iterable[Any], expected: Iterable[type]) -> None:
        kinds = [type(fact) for fact in facts]
        allowed = {item.provides} if isinstance(item, Analysis) else set(getattr(item, "provides", ()))
        wrong = [kind.__name__ for kind in kinds if kind not in allowed]
        missing = [kind.__name__ for kind in expected if kind not in kinds]
        if wrong or missing:
            raise PassContractError(
                f"pass {item.name!r} must provide {sorted(kind.__name__ for kind in allowed)}; "
                f"it provided {[kind.__name__ for kind in kinds]}"
            )

    def _report(self, report: PassReport) -> None:
        self.reports.append(report)
        if report.skipped is not None:
            logger.info("%s: skipped, %s", report.name, report.skipped)
            return
        ops = "".join(f", {name} {change:+d}" for name, change in report.ops.items())
        logger.info("%s: %d matches, %.3f s%s", report.name, report.matches, report.seconds, ops)

    def _record(self, name: str) -> None:
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"cachedit_fx_{name}", "encoding": "string"},
            payload_fn=lambda: self.gm.print_readable(print_output=False, include_stride=True, include_device=True),
        )


def _nodes_of(gm: fx.GraphModule) -> list[tuple[Any, ...]]:
    """Unequal after any change to the graph's nodes or their arguments, which are replaced, never changed in place."""
    return [(node, node.target, node.args, node.kwargs) for node in gm.graph.nodes]


def order(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """Put every pass after those that provide its facts, and the rewrite that ends `FlatGraph` after all others that
    require it. Otherwise keep the order given.

    Raises:
        PassOrderError: if that is not possible, or if a fact would be gone before a pass that requires it.
    """
    _check_providers(passes)
    ordered: list[Pass] = []
    waiting = list(passes)
    while waiting:
        ready = next((item for item in waiting if not any(_waits(item, other) for other in waiting)), None)
        if ready is None:
            raise PassOrderError(f"these passes wait for each other: {', '.join(item.name for item in waiting)}")
        ordered.append(ready)
        waiting.remove(ready)
    _check_lifetimes(ordered)
    return tuple(ordered)


def _check_providers(passes: Sequence[Pass]) -> None:
    names = Counter(item.name for item in passes)
    analyses = Counter(item.provides for item in passes if isinstance(item, Analysis))
    for name, count in [*names.items(), *((kind.__name__, count) for kind, count in analyses.items())]:
        if count > 1:
            raise PassOrderError(f"{name!r} names two passes, or is provided by two analyses")
    provided = {FlatGraph, *(kind for item in passes for kind in _provided(item))}
    for item in passes:
        missing = sorted(kind.__name__ for kind in item.requires if kind not in provided)
        if missing:
            raise PassOrderError(f"pass {item.name!r} requires {missing}, which no pass provides")


def _check_lifetimes(ordered: Sequence[Pass]) -> None:
    """Raise if a rewrite drops a fact that a later pass requires and that no analysis can restore."""
    restorable = {item.provides for item in ordered if isinstance(item, Analysis)}
    known: set[type] = {FlatGraph}
    dropped_by: dict[type, str] = {}
    for item in ordered:
        for kind in item.requires:
            if kind not in known | restorable:
                raise PassOrderError(
                    f"pass {item.name!r} requires {kind.__name__}, which pass {dropped_by[kind]!r} drops before it: "
                    f"enter {kind.__name__} in what that pass preserves, if it is still true after it, or move the pass"
                )
        if isinstance(item, Rewrite):
            dropped_by |= dict.fromkeys(known - set(item.preserves), item.name)
            known = (known & set(item.preserves)) | set(item.provides)


def _provided(item: Pass) -> tuple[type, ...]:
    if isinstance(item, Analysis):
        return (item.provides,)
    return item.provides if isinstance(item, Rewrite) else ()


def _waits(item: Pass, other: Pass) -> bool:
    """Whether `other`, which has not run yet, must run before `item`."""
    if item is other:
        return False
    reads = (*item.requires, *item.uses)
    if any(kind in reads for kind in _provided(other)):
        return True
    ends_flat_graph = isinstance(item, Rewrite) and FlatGraph in item.requires and FlatGraph not in item.preserves
    return ends_flat_graph and FlatGraph in other.requires
