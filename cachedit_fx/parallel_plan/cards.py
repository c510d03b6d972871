"""Kinds of cards by their data sheets, and which kind a device is taken for. Nothing is measured.

"NVIDIA H100 80GB HBM3", LOCAL_WORLD_SIZE=8     ->     H100 SXM, 8 a node, 360 GB/s inside a node, 40 GB/s between nodes
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

import torch

from cachedit_fx.parallel_plan.descriptions import Cards, Link

WIRE_SHARE = 0.8
"""Of a nominal bandwidth, of links and of memory, that is taken to be reached. Assumed."""
INSIDE_LATENCY, BETWEEN_LATENCY = 20e-6, 30e-6
"""Seconds of an exchange beyond its bytes. Assumed."""


@dataclass(frozen=True)
class Kind:
    """A kind of card, by its data sheet.

    Attributes:
        tflops: dense bfloat16.
        memory: GB/s.
        link: nominal GB/s of one direction, inside a node.
        adapters: of 400 Gb/s, in a node of 8 cards.
        share: of the TFLOP/s that is taken to be reached.
    """

    name: str
    tflops: float
    memory: float
    wire: str
    link: float
    adapters: int
    share: float

    def cards(self, share: float | None = None) -> Cards:
        """Such cards, with another share of the TFLOP/s if told."""
        inside = Link(self.link * WIRE_SHARE, INSIDE_LATENCY)
        between = Link(50 * self.adapters / 8 * WIRE_SHARE, BETWEEN_LATENCY)
        return Cards(self.name, self.tflops * (share or self.share), self.memory * WIRE_SHARE, inside, between)


L20 = Kind("L20", 119.5, 864, "PCIe 4", 31.5, 1, 0.74)
A100 = Kind("A100 SXM", 312, 2039, "NVLink 3", 300, 8, 0.65)
H100_PCIE = Kind("H100 PCIe", 756, 2000, "PCIe 5", 63, 1, 0.58)
H100 = Kind("H100 SXM", 989, 3350, "NVLink 4", 450, 8, 0.58)
H200 = Kind("H200 SXM", 989, 4800, "NVLink 4", 450, 8, 0.58)
A100_PCIE = Kind("A100 PCIe", 312, 1935, "PCIe 4", 31.5, 1, 0.65)
CPU = Cards("CPU", 0.5, 50, Link(2, 100e-6), Link(1, 200e-6))
"""Some cores, over TCP. Assumed."""

BY_NAME: tuple[tuple[str, Kind], ...] = (
    (r"\bH200\b", H200),
    (r"\bH100\b.*PCIe", H100_PCIE),
    (r"\bH100\b", H100),
    (r"\bA100\b.*SXM", A100),
    (r"\bL20\b", L20),
)
"""What a GPU's name holds -> its kind; the first that fits. Others are taken for `A100_PCIE`."""


def assumed_cards(device: torch.device, ranks: int) -> Cards:
    """The cards that ranks are taken to have, by the device of this one.

    torchrun says how many of them share a node; without its word all do.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return replace(_kind(device.type, name), per_node=int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))


def _kind(kind: str, name: str) -> Cards:
    """Cards of a device's type, and of this name."""
    if kind == "cpu":
        return CPU
    found = next((each for pattern, each in BY_NAME if re.search(pattern, name, re.IGNORECASE)), None)
    if found is not None:
        return found.cards()
    return replace(A100_PCIE.cards(), name=f"{name or kind}, taken for {A100_PCIE.name}")
