"""`cachedit bench ulysses`: what each rank does and sends when several share one sample, and how long a step takes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cachedit_fx.bench.errors import BenchmarkError
from cachedit_fx.cli.options import (
    ImageTokens,
    InnerBackend,
    OnlyModels,
    check_compiler,
    check_out,
    models_of,
    sides_of,
)
from cachedit_fx.cli.terminal import progress, quiet, reported, save, warn
from cachedit_fx.report.tables import Heading, Part

HEAD = 64
"""Width of a head of the model that is timed."""
SHARES = (
    "For the first rank: its part of the hidden states that enter the chain, the share of the chain's linear FLOPs "
    "that the ranks divide, collectives in the graph, bytes that the rank sends in a step, and size of the results "
    "that the cache keeps (F1B0, bfloat16). With more ranks than heads, keys and values are gathered. Counted on "
    "graphs of true configurations: 1024 x 1024 pixels, or 81 frames of 1280 x 720."
)
TIMES = (
    "CPU seconds of a step on one rank, and on each of two that share it: medians of rounds by turns. Ranks are "
    "processes of one thread, joined by gloo; one of them waits while the other is alone. A FLUX with 2 + 4 blocks, "
    "heads of 64, random weights in float32 and 16 text tokens. Computed and cached steps are those of a model with a "
    "cache that computes the first block (F1B0). cache-dit is the Ulysses of 1.5.3 on the two ranks, without a cache. "
    "torch.compile compiles its model if inductor compiles ours. The last column is the wall time of two ranks over "
    "that of one, told only if both ranks had a core."
)


def ulysses(
    only: OnlyModels = None,
    ranks: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=2, help="Number of ranks; may be repeated. 8, 64 and 256 by default."),
    ] = None,
    tokens: ImageTokens = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, max=200, help="Timed steps of each kind.")] = 20,
    width: Annotated[int, typer.Option(metavar="N", min=2 * HEAD, help="Width of the model that is timed.")] = 512,
    inner_backend: Annotated[
        list[InnerBackend] | None,
        typer.Option(case_sensitive=False, help="What compiles the model that is timed; may be repeated."),
    ] = None,
    peer_python: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Interpreter of an environment that has cache-dit. This one by default."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for [b]ulysses.md[/b].")] = Path("cachedit-bench"),
) -> None:
    """Count what each rank does and sends with [bold]ulysses_size=N[/bold], on the graphs of three large models.

    Needs neither weights nor ranks: models are on the meta device, and the process group only pretends to exist. It
    takes 3 minutes. With [bold]--tokens 1024[/bold] steps of a random FLUX are timed too, on two ranks, on one, and by
    cache-dit if it is installed: some 2 minutes for each number of tokens and inner backend.
    """
    check_out(out)
    sides = sides_of(tokens)
    if width % (2 * HEAD):
        raise typer.BadParameter(f"{width} is no multiple of {2 * HEAD}, a head for each rank", param_hint="--width")
    backends = [each.value for each in inner_backend or [InnerBackend.eager]]
    for backend in backends if sides else ():
        check_compiler(backend)
    with quiet():
        from cachedit_fx.bench import ulysses as bench
        from cachedit_fx.bench import ulysses_times
        from cachedit_fx.bench.flux import Size
    names = models_of(bench.INPUTS, only)
    with reported(lambda: f"; nothing was written to {out}"), progress("models") as tell, quiet():
        peer = _peer(peer_python) if sides else None
        rows = []
        for name in names:
            tell(name)
            module, graph = bench.capture(name)
            shares = (bench.count(name, module, graph, number) for number in ranks or bench.RANKS)
            rows += [share for share in shares if share is not None]
        parts: list[Part] = [Heading("Ranks that share one sample", 2), SHARES, bench.table(rows)]
        timings = []
        for backend, side in ((backend, side) for backend in backends for side in sides):
            tell(f"{backend}, {side**2} tokens")
            timings.append(ulysses_times.measure(Size(2, 4, width, side, HEAD), rounds, backend, peer))
        if timings:
            parts += [Heading("Time", 2), f"Width {width}. {TIMES}", ulysses_times.table(timings)]
            parts.append(ulysses_times.notes(timings))
    save(out / "ulysses.md", "Context parallelism", parts)


def _peer(python: str | None) -> str | None:
    """The interpreter that has cache-dit. None if it was not named, and this one has none.

    Raises:
        BenchmarkError: if the named one has none.
    """
    from cachedit_fx.bench.process import check_peer

    try:
        check_peer(python or sys.executable)
    except BenchmarkError:
        if python:
            raise
        warn("cache-dit is not installed here, so it is not timed; --peer-python names an environment that has it")
        return None
    return python or sys.executable
