"""Makes docs/options.md from the public configurations: fields, defaults, rules and docstrings."""

from __future__ import annotations

import dataclasses
from typing import Any

from tools.docstrings import attribute_docstrings, class_docstring

import cachedit_fx

HEAD = """\
# Options

<!-- Made by `python -m tools.pages` from the docstrings of the classes below. Edit these. -->

The fields of `Options` are keyword arguments of `cachedit_fx.enable_cache` and `cachedit_fx.compile`. For
`torch.compile(..., backend="cachedit", options={...})` they are the keys of `options`. Fields of the policy's class may
stand among them. The [guide](guide.md) shows how to use them, and [what to choose](choosing.md) says which values win.

`enable_cache` and `compile` also take `fullgraph`, `dynamic` and `recompile_limit`, as `torch.compile` does, and
[`guards`](guide.md#fewer-guards).
"""


ORDER = ("Options", "DBCacheConfig", "CalibratorConfig", "ParamsModifier")
"""Classes that the page begins with, each followed by the classes derived from it."""


def page() -> str:
    """The page, as Markdown."""
    contents = " · ".join(f"[{config.__name__}](#{config.__name__.lower()})" for config in configs())
    return "\n".join([HEAD, contents, "", *(_section(config) for config in configs())])


def configs() -> list[type]:
    """The public classes of settings, in the order of the page."""
    public = [getattr(cachedit_fx, name) for name in cachedit_fx.__all__]
    settings = [value for value in public if any("rule" in field.metadata for field in _fields(value))]

    def order(config: type) -> tuple[int, int]:
        root = next((place for place, name in enumerate(ORDER) if issubclass(config, getattr(cachedit_fx, name))), 99)
        return root, len(config.__mro__)

    return sorted([*settings, cachedit_fx.ParamsModifier], key=order)


def _fields(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()


def _section(config: type) -> str:
    public = {getattr(cachedit_fx, name) for name in cachedit_fx.__all__}
    sources = [each for each in config.__mro__ if each is config or each not in public]
    meanings = {name: text for each in reversed(sources[:-1]) for name, text in attribute_docstrings(each).items()}
    rows = [
        (f"`{field.name}`", f"`{_shown(field.default)}`", field.metadata["rule"].description, meanings[field.name])
        for field in _fields(config)
        if field.name in meanings and "rule" in field.metadata
    ]
    lines = [f"## {config.__name__}", "", class_docstring(config), ""]
    if rows:
        lines += ["| field | default | allowed | meaning |", "| --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    """A default as a user would write it: a config that has only defaults without its fields."""
    if dataclasses.is_dataclass(default) and not isinstance(default, type) and default == type(default)():
        return f"{type(default).__name__}()"
    return repr(default).replace("'", '"')


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
