"""Measures how far a region's input has moved: sums on the device, read back, divided on the host."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float

import torch

from cachedit_fx.kernels.l1_sums import l1_sums
from cachedit_fx.runtime.ranks import Ranks

EPSILON = 1e-30
"""Keeps 0/0 apart from a number: two zero residuals have difference 0."""


def relative_difference(change: float, size: float) -> float:
    """change / (size + EPSILON), computed in float32 from sum|r_prev - r| and sum|r_prev|."""
    return _float32(_float32(change) / _float32(_float32(size) + _float32(EPSILON)))


def _float32(number: float) -> float:
    """The nearest float32; infinite beyond the largest."""
    return c_float(number).value


def read_back(values: Sequence[torch.Tensor]) -> list[float]:
    """All elements of `values` as numbers, in one transfer: the only place where the host waits for the device.

    They meet in the widest of their dtypes: whole numbers next to float32 are exact up to 2^24.
    """
    if len(values) == 1 and values[0].numel() == 1:
        return [float(values[0])]
    if len(values) == 1:
        numbers: list[float] = values[0].reshape(-1).tolist()
    else:
        device = values[0].device
        numbers = torch.cat([value.reshape(-1).to(device) for value in values]).tolist()
    return [float(number) for number in numbers]


def on_host(tensor: torch.Tensor) -> bool:
    """Whether reading the tensor does not make the host wait for a device."""
    return tensor.device.type == "cpu"


class Residual:
    """r = hidden - base in float32. Without a base r is `hidden`, which is copied only by `keep`.

    Args:
        hidden: the hidden states after the first F blocks.
        base: of the same shape, or None.
        spare: a buffer that r may be written to, if it fits.
    """

    def __init__(self, hidden: torch.Tensor, base: torch.Tensor | None, spare: torch.Tensor | None) -> None:
        self.hidden, self.base, self.spare = hidden, base, spare
        self._is_written = False

    def sums(self, previous: Sequence[torch.Tensor]) -> torch.Tensor:
        """sum|r_prev - r| and sum|r_prev| for each r_prev of `previous`: [len(previous), 2]."""
        sums = l1_sums(self.hidden, self.base, previous, self._out())
        self._is_written = True
        return sums

    @classmethod
    def of(
        cls, hidden: torch.Tensor, base: torch.Tensor | None, spare: torch.Tensor | None, every: int = 1
    ) -> Residual:
        """r over every n-th token. A base of another shape counts as None."""
        fits = base is not None and base.shape == hidden.shape
        return cls(_thinned(hidden, every), _thinned(base, every) if fits and base is not None else None, spare)

    def copy(self) -> None:
        """Depend no longer on the tensors that r is made of: something may write to them before `keep`."""
        self.hidden = self.hidden.clone()
        self.base = self.base.clone() if self.base is not None else None

    def keep(self, old: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """r in a separate buffer, and a buffer that is free from now on. `old` is no longer needed."""
        if self.base is None:
            buffer = self._buffer(old)
            return buffer.copy_(self.hidden), None
        if not self._is_written:
            self.sums(())
        assert self.spare is not None
        return self.spare, old

    def _out(self) -> torch.Tensor | None:
        if self.base is not None:
            self.spare = self._buffer(self.spare)
            return self.spare
        return None

    def _buffer(self, old: torch.Tensor | None) -> torch.Tensor:
        """`old` if it fits, otherwise a new buffer, usable with and without inference mode."""
        if old is not None and old.shape == self.hidden.shape and old.device == self.hidden.device:
            return old
        with torch.inference_mode(False):
            return torch.empty(self.hidden.shape, dtype=torch.float32, device=self.hidden.device)


def read_differences(
    residual: Residual, previous: Sequence[torch.Tensor], *others: torch.Tensor, ranks: Ranks | None = None
) -> tuple[list[float], list[float]]:
    """The relative L1 differences of r from each of `previous`, and the numbers `others`, all in one transfer.

    If ranks hold a part of r each, the sums are added up before they are read: all ranks get one difference.
    """
    sums_here = residual.sums(previous)
    numbers = read_back([*others, ranks.total(sums_here) if ranks is not None else sums_here])
    sums = numbers[len(others) :]
    return list(map(relative_difference, sums[::2], sums[1::2])), numbers[: len(others)]


def _thinned(hidden: torch.Tensor, every: int) -> torch.Tensor:
    """Every n-th of the tokens, which are the dimension before the last; a view."""
    return hidden if every == 1 or hidden.ndim < 2 else hidden[..., ::every, :]
