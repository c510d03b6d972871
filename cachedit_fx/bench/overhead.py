"""What a step costs beyond the compiled pieces themselves: medians of calls by turns, in one process, on one thread.

pieces alone    the rewritten graph called by itself, regions restored from a list: no guards, no decision, no store
cached          a cached step of the compiled model; "past guards": with guards="generation"
computed        a computed step, which stores; likewise; "by region": with granularity="region"
no cache        the same graph, cut and compiled alike, without the cache pass
torch.compile   the whole graph by the inner backend
eager           the plain model
cache-dit       a cached step of cache-dit 1.5.3, its model compiled by torch.compile: in a process of its own, by
                turns with eager, since what it patches stays patched

With `inner_backend=NOTHING` the pieces compute nothing, and what is left is the Python of a step.
"""

from __future__ import annotations

import copy
import cProfile
import json
import pstats
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import cachedit_fx
from cachedit_fx.backend import compile_graph
from cachedit_fx.bench.errors import BenchmarkError
from cachedit_fx.bench.flux import Size, inputs, make, size_of
from cachedit_fx.bench.peers import cache_dit
from cachedit_fx.bench.process import answer_of
from cachedit_fx.bench.progress import Tell, silent
from cachedit_fx.config.options import Options, parse_options
from cachedit_fx.report.tables import Heading, Part, Table
from cachedit_fx.runtime.graph import CachedGraph
from cachedit_fx.runtime.hoisted_memory import ComputedValues

PIECES, UNCUT, WHOLE, EAGER, PEER = "pieces alone", "no cache", "torch.compile", "eager", "cache-dit, cached"
CACHED, COMPUTED = "cached", "computed"
PAST_GUARDS = ", past guards"
SHORT_CACHED, SHORT_COMPUTED = CACHED + PAST_GUARDS, COMPUTED + PAST_GUARDS
REGION = COMPUTED + ", by region"
RATIOS = (
    (SHORT_CACHED, PIECES),
    (CACHED, PIECES),
    (SHORT_COMPUTED, UNCUT),
    (COMPUTED, UNCUT),
    (SHORT_COMPUTED, WHOLE),
    (COMPUTED, WHOLE),
    (REGION, COMPUTED),
    (CACHED, EAGER),
    (SHORT_CACHED, EAGER),
    (PEER, EAGER),
)
"""The table's rows: what is measured over what."""
KINDS = (EAGER, WHOLE, UNCUT, COMPUTED, SHORT_COMPUTED, REGION, CACHED, SHORT_CACHED, PIECES)
SHORT_KINDS = (CACHED, SHORT_CACHED, PIECES)
"""Measured by themselves too: between steps that take ten times as long, what Python adds to these drowns in noise."""

WARMUP = 5
"""Calls ahead of those that count, the compiling one among them."""

AHEAD = 3
"""Calls of the same kind ahead of each that is timed. Steps of a kind come in runs, and after a single call the
processor's caches still miss some of what other kinds have driven out."""

MAX_STEPS = 1000
"""Of the one generation that all calls of a kind belong to."""

Step = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Overhead:
    """Seconds of each call of each kind of step, in order; call i of all kinds was made in one turn."""

    blocks: int
    seconds: Mapping[str, Sequence[float]]

    def ratio(self, above: str, below: str) -> float:
        """Median over the turns of one kind's time over another's. Both must have been measured."""
        return median(a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True))

    def extra(self, above: str, below: str) -> float:
        """Median over the turns of the difference, in seconds."""
        return median(a - b for a, b in zip(self.seconds[above], self.seconds[below], strict=True))


def measure(
    size: Size,
    rounds: int,
    first: int = 1,
    tell: Tell = silent,
    kinds: Sequence[str] | None = None,
    **options: Any,
) -> Overhead:
    """Compile the model of `size` in all ways, and time `rounds` calls of each by turns.

    Args:
        kinds: those to measure; all but the peer's if left out.
        first: F, the blocks that a cached step computes.
        options: of `cachedit_fx.compile`, for ours; `inner_backend` is plain `torch.compile`'s, and the peer's, too.

    Raises:
        ValueError: if all calls of a kind would not fit into one generation.
    """
    most = (MAX_STEPS - WARMUP) // (AHEAD + 1)
    if rounds > most:
        raise ValueError(f"{rounds} rounds: at most {most} fit into the generation that is measured")
    torch.set_num_threads(1)
    module = make(size)
    steps: dict[str, Step] = {}
    with torch.no_grad():
        for name, build in _builders(first, options).items():
            if name not in (kinds or KINDS):
                continue
            tell(f"{name}, {size.blocks} blocks")
            steps[name] = build(copy.deepcopy(module), size)
            for step in range(WARMUP):
                steps[name](inputs(size, step))
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(rounds):
            tell(f"round {turn + 1} of {rounds}")
            *ahead, given = [inputs(size, WARMUP + turn * (AHEAD + 1) + number) for number in range(AHEAD + 1)]
            for name in steps if turn % 2 else reversed(steps):
                for other in ahead:
                    steps[name](other)
                begun = time.perf_counter()
                steps[name](given)
                seconds[name].append(time.perf_counter() - begun)
    return Overhead(size.blocks, seconds)


def measure_peer(size: Size, rounds: int, first: int, inner: str) -> Overhead:
    """cache-dit's cached step by turns with eager, in a process of its own.

    Raises:
        BenchmarkError: if it does not work here, as when it is not installed.
    """
    request = json.dumps({"size": size, "rounds": rounds, "first": first, "inner_backend": inner})
    return Overhead(size.blocks, answer_of(["cachedit_fx.bench.overhead", request], "cache-dit"))


@dataclass(frozen=True)
class Line:
    """A function in a step's profile; times and calls are of one step, `own` without what it calls."""

    function: str
    calls: float
    own: float
    total: float


def profile(size: Size, kind: str, rounds: int, first: int = 1, **options: Any) -> list[Line]:
    """The Python of one kind of step by function, the costliest first. cProfile makes calls several times slower."""
    torch.set_num_threads(1)
    with torch.no_grad():
        step = _builders(first, options)[kind](make(size), size)
        for number in range(WARMUP):
            step(inputs(size, number))
        given = [inputs(size, WARMUP + number) for number in range(rounds)]
        profiler = cProfile.Profile()
        for arguments in given:
            profiler.runcall(step, arguments)
    rows = pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    lines = [
        Line(_named(*place), calls / rounds, own / rounds, total / rounds) for place, (_, calls, own, total, _) in rows
    ]
    return sorted(lines, key=lambda line: line.own, reverse=True)


def _named(path: str, number: int, name: str) -> str:
    parts = Path(path).parts
    known = next((at for at, part in enumerate(parts) if part in ("torch", "diffusers", "cachedit_fx", "kernels")), -1)
    return name if path == "~" else f"{'/'.join(parts[known:])}:{number} {name}"


def _builders(first: int, options: dict[str, Any]) -> dict[str, Callable[[Any, Size], Step]]:
    def masked(digit: str) -> dict[str, Any]:
        """One computed step, then `digit` for as long as anybody asks. Both may reuse, so both store."""
        mask = {"steps_computation_mask": f"1{digit * MAX_STEPS}0", "steps_computation_policy": "static"}
        return options | mask | {"Fn_compute_blocks": first}

    inner = options.get("inner_backend", "inductor")
    short = {"guards": "generation"}
    return {
        EAGER: lambda module, size: lambda given: module(**given),
        WHOLE: lambda module, size: _whole(module, inner),
        UNCUT: lambda module, size: _ours(module, **options | {"cache": None}),
        COMPUTED: lambda module, size: _ours(module, **masked("1")),
        SHORT_COMPUTED: lambda module, size: _ours(module, **masked("1"), **short),
        REGION: lambda module, size: _ours(module, **masked("1") | {"granularity": "region"}),
        CACHED: lambda module, size: _ours(module, **masked("0")),
        SHORT_CACHED: lambda module, size: _ours(module, **masked("0"), **short),
        PIECES: lambda module, size: _pieces(module, size, parse_options(masked("0"))),
        PEER: lambda module, size: _peer(module, first, inner),
    }


def NOTHING(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """An inner backend whose pieces give the same values whatever they are given, at once."""
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    results = []
    for node in output.args[0]:
        value = node.meta["example_value"]
        results.append(torch.zeros([int(size) for size in value.shape], dtype=value.dtype))
    given = tuple(results)
    return lambda *_: given


def _peer(module: Any, first: int, inner: Any) -> Step:
    cache_dit(module, steps=MAX_STEPS, first=first)
    module.compile(backend=inner, dynamic=False)
    return lambda given: module(**given)


def _whole(module: Any, inner: Any) -> Step:
    module.compile(backend=inner, dynamic=False)
    return lambda given: module(**given)


def _ours(module: Any, **options: Any) -> Step:
    cachedit_fx.compile(module, dynamic=False, **options)
    return lambda given: module(**given)


class _Alone:
    """In the place of a `RegionCall`: decides nothing, and hands out a region's first results again and again."""

    def __init__(self) -> None:
        self.results: dict[int, tuple[Any, ...]] = {}

    def decide(self, number: int, *_: Any) -> int:
        return number

    def run(self, number: int, compute: Callable[..., Any], inputs: Sequence[Any], *_: Any) -> Any:
        if number not in self.results:
            self.results[number] = compute(*inputs)
        return self.results[number]


def _pieces(module: Any, size: Size, options: Options) -> Step:
    """The rewritten graph on the inputs of its first call: neither dynamo's guards nor ours are in it."""
    calls: list[tuple[CachedGraph, tuple[Any, ...]]] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graph = compile_graph(gm, example_inputs, options)
        assert isinstance(graph, CachedGraph)

        def first_call(*arguments: Any) -> Any:
            calls.append((graph, arguments))
            return graph(*arguments)

        return first_call

    torch.compile(module, backend=backend, dynamic=False)(**inputs(size))
    (graph, arguments), *_ = calls
    alone = _Alone()
    code = graph.hoisted
    if code is None:
        return lambda _: graph.forward(alone, arguments)
    return lambda _: graph.forward(alone, arguments, ComputedValues(code, arguments))


PROFILED = 100
"""Steps in a profile."""
_TINY = {"width": 64, "side": 2}
_LONGEST = 12
"""Lines of a profile that are shown."""


@dataclass(frozen=True)
class Page:
    """Every figure of a run."""

    first: int
    inner: str
    steps: list[Overhead]
    """With real pieces."""
    python: list[Overhead]
    """On tiny tensors, with pieces that compute nothing."""
    profiles: dict[str, list[Line]]
    """By kind of step."""
    profiled_blocks: int


def run(depths: Sequence[int], rounds: int, first: int, inner: str, tell: Tell, failed: Callable[[str], None]) -> Page:
    """Measure steps at each depth: with real pieces, with pieces that compute nothing, and profiles of these.

    Args:
        depths: numbers of blocks.
        rounds: timed calls of each kind of step, 1 to 248.
        first: F, the blocks that a cached step computes.
        inner: the inner backend of ours, of plain `torch.compile` and of the peer.
        tell: takes reports of progress, in models.
        failed: takes the message of a peer that does not work here. It is left out.
    """
    tell(more=4 * len(depths) + 2)
    nothing: dict[str, Any] = {"inner_backend": NOTHING, "compiled_pieces": "all"}
    steps: list[Overhead] = []
    for blocks in depths:
        size = size_of(blocks)
        for kinds, turns in (([kind for kind in KINDS if kind != PIECES], rounds), (SHORT_KINDS, 2 * rounds)):
            steps.append(measure(size, turns, first, tell, kinds, inner_backend=inner))
            tell(done=1)
        tell(f"cache-dit, {blocks} blocks")
        try:
            steps.append(measure_peer(size, rounds, first, inner))
        except BenchmarkError as error:
            failed(str(error))
        tell(done=1)
    python: list[Overhead] = []
    for blocks in depths:
        python.append(measure(size_of(blocks, **_TINY), rounds, first, tell, **nothing))
        tell(done=1)
    deepest = size_of(max(depths), **_TINY)
    profiles: dict[str, list[Line]] = {}
    for kind in (SHORT_CACHED, SHORT_COMPUTED):
        tell(f"profile: {kind}")
        profiles[kind] = profile(deepest, kind, PROFILED, first, **nothing)
        tell(done=1)
    return Page(first, inner, steps, python, profiles, deepest.blocks)


_STEPS = (
    "Medians over calls by turns, one thread, batch 1; before each that is timed, three more of its kind. `pieces "
    "alone`: the compiled pieces of a cached step, one after the other; by turns with cached steps only, twice the "
    'rounds. `past guards`: with `guards="generation"`, calls after the first two of a generation.'
)
_PYTHON = (
    "The same kinds of steps on tiny tensors, with pieces that compute nothing: what remains is Python, ours and "
    "dynamo's. A block: the step over the number of blocks."
)
_PROFILE = (
    f"cProfile over {PROFILED} steps, which makes each call several times slower than it is: shares are what to read. "
    "Milliseconds a step."
)


def parts(page: Page) -> list[Part]:
    """The tables and what they mean."""
    result: list[Part] = [
        Heading(f"Steps, F = {page.first}, inner backend {page.inner}"),
        _STEPS,
        steps_table(page.steps),
        Heading("The Python of a step"),
        _PYTHON,
        python_table(page.python),
    ]
    for kind, lines in page.profiles.items():
        title = Heading(f"Its profile: {kind}, {page.profiled_blocks} blocks")
        result += [title, _PROFILE, profile_table(lines[:_LONGEST])]
    return result


def steps_table(results: Sequence[Overhead]) -> Table:
    """Every kind's milliseconds, then ratios."""
    table = Table(("blocks", "step", "ms", "over", "ratio", "extra ms"), texts=(1, 3))
    for overhead in results:
        blocks = str(overhead.blocks)
        for name, seconds in overhead.seconds.items():
            table.add(blocks, name, f"{1e3 * median(seconds):.2f}", "", "", "")
        for above, below in RATIOS:
            if {above, below} <= overhead.seconds.keys():
                ratio, extra = overhead.ratio(above, below), 1e3 * overhead.extra(above, below)
                table.add(blocks, above, "", below, f"{ratio:.3f}", f"{extra:+.2f}")
    return table


def python_table(results: Sequence[Overhead]) -> Table:
    """Milliseconds of Python for each kind of step, and microseconds a block."""
    table = Table(("blocks", "step", "ms", "us a block"), texts=(1,))
    for overhead in results:
        for name, seconds in overhead.seconds.items():
            if name != EAGER:
                middle = median(seconds)
                table.add(str(overhead.blocks), name, f"{1e3 * middle:.2f}", f"{1e6 * middle / overhead.blocks:.1f}")
    return table


def profile_table(lines: Sequence[Line]) -> Table:
    """Functions, and how often and how long each ran."""
    table = Table(("calls", "function", "own", "with what it calls"), texts=(1,))
    for line in lines:
        table.add(f"{line.calls:.0f}", line.function, f"{1e3 * line.own:.3f}", f"{1e3 * line.total:.3f}")
    return table


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps(measure(Size(*request.pop("size")), kinds=(EAGER, PEER), **request).seconds))
