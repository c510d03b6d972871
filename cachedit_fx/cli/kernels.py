"""`cachedit kernels`: what the compilers make of the Triton kernels, and what bandwidth they reach."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from cachedit_fx.cli.terminal import console, errors, progress_bar, quiet
from cachedit_fx.report.files import check_folder, machine, whole_files

if TYPE_CHECKING:
    import torch

    from cachedit_fx.bench.kernels_verify import Checked, Total

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

    A variant holds if nothing is spilled, its threads read and write no byte more than they must, and, where pointers
    are aligned, every load and store has 128 bits or all that a thread has of the tensor.

    The exit code is 1 if a variant falls short.
    """
    obstacle = check_folder(out) if out else None
    if obstacle:
        raise typer.BadParameter(obstacle, param_hint="--out")
    with quiet():
        from cachedit_fx.bench.kernels_verify import TARGETS, checker, tasks, totals
        from cachedit_fx.kernels.layout import HAS_TRITON
    if not HAS_TRITON:
        errors.print(f"[red]error:[/red] {NO_TRITON}", markup=True, soft_wrap=True)
        raise typer.Exit(1)
    unknown = [name for name in target or () if name not in TARGETS]
    if unknown:
        raise typer.BadParameter(
            f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}", param_hint="--target"
        )
    todo = tasks([name for name in TARGETS if not target or name in target], kernel or ())
    if not todo:
        raise typer.BadParameter(f"no variant's name contains {' or '.join(kernel or ())}", param_hint="--kernel")

    found: list[Checked] = []
    try:
        with progress_bar(len(todo), "variants") as (progress, bar), checker() as run:
            for row in run(todo):
                found.append(row)
                progress.update(bar, advance=1, description=f"{row.kernel}, {row.target}")
    except KeyboardInterrupt:
        errors.print(f"interrupted after {len(found)} of {len(todo)} variants; nothing was written")
        raise typer.Exit(130) from None

    sums = totals(found)
    _show(_EVERY if every else _TOTALS, [_cells(row) for row in found] if every else [_sum(row) for row in sums])
    failed = [row for row in found if not row.is_good]
    for line in _told(found):
        console.print(f"[bold]{escape(line)}[/bold]")
    for row in failed[:MANY]:
        console.print(f"{escape(row.variant)}, {row.target}: {'; '.join(row.problems)}", soft_wrap=True)
    if len(failed) > MANY:
        console.print(f"and {len(failed) - MANY} more: --all")
    if out is not None:
        with whole_files(out) as folder:
            (folder / "kernels.md").write_text(markdown(found, sums))
            (folder / "kernels.csv").write_text(as_csv(found))
        console.print(f"\nwritten: {out / 'kernels.md'}, {out / 'kernels.csv'}")
    if failed:
        raise typer.Exit(1)


_TOTALS = ("kernel", "target", "variants", "most registers", "spills", "wide", "bytes exact")
_EVERY = ("variant", "target", "registers", "spills", "loads", "stores", "wide", "bytes exact")


def _sum(row: Total) -> tuple[str, ...]:
    return (
        row.kernel,
        row.target,
        str(row.variants),
        str(row.registers),
        str(row.spills),
        f"{row.wide} of {row.aligned}",
        f"{row.exact} of {row.variants}",
    )


def _cells(row: Checked) -> tuple[str, ...]:
    wide = {True: "yes", False: "no", None: "not aligned"}[row.is_wide]
    return (
        row.variant,
        row.target,
        str(row.registers),
        str(row.spills),
        _widths(row.accesses.loads),
        _widths(row.accesses.stores),
        wide,
        "yes" if row.is_exact else "no",
    )


def _widths(widths: Sequence[int]) -> str:
    """`4 x 16 + 2 x 4`, in bytes."""
    return " + ".join(f"{n} x {width}" for width, n in sorted(Counter(widths).items(), reverse=True))


def _show(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < 2 else "right", overflow="fold", no_wrap=not index)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _told(found: Sequence[Checked]) -> list[str]:
    return [f"{sum(row.is_good for row in found)} of {len(found)} hold: no spills, wide where aligned, no byte twice."]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown(found: Sequence[Checked], sums: Sequence[Total]) -> str:
    """The table of kernels and targets, what its columns mean, and what falls short."""
    lines = [
        "# What the compilers make of the kernels",
        "",
        f"Made by `{_command()}` on {machine()}, Triton {version('triton')}, ahead of time: nothing was run.",
        "",
        *_told(found),
        "",
        "- **variants**: specialisations that the launchers can choose.",
        "- **most registers**: of a thread, in any variant; vector registers on AMD.",
        "- **spills**: bytes spilled and read back (NVIDIA), registers spilled (AMD), of all variants.",
        "- **wide**: variants with aligned pointers whose loads and stores have 128 bits, or all that a thread has of "
        "the tensor.",
        "- **bytes exact**: variants whose instructions read and write each byte once.",
        "",
        _line(_TOTALS),
        _line(["---"] * 2 + ["---:"] * (len(_TOTALS) - 2)),
        *(_line(_sum(row)) for row in sums),
    ]
    failed = [row for row in found if not row.is_good]
    if failed:
        lines += ["", "## Variants that fall short", ""]
        lines += [f"- {row.variant}, {row.target}: {'; '.join(row.problems)}" for row in failed]
    return "\n".join(lines) + "\n"


def as_csv(found: Sequence[Checked]) -> str:
    """Every variant on every target."""
    import csv
    import io

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow((*_EVERY, "problems"))
    writer.writerows((*_cells(row), "; ".join(row.problems)) for row in found)
    return file.getvalue()


def _command() -> str:
    return shlex.join(["cachedit", *sys.argv[1:]])


def bench(
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Where [i]bandwidth.md[/i], [i].csv[/i] and [i].png[/i] go."),
    ] = Path("runs/kernels"),
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cuda, cuda:1, cpu, ...; cuda where there is one, unless given.")
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
    obstacle = check_folder(out)
    if obstacle:
        raise typer.BadParameter(obstacle, param_hint="--out")
    with quiet():
        from cachedit_fx.bench.kernels_bandwidth import (
            DTYPES,
            HEADINGS,
            as_csv,
            cells,
            count,
            markdown,
            measure,
            save_plot,
            shapes_for,
        )
    where = _device(device)
    unknown = [name for name in dtype or () if name not in DTYPES]
    if unknown:
        raise typer.BadParameter(f"no dtype {', '.join(unknown)}; there are {', '.join(DTYPES)}", param_hint="--dtype")
    dtypes = dtype or [name for name in DTYPES if name != "fp16" or where.type != "cpu"]
    shapes = {text: (_size(text),) for text in shape} if shape else shapes_for(where)
    rows = []
    with progress_bar(count(shapes, dtypes), "kernels") as (progress, bar):

        def tell(what: str) -> None:
            progress.update(bar, description=what)

        try:
            for row in measure(shapes, dtypes, where, rounds, tell):
                rows.append(row)
                progress.update(bar, advance=1)
        except KeyboardInterrupt:
            errors.print("interrupted; nothing was written")
            raise typer.Exit(130) from None
    _show(HEADINGS, [cells(row) for row in rows])
    on = hardware(where)
    with whole_files(out) as folder:
        (folder / "bandwidth.md").write_text(markdown(rows, shapes, f"`{_command()}`, on {on}."))
        (folder / "bandwidth.csv").write_text(as_csv(rows))
        save_plot(rows, f"Kernels on {on}", folder / "bandwidth.png")
    console.print(f"written: {', '.join(str(out / f'bandwidth.{kind}') for kind in ('md', 'csv', 'png'))}")


def hardware(device: torch.device) -> str:
    """What the figures were made on: `NVIDIA H100 80GB HBM3, torch 2.13.0, triton 3.7.1`."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{machine()}, one thread"
    versions = []
    for package in ("torch", "triton"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    return ", ".join([name, *versions])


def _device(name: str | None) -> torch.device:
    import torch

    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(
            f"{name} cannot be used: {str(error).splitlines()[0]}", param_hint="--device"
        ) from None
    return found


def _size(text: str) -> tuple[int, ...]:
    try:
        size = tuple(map(int, text.split("x")))
    except ValueError:
        size = ()
    if len(size) < 2 or min(size) < 1:
        raise typer.BadParameter(f"{text!r} is no shape such as 1x4096x3072", param_hint="--shape")
    return size
