"""Reads docstrings from source: those of functions and classes, and the string literals after fields of a class."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any


def attribute_docstrings(cls: type) -> dict[str, str]:
    """Attribute -> the string literal after it, for the attributes that the class itself declares."""
    body = _definition(cls).body
    docstrings: dict[str, str] = {}
    for statement, following in zip(body, body[1:], strict=False):
        name = _assigned_name(statement)
        if name is not None and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docstrings[name] = inspect.cleandoc(str(following.value.value))
    return docstrings


def class_docstring(cls: type) -> str:
    """The docstring as written; "" if there is none, even for a dataclass, which makes itself one."""
    return ast.get_docstring(_definition(cls)) or ""


def public_docstrings(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Qualified name and docstring of a public function or class, and of the class's own public members."""
    if not inspect.isclass(value):
        yield name, inspect.getdoc(value) or ""
        return
    yield name, class_docstring(value)
    for member, docstring in attribute_docstrings(value).items():
        yield f"{name}.{member}", docstring
    for method in _definition(value).body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            yield f"{name}.{method.name}", ast.get_docstring(method) or ""


def _definition(cls: type) -> ast.ClassDef:
    (statement,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(statement, ast.ClassDef)
    return statement


def _assigned_name(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return statement.target.id
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return None
