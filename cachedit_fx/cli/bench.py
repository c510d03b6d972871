"""`cachedit bench`: many configurations, ours and others', measured on the same pictures in one run."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from cachedit_fx.cli import timings
from cachedit_fx.cli.demo import InnerBackend, check_compiler
from cachedit_fx.cli.terminal import console, errors, progress_bar, quiet
from cachedit_fx.report.files import check_folder, machine, whole_files

if TYPE_CHECKING:
    from cachedit_fx.bench.measure import Bench, Measured, Settings
    from cachedit_fx.bench.report import Report
    from cachedit_fx.bench.rows import Row

DEFAULT_PROMPTS = 24


class _Panel(StrEnum):
    """Headings of the help page."""

    what = "What is measured"
    pictures = "On which pictures"
    run = "How it runs"


def bench(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG.toml",
            help="The configurations. A table is a row, its name the row's, its keys keyword arguments of "
            '[b]cachedit_fx.enable_cache[/b]:  [i]\\["F1 R0.2"]  Fn_compute_blocks = 1  residual_diff_threshold = 0.2  '
            'calibrator = "taylorseer"[/i].  [b]presets = true[/b], above the tables, adds all presets; '
            '[i]system = "cache-dit"[/i] makes a row a peer\'s.  [dim]\\[default: DBCache at four thresholds, with '
            "and without TaylorSeer, and the presets][/dim]",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            "-k",
            metavar="TEXT",
            help="Only rows whose name contains TEXT; may be repeated.",
            rich_help_panel=_Panel.what,
        ),
    ] = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Rows of cache-dit 1.5.3 too, and of diffusers' FirstBlockCache, TaylorSeerCache and MagCache, each "
            "in a process of its own. Needs [b]pip install 'cachedit-fx\\[peers]'[/b], or --peer-python.",
            rich_help_panel=_Panel.what,
        ),
    ] = False,
    peer_python: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="The interpreter of another environment that has cache-dit, and the same torch and diffusers.",
            rich_help_panel=_Panel.what,
            show_default="this one",
        ),
    ] = sys.executable,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold",
            help="In place of all that: seconds to the first steps of a random FLUX, by ours and by others, from an "
            "empty cache folder and from a full one; written to [b]cold.md[/b]. --only picks ways by name.",
            rich_help_panel=_Panel.what,
        ),
    ] = False,
    overhead: Annotated[
        bool,
        typer.Option(
            "--overhead",
            help="In place of all that: what a cached and a computed step of a random FLUX cost over the compiled "
            "pieces, the uncached graph, torch.compile and eager; written to [b]overhead.md[/b]. Takes --rounds (of "
            "one call each; some 30) and --inner-backend.",
            rich_help_panel=_Panel.what,
        ),
    ] = False,
    blocks: Annotated[
        list[int] | None,
        typer.Option(
            "--blocks",
            metavar="N",
            min=3,
            max=1000,
            help="Of the random FLUX; may be repeated.  [dim]\\[default: 18 and 57][/dim]",
            rich_help_panel=_Panel.what,
        ),
    ] = None,
    list_rows: Annotated[
        bool, typer.Option("--list", help="Show the rows, and exit.", rich_help_panel=_Panel.what)
    ] = False,
    pipeline: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="A pipeline of yours in place of the bundled model: a function without arguments, in the current "
            "folder or installed, that returns a diffusers pipeline, or an object with [b]pipe[/b] and "
            "[b]generate(pipe, prompts, steps, seed)[/b], which returns float pictures \\[B, 3, H, W] in 0..1, "
            "picture i from the noise of seed + i.",
            rich_help_panel=_Panel.pictures,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="N|FILE",
            help="N of the 200 prompts of ShapesBench, spread over its categories; or a text file, a prompt a line.  "
            f"[dim]\\[default: {DEFAULT_PROMPTS}][/dim]",
            rich_help_panel=_Panel.pictures,
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=2000,
            help="In place of --prompts: N captions sampled as the bundled model's data set is, none of ShapesBench. "
            "Choose settings on one --prompt-seed, and report on another.",
            rich_help_panel=_Panel.pictures,
        ),
    ] = None,
    prompt_seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Which captions are held out.", rich_help_panel=_Panel.pictures)
    ] = 1,
    steps: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=1000, help="Denoising steps.", rich_help_panel=_Panel.pictures),
    ] = 28,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Picture i starts from the noise of seed N + i.", rich_help_panel=_Panel.pictures
        ),
    ] = 0,
    guidance: Annotated[
        float,
        typer.Option(
            metavar="G",
            min=1.0,
            help="Guidance of the bundled model; 1 is none, above it a step calls the model twice. ShapesBench's "
            "accuracy is stated at 3.",
            rich_help_panel=_Panel.pictures,
        ),
    ] = 1.0,
    batch: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Pictures drawn by one call. Caches decide by the call: 1 lets every system decide by the picture.",
            rich_help_panel=_Panel.pictures,
        ),
    ] = 1,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder for [b]bench.json[/b], written anew after every row, [b]bench.md[/b] and [b]bench.png[/b].",
            rich_help_panel=_Panel.run,
        ),
    ] = Path("cachedit-bench"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in --out: rows that are there are not measured again. It must have been made with "
            "the same settings.",
            rich_help_panel=_Panel.run,
        ),
    ] = False,
    rounds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=100,
            help="Timed rounds of each row, by turns with uncached; 0 leaves wall times out.",
            rich_help_panel=_Panel.run,
        ),
    ] = 3,
    inner_backend: Annotated[
        InnerBackend,
        typer.Option(
            case_sensitive=False,
            help="[b]eager[/b] compiles nothing and will do for work and quality; [b]inductor[/b] for wall times as "
            "you would have them: uncached is then torch.compile's, and so are peers.",
            rich_help_panel=_Panel.run,
        ),
    ] = InnerBackend.eager,
) -> None:
    """Measure many configurations on the same pictures: work, wall time, PSNR, SSIM, accuracy, memory.

    Each cached row comes with its rival, [bold]as many steps as cost the same work[/bold] with no cache at all, and
    with [bold]--peers[/bold] those of others join in. Try [bold]cachedit bench --prompts 6 --rounds 1[/bold] for a
    look, and [bold]cachedit bench --held-out 32 --peers[/bold] for figures. Ctrl-C keeps what is measured,
    [bold]--resume[/bold] goes on.

    [bold]work[/bold] is the FLOPs of the transformer's calls over the uncached run's; [bold]wall[/bold] time over the
    uncached run's, on one thread, compiling left out. PSNR and SSIM (from the extra [bold]metrics[/bold]) are against
    the uncached pictures from the same noise. [bold]right[/bold] is the share of the bundled model's pictures that show
    what the prompt says.
    """
    from cachedit_fx.bench.process import BenchmarkError
    from cachedit_fx.bench.report import ResumeError
    from cachedit_fx.bench.rows import RowError
    from cachedit_fx.bench.systems import EntryError

    try:
        if cold or overhead:
            _time(cold, overhead, blocks or list(timings.DEPTHS), only or [], rounds, inner_backend.value, out)
            return
        rows, notes = _rows(config, steps, peers, peer_python, only or [])
        if list_rows:
            _show(rows)
            return
        settings = _settings(
            prompts,
            held_out,
            prompt_seed,
            steps=steps,
            seed=seed,
            guidance=guidance,
            entry=pipeline,
            inner_backend=inner_backend.value,
            batch=batch,
            rounds=rounds,
        )
        obstacle = check_folder(out)
        if obstacle:
            raise typer.BadParameter(obstacle, param_hint="--out")
        check_compiler(settings.inner_backend)
        _run(rows, settings, notes, out, resume, peer_python)
    except (RowError, EntryError, ResumeError) as error:
        errors.print(f"[bold red]error:[/bold red] {escape(str(error))}")
        raise typer.Exit(2) from None
    except (BenchmarkError, OSError) as error:
        errors.print(f"[bold red]error:[/bold red] {escape(str(error))}")
        raise typer.Exit(1) from None


def _time(
    cold: bool, overhead: bool, blocks: Sequence[int], only: Sequence[str], rounds: int, inner: str, out: Path
) -> None:
    """`--cold`, `--overhead`, or both."""
    obstacle = check_folder(out)
    if obstacle:
        raise typer.BadParameter(obstacle, param_hint="--out")
    check_compiler("inductor" if cold else inner)
    if overhead and not rounds:
        raise typer.BadParameter("nothing is timed in 0 rounds; some 30 give steady medians", param_hint="--rounds")
    if overhead and rounds > 100:
        raise typer.BadParameter("--overhead takes at most 100; some 30 give steady medians", param_hint="--rounds")
    if cold:
        timings.cold(blocks, only, out)
    if overhead:
        timings.overhead(blocks, rounds, 1, inner, out)


def _rows(
    config: Path | None, steps: int, peers: bool, peer_python: str, only: Sequence[str]
) -> tuple[list[Row], list[str]]:
    """The rows to measure, and what must be said of those that cannot be."""
    from cachedit_fx.bench.process import BenchmarkError, check_peer
    from cachedit_fx.bench.rows import DEFAULT, peer_rows, read_rows, select

    rows = select(read_rows(config or DEFAULT, steps) + (peer_rows() if peers else []), only)
    notes = []
    if any(row.system == "cache-dit" for row in rows):
        try:
            check_peer(peer_python)
        except BenchmarkError as error:
            notes.append(f"Rows of cache-dit were skipped: {' '.join(str(error).split())}")
            rows = [row for row in rows if row.system != "cache-dit"]
            if not rows:
                raise
    return rows, notes


def _settings(prompts: str | None, held_out: int | None, prompt_seed: int, **more: object) -> Settings:
    from cachedit_fx.bench.measure import Settings
    from cachedit_fx.shapes import bench_prompts, held_out_prompts, tokenize

    if prompts is not None and held_out is not None:
        raise typer.BadParameter("--prompts and --held-out are two ways to say what is drawn; give one of them")
    if more["entry"] is not None and more["guidance"] != 1:
        raise typer.BadParameter(
            "that is the bundled model's; in a pipeline of yours, let generate() set it", param_hint="--guidance"
        )
    if held_out is not None:
        texts = held_out_prompts(held_out, prompt_seed)
    elif prompts is None or prompts.isdecimal():
        try:
            texts = bench_prompts(int(prompts or DEFAULT_PROMPTS))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--prompts") from None
    else:
        texts = _lines(Path(prompts))
    if more["entry"] is None:
        try:
            tokenize(texts)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--prompts") from None
        calibration = held_out_prompts(4, prompt_seed + 1)
    else:
        calibration = texts[:4]  # from noise that is used for nothing else
    return Settings(prompts=texts, calibration=calibration, **more)  # type: ignore[arg-type]


def _lines(path: Path) -> tuple[str, ...]:
    try:
        found = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(
            f"{path} is neither a number nor a text file ({error})", param_hint="--prompts"
        ) from None
    if not found:
        raise typer.BadParameter(f"{path} has no prompts: write one a line", param_hint="--prompts")
    return found


def _run(rows: Sequence[Row], settings: Settings, notes: list[str], out: Path, resume: bool, peer_python: str) -> None:
    from cachedit_fx import CacheWarning
    from cachedit_fx.bench.measure import Bench
    from cachedit_fx.bench.report import FILE, Report, load_rows, save_json
    from cachedit_fx.bench.systems import LIBRARIES
    from cachedit_fx.bench.worker import versions

    report = Report(settings, shlex.join(["cachedit", *sys.argv[1:]]), machine(), versions(*LIBRARIES), notes=notes)
    if resume:
        report.rows = load_rows(out, settings)
    todo = [row for row in rows if report.find(row) is None]
    for note in notes:
        errors.print(f"[yellow]{escape(note)}[/yellow]")
    is_interrupted = False
    try:
        with progress_bar(settings.calls, "calls") as (progress, task), warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheWarning)  # an inert threshold shows in the figures

            def tell(what: str, done: int) -> None:
                progress.update(task, advance=done, description=what or None)

            def more(calls: int) -> None:
                progress.update(task, total=(progress.tasks[task].total or 0) + calls)

            tell("loading the model", 0)
            with quiet():
                made = Bench(settings, tell, peer_python)
                made.check(todo)
            more(len(todo) * (settings.calls + settings.timed_calls))
            reference = made.draw_reference()
            if not resume:
                report.rows.append(reference)
            _measure(made, report, todo, more, lambda: save_json(report, out))
    except KeyboardInterrupt:
        is_interrupted = True
    if len(report.rows) > 1:
        _finish(report, out)
    if is_interrupted:
        left = sum(report.find(row) is None for row in rows)
        kept = f"{out / FILE} has the others, --resume goes on" if len(report.rows) > 1 else "nothing was measured"
        errors.print(f"interrupted with {left} of {len(rows)} rows to go; {kept}")
        raise typer.Exit(130)


def _measure(
    made: Bench, report: Report, todo: Sequence[Row], more: Callable[[int], None], save: Callable[[], None]
) -> None:
    """Measure the rows, each followed by its rival, keeping all of it after each."""
    from cachedit_fx.bench.process import BenchmarkError

    calls = made.settings.calls + made.settings.timed_calls
    # A row that an earlier run was interrupted after may lack its rival.
    for known in [row for row in report.rows if row.system != "uncached"]:
        rival = made.fewer_steps(known)
        if report.find(rival) is None:
            more(calls)
            report.rows.append(made.measure(rival))
    save()
    for row in todo:
        try:
            measured = made.measure(row)
        except BenchmarkError as error:  # a peer that this model is too much for; the others go on
            report.notes.append(f"{row.name} failed: {str(error).splitlines()[0]}")
            errors.print(f"[yellow]{escape(report.notes[-1])}[/yellow]")
            continue
        report.rows.append(measured)
        save()
        rival = made.fewer_steps(measured)
        if report.find(rival) is None:
            more(calls)
            report.rows.append(made.measure(rival))
            save()


def _finish(report: Report, out: Path) -> None:
    from cachedit_fx.bench.report import explanations, markdown, save_json

    report.notes += _doubts(report)
    with quiet():
        from cachedit_fx.report.plots import save_plot
    save_json(report, out)
    with whole_files(out) as folder:
        (folder / "bench.md").write_text(markdown(report))
        save_plot(report, folder / "bench.png")
    console.print()
    console.print(_table(report))
    for line in explanations(report):
        console.print(f"\n{line}", markup=False)
    told = {"bench.json": "every figure", "bench.md": "this table", "bench.png": "quality over work"}
    console.print()
    for name, what in told.items():
        console.print(f"{out / name}  [dim]{what}[/dim]")


def _doubts(report: Report) -> list[str]:
    """What the figures lack, and what makes them hard to compare."""
    found: dict[str, None] = {}
    if all(row.ssim is None for row in report.rows):
        found["No SSIM: torchmetrics is not installed (pip install 'cachedit-fx[metrics]')."] = None
    for row in report.rows:
        for name, here in report.versions.items():
            there = row.versions.get(name, here)
            if there != here:
                found[f"Not a fair comparison: {name} is {here} here and {there} in the peers' environment."] = None
    return list(found)


def _table(report: Report) -> Table:
    from cachedit_fx.bench.report import HEADINGS, by_work, cells

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, heading in enumerate(HEADINGS):
        made.add_column(heading, justify="right" if number else "left", no_wrap=bool(number))
    front = {row.name for row in report.pareto()}
    for row in by_work(report.rows):
        made.add_row(*map(escape, cells(row)), style=_style(row, front))
    return made


def _style(row: Measured, front: set[str]) -> str:
    if row.name in front:
        return "bold"
    return "dim" if row.system == "uncached" else ""


def _show(rows: Sequence[Row]) -> None:
    made = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("row", "system", "arguments"):
        made.add_column(heading)
    for row in rows:
        arguments = ", ".join(f"{name}={value!r}" for name, value in row.arguments.items())
        made.add_row(escape(row.name), row.system, escape(arguments))
    console.print(made)
