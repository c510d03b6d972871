"""Finds evidence of block loops in structure: tandem repeats in the sequence of node fingerprints.

a b c d a b c d a b c d e   ->   three blocks `a b c d`, cut at the phase at which the fewest values cross
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from torch import fx


def tandem_repeats(
    nodes: Sequence[fx.Node], prints: Sequence[Hashable], start: int, end: int
) -> list[list[tuple[int, int]]]:
    """The repeats in [start, end): for each one the [start, end) ranges of its blocks, which are identical neighbours.

    Blocks are cut at the phase at which the fewest values cross.
    """
    repeats: list[list[tuple[int, int]]] = []
    codes_of: dict[Hashable, int] = {}
    codes = np.array([codes_of.setdefault(mark, len(codes_of)) for mark in prints[start:end]], dtype=np.int64)
    pending = [(0, len(codes))]
    while pending:
        low, high = pending.pop()
        best = _longest_repeat(codes[low:high])
        if best is None:
            continue
        first, period, length = best
        first += low
        repeats.append(_rotate(nodes, start + first, period, length))
        pending += [(low, first), (first + length, high)]
    return sorted(repeats)


def _longest_repeat(codes: np.ndarray[Any, Any]) -> tuple[int, int, int] | None:
    """(start, period, length) of the repeat whose whole periods cover most nodes.

    Nodes after the last whole period do not count, since they may belong to the next loop. On a tie the shortest period
    wins: a stack of (linear, relu) must show as a repeat that is too short to be a block.
    """
    best: tuple[int, int, int] | None = None
    coverage = 0
    size = len(codes)
    for period in range(1, size // 2 + 1):
        matches = codes[:-period] == codes[period:]
        edges = np.flatnonzero(np.diff(np.concatenate(([False], matches, [False])).astype(np.int8)))
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            length = int(last - first) + period
            if last - first >= period and length - length % period > coverage:
                best, coverage = (int(first), period, length), length - length % period
    return best


def _rotate(nodes: Sequence[fx.Node], start: int, period: int, length: int) -> list[tuple[int, int]]:
    """Cut a repeat into as many blocks as it holds, at the phase at which the fewest values cross."""
    position = {node: start + index for index, node in enumerate(nodes[start : start + length])}
    last_use = {
        position[node]: max((position.get(user, start + length) for user in node.users), default=position[node])
        for node in position
    }

    def crossing(border: int) -> int:
        return sum(1 for at in range(start, border) if last_use[at] >= border)

    def badness(phase: int) -> tuple[int, int, int]:
        count = (length - phase) // period
        return (-count, crossing(start + phase + max(count // 2, 1) * period), phase)

    phase = min(range(min(period, length - 2 * period + 1)), key=badness)
    count = (length - phase) // period
    return [(start + phase + i * period, start + phase + (i + 1) * period) for i in range(count)]
