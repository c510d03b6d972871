"""What the run time knows of a region, and what it is known by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

ChainKey: TypeAlias = tuple[tuple[str, ...], int]
"""The loops that a chain runs through, and its number among those of a call that run through the same."""


RegionKey: TypeAlias = tuple[ChainKey, int | None]
"""The chain that a region was cut from, and its block where it is a single one."""


@dataclass(frozen=True)
class RegionInfo:
    """What the run time knows of a region: the loops and the number of blocks of its chain, F and B; and which block it
    is, where blocks are regions of their own."""

    loops: tuple[str, ...]
    num_blocks: int
    first: int
    last: int
    loop: int | None = None
    """With a region for each loop, its loop's place in the chain."""
    block: int | None = None
