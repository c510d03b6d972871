"""Graphs for the tests of the passes: what dynamo captures, passes run over it, op counts, stand-in caches."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cachedit_fx.config.cache import Cut
from cachedit_fx.passes.base import Pass
from cachedit_fx.passes.block_loops import Detection
from cachedit_fx.passes.detect_block_loops import DetectBlockLoops
from cachedit_fx.passes.graph_values import op_counts, target_name
from cachedit_fx.passes.insert_cache_branch import InsertCacheBranch
from cachedit_fx.passes.manager import Outcome, PassManager
from cachedit_fx.passes.normalize import Normalize
from cachedit_fx.passes.outline_blocks import OutlineBlocks
from cachedit_fx.passes.plan_regions import PlanRegions, RegionReport
from cachedit_fx.runtime import clock, hoisted_memory, hoisting, session

UNMOVED = {"hoist_invariants": False}
"""Passes for tests that count a step's work: every call computes all of it anew."""


@dataclass
class Captured:
    """One graph as dynamo hands it to a backend, weights lifted.

    Attributes:
        gm: the graph module; the passes may change it.
        inputs: the real inputs of the call that was captured.
        expected: what the graph returned for them before any pass.
    """

    gm: fx.GraphModule
    inputs: list[Any]
    expected: tuple[Any, ...]

    def copy(self) -> fx.GraphModule:
        """Another graph module of the same graph, for the passes to change."""
        return fx.GraphModule(self.gm, copy.deepcopy(self.gm.graph))

    def equals(self, results: Sequence[Any]) -> bool:
        """Whether `results` are bit for bit what was captured."""
        return len(results) == len(self.expected) and all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(results, self.expected, strict=True)
        )

    def same(self, gm: Callable[..., Any], *first: Any) -> bool:
        """Whether `gm` gives for the captured inputs, behind `first`, bit for bit what the captured graph gave."""
        return self.equals(run_graph(gm, self.inputs, *first))


def capture(module: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Captured:
    """The one graph that dynamo makes of `module(*args, **kwargs)`."""
    found: list[Captured] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def first_call(*inputs: Any) -> Any:
            real = copied(inputs)
            expected = gm(*inputs)
            found.append(Captured(gm, real, tuple(expected)))
            return expected

        return first_call

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    (graph,) = found
    return graph


def copied(inputs: Sequence[Any]) -> list[Any]:
    """Inputs that a graph may write to: tensors cloned, weights shared."""
    return [
        item.clone() if isinstance(item, torch.Tensor) and not isinstance(item, torch.nn.Parameter) else item
        for item in inputs
    ]


def run_graph(gm: Callable[..., Any], inputs: Sequence[Any], *first: Any) -> tuple[Any, ...]:
    """Results of one call on copies of `inputs`."""
    with torch.no_grad():
        return tuple(gm(*first, *copied(inputs)))


def outcome_of(gm: fx.GraphModule, *passes: Pass) -> Outcome:
    """What `passes`, in the manager's hands, make of `gm`."""
    return PassManager(passes).run(gm)


def run_passes(gm: fx.GraphModule, *passes: Pass) -> fx.GraphModule:
    """`gm` after `passes`."""
    return outcome_of(gm, *passes).graph_module


def detected(gm: fx.GraphModule, **options: Any) -> Detection:
    """Normalize, then detect."""
    return outcome_of(gm, Normalize(), DetectBlockLoops(**options)).facts[Detection]


def planned(
    gm: fx.GraphModule,
    first: int,
    last: int,
    scope: Any = "model",
    kept: Sequence[int] | None = None,
    to_output: bool = False,
    **options: Any,
) -> RegionReport:
    """Normalize, detect, plan. With `kept`, each block is a region of its own, but these."""
    cut = Cut(first, last) if kept is None else Cut(first, last, "block", tuple(kept))
    plan = PlanRegions([cut], scope, to_output)
    return outcome_of(gm, Normalize(), DetectBlockLoops(**options), plan).facts[RegionReport]


def rewritten(
    gm: fx.GraphModule,
    first: int = 1,
    last: int = 0,
    *more: Pass,
    scope: Any = "model",
    granularity: Any = "block",
    canonical_layout: bool = True,
    **options: Any,
) -> fx.GraphModule:
    """The whole pipeline but the lowering, and `more` passes: the graph takes a region call before its inputs."""
    return run_passes(
        gm,
        Normalize(),
        DetectBlockLoops(**options),
        PlanRegions([Cut(first, last)], scope),
        OutlineBlocks(granularity, canonical_layout),
        InsertCacheBranch(),
        *more,
    )


def ops(gm: fx.GraphModule) -> Counter[str]:
    """How often each op stands in the graph, pieces and branches included."""
    return op_counts(gm)


def find(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    """The nodes that call `name`, in order."""
    return [n for n in gm.graph.nodes if n.op in ("call_function", "call_method") and target_name(n) == name]


class Computes:
    """A stand-in for the run time's side of a call: every region is computed. Remembers what it was asked."""

    def __init__(self) -> None:
        self.decided: list[tuple[int, Any, Any, tuple[Any, ...]]] = []
        self.ran: list[int] = []

    def decide(self, region: int, reference: Any, hidden: Any, streams: tuple[Any, ...]) -> int:
        self.decided.append((region, reference, hidden, streams))
        return region

    def run(self, region: int, compute: Any, inputs: Sequence[Any], *bypassed: Any) -> Any:
        assert region == self.decided[-1][0]
        self.ran.append(region)
        return compute(*inputs)


class Restores(Computes):
    """Computes a region the first time and keeps its residuals; from then on adds them to the bases."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[int, list[Any]] = {}
        self.bypassed = 0

    def run(self, region: int, compute: Any, inputs: Sequence[Any], *bypassed: Any) -> Any:
        bases, continued = bypassed
        values = bases(*continued)
        if region in self.stored:
            self.bypassed += 1
            pairs = zip(self.stored[region], values, strict=True)
            return tuple(kept if base is None else (base.double() + kept).to(base.dtype) for kept, base in pairs)
        results = super().run(region, compute, inputs)
        self.stored[region] = [
            result if base is None else result.double() - base.double()
            for result, base in zip(results, values, strict=True)
        ]
        return results


def on_a_device(monkeypatch: Any) -> None:
    """Let the run time take every tensor for one on a device, whose numbers the host has to wait for."""
    for module in (clock, session, hoisting, hoisted_memory):
        monkeypatch.setattr(module, "on_host", lambda tensor: False)
