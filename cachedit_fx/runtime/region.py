"""What the run time knows of a region, and what it is known by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

ChainKey: TypeAlias = tuple[tuple[str, ...], int]
"""The loops that a chain runs through, and its number among those of a call that run through the same."""


class RegionKey(NamedTuple):
    """What a session knows a region by, whichever graphs the call consists of."""

    chain: ChainKey
    """The chain that the region was cut from."""
    block: int | None
    """The region's block, if blocks are regions of their own."""


@dataclass(frozen=True)
class RegionInfo:
    """A region as it was planned.

    Attributes:
        loops: names of the loops of its chain.
        num_blocks: blocks of its chain.
        first, last: F and B.
        loop: with a region for each loop, its loop's place in the chain.
        block: its block, if blocks are regions of their own.
    """

    loops: tuple[str, ...]
    num_blocks: int
    first: int
    last: int
    loop: int | None = None
    block: int | None = None
