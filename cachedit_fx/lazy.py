"""Lets a package's public names be imported from its modules at their first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from threading import RLock
from typing import Any

_lock = RLock()
"""Modules that import each other must not be begun from two ends at once."""


def lazy_names(
    namespace: dict[str, Any], modules: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`.

    Args:
        namespace: the package's `globals()`.
        modules: module inside the package -> the public names that it defines.
    """
    package = namespace["__name__"]

    def get(name: str) -> Any:
        module = next((module for module, names in modules.items() if name in names), None)
        if module is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with _lock:
            value = getattr(import_module(f"{package}.{module}"), name)
        namespace[name] = value
        return value

    def names() -> list[str]:
        return sorted({*namespace, *namespace["__all__"]})

    return get, names
