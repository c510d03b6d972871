"""Orders the passes by their contracts, runs, times and dumps them. It alone lints and recompiles.

`TORCH_TRACE=dir` records the graph before the first pass and after each pass that changed it, as artifacts named
`cachedit_fx_<pass>`; `TORCH_LOGS="+cachedit_fx"` shows one line a pass.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx
from torch._logging import trace_structured

from .base import Pass, facts

logger = logging.getLogger(__name__)


class PassOrderError(ValueError):
    """The passes cannot be ordered, or a name does not name a pass."""


@dataclass(frozen=True)
class PassReport:
    """What one pass did: matches, wall seconds, or `skipped` where it was switched off or lacked a fact."""

    name: str
    matches: int
    seconds: float
    skipped: str | None = None


class PassManager:
    """Runs passes in the order that their contracts ask for; of equals, in the order given.

    Args:
        passes: every fact that one requires must be provided by another.
        enabled: pass name -> bool; what is not named is on.

    Raises:
        PassOrderError: where a fact is provided by no pass, or passes wait for each other, or two that are on conflict,
            or a name in `enabled` is no pass.
    """

    def __init__(self, passes: Sequence[Pass], enabled: Mapping[str, bool] | None = None) -> None:
        self.passes = order(passes)
        self.enabled = {item.name: True for item in self.passes}
        self.reports: list[PassReport] = []
        for name, on in (enabled or {}).items():
            if name not in self.enabled:
                raise PassOrderError(f"no pass is called {name!r}; the passes are {', '.join(self.enabled)}")
            self.enabled[name] = on
        active = {item.name for item in self.passes if self.enabled[item.name]}
        for item in self.passes:
            clash = sorted(item.conflicts & active)
            if clash and item.name in active:
                raise PassOrderError(f"pass {item.name!r} cannot run beside {clash[0]!r}: switch one of them off")

    def run(self, gm: fx.GraphModule) -> fx.GraphModule:
        """Run the enabled passes on `gm`; a pass whose facts are absent, since an earlier one was off, is skipped."""
        self.reports = []
        self._record("before", gm)
        for item in self.passes:
            reason = self._reason_to_skip(item, gm)
            if reason is not None:
                self.reports.append(PassReport(item.name, 0, 0.0, reason))
                logger.info("%s: skipped, %s", item.name, reason)
                continue
            start = time.perf_counter()
            result = item.run(gm)
            gm = result.graph_module
            if result.matches:
                gm.graph.lint()
                gm.recompile()
            seconds = time.perf_counter() - start
            self.reports.append(PassReport(item.name, result.matches, seconds))
            logger.info("%s: %d matches, %.3f s", item.name, result.matches, seconds)
            if result.matches:
                self._record(item.name, gm)
        return gm

    def _reason_to_skip(self, item: Pass, gm: fx.GraphModule) -> str | None:
        if not self.enabled[item.name]:
            return "switched off"
        missing = sorted(item.requires - facts(gm).keys())
        return f"nothing provided {missing}" if missing else None

    @staticmethod
    def _record(name: str, gm: fx.GraphModule) -> None:
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"cachedit_fx_{name}", "encoding": "string"},
            payload_fn=lambda: gm.print_readable(print_output=False, include_stride=True, include_device=True),
        )


def order(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """Put every pass behind those that provide what it requires or uses, otherwise keeping the order given.

    Raises:
        PassOrderError: where that is not possible.
    """
    provided = {fact for item in passes for fact in item.provides}
    for item in passes:
        missing = sorted(item.requires - provided)
        if missing:
            raise PassOrderError(f"pass {item.name!r} requires {missing}, which no pass provides")
    ordered: list[Pass] = []
    waiting = list(passes)
    while waiting:
        ready = next((item for item in waiting if not _waits(item, waiting)), None)
        if ready is None:
            raise PassOrderError(f"these passes wait for each other: {', '.join(item.name for item in waiting)}")
        ordered.append(ready)
        waiting.remove(ready)
    return tuple(ordered)


def _waits(item: Pass, others: Sequence[Pass]) -> bool:
    """Whether another of `others` has yet to provide what `item` reads."""
    due = {fact for other in others if other is not item for fact in other.provides}
    return bool((item.requires | item.uses) & due)
