"""`cachedit demo`: pictures from the bundled model, without and with the cache, and what the difference is."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cachedit_fx.cli.options import InnerBackend, check_compiler, check_out
from cachedit_fx.cli.terminal import console, progress, quiet, reported, show

MAX_PROMPTS = 16


def demo(
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder for [b]grid.png[/b], [b]differences.png[/b] and [b]table.md[/b]."),
    ] = Path("cachedit-demo"),
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            "-p",
            metavar="TEXT",
            help="A scene to draw; repeat the option for more. Either one object and its place: [i]a small red circle "
            "at the top left on navy[/i]. Or two and their relation: [i]a large blue square above a small pink "
            "cross[/i]. A word that the model does not know is an error that lists those it knows.  "
            "[dim]\\[default: six scenes][/dim]",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Denoising steps of the uncached run.")] = 28,
    thresholds: Annotated[
        str,
        typer.Option(
            metavar="R,R,...",
            help="A step is cached if the first block's residual differs by less than R, as a ratio, from that of "
            "the last computed step. Higher: less work, less fidelity. 0: never, bit-identical to uncached.",
        ),
    ] = "0.08,0.12,0.2",
    inner_backend: Annotated[
        InnerBackend,
        typer.Option(
            case_sensitive=False,
            help="What compiles the pieces that the graph is cut into. [b]inductor[/b] is what you would use (needs a "
            "C++ compiler, half a minute the first time); [b]eager[/b] compiles nothing.",
        ),
    ] = InnerBackend.inductor,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Picture i starts from the noise of seed N + i.")] = 0,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, max=100, help="Timed runs of each configuration.")] = 5,
) -> None:
    """Draw pictures without and with the cache, and compare work, time and fidelity.

    A small trained FLUX runs behind diffusers' FluxPipeline, on one thread. It has 18 blocks and 6.8 M parameters, and
    is part of this installation. It draws uncached, and with [bold]DBCache[/bold] (F1B0, 4 warm-up steps) at each
    threshold: once repeating what was stored, once predicting it with [bold]TaylorSeer[/bold] (order 1). Each threshold
    has its rival too, which any cache has to beat: no cache, and [bold]fewer steps at equal work[/bold].

    [bold]work[/bold] is block executions over the uncached run's. [bold]time[/bold] is wall time over the uncached
    run's, the median of alternating runs; compiling is not in it. [bold]PSNR[/bold] is against the uncached pictures
    from the same noise: 30 dB is a visible difference, 40 hardly, 50 none.
    """
    numbers = _parsed_thresholds(thresholds)
    check_out(out)
    check_compiler(inner_backend.value)
    if prompts:
        _check_prompts(prompts)

    start = time.perf_counter()
    with reported(lambda: f"; nothing was written to {out}"), progress("runs") as tell:
        tell("loading the model")
        with quiet():
            from cachedit_fx import CacheWarning
            from cachedit_fx.bench import demo as bench
            from cachedit_fx.bench.measure import Bench

            scenes = tuple(prompts or bench.PROMPTS)
            made = Bench(bench.settings_for(scenes, steps, inner_backend.value, seed, rounds), tell, keeps=True)
            made.check(bench.cached_rows(numbers[0]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheWarning)  # an inert threshold shows in the notes
            result = bench.run(made, numbers)
        bench.save(result, out)
    show(*bench.parts(result))
    console.print()
    for name, what in bench.FILES.items():
        console.print(f"{out / name}  [dim]{what}[/dim]")
    console.print(f"[dim]{time.perf_counter() - start:.0f} s in all[/dim]")


def _check_prompts(prompts: Sequence[str]) -> None:
    if len(prompts) > MAX_PROMPTS:
        raise typer.BadParameter(f"{len(prompts)} prompts; at most {MAX_PROMPTS} fit", param_hint="--prompts")
    from cachedit_fx.bench.prompts import PromptError, known_prompts

    try:
        known_prompts(tuple(prompts))
    except PromptError as error:
        raise typer.BadParameter(str(error), param_hint="--prompts") from None


def _parsed_thresholds(text: str) -> Sequence[float]:
    allowed = "give one to six ratios, 0 or more, separated by commas, such as 0.08,0.12,0.2"
    try:
        numbers = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers; {allowed}", param_hint="--thresholds") from None
    if not all(math.isfinite(number) and number >= 0 for number in numbers) or len(numbers) > 6:
        raise typer.BadParameter(f"{text!r} is not allowed; {allowed}", param_hint="--thresholds")
    return numbers
