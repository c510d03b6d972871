"""`cachedit kernels`: what the compilers make of the Triton kernels, and what bandwidth they reach."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachedit_fx.cli.options import check_out
from cachedit_fx.cli.terminal import command_line, console, errors, progress, quiet, reported, show
from cachedit_fx.report.files import hardware, machine, versions

if TYPE_CHECKING:
    import torch

    from cachedit_fx.bench.kernels_bandwidth import Timed
    from cachedit_fx.bench.kernels_verify import Checked

kernels = typer.Typer(
    name="kernels",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Look at the Triton kernels: what the compilers make of them, and what bandwidth they reach.",
)

NO_TRITON = (
    "Triton is not installed; the CPU build of torch comes without it. "
    "Install it with: pip install 'triton>=3.7.1,<3.10'   (Linux; no GPU is needed)"
)
NO_SAGE = "sageattention is not installed. Install it with: pip install 'sageattention>=1.0.6,<1.1'"
MANY = 10
"""Failures that are told one by one."""


def verify(
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="sm80, sm89, sm90, sm100 or gfx942; may be repeated. All unless given."),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option("--kernel", "-k", metavar="TEXT", help="Only variants whose name contains TEXT; may be repeated."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Show every variant rather than a line for each kernel and target.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write [i]kernels.md[/i], and [i]kernels.csv[/i] with every variant, there."
        ),
    ] = None,
) -> None:
    """Compile the Triton kernels for GPUs that need not be there, and read what came out.

    A variant holds if nothing is spilled and its threads read and write no byte more than they must. If pointers are
    aligned, every load and store must have 128 bits too, or all that a thread has of the tensor.

    The exit code is 1 if a variant falls short.
    """
    if out is not None:
        check_out(out)
    with quiet():
        from cachedit_fx.bench import kernels_verify as bench
        from cachedit_fx.kernels.layout import HAS_TRITON
    if not HAS_TRITON:
        errors.print(f"[red]error:[/red] {NO_TRITON}", markup=True, soft_wrap=True)
        raise typer.Exit(1)
    unknown = [name for name in target or () if name not in bench.TARGETS]
    if unknown:
        raise typer.BadParameter(
            f"no target {', '.join(unknown)}; there are {', '.join(bench.TARGETS)}", param_hint="--target"
        )
    todo = bench.tasks([name for name in bench.TARGETS if not target or name in target], kernel or ())
    if not todo:
        raise typer.BadParameter(f"no variant's name contains {' or '.join(kernel or ())}", param_hint="--kernel")

    rows: list[Checked] = []
    interrupted = f" after {{}} of {len(todo)} variants; nothing was written"
    with reported(lambda: interrupted.format(len(rows))), progress("variants") as tell, bench.checker() as run:
        tell(more=len(todo))
        for row in run(todo):
            rows.append(row)
            tell(f"{row.kernel}, {row.target}", done=1)

    show(bench.variants_table(rows) if every else bench.totals_table(bench.totals(rows)))
    console.print(f"\n[bold]{bench.summary(rows)}[/bold]")
    problems = bench.problems(rows)
    for problem in problems[:MANY]:
        console.print(problem, markup=False, soft_wrap=True)
    if len(problems) > MANY:
        console.print(f"and {len(problems) - MANY} more: --all")
    if out is not None:
        made_by = f"Made by `{command_line()}` on {machine()}, Triton {versions('triton')['triton']}"
        bench.save(rows, f"{made_by}, ahead of time: nothing was run.", out)
        console.print(f"\nwritten: {out / 'kernels.md'}, {out / 'kernels.csv'}")
    if problems:
        raise typer.Exit(1)


def bandwidth(
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Where [i]bandwidth.md[/i], [i].csv[/i] and [i].png[/i] go."),
    ] = Path("runs/kernels"),
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cuda, cuda:1, cpu, ...; cuda if there is one, unless given.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="bf16, fp16 or fp32; may be repeated. All unless given; no fp16 on a CPU."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE",
            help="Hidden states such as 1x4096x3072; may be repeated. Those of FLUX and Wan, as long as they fit, and "
            "small ones, unless given.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is timed; medians count.")] = 20,
) -> None:
    """Time the kernels against a copy that moves as many bytes, and against plain torch.

    On a machine without a GPU these are the paths for a CPU, on one thread.
    """
    check_out(out)
    with quiet():
        from cachedit_fx.bench import kernels_bandwidth as bench
    where = _device(device)
    unknown = [name for name in dtype or () if name not in bench.DTYPES]
    if unknown:
        raise typer.BadParameter(
            f"no dtype {', '.join(unknown)}; there are {', '.join(bench.DTYPES)}", param_hint="--dtype"
        )
    dtypes = dtype or [name for name in bench.DTYPES if name != "fp16" or where.type != "cpu"]
    shapes = {text: (_size(text),) for text in shape} if shape else bench.shapes_for(where)
    rows: list[Timed] = []
    with reported(lambda: "; nothing was written"), progress("kernels") as tell:
        rows.extend(bench.measure(shapes, dtypes, where, rounds, tell))
    show(bench.table(rows))
    bench.save(rows, shapes, command_line(), hardware(where), out)
    console.print(f"\nwritten: {', '.join(str(out / f'bandwidth.{kind}') for kind in ('md', 'csv', 'png'))}")


def attention(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where [i]attention.md[/i] goes.")] = Path("runs/kernels"),
) -> None:
    """Compare INT8 attention with sageattention 1.0.6: errors, and instructions and bytes of the loop over keys.

    Nothing runs on a GPU: errors come from Triton's interpreter, and the loops are compiled for sm80, sm89 and sm90.
    """
    check_out(out)
    with quiet():
        from cachedit_fx.bench import kernels_attention as bench
        from cachedit_fx.kernels.layout import HAS_TRITON
    missing = NO_TRITON if not HAS_TRITON else NO_SAGE if find_spec("sageattention") is None else ""
    if missing:
        errors.print(f"[red]error:[/red] {missing}", markup=True, soft_wrap=True)
        raise typer.Exit(1)
    with reported(lambda: "; nothing was written"):
        rows, loops = bench.measure()
    show(bench.errors_table(rows))
    show(bench.loops_table(loops))
    made_by = f"Made by `{command_line()}` on {machine()}, Triton {versions('triton')['triton']}; nothing ran on a GPU."
    bench.save(rows, loops, made_by, out)
    console.print(f"\nwritten: {out / 'attention.md'}")


def _device(name: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(
            f"{name} cannot be used: {str(error).splitlines()[0]}", param_hint="--device"
        ) from None
    return device


def _size(text: str) -> tuple[int, ...]:
    try:
        size = tuple(map(int, text.split("x")))
    except ValueError:
        size = ()
    if len(size) < 2 or min(size) < 1:
        raise typer.BadParameter(f"{text!r} is no shape such as 1x4096x3072", param_hint="--shape")
    return size
