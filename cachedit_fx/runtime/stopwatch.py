"""Wall time of a region, on the clock of the device that it runs on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch


class Stopwatch:
    """Wall time of a region: by the clock on the host, by events on a GPU, which are read only when somebody asks."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self._device = next((item.device for item in inputs if isinstance(item, torch.Tensor)), torch.device("cpu"))
        self._events: list[torch.cuda.Event] = []
        if self._device.type == "cuda":
            self._mark_event()
        self._times = [time.perf_counter()]

    def stop(self) -> Stopwatch:
        """End the measurement; waits for nothing."""
        if self._events:
            self._mark_event()
        self._times.append(time.perf_counter())
        return self

    def seconds(self) -> float:
        """The measured time. On a GPU this waits until the region is done."""
        if self._events:
            first, last = self._events
            last.synchronize()
            return float(first.elapsed_time(last)) / 1e3
        return self._times[-1] - self._times[0]

    def _mark_event(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
