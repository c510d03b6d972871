"""One number for all bits of a tensor, and a memory of such numbers for tensors that were not written to since.

tensor ─► words of 8 bytes ─► each times an odd number of its place ─► their sum, modulo 2^64

A single word that differs always changes the sum, since an odd number divides no power of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

WORDS = 2**22
"""Words that are summed up at once, so that large tensors take little memory."""


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """One number for the contents, int64 [], on the tensor's device. Equal contents have equal numbers."""
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = values.detach().reshape(-1)
    if flat.stride(0) != 1 or flat.data_ptr() % 8 or flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone(memory_format=torch.contiguous_format)
    content = flat.view(torch.uint8)
    whole = len(content) // 8 * 8
    total = _sum_of_words(torch.nn.functional.pad(content[whole:], (0, 8 - len(content) + whole)), 0)
    for start in range(0, whole, 8 * WORDS):
        total = total + _sum_of_words(content[start : min(start + 8 * WORDS, whole)], start // 8 + 1)
    return total


def _sum_of_words(content: torch.Tensor, place: int) -> torch.Tensor:
    words = content.view(torch.int64)
    return (words * torch.arange(2 * place + 1, 2 * (place + len(words)), 2, device=words.device)).sum()


class Memo:
    """What a function makes of tensors, kept for each as long as the tensor lives and counts no write.

    Args:
        function: from a tensor to a result that does not hold the tensor.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.function = function
        self._results: Any = WeakIdKeyDictionary()
        """Tensor -> its version, and the result."""

    def __len__(self) -> int:
        return len(self._results)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The result; computed anew for a tensor of inference mode, which counts no writes."""
        if tensor.is_inference():
            return self.function(tensor)
        version, result = self._results.get(tensor, (None, None))
        if result is None or version != tensor._version:
            result = self.function(tensor)
            self._results[tensor] = tensor._version, result
        return result
