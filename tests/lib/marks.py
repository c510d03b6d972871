"""Marks that several modules of tests have, and parameters most of which run only in a part of `make test-all`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

SHARES_GRAPHS = pytest.mark.xdist_group("graphs")
"""For modules that use `lib.cases.graph_of`: one worker of xdist runs them all."""


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
