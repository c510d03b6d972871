"""A mock of a slow network between ranks: gloo sends at once, and a collective counts as done some time later."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class SlowWire(TorchDispatchMode):
    """Context manager in which collectives take a while from their start, and which counts the time spent in waits.

    A wait sleeps for what is left of that while, so a slow collective takes no work from the processor. The wire sends
    one collective after another.

    Args:
        latency: seconds from the end of sending to the end of the collective.
        seconds_per_byte: what the wire takes for each byte that a rank gives to a collective.
    """

    def __init__(self, latency: float = 0.0, seconds_per_byte: float = 0.0) -> None:
        super().__init__()
        self.latency, self.seconds_per_byte = latency, seconds_per_byte
        self.waited = 0.0
        """Seconds spent in waits."""
        self.starts: list[int] = []
        """For each wait, how many collectives had started."""
        self._free = 0.0
        self._started = 0
        self._pending: dict[int, tuple[torch.Tensor, float]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace != "_c10d_functional":
            return func(*args, **kwargs or {})
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return self._wait(args[0])
        result = func(*args, **kwargs or {})
        self._free = max(time.perf_counter(), self._free) + self.seconds_per_byte * args[0].nbytes
        self._pending[id(result)] = result, self._free + self.latency
        self._started += 1
        return result

    def _wait(self, started: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        result: torch.Tensor = torch.ops._c10d_functional.wait_tensor.default(started)
        _, done = self._pending.pop(id(started))
        time.sleep(max(0.0, done - time.perf_counter()))
        self.waited += time.perf_counter() - begin
        self.starts.append(self._started)
        return result
