"""The command line, `cachedit`: one file a command. Nothing heavy is imported before a command runs.

A new command is a function in a file of its own, listed below.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from cachedit_fx.cli.demo import demo

app = typer.Typer(
    name="cachedit",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)

for command in (demo,):
    app.command()(command)


def _show_versions(wanted: bool) -> None:
    if not wanted:
        return
    for name in ("cachedit-fx", "torch", "diffusers"):
        try:
            typer.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} (run from a checkout, not installed)" if name == "cachedit-fx" else f"{name} missing")
    raise typer.Exit()


@app.callback()
def main(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_versions, is_eager=True, help="Show the versions in use, and exit."),
    ] = False,
) -> None:
    """Let a diffusion transformer skip the work that consecutive denoising steps repeat.

    cachedit_fx is a torch.compile backend; this is its command line. Start with [bold]cachedit demo[/bold], which needs
    nothing but this installation. On your own pipeline:

    [bold]torch.compile(pipe.transformer, backend="cachedit")[/bold]   or   [bold]cachedit_fx.enable_cache(pipe)[/bold]
    """
