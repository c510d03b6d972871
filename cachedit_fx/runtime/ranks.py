"""Lets the ranks of a group add up numbers, and tell each other values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from cachedit_fx.runtime.presence import Presence, RankMissing


@dataclass(frozen=True)
class Ranks:
    """The ranks of one group. Groups of other ranks, which work on other samples, are not coupled to them.

    Attributes:
        name: the group's, for collectives in graphs.
        size: their number.
        words: the options that ask for them, for errors.
        faults: why their collectives are out of step for good, if they are.
    """

    name: str
    size: int
    group: dist.ProcessGroup = field(repr=False, compare=False)
    words: str = field(compare=False)
    faults: list[str] = field(default_factory=list, repr=False, compare=False)

    @property
    def is_destroyed(self) -> bool:
        """Whether the program has destroyed the group, even if it has made another one of that name."""
        try:
            return _resolve_process_group(self.name) is not self.group  # type: ignore[arg-type]
        except RuntimeError:
            return True

    def check(self) -> None:
        """Raise if the group was destroyed, or is of no use any more.

        Raises:
            RankMissing: if so.
        """
        if self.faults:
            raise RankMissing(self.faults[0])
        if self.is_destroyed:
            raise RankMissing(
                f"{self.words}: the process group of these ranks was destroyed after enable_cache. "
                "Call init_process_group of torch.distributed, and enable_cache or torch.compile once more; or "
                "disable_cache, and each process computes alone"
            )

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return dist.get_rank(self.group)

    @cached_property
    def presence(self) -> Presence:
        """Which of the ranks take part."""
        return Presence.of(self.group, self.words)

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, equal to the bit on all of them; in place. All ranks must call it together."""
        dist.all_reduce(numbers, group=self.group)
        return numbers

    def from_first(self, values: torch.Tensor) -> torch.Tensor:
        """The first rank's tensor; in place on the others. All ranks must call it together, with equal shapes."""
        sent = values.to(self.device_for(values.device))
        dist.broadcast(sent, src=self.presence.members[0], group=self.group)
        return sent

    def tables(self, row: torch.Tensor) -> list[list[int]]:
        """Every rank's row of integers, by rank, read back. All ranks must call it together.

        Args:
            row: int64, of one length on all ranks.
        """
        device = self.device_for(row.device)
        rows = [torch.empty_like(row, device=device) for _ in range(self.size)]
        dist.all_gather(rows, row.to(device), group=self.group)
        tables: list[list[int]] = torch.stack(rows).tolist()
        return tables

    def device_for(self, device: torch.device) -> torch.device:
        """The device on which the group exchanges values of a device: gloo needs them on the host."""
        return torch.device("cpu") if dist.get_backend(self.group) == "gloo" else device

    def objects(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. All ranks must call it together."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def device_among(tensors: Iterable[torch.Tensor]) -> torch.device:
    """That of the first tensor that is not on the host; the host if all are there."""
    return next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), torch.device("cpu"))


class Gathering:
    """Every rank's tensor, on its way to the host. All ranks must make it together; none waits.

    Args:
        ranks: those of the group.
        own: this rank's, of equal shape and dtype on all.
    """

    def __init__(self, ranks: Ranks, own: torch.Tensor) -> None:
        own = own.to(ranks.device_for(own.device))
        self._event: torch.cuda.Event | None = None
        if own.device.type != "cuda":
            self._rows, self._work = self._send(ranks, own)
            return
        stream = torch.cuda.Stream(own.device)  # the device's other work waits for no rank
        stream.wait_stream(torch.cuda.current_stream(own.device))
        with torch.cuda.stream(stream):
            rows, work = self._send(ranks, own)
            work.wait()  # the stream does, and not the host
            self._rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            self._rows.copy_(rows, non_blocking=True)
            self._event = stream.record_event()
        own.record_stream(stream)

    def rows(self) -> torch.Tensor:
        """By rank, on the host. A call after the next step was started does not wait for that step."""
        if self._event is not None:
            self._event.synchronize()
        else:
            self._work.wait()
        return self._rows.cpu()

    def _send(self, ranks: Ranks, own: torch.Tensor) -> tuple[torch.Tensor, dist.Work]:
        rows = own.new_empty(ranks.size, *own.shape)
        return rows, dist.all_gather(list(rows), own, group=ranks.group, async_op=True)
