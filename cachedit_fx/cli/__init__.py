"""The command line, `cachedit`: one file a command. Nothing heavy is imported before a command runs.

A new command is a function in a file of its own, listed below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from cachedit_fx.cli.bench import BenchGroup, bench
from cachedit_fx.cli.branches import branches
from cachedit_fx.cli.cold import cold
from cachedit_fx.cli.coverage import coverage
from cachedit_fx.cli.demo import demo
from cachedit_fx.cli.fusion import fusion
from cachedit_fx.cli.kernels import attention, bandwidth, kernels, verify
from cachedit_fx.cli.links import links
from cachedit_fx.cli.metrics import metrics
from cachedit_fx.cli.motion import motion
from cachedit_fx.cli.overhead import overhead
from cachedit_fx.cli.quantized import quantized
from cachedit_fx.cli.sensitivity import sensitivity
from cachedit_fx.cli.ulysses import ulysses
from cachedit_fx.report.files import versions


def _unwrapped(command: Callable[..., object]) -> str:
    """A docstring with one line a paragraph, so that the terminal's width breaks it."""
    return "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))


def _add(group: typer.Typer, **commands: Callable[..., None]) -> None:
    for name, command in commands.items():
        group.command(name, help=_unwrapped(command))(command)


def _show_versions(wanted: bool) -> None:
    if not wanted:
        return
    names = ("cachedit-fx", "torch", "diffusers")
    installed = {"cachedit-fx": "(run from a checkout, not installed)"} | versions(*names)
    for name in names:
        typer.echo(f"{name} {installed.get(name, 'missing')}")
    raise typer.Exit()


def main(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_versions, is_eager=True, help="Show the versions in use, and exit."),
    ] = False,
) -> None:
    """Let a diffusion transformer skip the work that consecutive denoising steps repeat.

    This is the command line of cachedit_fx, a torch.compile backend. Start with [bold]cachedit demo[/bold], which needs
    nothing but this installation. On a pipeline of your own, one line is all:

    [bold]torch.compile(pipe.transformer, backend="cachedit")[/bold] or [bold]cachedit_fx.enable_cache(pipe)[/bold]
    """


app = typer.Typer(
    name="cachedit",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)
app.callback(help=_unwrapped(main))(main)
_add(app, demo=demo)
benches = typer.Typer(
    name="bench",
    cls=BenchGroup,
    invoke_without_command=True,
    subcommand_metavar="| COMMAND ...",
    rich_markup_mode="rich",
)
benches.callback(help=_unwrapped(bench))(bench)
_add(
    benches,
    overhead=overhead,
    cold=cold,
    motion=motion,
    quantized=quantized,
    ulysses=ulysses,
    links=links,
    branches=branches,
)
app.add_typer(benches)
_add(app, coverage=coverage, metrics=metrics, sensitivity=sensitivity)
_add(kernels, verify=verify, bench=bandwidth, attention=attention, fusion=fusion)
app.add_typer(kernels)
