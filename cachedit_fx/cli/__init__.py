"""The command line, `cachedit`: one file a command. Nothing heavy is imported before a command runs.

A new command is a function in a file of its own, listed below.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from cachedit_fx.cli.bench import bench
from cachedit_fx.cli.coverage import coverage
from cachedit_fx.cli.demo import demo
from cachedit_fx.cli.kernels import bench as bench_kernels
from cachedit_fx.cli.kernels import kernels
from cachedit_fx.cli.kernels import verify as verify_kernels

app = typer.Typer(
    name="cachedit",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)


def _unwrapped(command: Callable[..., object]) -> str:
    """A docstring with one line a paragraph, so that the terminal's width breaks it."""
    return "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))


for command in (demo, bench, coverage):
    app.command(help=_unwrapped(command))(command)
kernels.command("verify", help=_unwrapped(verify_kernels))(verify_kernels)
kernels.command("bench", help=_unwrapped(bench_kernels))(bench_kernels)
app.add_typer(kernels)


def _show_versions(wanted: bool) -> None:
    if not wanted:
        return
    for name in ("cachedit-fx", "torch", "diffusers"):
        try:
            typer.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} (run from a checkout, not installed)" if name == "cachedit-fx" else f"{name} missing")
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


app.callback(help=_unwrapped(main))(main)
