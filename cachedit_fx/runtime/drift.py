"""Notices that the inputs of ranks drift apart within a generation: it compares those of every call, a call late.

    call k       inputs ─► 18 numbers each ─► all-gather, nobody waits ─┐
    call k + 1   equal up to rounding? else RanksDisagree     ◄─────────┘

A guidance scale, a callback or a scheduler's noise that differs between ranks is seen in the inputs of the next step.
The numbers of a tensor are sums over its parts. A tensor whose identity and version are those of an earlier call keeps
its numbers.

Ranks may choose other kernels for what each computes whole, so their samples may differ by rounding. That is no drift.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cachedit_fx.runtime.checksum import Memo
from cachedit_fx.runtime.ranks import Gathering, Ranks, device_among

if TYPE_CHECKING:
    from cachedit_fx.runtime.session import Session

PARTS = 16
"""Parts of a tensor that are summed up separately; what is left over is one more."""
TOLERANCE = 0.02
"""How far sums of one part may differ between ranks, over the sum of a part whose elements have random signs."""


class Drift:
    """The inputs of one graph's calls, compared over the ranks a call late.

    Args:
        ranks: those that share a sample.
        names: of the inputs.
    """

    def __init__(self, ranks: Ranks, names: Sequence[str]) -> None:
        self.ranks, self.names = ranks, names
        self.calls = 0
        """Calls since the ranks compared all inputs to the bit."""
        self.sketches = Memo(_sketch_of)
        self._latest: tuple[Gathering, weakref.ref[Session]] | None = None

    def restart(self) -> None:
        """The ranks have compared a call to the bit, or cannot agree: the call before counts no more."""
        self.calls, self._latest = 0, None

    def send(self, inputs: Sequence[Any], session: Session) -> None:
        """Begin to compare the inputs of a call. All ranks must call it together; none waits."""
        self.calls += 1
        self._latest = None
        sketches = [self._sketch(value) for value in inputs]
        if sketches:
            self._latest = Gathering(self.ranks, _on_one_device(sketches)), weakref.ref(session)

    def differing(self, session: Session | None = None) -> list[str]:
        """Names of the inputs that differed in the latest call, if that is not told yet. All ranks get one answer.

        Args:
            session: only if it made the latest call.
        """
        if self._latest is None or session not in (None, self._latest[1]()):
            return []
        (gathering, reference), self._latest = self._latest, None
        numbers = gathering.rows()
        sums, sizes = numbers[..., :-1], numbers[..., -1].amax(0)
        distances = (sums.amax(0) - sums.amin(0)).amax(-1)
        names = [self.names[index] for index in (distances > TOLERANCE / math.sqrt(PARTS) * sizes).nonzero()]
        drifted = reference()
        if names and drifted is not None:
            drifted.forget()
        return names

    def _sketch(self, value: Any) -> torch.Tensor:
        """The numbers of an input."""
        if isinstance(value, torch.Tensor):
            return self.sketches(value)
        return _sketch_of(torch.tensor(value if isinstance(value, (int, float)) else 0.0))


def _sketch_of(tensor: torch.Tensor) -> torch.Tensor:
    """Sums of the parts, and the square root of the sum of squares, float32 [PARTS + 2], on the tensor's device."""
    values = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().reshape(-1).float()
    width = len(values) // PARTS
    parts, rest = values[: PARTS * width].view(PARTS, width), values[PARTS * width :]
    numbers = torch.cat([parts.sum(1), rest.sum().view(1), torch.linalg.vector_norm(values).view(1)])
    return numbers.nan_to_num()


def _on_one_device(sketches: Sequence[torch.Tensor]) -> torch.Tensor:
    """All sketches, on a device that holds one of them, if any does. The host does not wait."""
    device = device_among(sketches)
    return torch.stack([each.to(device, non_blocking=True) for each in sketches])
