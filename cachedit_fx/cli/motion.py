"""`cachedit bench motion`: what code motion saves, in weights that a step reads and in time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachedit_fx.cli.options import ImageTokens, OnlyModels, check_compiler, check_out, models_of, sides_of
from cachedit_fx.cli.terminal import progress, quiet, reported, save
from cachedit_fx.report.tables import Heading, Part

HEAD = 128
"""Width of a head of the model that is timed."""
SHARES = (
    "Shares of the weights that a step reads without code motion: those whose results change with the timestep "
    "alone, with the timestep and conditions, and with conditions alone. The hoisted values, and their size for a "
    "step and for a prompt. The weights that a computed step still reads if all values are kept. Counted on graphs "
    "of true configurations."
)
READS = (
    "Weights that a step reads, over those that it reads without the pass, for a new prompt and steps that came "
    'before: with `motion="step"`, with `motion="batched"`, and a cached step that computes the first block (F1B0) '
    "with all hoisted values kept. Values of conditions are kept from the second step on."
)
MEMORY = (
    "GiB of the accelerator that weights and hoisted values take at their peak, derived from the graph and not "
    "measured: weights in bfloat16, and the values of one prompt and 28 steps, as far as the default of `hoisted_mib` "
    'keeps them. "on the host" are the weights that `time_weights="host"` takes there. The last columns are what a '
    "card has left, without the option → with it. Activations, what the cache stores, text encoders and decoders are "
    "left out."
)
TIMES = (
    "CPU seconds over those without the pass, hoisted values kept: medians of pairs by turns, one thread, bfloat16. "
    "A FLUX of width 1024 with 6 + 12 blocks, heads of 128 and random weights; a cached step computes the first block. "
    '"By hand" is the model without the pass whose modulations are constants: no code motion can take less.'
)


def motion(
    only: OnlyModels = None,
    tokens: ImageTokens = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, max=200, help="Timed pairs of steps.")] = 20,
    width: Annotated[int, typer.Option(metavar="N", min=HEAD, help="Width of the model that is timed.")] = 1024,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for [b]motion.md[/b].")] = Path("cachedit-bench"),
) -> None:
    """Count the weights that steps of ten models read with code motion, and time steps of a random FLUX.

    No weights are made for the count, which takes 5 minutes for all models. With [bold]--tokens 64[/bold] steps are
    timed too, some 3 minutes for each number of tokens.

    For a look: [bold]cachedit bench motion -k DiT[/bold].
    """
    check_out(out)
    with quiet():
        from cachedit_fx.bench import known_models
        from cachedit_fx.bench import motion as bench
        from cachedit_fx.bench.flux import Size
        from cachedit_fx.bench.graphs import largest_graph
        from cachedit_fx.bench.motion_memory import cards, memory_table
        from cachedit_fx.bench.motion_times import measure, time_table
    names = models_of(known_models.MODELS, only)
    sides = sides_of(tokens)
    if width % HEAD:
        raise typer.BadParameter(f"{width} is no multiple of {HEAD}, the width of a head", param_hint="--width")
    if sides:
        check_compiler("inductor")
    parts: list[Part] = []
    with reported(lambda: f"; nothing was written to {out}"), progress("models") as tell, quiet():
        rows = []
        for name in names:
            tell(name)
            module, arguments = known_models.make(name)
            row = bench.count(name, module, largest_graph(module, arguments))
            assert row is not None, f"{name}: no chain"
            rows.append(row)
        parts += [Heading("Weights behind what is hoisted", 2), SHARES, bench.shares_table(rows)]
        parts += [Heading("Weights that a step reads", 2), READS, bench.reads_table(rows)]
        parts += [Heading("Memory with weights on the host", 2), MEMORY, memory_table(rows), cards(rows)]
        timings = [measure(Size(width=width, head=HEAD), side, rounds, tell) for side in sides]
        if timings:
            parts += [Heading("Time", 2), TIMES, time_table(timings)]
    save(out / "motion.md", "Code motion", parts)
