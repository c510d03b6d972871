"""`cachedit sensitivity`: which layers can be quantized at what cost, and a plan for a wanted quality or size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachedit_fx.cli.options import PipelineEntry, check_out, grouped
from cachedit_fx.cli.terminal import command_line, console, errors, progress, quiet, reported, show
from cachedit_fx.report.files import machine, versions

if TYPE_CHECKING:
    from cachedit_fx.bench.sensitivity import Drawing, Probe, Record, Settings
    from cachedit_fx.quantization.plan import Plan

FILES = {
    "sensitivity.json": "every figure",
    "sensitivity.md": "these tables",
    "sensitivity.png": "errors by block",
    "plan.json": "the argument per_layer of cachedit_fx.quantize",
}


@dataclass(frozen=True)
class Wanted:
    """What is wanted"""

    kinds: Annotated[
        str,
        typer.Option(
            metavar="KIND,KIND,...",
            help="Kinds of [b]cachedit_fx.quantize[/b] that run here. A plan mixes several: it gives each group one "
            "of them or none.",
        ),
    ] = "int8"
    psnr: Annotated[
        float | None,
        typer.Option(
            metavar="DB",
            min=0,
            help="Make the smallest plan whose pictures have this PSNR, on the prompts that errors are measured on.",
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Make the plan of least error for this size of all weights: [b]60%[/b] of the unquantized ones, or "
            "such as [b]14MiB[/b].",
        ),
    ] = None
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="N|FILE",
            help="Draw other prompts with the plan, with each kind everywhere, and with the plan's bytes spent front "
            "to back, back to front and at random. N captions that are none of ShapesBench, or a text file, a prompt a "
            "line.",
        ),
    ] = None


@dataclass(frozen=True)
class Pictures:
    """On which pictures"""

    pipeline: PipelineEntry = None
    prompts: Annotated[
        str,
        typer.Option(
            metavar="N|FILE",
            help="What errors are measured on: N of the 200 prompts of ShapesBench, spread over its categories. Or a "
            "text file, a prompt a line.",
        ),
    ] = "8"
    steps: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Denoising steps.")] = 28
    every: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Measure on one of N calls of the model. Odd numbers take in both branches of guidance. Their inputs "
            "and outputs stay in memory.",
        ),
    ] = 5
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Picture i starts from the noise of seed N + i.")] = 0
    guidance: Annotated[float, typer.Option(metavar="G", min=1.0, help="Guidance of the bundled model; 1 is none.")] = (
        1.0
    )
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures drawn by one call.")] = 1


@dataclass(frozen=True)
class Running:
    """How it runs"""

    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder for [b]sensitivity.json[/b], written anew after every group, [b]sensitivity.md[/b], "
            "[b]sensitivity.png[/b] and [b]plan.json[/b].",
        ),
    ] = Path("cachedit-sensitivity")
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in --out: what is there is not measured again. Errors must have been measured "
            "with the same settings; [b]--psnr[/b], [b]--size[/b] and [b]--compare[/b] may be others.",
        ),
    ] = False
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="CPU threads.")] = 1


@grouped
def sensitivity(wanted: Wanted, pictures: Pictures, running: Running) -> None:
    """Measure what the quantization of each group of layers costs, and plan which to quantize.

    A group is a part of a block: its attention, its feed-forward network. Each is quantized alone, and the model's
    output compared with the unquantized one, on calls of an unquantized generation. The bundled model takes some two
    minutes for each kind.

    For a look: [bold]cachedit sensitivity --prompts 2[/bold]. Then a plan from the same errors: [bold]cachedit
    sensitivity --prompts 2 --resume --size 60%[/bold], or [bold]--psnr 60[/bold]. [bold]--compare 32[/bold] says what
    the plan is worth on other prompts. Ctrl-C keeps what is measured, [bold]--resume[/bold] goes on.

    A plan takes groups in the order of their error for a saved byte, and adds up squared errors. It is used as it is:
    [bold]cachedit_fx.quantize(pipe, None, per_layer=json.load(open("plan.json")))[/bold].
    """
    if wanted.psnr is not None and wanted.size is not None:
        raise typer.BadParameter("--psnr and --size both say when a plan ends; give one of them")
    if wanted.compare is not None and wanted.psnr is None and wanted.size is None:
        raise typer.BadParameter(
            "there is no plan to compare; say by --psnr or --size what it is for", param_hint="--compare"
        )
    if pictures.pipeline is not None and pictures.guidance != 1:
        raise typer.BadParameter(
            "that is the bundled model's; in a pipeline of yours, let generate() set it", param_hint="--guidance"
        )
    check_out(running.out)
    with reported(lambda: "; nothing was measured"):
        with quiet():
            from cachedit_fx.bench.sensitivity import Probe, Record, most_bytes
        settings = _settings(wanted, pictures, running)
        if wanted.size is not None:
            most_bytes(wanted.size, 0)
        others = _others(wanted.compare, settings)
        record = Record(settings, command_line(), machine(), versions("torch", "diffusers", "torchao"))
        if running.resume:
            record.resume(running.out)
        with progress("groups") as tell:
            tell("loading the model")
            with quiet():
                probe = Probe(settings, tell)
                plan, drawings, is_finished = _measure(probe, record, wanted, others, running.out)
        _show(record, plan, drawings, running.out)
    if not is_finished:
        kept = f"{running.out} has them, --resume goes on" if record.measurements else "nothing was measured"
        errors.print(f"interrupted after {len(record.groups)} groups; {kept}")
        raise typer.Exit(130)


def _settings(wanted: Wanted, pictures: Pictures, running: Running) -> Settings:
    from cachedit_fx.bench.prompts import chosen_prompts, known_prompts
    from cachedit_fx.bench.sensitivity import Settings, kinds_in

    prompts = chosen_prompts(pictures.prompts, None, 0)
    return Settings(
        prompts=known_prompts(prompts) if pictures.pipeline is None else prompts,
        kinds=kinds_in(wanted.kinds),
        steps=pictures.steps,
        seed=pictures.seed,
        guidance=pictures.guidance,
        entry=pictures.pipeline,
        batch=pictures.batch,
        every=pictures.every,
        threads=running.threads,
    )


def _others(text: str | None, settings: Settings) -> tuple[str, ...]:
    """The prompts of `--compare`: none that errors are measured on."""
    from cachedit_fx.bench.prompts import PromptError, chosen_prompts, known_prompts

    if text is None:
        return ()
    prompts = chosen_prompts(text, int(text) if text.isdecimal() else None, 1)
    shared = sorted({*prompts} & {*settings.prompts})
    if shared or not prompts:
        told = f"errors are measured on {shared[0]!r} too" if shared else "no prompts"
        raise PromptError(f"--compare: {told}; give prompts that are not among --prompts")
    return known_prompts(prompts) if settings.entry is None else prompts


def _measure(
    probe: Probe, record: Record, wanted: Wanted, others: tuple[str, ...], out: Path
) -> tuple[Plan | None, list[Drawing], bool]:
    """The plan, its comparison, and whether all was measured. Ctrl-C ends it early."""
    from cachedit_fx.bench.sensitivity import compare, most_bytes, plan_for_psnr, plan_for_size
    from cachedit_fx.quantization.plan import greedy_plans

    plan: Plan | None = None
    drawings: list[Drawing] = []
    try:
        for _ in probe.measure(record):
            record.save(out)
        plans = greedy_plans(record.candidates)
        if wanted.size is not None:
            plan = plan_for_size(plans, most_bytes(wanted.size, record.bytes), record.bytes)
        elif wanted.psnr is not None:
            plan = plan_for_psnr(plans, wanted.psnr, probe, record)
        if plan is not None and others:
            for drawing in compare(probe, record, plan, others):
                drawings.append(drawing)
                record.save(out)
    except KeyboardInterrupt:
        return plan, drawings, False
    return plan, drawings, True


def _show(record: Record, plan: Plan | None, drawings: list[Drawing], out: Path) -> None:
    if not record.groups:
        return
    from cachedit_fx.bench import sensitivity_pages as pages

    with quiet():
        names = pages.save(record, plan, drawings, out)
    show(pages.groups_table(record, plan), *pages.summary(record, plan, drawings))
    console.print()
    for name in names:
        console.print(f"{out / name}  [dim]{FILES[name]}[/dim]")
