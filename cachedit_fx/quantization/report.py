"""The report of `quantize`: the layers, their bytes before and after, and the reasons of those that were left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer that was quantized.

    Attributes:
        name: in the module; in a pipeline after the component's name.
        kind: name of the kind of quantization.
        shape: (output features, input features).
        bytes_before: size of the weight in bytes.
        bytes_after: size of the quantized weight and its scales in bytes.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class KeptLayer:
    """A linear layer that was left as it is.

    Attributes:
        name: in the module; in a pipeline after the component's name.
        reason: why it was left.
        bytes: size of the weight in bytes.
    """

    name: str
    reason: str
    bytes: int


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` did; `print(report)` shows it as tables.

    Attributes:
        title: class names of the modules.
        layers: those that were quantized.
        kept: all other linear layers, with the reasons.
        bytes_before: size of all parameters and buffers of the modules in bytes, before.
        bytes_after: the same after.
        notes: what a kind costs on this device, a sentence each.
    """

    title: str
    layers: tuple[QuantizedLayer, ...]
    kept: tuple[KeptLayer, ...]
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = ()

    @property
    def kinds(self) -> dict[str, int]:
        """Kind -> the number of its layers."""
        return dict(Counter(layer.kind for layer in self.layers))

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> the number of layers that were left for it."""
        return dict(Counter(layer.reason for layer in self.kept))

    def __str__(self) -> str:
        from cachedit_fx.report.quantization import text

        return text(self)

    def __rich__(self) -> Group:
        from cachedit_fx.report.quantization import render

        return render(self)


def joined(reports: Sequence[QuantizationReport]) -> QuantizationReport:
    """One report of several modules."""
    return QuantizationReport(
        ", ".join(report.title for report in reports),
        tuple(layer for report in reports for layer in report.layers),
        tuple(layer for report in reports for layer in report.kept),
        sum(report.bytes_before for report in reports),
        sum(report.bytes_after for report in reports),
        tuple(dict.fromkeys(note for report in reports for note in report.notes)),
    )
