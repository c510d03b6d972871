"""What a step costs beyond the compiled pieces themselves: medians of calls by turns, in one process, on one thread.

pieces alone    the rewritten graph called by itself, regions restored from a list: no guards, no decision, no store
cached          a cached step of the compiled model
computed        a computed step, which stores
no cache        the same graph, cut and compiled alike, without the cache pass
torch.compile   the whole graph by the inner backend
eager           the plain model
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

import cachedit_fx
from cachedit_fx.backend import CachedGraph, compile_graph
from cachedit_fx.bench.flux import Size, inputs, make
from cachedit_fx.options import Options, parse_options

PIECES, CACHED, COMPUTED, UNCUT, WHOLE, EAGER = (
    "pieces alone",
    "cached step",
    "computed step",
    "no cache",
    "torch.compile",
    "eager",
)
RATIOS = ((CACHED, PIECES), (COMPUTED, UNCUT), (COMPUTED, WHOLE), (CACHED, EAGER))
"""The table's rows: what is measured over what."""
WARMUP = 5
"""Calls ahead of those that count, the compiling one among them."""

MAX_STEPS = 1000
"""Of the one generation that all calls of a kind belong to."""

Step = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Overhead:
    """Seconds of each call of each kind of step, in order; call i of all kinds was made in one turn."""

    blocks: int
    seconds: Mapping[str, Sequence[float]]

    def ratio(self, above: str, below: str) -> float:
        """Median over the turns of one kind's time over another's."""
        return median(a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True))

    def extra(self, above: str, below: str) -> float:
        """Median over the turns of the difference, in seconds."""
        return median(a - b for a, b in zip(self.seconds[above], self.seconds[below], strict=True))


def measure(
    size: Size, rounds: int, first: int = 1, tell: Callable[[str], None] = lambda what: None, **options: Any
) -> Overhead:
    """Compile the model of `size` in all ways, and time `rounds` calls of each by turns.

    Args:
        first: F, the blocks that a cached step computes.
        options: of `cachedit_fx.compile`, for ours; `inner_backend` is plain `torch.compile`'s too.
    """
    torch.set_num_threads(1)
    module = make(size)
    steps: dict[str, Step] = {}
    with torch.no_grad():
        for name, build in _builders(first, options).items():
            tell(f"{name}, {size.blocks} blocks")
            steps[name] = build(copy.deepcopy(module), size)
            for step in range(WARMUP):
                steps[name](inputs(size, step))
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(rounds):
            tell(f"round {turn + 1} of {rounds}")
            given = inputs(size, WARMUP + turn)
            for name in steps if turn % 2 else reversed(steps):
                begun = time.perf_counter()
                steps[name](given)
                seconds[name].append(time.perf_counter() - begun)
    return Overhead(size.blocks, seconds)


def _builders(first: int, options: dict[str, Any]) -> dict[str, Callable[[Any, Size], Step]]:
    def masked(digit: str) -> dict[str, Any]:
        """One computed step, then `digit` for as long as anybody asks. Both may reuse, so both store."""
        mask = {"steps_computation_mask": f"1{digit * MAX_STEPS}0", "steps_computation_policy": "static"}
        return options | mask | {"Fn_compute_blocks": first}

    return {
        EAGER: lambda module, size: lambda given: module(**given),
        WHOLE: lambda module, size: _whole(module, options.get("inner_backend", "inductor")),
        UNCUT: lambda module, size: _ours(module, **options | {"cache": None}),
        COMPUTED: lambda module, size: _ours(module, **masked("1")),
        CACHED: lambda module, size: _ours(module, **masked("0")),
        PIECES: lambda module, size: _pieces(module, size, parse_options(masked("0"))),
    }


def _whole(module: Any, inner: Any) -> Step:
    module.compile(backend=inner, dynamic=False)
    return lambda given: module(**given)


def _ours(module: Any, **options: Any) -> Step:
    cachedit_fx.compile(module, dynamic=False, **options)
    return lambda given: module(**given)


class _Alone:
    """In the place of a call: decides nothing, and hands out what a region gave the first time."""

    def __init__(self) -> None:
        self.results: dict[int, tuple[Any, ...]] = {}

    def decide(self, *_: Any) -> None:
        return None

    def run(self, number: int, decision: None, compute: Callable[..., Any], bases: Any, inputs: Sequence[Any]) -> Any:
        if number not in self.results:
            self.results[number] = compute(*inputs)
        return self.results[number]


def _pieces(module: Any, size: Size, options: Options) -> Step:
    """The rewritten graph on the inputs of its first call: neither dynamo's guards nor ours are in it."""
    found: list[tuple[CachedGraph, tuple[Any, ...]]] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graph = compile_graph(gm, example_inputs, options)
        assert isinstance(graph, CachedGraph)

        def first_call(*given: Any) -> Any:
            found.append((graph, given))
            return graph(*given)

        return first_call

    torch.compile(module, backend=backend, dynamic=False)(**inputs(size))
    (graph, given), *_ = found
    alone = _Alone()
    return lambda _: graph.forward(alone, *given)
