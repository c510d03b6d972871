"""Parameters of a test, most of which run only in a part of `make test-all`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def only_in(part: str, values: Iterable[Any], but: Collection[Any] = ()) -> list[Any]:
    """For `parametrize` and `params`: `values`, of which all but those in `but` run in that part only.

    A tuple is a row of several parameters.
    """
    values = list(values)
    missing = [value for value in but if value not in values]
    assert not missing, f"no such parameters: {missing}"
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[] if value in but else [pytest.mark.full(part)],
        )
        for value in values
    ]
