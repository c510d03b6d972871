"""`cachedit demo`: pictures from the bundled model, without and with the cache, and what the difference is."""

from __future__ import annotations

import math
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from cachedit_fx.cli.terminal import console, errors, progress_bar, quiet
from cachedit_fx.report.files import check_folder, machine, whole_files

if TYPE_CHECKING:
    from cachedit_fx.bench.comparison import Row, Settings

PROMPTS = (
    "a large red circle at the center on white",
    "a small yellow square at the top left on navy",
    "a large green triangle at the bottom right on black",
    "a small cyan cross at the right on gray",
    "a small blue diamond left of a large orange circle on white",
    "a large pink square above a small green cross on black",
)
MAX_PROMPTS = 16


class InnerBackend(StrEnum):
    """What compiles the pieces."""

    inductor = "inductor"
    eager = "eager"


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
            help="A scene to draw; repeat the option for more. One object and its place ([i]a small red circle at the "
            "top left on navy[/i]) or two and their relation ([i]a large blue square above a small pink cross[/i]). "
            "A word the model does not know is an error that lists those it knows.  [dim]\\[default: six scenes][/dim]",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Denoising steps of the uncached run.")] = 28,
    thresholds: Annotated[
        str,
        typer.Option(
            metavar="R,R,...",
            help="A step is cached where the first block's residual differs by less than R, as a ratio, from that of "
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

    A small trained FLUX (18 blocks, 6.8 M parameters, part of this installation) runs behind diffusers' FluxPipeline,
    on one thread: uncached; with [bold]DBCache[/bold] (F1B0, 4 warm-up steps) at each threshold, repeating what was
    stored and predicting it with [bold]TaylorSeer[/bold] (order 1); and, for each of these, uncached with [bold]fewer
    steps at equal work[/bold], the rival that any cache has to beat.

    [bold]work[/bold] is block executions over the uncached run's. [bold]time[/bold] is wall time over the uncached
    run's, the median of alternating runs; compiling is not in it. [bold]PSNR[/bold] is against the uncached pictures
    from the same noise: 30 dB is a visible difference, 40 hardly, 50 none.
    """
    from cachedit_fx.bench.comparison import Settings, compare

    settings = Settings(
        prompts=_checked_prompts(prompts or PROMPTS),
        steps=steps,
        thresholds=_parsed_thresholds(thresholds),
        inner_backend=inner_backend.value,
        seed=seed,
        rounds=rounds,
    )
    obstacle = check_folder(out)
    if obstacle:
        raise typer.BadParameter(obstacle, param_hint="--out")
    check_compiler(settings.inner_backend)

    start = time.perf_counter()
    try:
        with progress_bar(settings.runs, "runs") as (progress, task):

            def tell(what: str, done: int) -> None:
                progress.update(task, advance=done, description=what or None)

            rows = compare(settings, tell)
            with quiet():
                from cachedit_fx.report.charts import save_differences, save_grid
            with whole_files(out) as folder:
                save_grid(rows, settings.prompts, folder / "grid.png")
                save_differences(rows, folder / "differences.png")
                (folder / "table.md").write_text(markdown(rows, settings))
    except KeyboardInterrupt:
        errors.print(f"interrupted; nothing was written to {out}")
        raise typer.Exit(130) from None
    except OSError as error:  # no weights, a full disk
        errors.print(f"[bold red]error:[/bold red] {error}")
        raise typer.Exit(1) from None

    console.print()
    console.print(table(rows))
    for line in (*verdict(rows), *notes(rows, settings)):
        console.print()
        console.print(line)
    console.print()
    names = {"grid.png": "the pictures", "differences.png": "why each step was cached or not", "table.md": "this table"}
    for name, told in names.items():
        console.print(f"{out / name}  [dim]{told}[/dim]")
    console.print(f"[dim]{time.perf_counter() - start:.0f} s in all[/dim]")


def _checked_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    from cachedit_fx.shapes import tokenize

    if len(prompts) > MAX_PROMPTS:
        raise typer.BadParameter(f"{len(prompts)} prompts; at most {MAX_PROMPTS} fit", param_hint="--prompts")
    try:
        tokenize(prompts)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--prompts") from None
    return tuple(prompts)


def _parsed_thresholds(text: str) -> tuple[float, ...]:
    allowed = "give one to six ratios, 0 or more, separated by commas, such as 0.08,0.12,0.2"
    try:
        numbers = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers; {allowed}", param_hint="--thresholds") from None
    if not all(math.isfinite(number) and number >= 0 for number in numbers) or len(numbers) > 6:
        raise typer.BadParameter(f"{text!r} is not allowed; {allowed}", param_hint="--thresholds")
    return numbers


def check_compiler(inner_backend: str) -> None:
    """Looked for beforehand: missing, it would show as a long traceback half a minute later."""
    compiler = os.environ.get("CXX") or "g++"
    if inner_backend == "inductor" and shutil.which(compiler.split()[0]) is None:
        raise typer.BadParameter(
            f"inductor needs a C++ compiler, and there is no {compiler}. Install one (Debian: apt-get install g++), "
            "name it in CXX, or use --inner-backend eager",
            param_hint="--inner-backend",
        )


HEADINGS = ("configuration", "steps", "cached", "work", "time", "PSNR dB")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The text below `HEADINGS`, a tuple for each row."""
    found: list[tuple[str, ...]] = []
    for index, row in enumerate(rows):
        name = "fewer steps, equal work"
        if row.calibrator is not None:
            name = "  with TaylorSeer"
        elif row.config is not None:
            name = f"DBCache, threshold {row.config.residual_diff_threshold:g}"
        elif index == 0:
            name = "uncached"
        quality = "" if index == 0 else f"{row.mean_psnr:.1f}" if math.isfinite(row.mean_psnr) else "identical"
        cached = str(row.cached_steps) if row.config else ""
        found.append((name, str(row.steps), cached, f"{row.work:.0%}", f"{row.ratio:.0%}", quality))
    return found


def table(rows: Sequence[Row]) -> Table:
    """The comparison for a terminal; 70 characters wide."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for number, heading in enumerate(HEADINGS):
        made.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for index, (row, texts) in enumerate(zip(rows, cells(rows), strict=True)):
        ends_group = row.config is None
        made.add_row(*texts, style="bold" if row.config else "" if index == 0 else "dim", end_section=ends_group)
    return made


def markdown(rows: Sequence[Row], settings: Settings) -> str:
    """The comparison as `table.md`: ready to be pasted, conditions included."""
    lines = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *cells(rows)]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*text, "", *verdict(rows), "", *notes(rows, settings)]) + "\n"


def verdict(rows: Sequence[Row]) -> list[str]:
    """What the table says: whether each way of caching beats its rival, a sentence for each."""
    told: dict[str, list[str]] = {}
    for plain, predicted, rival in zip(rows[1::3], rows[2::3], rows[3::3], strict=True):
        assert plain.config is not None
        for name, row in (("DBCache", plain), ("DBCache with TaylorSeer", predicted)):
            told.setdefault(name, []).append(f"{_against(row, rival)} at {plain.config.residual_diff_threshold:g}")
    return [f"At equal work, {name} against fewer steps: {', '.join(parts)}." for name, parts in told.items()]


def _against(row: Row, rival: Row) -> str:
    cached, fewer = row.mean_psnr, rival.mean_psnr
    if math.isinf(cached):
        return "equal" if math.isinf(fewer) else "identical pictures"
    if math.isinf(fewer):
        return "too little cached to compare"
    return f"{abs(cached - fewer):.1f} dB {'ahead' if cached > fewer else 'behind'}"


def notes(rows: Sequence[Row], settings: Settings) -> list[str]:
    """The conditions, and thresholds that did nothing."""
    import torch

    pictures = "1 picture" if len(settings.prompts) == 1 else f"{len(settings.prompts)} pictures at a time"
    seconds = statistics.median(rows[0].seconds)
    found = [
        f"Work: block executions; time: wall time, median of {settings.rounds}; both over uncached, which takes "
        f"{seconds:.2f} s for {pictures}. F1B0, 4 warm-up steps, {settings.inner_backend}, one thread of "
        f"{machine()}, torch {torch.__version__}."
    ]
    spread = max(rows[0].seconds) / min(rows[0].seconds)
    if spread > 1.25:
        found.append(
            f"Busy machine: the uncached run's slowest round took {spread:.1f} x its fastest; doubt the times."
        )
    for row in rows:
        repeats = row.stats and row.config and row.calibrator is None
        message = row.stats.inert_threshold_message(row.config) if repeats and row.stats and row.config else None
        if message:
            found.append(f"Nothing was cached: {message}.")
    return found
