"""What the backend gives to dynamo: a graph with regions, or one without, as a callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from cachedit_fx.capture import ends_at_break
from cachedit_fx.passes.block_loops import Detection
from cachedit_fx.passes.find_timestep import TimestepSource, timestep_of
from cachedit_fx.passes.plan_regions import RegionReport
from cachedit_fx.runtime.call import NO_LOOP, Uncached, call_of
from cachedit_fx.runtime.region import RegionInfo
from cachedit_fx.runtime.region_call import GraphCall
from cachedit_fx.runtime.registry import StateFinder

GRADIENTS = Uncached("gradients wanted", "gradients wanted: nothing is cached under grad mode")


class UncachedGraph:
    """A graph without a region. Where that was not asked for, its call is counted, and said once why.

    Args:
        timestep: where this graph has it; a later graph of the same call may go by it.
        is_fragment: it is clearly not a model of its own; called by itself, it is no call that could be cached.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        find: StateFinder,
        why: Uncached,
        timestep: TimestepSource | None = None,
        is_fragment: bool = False,
    ) -> None:
        self.forward, self.find, self.why = forward, find, why
        self.timestep, self.is_fragment = timestep, is_fragment

    def __call__(self, *args: Any) -> Any:
        cache = self.find(args)
        if cache.config is None or (self.is_fragment and cache.session().call is None):
            return self.forward(*args)
        with call_of(cache) as call:
            call.pass_by(self.why, timestep_of(self.timestep, args))
            return self.forward(*args)


class CachedGraph:
    """A graph with regions: has its part in a call, with the timestep that the call goes by.

    Args:
        forward: of the call's side of the graph (`GraphCall`), and the graph's inputs in one sequence.
        is_whole: nothing breaks the capture behind it.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        find: StateFinder,
        regions: Sequence[RegionInfo],
        timestep: TimestepSource | None,
        is_whole: bool = True,
    ) -> None:
        self.forward, self.find, self.regions, self.timestep = forward, find, regions, timestep
        self.is_whole = is_whole

    def __call__(self, *args: Any) -> Any:
        return self.run(args)

    def run(self, inputs: Sequence[Any]) -> Any:
        """The graph's results, from its inputs in order."""
        with call_of(self.find(inputs)) as call:
            keys = call.enter(self.regions, timestep_of(self.timestep, inputs))
            part = GraphCall(call, self.regions, keys)
            results = self.forward(part, inputs)
            if call.ran is not None and self.is_whole:
                call.ran.append((self.run, inputs, results))
            return results


def unpacking(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda cache, inputs: forward(cache, *inputs)


def is_fragment(gm: fx.GraphModule, find: StateFinder, found: Mapping[str, Any]) -> bool:
    """Whether a graph is only a part of what the user compiled: it ended at a graph break, or it has neither a block
    loop nor weights, as a helper function has that is a frame of its own."""
    if ends_at_break(gm):
        return True
    detection: Detection | None = found.get("block_loops")
    return find.anchors is None and (detection is None or not detection.loops)


def why_uncached(found: Mapping[str, Any]) -> Uncached:
    """What was looked for and not found."""
    detection: Detection | None = found.get("block_loops")
    report: RegionReport | None = found.get("regions")
    if detection is not None and not detection.loops:
        return Uncached(
            NO_LOOP,
            "no caching: no block loop was found, that is, no run of two or more alike sub-graphs of at least four "
            "operations in which each takes what the one before it made; cachedit_fx.explain(module, ...) shows more",
        )
    if detection is not None and not detection.chain:
        return Uncached(NO_LOOP, f"no caching: {'; '.join(detection.notes)}")
    if report is not None and report.refusals:
        return Uncached("no region to bypass", "no caching: " + "; ".join(report.refusals))
    return Uncached("switched off", "no caching: a pass that it needs is switched off by the option `passes`")
