"""Options in groups: a dataclass for each panel of a help page, and options that several commands have."""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from cachedit_fx.config.rules import nearest
from cachedit_fx.report.files import check_folder

_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Spread a command's parameters that are dataclasses into one option for each field.

    A dataclass's docstring is the heading of its panel on the help page. Its fields are annotated as typer's parameters
    are, `name: Annotated[kind, typer.Option(...)] = default`.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters = [parameter.replace(kind=_KEYWORD) for parameter in signature.parameters.values()]
    groups: dict[str, Any] = {p.name: p.annotation for p in parameters if is_dataclass(p.annotation)}
    spread = [
        option
        for parameter in parameters
        for option in (_options_of(groups[parameter.name]) if parameter.name in groups else [parameter])
    ]

    @functools.wraps(command)
    def run(**options: Any) -> None:
        for name, group in groups.items():
            options[name] = group(**{field.name: options.pop(field.name) for field in fields(group)})
        command(**options)

    run.__signature__ = signature.replace(parameters=spread)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in spread}
    return run


def _options_of(group: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        kind, (option,) = hints[field.name].__origin__, hints[field.name].__metadata__
        option = copy(option)
        option.rich_help_panel = group.__doc__
        yield inspect.Parameter(field.name, _KEYWORD, default=field.default, annotation=Annotated[kind, option])


class InnerBackend(StrEnum):
    """What compiles the pieces."""

    inductor = "inductor"
    eager = "eager"


Blocks = Annotated[
    list[int] | None,
    typer.Option(
        "--blocks",
        metavar="N",
        min=3,
        max=1000,
        help="Of the random FLUX; may be repeated.  [dim]\\[default: 18 and 57][/dim]",
    ),
]
DEPTHS = [18, 57]
"""The default of `--blocks`."""


PipelineEntry = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="A pipeline of yours in place of the bundled model: a function without arguments, in the current "
        "folder or installed. It returns a diffusers pipeline that takes prompts, or an object "
        "with [b]pipe[/b] and [b]generate(pipe, prompts, steps, seed)[/b]. That returns float pictures "
        "\\[B, 3, H, W] in 0..1, picture i from the noise of seed + i, and may pass embeddings.",
    ),
]


OnlyModels = Annotated[
    list[str] | None,
    typer.Option("--only", "-k", metavar="TEXT", help="Only models with TEXT in their names; may be repeated."),
]


def models_of(names: Iterable[str], only: list[str] | None) -> list[str]:
    """The names of models that `--only` asks for; all without it. Refuses a text that is in no name."""
    names = list(names)
    chosen = [name for name in names if not only or any(text.lower() in name.lower() for text in only)]
    if not chosen:
        guess = nearest((only or [""])[0], names)
        raise typer.BadParameter(f"no model is called so; did you mean {guess!r}?", param_hint="--only")
    return chosen


ImageTokens = Annotated[
    list[int] | None,
    typer.Option(
        "--tokens",
        metavar="N",
        min=1,
        help="Time steps with N image tokens, a square number; may be repeated. None by default.",
    ),
]


def sides_of(tokens: list[int] | None) -> list[int]:
    """The side of a picture of each of these numbers of tokens. Refuses a number that is no square."""
    sides = [round(number**0.5) for number in tokens or ()]
    for number, side in zip(tokens or (), sides, strict=True):
        if side**2 != number:
            raise typer.BadParameter(f"{number} is no square number, such as {side**2}", param_hint="--tokens")
    return sides


def check_out(folder: Path) -> None:
    """Refuse `--out` if nothing can be written there, before anything slow begins."""
    obstacle = check_folder(folder)
    if obstacle:
        raise typer.BadParameter(obstacle, param_hint="--out")


def check_compiler(inner_backend: str) -> None:
    """Refuse inductor without a compiler: else it shows as a long traceback half a minute later."""
    compiler = os.environ.get("CXX") or "g++"
    if inner_backend == "inductor" and shutil.which(compiler.split()[0]) is None:
        raise typer.BadParameter(
            f"inductor needs a C++ compiler, and there is no {compiler}. Install one (Debian: apt-get install g++), "
            "name it in CXX, or use --inner-backend eager",
            param_hint="--inner-backend",
        )
