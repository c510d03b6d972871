"""Finds the weights that only pieces behind the timestep read, and the pieces that run on the host with them.

blocks_3_time   reads the modulation's weight, and nothing else does    the weight may lie on the host
prologue_time   reads a weight that a block reads too                   that weight stays
prologue_time_1 reads no weight, and only blocks_3_time takes its values: it runs on the host too
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from torch import fx

from .graph_values import is_weight

if TYPE_CHECKING:
    from .hoist_invariants import HoistedPiece


def time_weights(inputs: Sequence[fx.Node], pieces: Sequence[HoistedPiece]) -> tuple[int, ...]:
    """Places of the parameters that hoisted pieces behind the timestep read, and nothing else.

    Args:
        inputs: of the graph that is left when the pieces are taken out.
        pieces: the hoisted ones.
    """
    timed = {place for piece in pieces if piece.is_timed for place in piece.weights}
    others = {place for piece in pieces if not piece.is_timed for place in piece.weights}
    return tuple(place for place in sorted(timed - others) if is_weight(inputs[place]) and not inputs[place].users)


def pieces_on_host(pieces: Sequence[HoistedPiece], places: Collection[int]) -> frozenset[int]:
    """Numbers of the pieces that run on the host if the weights at these places lie there.

    They are the pieces that read such a weight, and those behind the timestep that read no weight and serve them.
    """
    numbers = {number for number, piece in enumerate(pieces) if not set(places).isdisjoint(piece.weights)}
    for number, piece in reversed(list(enumerate(pieces))):
        if piece.is_timed and not piece.weights and not numbers.isdisjoint(readers_of(pieces, piece.results)):
            numbers.add(number)
    return frozenset(numbers)


def readers_of(pieces: Sequence[HoistedPiece], values: Collection[int]) -> set[int]:
    """Numbers of the pieces that take one of these hoisted values."""
    return {
        number
        for number, piece in enumerate(pieces)
        if any(at.is_value and at.place in values for at in piece.arguments)
    }
