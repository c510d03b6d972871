"""Measures the wall time of a region, on the clock of the region's device."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Wall time of a region on `device`: by the host's clock, or on a GPU by events, which `seconds` reads."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        if device is not None and device.type == "cuda":
            self._mark_event()
        self._times = [time.perf_counter()]

    def stop(self) -> Stopwatch:
        """End the measurement, without waiting for the device."""
        if self._events:
            self._mark_event()
        self._times.append(time.perf_counter())
        return self

    def seconds(self) -> float:
        """The measured time in seconds. On a GPU this waits until the region is done."""
        if self._events:
            first, last = self._events
            last.synchronize()
            return float(first.elapsed_time(last)) / 1e3
        return self._times[-1] - self._times[0]

    def _mark_event(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
