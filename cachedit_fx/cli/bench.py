"""`cachedit bench`: many configurations, ours and others', measured on the same pictures in one run."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cachedit_fx.cli.options import InnerBackend, PipelineEntry, check_compiler, check_out, grouped
from cachedit_fx.cli.terminal import command_line, console, errors, progress, quiet, reported, show
from cachedit_fx.config.rules import nearest
from cachedit_fx.report.files import machine, versions
from cachedit_fx.report.tables import Table

if TYPE_CHECKING:
    from cachedit_fx.bench.measure import Settings
    from cachedit_fx.bench.run import Plan

DEFAULT_PROMPTS, PAIRED_PROMPTS = 24, 8
FILES = {"bench.json": "every figure", "bench.md": "these tables", "bench.png": "quality over work"}


class BenchGroup(TyperGroup):
    """A command that has sub-commands too: the first word is one of theirs, or all words are its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_sub_command = bool(args) and args[0] in self.commands
        ctx.allow_interspersed_args = not is_sub_command
        # An empty word takes the place of CONFIG, which would take the sub-command's name.
        return super().parse_args(ctx, ["", *args] if is_sub_command else args)

    def get_params(self, ctx: Any) -> list[Any]:
        """None for a sub-command, whose usage line would name CONFIG."""
        return super().get_params(ctx) if ctx.command is self else []


class Peer(StrEnum):
    """Systems to be paired with."""

    cache_dit = "cache-dit"


class PeerCompile(StrEnum):
    """How cache-dit is compiled."""

    transformer = "transformer"
    tuned = "transformer-tuned"
    blocks = "blocks"


class Granularity(StrEnum):
    """What ours compiles as one piece."""

    block = "block"
    region = "region"


@dataclass(frozen=True)
class Rows:
    """What is measured"""

    only: Annotated[
        list[str] | None,
        typer.Option("--only", "-k", metavar="TEXT", help="Only rows whose name contains TEXT; may be repeated."),
    ] = None
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Rows of cache-dit 1.5.3 too, and of diffusers' FirstBlockCache, TaylorSeerCache and MagCache. Each "
            "has a process of its own. Needs [b]pip install 'cachedit-fx\\[peers]'[/b], or --peer-python.",
        ),
    ] = False
    against: Annotated[
        Peer | None,
        typer.Option(
            case_sensitive=False,
            help="Pairs instead: each row with cache-dit's of the same settings, a process each, by turns within each "
            "prompt. Tells whether both cache the same steps, and how their times compare. Rows are those of "
            "CONFIG.toml, or F1 B0 W4 at three thresholds.",
        ),
    ] = None
    peer_python: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="The interpreter of another environment that has cache-dit, and the same torch and diffusers.",
            show_default="this one",
        ),
    ] = sys.executable
    row: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A row by its settings, as cache-dit's tables name them: [b]F8B0_W4MC2_R0.12[/b] is 8 first and 0 "
            "last blocks, 4 warm-up steps, 2 cached steps in a row at most, threshold 0.12. [b]_T1O2[/b] after it is "
            "TaylorSeer of order 2. May be repeated.",
        ),
    ] = None
    list_rows: Annotated[bool, typer.Option("--list", help="Show the rows, and exit.")] = False


@dataclass(frozen=True)
class Pictures:
    """On which pictures"""

    pipeline: PipelineEntry = None
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|NAME",
            help="CLIP score by this CLIP of transformers: a folder, or a model of the hub that is in the local "
            "cache.  [dim]\\[default: with --pipeline openai/clip-vit-large-patch14, if it is there][/dim]",
        ),
    ] = None
    image_reward: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="ImageReward by the weights in this folder; see cachedit metrics."),
    ] = None
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="N|FILE",
            help="N of the 200 prompts of ShapesBench, spread over its categories. Or a text file, a prompt a line.  "
            f"[dim]\\[default: {DEFAULT_PROMPTS}, or {PAIRED_PROMPTS} with --against][/dim]",
        ),
    ] = None
    held_out: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=2000,
            help="In place of --prompts: N captions sampled as the bundled model's data set is, none of ShapesBench. "
            "Choose settings on one --prompt-seed, and report on another.",
        ),
    ] = None
    prompt_seed: Annotated[int, typer.Option(metavar="N", min=0, help="Which captions are held out.")] = 1
    steps: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Denoising steps.")] = 28
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Picture i starts from the noise of seed N + i.")] = 0
    guidance: Annotated[
        float,
        typer.Option(
            metavar="G",
            min=1.0,
            help="Guidance of the bundled model; 1 is none, above it a step calls the model twice. ShapesBench's "
            "accuracy is stated at 3.",
        ),
    ] = 1.0
    batch: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Pictures drawn by one call. Caches decide by the call: 1 lets every system decide by the picture.",
        ),
    ] = 1


@dataclass(frozen=True)
class Running:
    """How it runs"""

    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder for [b]bench.json[/b], written anew after every row, [b]bench.md[/b] and [b]bench.png[/b].",
        ),
    ] = Path("cachedit-bench")
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in --out: rows that are there are not measured again. It must have been made with "
            "the same settings.",
        ),
    ] = False
    rounds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=100,
            help="Timed rounds of each row, by turns with uncached; 0 leaves times out.",
        ),
    ] = 3
    inner_backend: Annotated[
        InnerBackend,
        typer.Option(
            case_sensitive=False,
            help="[b]eager[/b] compiles nothing and will do for work and quality. [b]inductor[/b] gives times as you "
            "would have them: torch.compile compiles the uncached model and peers too.",
        ),
    ] = InnerBackend.eager
    granularity: Annotated[Granularity, typer.Option(case_sensitive=False, help="What ours compiles as one piece.")] = (
        Granularity.block
    )
    peer_compile: Annotated[
        PeerCompile,
        typer.Option(
            case_sensitive=False,
            help="How cache-dit is compiled. [b]transformer[/b]: as its README says. [b]transformer-tuned[/b]: the "
            "same after its set_compile_configs(). [b]blocks[/b]: by diffusers' compile_repeated_blocks, as its own "
            "example scripts do.",
        ),
    ] = PeerCompile.transformer
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="CPU threads of every system.")] = 1


@grouped
def bench(
    ctx: typer.Context,
    what: Rows,
    pictures: Pictures,
    running: Running,
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG.toml",
            help="The configurations. A table is a row, its name the row's, its keys keyword arguments of "
            '[b]cachedit_fx.enable_cache[/b]:  [i]\\["F1 R0.2"]  Fn_compute_blocks = 1  residual_diff_threshold = 0.2  '
            'calibrator = "taylorseer"[/i].  [b]presets = true[/b], above the tables, adds all presets. '
            '[b]quantize = "int8"[/b] quantizes first, as [b]cachedit_fx.quantize[/b] does. '
            '[i]system = "cache-dit"[/i] makes a row a peer\'s.  [dim]\\[default: DBCache at four thresholds, with '
            "and without TaylorSeer, and the presets][/dim]",
        ),
    ] = None,
) -> None:
    """Measure many configurations on the same pictures: work, wall time, PSNR, SSIM, accuracy, memory.

    Each cached row comes with its rival: [bold]as many steps as cost the same work[/bold], with no cache at all.

    For a look: [bold]cachedit bench --prompts 6 --rounds 1[/bold]. For figures, with the rows of others: [bold]cachedit
    bench --held-out 32 --peers[/bold]. For times against cache-dit: [bold]cachedit bench --against cache-dit
    --inner-backend inductor[/bold]. Ctrl-C keeps what is measured, [bold]--resume[/bold] goes on.

    [bold]work[/bold] is the FLOPs of the transformer's calls over the uncached run's. [bold]wall[/bold] is time over
    the uncached run's for the same prompt in the same round, the median; compiling is left out. PSNR and SSIM (from the
    extra [bold]metrics[/bold]) are against the uncached pictures from the same noise. [bold]right[/bold] is the share
    of the bundled model's pictures that show what the prompt says. With a pipeline of yours, or [bold]--clip[/bold], a
    second table has CLIP score, ImageReward, TFLOPs and speed-up.
    """
    if ctx.invoked_subcommand is not None:
        return
    if config is not None and not config.is_file():
        raise typer.BadParameter(_no_file(config, list(ctx.command.commands)), param_hint="CONFIG.toml")  # type: ignore[attr-defined]
    with reported(lambda: "; nothing was measured"):
        with quiet():
            from cachedit_fx.bench.run import plan_pairs, plan_rows
            from cachedit_fx.bench.systems import check_entry

        if what.against is not None:
            plan = plan_pairs(config, pictures.steps, what.only or (), what.peer_python)
        else:
            plan = plan_rows(config, pictures.steps, what.only or (), what.peers, what.peer_python, what.row or ())
        if what.list_rows:
            if pictures.pipeline is not None:
                check_entry(pictures.pipeline)
            show(_list(plan))
            return
        settings = _settings(pictures, running, is_paired=what.against is not None)
        check_out(running.out)
        check_compiler(settings.inner_backend)
        _run(plan, settings, running, what.peer_python)


def _no_file(config: Path, commands: list[str]) -> str:
    """What to say of a word that is no file. Nothing is imported for it."""
    if config.is_dir():
        return f"{config} is a folder; give a file of configurations"
    guess = nearest(config.name, commands)
    words = f"or did you mean the command {guess!r}?" if not config.suffix and len(config.parts) == 1 else ""
    return f"{config} cannot be read (no such file); give a file such as rows.toml {words}".rstrip()


def _settings(pictures: Pictures, running: Running, is_paired: bool) -> Settings:
    from cachedit_fx.bench.measure import Settings
    from cachedit_fx.bench.prompts import PromptError, calibration_prompts, chosen_prompts, known_prompts
    from cachedit_fx.bench.scorers import DEFAULT_CLIP

    if pictures.prompts is not None and pictures.held_out is not None:
        raise typer.BadParameter("--prompts and --held-out are two ways to say what is drawn; give one of them")
    if pictures.pipeline is not None and pictures.guidance != 1:
        raise typer.BadParameter(
            "that is the bundled model's; in a pipeline of yours, let generate() set it", param_hint="--guidance"
        )
    default = PAIRED_PROMPTS if is_paired else DEFAULT_PROMPTS
    try:
        prompts = chosen_prompts(pictures.prompts or str(default), pictures.held_out, pictures.prompt_seed)
        if pictures.pipeline is None:
            known_prompts(prompts)
    except PromptError as error:
        raise typer.BadParameter(str(error), param_hint="--prompts") from None
    return Settings(
        prompts=prompts,
        steps=pictures.steps,
        seed=pictures.seed,
        guidance=pictures.guidance,
        entry=pictures.pipeline,
        inner_backend=running.inner_backend.value,
        batch=pictures.batch,
        rounds=running.rounds,
        timed=len(prompts) if is_paired else Settings.timed,
        clip=pictures.clip or (DEFAULT_CLIP if pictures.pipeline else None),
        image_reward=pictures.image_reward,
        calibration=calibration_prompts(prompts, pictures.pipeline, pictures.prompt_seed),
        granularity=running.granularity.value,
        peer_compile=running.peer_compile.value,
        threads=running.threads,
    )


def _run(plan: Plan, settings: Settings, running: Running, peer_python: str) -> None:
    from cachedit_fx import CacheWarning
    from cachedit_fx.bench import pages
    from cachedit_fx.bench.measure import Bench
    from cachedit_fx.bench.record import FILE, Record, load_rows
    from cachedit_fx.bench.run import left, run
    from cachedit_fx.bench.systems import LIBRARIES

    out = running.out
    record = Record(settings, command_line(), machine(), versions(*LIBRARIES), notes=list(plan.notes))
    if running.resume:
        record.rows = load_rows(out, settings)
    with progress("calls") as tell, warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)  # an inert threshold shows in the figures
        tell("loading the model")
        with quiet():
            made = Bench(settings, tell, peer_python)
            made.check(plan.rows)
        is_finished = run(made, plan, record, lambda: record.save(out))
    if len(record.rows) > 1:
        with quiet():
            pages.save(record, out)
        show(*pages.parts(record))
        console.print()
        for name, told in FILES.items():
            console.print(f"{out / name}  [dim]{told}[/dim]")
    if not is_finished:
        kept = f"{out / FILE} has the others, --resume goes on" if len(record.rows) > 1 else "nothing was measured"
        errors.print(f"interrupted with {left(plan, record)} of {len(plan.rows)} rows to go; {kept}")
        raise typer.Exit(130)


def _list(plan: Plan) -> Table:
    table = Table(("row", "system", "arguments"), texts=range(3))
    for row in plan.rows:
        table.add(row.name, row.system, ", ".join(f"{name}={value!r}" for name, value in row.arguments.items()))
    return table
