"""Orders, checks, runs, times and dumps the passes. It alone lints and recompiles.

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

from cachedit_fx.passes.base import Pass, facts

logger = logging.getLogger(__name__)


class PassOrderError(ValueError):
    """A pass needs a fact that no pass before it provides, or a name does not name a pass."""


@dataclass(frozen=True)
class PassReport:
    """What one pass did: matches, wall seconds, or `skipped` where it was switched off or lacked a fact."""

    name: str
    matches: int
    seconds: float
    skipped: str | None = None


class PassManager:
    """Runs passes in their order.

    Args:
        passes: in order. Every fact that a pass requires must be provided by an earlier one.
        enabled: pass name -> bool; what is not named is on.

    Raises:
        PassOrderError: on a bad order, or a name in `enabled` that is no pass or cannot be switched off.
    """

    def __init__(self, passes: Sequence[Pass], enabled: Mapping[str, bool] | None = None) -> None:
        self.passes = tuple(passes)
        self.enabled = dict(enabled or {})
        self.reports: list[PassReport] = []
        self._check_order()
        self._check_names()

    def _check_order(self) -> None:
        available: set[str] = set()
        for item in self.passes:
            missing = sorted(item.requires - available)
            if missing:
                raise PassOrderError(f"pass {item.name!r} requires {missing}, which no pass before it provides")
            available |= item.provides

    def _check_names(self) -> None:
        known = {item.name: item for item in self.passes}
        for name, on in self.enabled.items():
            if name not in known:
                raise PassOrderError(f"no pass is called {name!r}; the passes are {', '.join(known)}")
            if not on and not known[name].optional:
                raise PassOrderError(f"pass {name!r} cannot be switched off: every later pass stands on it")

    def run(self, gm: fx.GraphModule) -> fx.GraphModule:
        """Run the enabled passes on `gm`; a pass whose facts are absent, since an earlier one was off, is skipped."""
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
        if not self.enabled.get(item.name, True):
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
