"""Makes docs/cli.md from the commands: their docstrings, their options and the help of these."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import EnumMeta
from typing import Any, get_args

import typer
from typer.models import OptionInfo, ParameterInfo
from typer.utils import get_params_from_function

from cachedit_fx.cli import app
from cachedit_fx.report import tables
from cachedit_fx.report.tables import Heading, Part, Table

HEAD = "<!-- Made by `python -m tools.pages` from the commands in cachedit_fx/cli. Edit these. -->"


def page() -> str:
    """The page, as Markdown."""
    return tables.page(Heading("The command line"), HEAD, *_group(app, "cachedit"))


def _group(group: typer.Typer, path: str) -> Iterator[Part]:
    """A group's section, then those of its commands and groups."""
    callback = group.registered_callback
    text = (callback and callback.help) or group.info.help or ""
    yield from _section(path, str(text), callback.callback if callback else None)
    for command in group.registered_commands:
        yield from _section(f"{path} {command.name}", command.help or "", command.callback)
    for sub in group.registered_groups:
        assert sub.typer_instance is not None
        yield from _group(sub.typer_instance, f"{path} {sub.typer_instance.info.name}")


def _section(path: str, text: str, callback: Callable[..., Any] | None) -> Iterator[Part]:
    """A heading, the text, and a table for each panel of options."""
    yield Heading(path, 2)
    yield from _markdown(text).split("\n\n")
    panels: dict[str, Table] = {}
    for parameter in get_params_from_function(callback).values() if callback else ():
        info = parameter.default
        if isinstance(info, ParameterInfo):
            title = info.rich_help_panel or ("Options" if isinstance(info, OptionInfo) else "Arguments")
            table = panels.setdefault(title, Table((title, "default", "meaning"), texts=range(3)))
            table.add(_names(parameter.name, parameter.annotation, info), _default(info), _meaning(info))
    yield from panels.values()


def _names(name: str, kind: Any, info: ParameterInfo) -> str:
    """`--prompts`, `-p` TEXT."""
    if not isinstance(info, OptionInfo):
        return f"`{info.metavar}`"
    names = info.param_decls or (f"--{name.replace('_', '-')}",)
    choices: list[Any] = next((list(enum) for enum in (kind, *get_args(kind)) if isinstance(enum, EnumMeta)), [])
    value = info.metavar or ", ".join(choice.value for choice in choices)
    return f"{', '.join(f'`{option}`' for option in names)} {value}".strip()


def _default(info: ParameterInfo) -> str:
    """Empty if there is none, or if the help says it."""
    if isinstance(info.show_default, str):
        return info.show_default
    return "" if info.default is None or info.default is False else f"`{info.default}`"


def _meaning(info: ParameterInfo) -> str:
    bounds = (("at least", info.min), ("at most", info.max))
    limits = [f"{word} {bound:g}" for word, bound in bounds if bound is not None]
    text = _markdown(info.help or "")
    return f"{text} ({', '.join(limits)})" if limits else text


_MARKS = {"bold": "**", "b": "**", "i": "*", "dim": ""}


def _markdown(text: str) -> str:
    """Text in rich's markup as Markdown."""
    text = re.sub(r"(?<!\\)\[/?(bold|b|i|dim)\]", lambda match: _MARKS[match[1]], text)
    return re.sub(" +", " ", text.replace("\\[", "["))
