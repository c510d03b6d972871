"""How long a model takes from `compile` to its first computed and first cached step, in a process of its own.

    for each depth, for each way to compile:
        cold   a new process, an empty folder for inductor's caches
        warm   another process, the same folder
        sizes  three resolutions in the warm process's place, dynamic shapes: seconds of the first call at each

`capture` is dynamo alone (`backend="eager"`). It is linear in depth, and part of every way but
`compile_repeated_blocks`. A compiler cannot change it, so the table has times with and without it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cachedit_fx.bench.errors import BenchmarkError
from cachedit_fx.bench.flux import Size, inputs, make, size_of
from cachedit_fx.bench.process import answer_of
from cachedit_fx.bench.progress import Tell
from cachedit_fx.report.tables import Table

CAPTURE, OURS, REPEATED = "capture", "cachedit_fx", "compile_repeated_blocks"
PEER = "cache-dit"
"""At a threshold that always reuses, 1.5.3 adds the residual of another resolution, and raises: one resolution only."""

WAYS: dict[str, Callable[[Any], None]] = {
    CAPTURE: lambda module: module.compile(backend="eager"),
    REPEATED: lambda module: module.compile_repeated_blocks(),
    OURS: lambda module: _cachedit(module),
    f"{OURS}, all pieces": lambda module: _cachedit(module, compiled_pieces="all"),
    f"{OURS}, region": lambda module: _cachedit(module, granularity="region"),
    f"{OURS}, int8": lambda module: _in_int8(module),
    f"{OURS}, int8 by step": lambda module: _cachedit(module.requires_grad_(False), precision="int8"),
    "torch.compile": lambda module: module.compile(),
    PEER: lambda module: _cache_dit(module),
}
"""How a module is compiled, by name."""

CALLS = 4
"""Of the model: two of ours are computed, two cached."""
SIDES = (12, 14, 16)
"""Resolutions, in tokens a side, of the run with several."""


def _cachedit(module: Any, **options: Any) -> None:
    import cachedit_fx

    cachedit_fx.compile(
        module, steps_computation_mask="10" * CALLS, steps_computation_policy="static", Fn_compute_blocks=1, **options
    )


def _in_int8(module: Any) -> None:
    import cachedit_fx

    cachedit_fx.quantize(module.requires_grad_(False), "int8")
    _cachedit(module)


def _cache_dit(module: Any) -> None:
    from cachedit_fx.bench.peers import cache_dit

    cache_dit(module, steps=CALLS, first=1)
    module.compile()


@dataclass(frozen=True)
class Start:
    """One process's figures, in seconds."""

    way: str
    blocks: int
    warm: bool
    calls: tuple[float, ...]
    """Of each call; the first has the compilation in it."""
    sizes: tuple[float, ...] = ()
    """Of the first call at each of `SIDES`."""

    @property
    def seconds(self) -> float:
        return sum(self.calls)


def ways_named(texts: Sequence[str]) -> list[str]:
    """The ways whose name contains one of `texts`, all if there are none; and `CAPTURE`, which others are less."""
    return [way for way in WAYS if way == CAPTURE or not texts or any(text in way for text in texts)]


def measure(depths: Sequence[int], ways: Sequence[str], tell: Tell, failed: Callable[[str], None]) -> Iterator[Start]:
    """Run all processes, one after the other, and give their figures as they come.

    Args:
        depths: numbers of blocks.
        ways: names of `WAYS`.
        tell: takes reports of progress, in processes.
        failed: takes the message of a way that does not work here, such as a peer that is not installed. It is left
            out.
    """
    tell(more=2 * len(depths) * len(ways))
    for blocks in depths:
        for way in ways:
            with tempfile.TemporaryDirectory(prefix="cachedit-cold-") as folder:
                for warm in (False, True):
                    tell(f"{way}, {blocks} blocks, {'warm' if warm else 'cold'}")
                    try:
                        yield _run(way, blocks, warm, folder)
                    except BenchmarkError as error:
                        failed(str(error))
                        tell(done=1 if warm else 2)
                        break
                    tell(done=1)


def _run(way: str, blocks: int, warm: bool, folder: str) -> Start:
    request = json.dumps({"way": way, "blocks": blocks, "warm": warm})
    command = ["cachedit_fx.bench.cold", request]
    answer = answer_of(command, f"{way} with {blocks} blocks", TORCHINDUCTOR_CACHE_DIR=folder)
    return Start(**answer | {name: tuple(answer[name]) for name in ("calls", "sizes")})


def start(way: str, blocks: int, warm: bool) -> Start:
    """In the process itself: compile, and call until a computed and a cached step have run."""
    import torch

    torch.set_num_threads(1)
    size = size_of(blocks)
    module = make(size)
    given = [inputs(size, step) for step in range(CALLS)]
    calls: list[float] = []
    with torch.no_grad():
        begun = time.perf_counter()
        WAYS[way](module)
        for arguments in given:
            module(**arguments)
            now = time.perf_counter()
            calls.append(now - begun)
            begun = now
        sides = SIDES if warm and way != PEER else ()
        sizes = [_first_call(module, size._replace(side=side)) for side in sides]
    return Start(way, blocks, warm, tuple(calls), tuple(sizes))


def _first_call(module: Any, size: Size) -> float:
    arguments = inputs(size)
    begun = time.perf_counter()
    module(**arguments)
    return time.perf_counter() - begun


EXPLANATION = (
    "Seconds from the call of `compile` to the end of four steps (ours: two computed, two cached), one thread, in a "
    "new process; cold: an empty folder for inductor's caches, warm: the same folder in another process. `- capture`: "
    'less the time of `backend="eager"`, dynamo\'s own. `sizes`: the first call at three resolutions, warm.'
)


def table(starts: Sequence[Start]) -> Table:
    """A line for each depth and way."""
    headings = ("blocks", "compiled by", "cold", "-\ncapture", "over\nrepeated", "warm", "-\ncapture", "sizes")
    result = Table(headings, texts=(1, 7))
    by = {(start.way, start.blocks, start.warm): start for start in starts}
    for way, blocks in dict.fromkeys((start.way, start.blocks) for start in starts):
        cells = [str(blocks), way]
        capture, repeated = by.get((CAPTURE, blocks, False)), by.get((REPEATED, blocks, False))
        for warm in (False, True):
            start = by.get((way, blocks, warm))
            own = start and capture and way not in (CAPTURE, REPEATED) and start.seconds - capture.seconds
            cells += [f"{start.seconds:.1f}" if start else "", f"{own:.1f}" if own else ""]
            if not warm:
                cells.append(f"{own / repeated.seconds:.2f}" if own and repeated else "")
        last = by.get((way, blocks, True))
        result.add(*cells, ", ".join(f"{size:.1f}" for size in last.sizes) if last else "")
    return result


if __name__ == "__main__":
    print(json.dumps(asdict(start(**json.loads(sys.argv[1])))))
