"""Cuts of values: a reshape of each rank's part is the rank's part of the reshape."""

import math

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachedit_fx.passes.layouts import Cut, Segment, hints_of, product, regrouped, simplified, unit_for


def parts_of(x, cut, ranks):
    """Each rank's part, by the words of the module: of each segment consecutive units, the first ranks one more."""
    parts: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    start = 0
    for segment in cut.segments:
        for rank in range(ranks):
            own = sum(1 for unit in range(segment.count) if unit % ranks == rank)  # as many, whoever holds which
            parts[rank].append(x.narrow(cut.axis, start, own * segment.unit))
            start += own * segment.unit
    assert start == x.shape[cut.axis]
    return [torch.cat(part, cut.axis) for part in parts]


@st.composite
def reshapes(draw):
    """(sizes, a cut of one of them, other sizes of the same elements)."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=5))
    sizes = tuple(draw(groups(factors)))
    axis = draw(st.integers(0, len(sizes) - 1))
    borders = sorted(draw(st.sets(st.integers(1, sizes[axis]), max_size=2)) | {sizes[axis]})
    lengths = [high - low for low, high in zip([0, *borders], borders, strict=False)]
    units = [draw(st.sampled_from([unit for unit in range(1, n + 1) if n % unit == 0])) for n in lengths]
    segments = tuple(Segment(n // unit, unit) for n, unit in zip(lengths, units, strict=True))
    return sizes, Cut(axis, segments), tuple(draw(groups(factors)))


@st.composite
def groups(draw, factors):
    """Runs of the factors, multiplied."""
    sizes, size = [], 1
    for factor in factors:
        size *= factor
        if draw(st.booleans()):
            sizes.append(size)
            size = 1
    return [*sizes, size]


@given(reshapes(), st.integers(2, 4))
def test_parts_are_reshaped_to_parts(case, ranks):
    sizes, cut, result = case
    x = torch.arange(math.prod(sizes)).reshape(sizes)
    y = x.reshape(result)
    new = regrouped(cut, sizes, result, (hints_of(x), hints_of(y)))
    if new is None:
        return
    assert new.length == result[new.axis]
    for part, expected in zip(parts_of(x, cut, ranks), parts_of(y, new, ranks), strict=True):
        assert torch.equal(part.reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("before", "cut", "after", "expected"),
    [
        ((1, 512, 192), Cut.along(1, 512), (1, 512, 6, 32), Cut.along(1, 512)),
        ((1, 512, 192), Cut.along(1, 512), (512, 192), Cut.along(0, 512)),
        ((2, 6, 512, 32), Cut.along(2, 512), (12, 512, 32), Cut.along(1, 512)),
        ((1, 8, 64, 16), Cut.along(1, 8), (1, 512, 16), Cut(1, (Segment(8, 64),))),
        ((1, 512, 16), Cut(1, (Segment(8, 64),)), (1, 8, 64, 16), Cut.along(1, 8)),
        ((2, 8, 16), Cut.along(1, 8), (16, 16), Cut.along(0, 8, 8)),
        ((16, 16), Cut.along(0, 8, 8), (2, 8, 16), Cut.along(1, 8)),
        ((1, 512, 16), Cut.along(1, 512), (1, 8, 64, 16), None),
        ((1, 512, 16), Cut.along(1, 64, 448), (1, 8, 64, 16), None),
    ],
)
def test_cut_follows_the_axis(before, cut, after, expected):
    assert regrouped(cut, before, after, (before, after)) == expected


def test_symbols():
    """Lengths that depend on data are compared by what they are, and add no guard."""
    length, other = sympy.symbols("u0 u1", integer=True, nonnegative=True)
    cut = Cut.along(1, length, other)
    assert cut.length == simplified(length + other) and cut.borders == [0, length, length + other]
    assert cut.between(length, simplified(other + length)) == (1, 2) and cut.between(other, cut.length) is None
    before, after = (1, cut.length, 192), (1, cut.length, 6, 32)
    assert regrouped(cut, before, after, ((1, 512, 192), (1, 512, 6, 32))) == cut
    merged = regrouped(cut.at(0), (cut.length, 4), (product((cut.length, 4)),), ((512, 4), (2048,)))
    assert merged == Cut(0, (Segment(length, 4), Segment(other, 4)))


def test_unit_that_a_reshape_needs():
    assert unit_for(Cut.along(1, 512), (1, 512, 16), (1, 8, 64, 16)) == 64
    assert unit_for(Cut.along(1, 512), (1, 512, 16), (1, 512, 4, 4)) == 1
