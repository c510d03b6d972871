"""Counting the floating-point operations that really ran, inside compiled pieces too."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_FORMULAS = {**flop_registry, torch.ops.aten._int_mm: flop_registry[torch.ops.aten.mm]}
"""Operator -> its FLOPs. A multiply-add of integers counts as one of floats, so that work compares."""


class FlopCounter(TorchDispatchMode):
    """Sums, while entered, the FLOPs of matrix products, convolutions and attention; other operations count as none.

    torch's own `FlopCounterMode` makes dynamo refuse compiled code; this one is let through. What tracing runs on fake
    tensors is not counted.

    Attributes:
        flops: two for each multiplication with its addition.
        kernels: operators that ran, views included.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.kernels = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        fake = any(isinstance(item, torch._subclasses.FakeTensor) for item in tree_leaves((args, result)))
        if not fake:
            self.kernels += 1
            packet = getattr(func, "_overloadpacket", func)  # a higher-order operator is its own
            if packet in _FORMULAS:
                self.flops += _FORMULAS[packet](*args, **(kwargs or {}), out_val=result)
        return result
