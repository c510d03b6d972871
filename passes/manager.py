"""Runs the passes: orders them by their contracts, keeps facts fresh, checks, times, logs and dumps.

    for each pass:  facts that it needs and that are not known ──► their analyses
                    a rewrite that matched ──► drop the facts that it does not preserve

The manager alone lints and recompiles. `TORCH_TRACE=dir` records the graph before the first pass and after each pass
that changed it, as artifacts named `cachedit_fx_<pass>`. `TORCH_LOGS="+cachedit_fx"` shows a line for each pass, with
the difference in op counts.
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

from .base import Analysis, Facts, FlatGraph, Interface, Pass, Rewrite
from .graph_values import op_counts

logger = logging.getLogger(__name__)


class PassOrderError(ValueError):
    """The passes cannot be ordered, or a name is no pass's name."""


class PassContractError(RuntimeError):
    """A pass broke its contract."""


@dataclass(frozen=True)
class PassReport:
    """The report of one run of one pass.

    Attributes:
        matches: places that a rewrite matched. For an analysis, 1 if it found its fact, otherwise 0.
        seconds: wall time.
        skipped: why the pass did not run; None if it did.
        ops: op name -> the change in the number of its calls; filled in at log level INFO.
    """

    name: str
    matches: int = 0
    seconds: float = 0.0
    skipped: str | None = None
    ops: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The result of all passes together: the graph module, the facts about it, and a report for each run of a pass."""

    graph_module: fx.GraphModule
    facts: Facts
    reports: tuple[PassReport, ...]


class PassManager:
    """Runs passes in the order that their contracts ask for; between equals, in the order of `passes`.

    Args:
        passes: every required fact must be `FlatGraph` or provided by one of these passes.
        enabled: pass name -> bool; passes that are not named are on.

    Raises:
        PassOrderError: if no pass provides a required fact, or two analyses provide one fact; if passes wait for each
            other; if a name in `enabled` is no pass.
    """

    def __init__(self, passes: Sequence[Pass], enabled: Mapping[str, bool] | None = None) -> None:
        self.passes = order(passes)
        names = [pass_.name for pass_ in self.passes]
        for name in enabled or {}:
            if name not in names:
                raise PassOrderError(f"no pass is called {name!r}; the passes are {', '.join(names)}")
        self.enabled = dict.fromkeys(names, True) | dict(enabled or {})
        self._analyses = {pass_.provides: pass_ for pass_ in self.passes if isinstance(pass_, Analysis)}

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
        self.unavailable: set[type] = set()
        """Facts that an analysis looked for in the present graph and did not find."""
        self.reports: list[PassReport] = []

    def outcome(self) -> Outcome:
        self._record("before")
        for pass_ in self.manager.passes:
            if not self.manager.enabled[pass_.name]:
                self._report(PassReport(pass_.name, skipped="switched off"))
            elif isinstance(pass_, Analysis):
                self._establish(pass_.provides)
            elif isinstance(pass_, Rewrite):
                self._rewrite(pass_)
        return Outcome(self.gm, self.facts, tuple(self.reports))

    def _establish(self, kind: type) -> bool:
        """Run the fact's analysis if the fact is not known yet. Returns whether the fact is known then."""
        analysis = self.manager._analyses.get(kind)
        if (
            kind in self.facts
            or kind in self.unavailable
            or analysis is None
            or not self.manager.enabled[analysis.name]
        ):
            return kind in self.facts
        missing = self._missing(analysis)
        if missing is None:
            self._analyse(analysis)
        else:
            self.unavailable.add(kind)
            self._report(PassReport(analysis.name, skipped=missing))
        return kind in self.facts

    def _missing(self, pass_: Pass) -> str | None:
        """Why the pass cannot run; None if all that it requires is known."""
        for kind in pass_.uses:
            self._establish(kind)
        missing = [kind.__name__ for kind in pass_.requires if not self._establish(kind)]
        return f"nothing provides {', '.join(missing)}" if missing else None

    def _analyse(self, analysis: Analysis[Any]) -> None:
        before, start = _nodes_of(self.gm), time.perf_counter()
        fact = analysis.run(self.gm, self.facts)
        seconds = time.perf_counter() - start
        if _nodes_of(self.gm) != before:
            raise PassContractError(f"analysis {analysis.name!r} changed the graph; only a Rewrite may")
        if fact is None:
            self.unavailable.add(analysis.provides)
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
            for kind in rewrite.preserves:  # their analyses cannot run on a graph that is no longer flat
                self._establish(kind)
        ops = op_counts(self.gm) if logger.isEnabledFor(logging.INFO) else Counter()
        before, start = _nodes_of(self.gm), time.perf_counter()
        result = rewrite.run(self.gm, self.facts)
        self.gm = result.graph_module
        if result.matches:
            self.gm.graph.lint()
            self.gm.recompile()
            self.facts.keep(rewrite.preserves)
            self.unavailable.clear()
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
    def _check_provided(pass_: Pass, facts: Iterable[Any], expected: Iterable[type]) -> None:
        kinds = [type(fact) for fact in facts]
        contract = {pass_.provides} if isinstance(pass_, Analysis) else set(getattr(pass_, "provides", ()))
        wrong = [kind.__name__ for kind in kinds if kind not in contract]
        missing = [kind.__name__ for kind in expected if kind not in kinds]
        if wrong or missing:
            raise PassContractError(
                f"pass {pass_.name!r} must provide {sorted(kind.__name__ for kind in contract)}; "
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
    """A snapshot of the graph, unequal after any change to its nodes. FX replaces arguments, never changes them."""
    return [(node, node.target, node.args, node.kwargs) for node in gm.graph.nodes]


def order(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """Put every pass after the passes that provide its facts; otherwise keep the order of `passes`.

    The rewrite that ends `FlatGraph` comes after all other passes that require it.

    Raises:
        PassOrderError: if no order is possible, or if a fact would be dropped before a pass that requires it; if a
            pass leaves out a part of its contract.
    """
    for pass_ in passes:
        _check_contract(pass_)
    _check_providers(passes)
    enders = [pass_.name for pass_ in passes if _ends_flat_graph(pass_)]
    if len(enders) > 1:
        raise PassOrderError(
            f"only one pass may end FlatGraph, and these do: {', '.join(enders)}; a rewrite of the flat graph enters "
            "FlatGraph in what it preserves"
        )
    result: list[Pass] = []
    queue = list(passes)
    while queue:
        ready = next((pass_ for pass_ in queue if not any(_waits(pass_, other) for other in queue)), None)
        if ready is None:
            raise PassOrderError(f"these passes wait for each other: {', '.join(pass_.name for pass_ in queue)}")
        result.append(ready)
        queue.remove(ready)
    _check_lifetimes(result)
    return tuple(result)


def _check_contract(pass_: Pass) -> None:
    """Raise if the pass has no name, or does not say which graph it is for: it would match nothing, and say nothing."""
    if not isinstance(getattr(pass_, "name", None), str):
        raise PassOrderError(f"{type(pass_).__name__} has no name: give the class a `name`, such as 'fold_dropout'")
    if isinstance(pass_, Analysis) and not isinstance(getattr(pass_, "provides", None), type):
        raise PassOrderError(f"analysis {pass_.name!r} has no `provides`: name the type of the fact that it learns")
    if not pass_.requires:
        raise PassOrderError(
            f"pass {pass_.name!r} requires no fact, so nothing tells on which graph it runs. Enter in `requires` "
            "FlatGraph, to see the nodes of the blocks, or the fact of a later graph, such as Outline, in which each "
            "block is one call"
        )


def _check_providers(passes: Sequence[Pass]) -> None:
    names = Counter(pass_.name for pass_ in passes)
    analyses = Counter(pass_.provides for pass_ in passes if isinstance(pass_, Analysis))
    for name, count in [*names.items(), *((kind.__name__, count) for kind, count in analyses.items())]:
        if count > 1:
            raise PassOrderError(f"{name!r} names two passes, or is provided by two analyses")
    provisions = {FlatGraph, *(kind for pass_ in passes for kind in _provisions_of(pass_))}
    for pass_ in passes:
        missing = sorted(kind.__name__ for kind in pass_.requires if kind not in provisions)
        if missing:
            raise PassOrderError(f"pass {pass_.name!r} requires {missing}, which no pass provides")


def _check_lifetimes(ordered: Sequence[Pass]) -> None:
    """Raise if a rewrite drops a fact that a later pass requires and that no analysis can restore.

    An analysis restores its fact only as long as the facts that it requires itself are there or can be restored.
    """
    analyses = {pass_.provides: pass_ for pass_ in ordered if isinstance(pass_, Analysis)}
    facts: set[type] = {FlatGraph}
    droppers: dict[type, str] = {}

    def lost(kind: type) -> type | None:
        """The dropped fact for want of which `kind` is not to be had; None if it is."""
        if kind in facts:
            return None
        if kind not in analyses:
            return kind
        return next((fact for required in analyses[kind].requires if (fact := lost(required)) is not None), None)

    for pass_ in ordered:
        for kind in pass_.requires:
            fact = lost(kind)
            if fact is not None:
                needed = kind.__name__ if fact is kind else f"{kind.__name__}, hence {fact.__name__}"
                raise PassOrderError(
                    f"pass {pass_.name!r} requires {needed}, which pass {droppers[fact]!r} drops before it: "
                    f"enter {fact.__name__} in what that pass preserves, if it is still true after it, or move the pass"
                )
        last_chance = pass_.preserves if isinstance(pass_, Rewrite) and _ends_flat_graph(pass_) else ()
        facts |= {kind for kind in (*pass_.requires, *pass_.uses, *last_chance) if lost(kind) is None}
        if isinstance(pass_, Analysis):
            facts.add(pass_.provides)
        if isinstance(pass_, Rewrite):
            kept = {kind for kind in facts if kind in pass_.preserves or issubclass(kind, Interface)}
            droppers |= dict.fromkeys(facts - kept, pass_.name)
            facts = kept | set(pass_.provides)


def _provisions_of(pass_: Pass) -> tuple[type, ...]:
    if isinstance(pass_, Analysis):
        return (pass_.provides,)
    return pass_.provides if isinstance(pass_, Rewrite) else ()


def _waits(pass_: Pass, other: Pass) -> bool:
    """Whether `other`, which has not run yet, must run before `pass_`."""
    if pass_ is other:
        return False
    reads = (*pass_.requires, *pass_.uses)
    if any(kind in reads for kind in _provisions_of(other)):
        return True
    return _ends_flat_graph(pass_) and FlatGraph in other.requires


def _ends_flat_graph(pass_: Pass) -> bool:
    return isinstance(pass_, Rewrite) and FlatGraph in pass_.requires and FlatGraph not in pass_.preserves
