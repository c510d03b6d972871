"""The run time's types for a region: its key in a session, and its plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

ChainKey: TypeAlias = tuple[tuple[str, ...], int]
"""The names of a chain's loops, and the chain's number among a call's chains through loops of the same names."""


class RegionKey(NamedTuple):
    """The key of a region in a session, whatever graphs the call consists of."""

    chain: ChainKey
    """The chain that the region was cut from."""
    block: int | None
    """The index of the region's block, if every block is a separate region."""


@dataclass(frozen=True)
class RegionInfo:
    """A region as it was planned.

    Attributes:
        loops: names of the loops of its chain.
        num_blocks: blocks of its chain.
        first, last: F and B.
        loop: the index of its loop in the chain, if every loop has a separate region.
        block: the index of its block, if every block is a separate region.
    """

    loops: tuple[str, ...]
    num_blocks: int
    first: int
    last: int
    loop: int | None = None
    block: int | None = None
