"""Finds the group of ranks that share the work on one sample, and adds up numbers over it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from cachedit_fx.config.rules import OptionError
from cachedit_fx.runtime.presence import Presence, RankMissing, introduce

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Mesh: TypeAlias = "DeviceMesh | dist.ProcessGroup"
"""What a user may pass to say which ranks share a sample."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that share one sample. Groups of other ranks, which work on other samples, are not coupled to them.

    Attributes:
        name: the group's, for collectives in graphs.
        size: their number.
    """

    name: str
    size: int
    group: dist.ProcessGroup = field(repr=False, compare=False)

    @property
    def is_destroyed(self) -> bool:
        """Whether the program has destroyed the group, even if it has made another one of that name."""
        try:
            return _resolve_process_group(self.name) is not self.group  # type: ignore[arg-type]
        except RuntimeError:
            return True

    def check(self) -> None:
        """Raise if the group was destroyed.

        Raises:
            RankMissing: if so.
        """
        if self.is_destroyed:
            raise RankMissing(
                f"ulysses_size={self.size}: the process group of these ranks was destroyed after enable_cache. "
                "Call init_process_group of torch.distributed, and enable_cache or torch.compile once more; or "
                "disable_cache, and each process computes alone"
            )

    @cached_property
    def presence(self) -> Presence:
        """Which of the ranks take part."""
        return Presence.of(self.group, self.size)

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, equal to the bit on all of them; in place. All ranks must call it together."""
        dist.all_reduce(numbers, group=self.group)
        return numbers

    def from_first(self, values: torch.Tensor) -> torch.Tensor:
        """The first rank's tensor; in place on the others. All ranks must call it together, with equal shapes."""
        sent = values.to(self.device_for(values))
        dist.broadcast(sent, src=self.presence.members[0], group=self.group)
        return sent

    def tables(self, row: torch.Tensor) -> list[list[int]]:
        """Every rank's row of integers, by rank, read back. All ranks must call it together.

        Args:
            row: int64, of one length on all ranks.
        """
        device = self.device_for(row)
        rows = [torch.empty_like(row, device=device) for _ in range(self.size)]
        dist.all_gather(rows, row.to(device), group=self.group)
        tables: list[list[int]] = torch.stack(rows).tolist()
        return tables

    def device_for(self, values: torch.Tensor) -> torch.device:
        """The device on which the group exchanges these values: gloo needs them on the host."""
        return torch.device("cpu") if dist.get_backend(self.group) == "gloo" else values.device

    def objects(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. All ranks must call it together."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


class Gathering:
    """Every rank's tensor, on its way to the host. All ranks must make it together; none waits.

    Args:
        ranks: those of the group.
        own: this rank's, of equal shape and dtype on all.
    """

    def __init__(self, ranks: Ranks, own: torch.Tensor) -> None:
        own = own.to(ranks.device_for(own))
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


def is_mesh(value: Any) -> bool:
    """Whether the value is a mesh or a group."""
    if not dist.is_available():
        return False
    from torch.distributed.device_mesh import DeviceMesh

    return isinstance(value, (DeviceMesh, dist.ProcessGroup)) or _is_of_others(value)


def _is_of_others(value: Any) -> bool:
    """Whether the value is what torch.distributed hands to a process in place of a group that it is not in."""
    return isinstance(value, int) and value == dist.GroupMember.NON_GROUP_MEMBER


def size_of(mesh: Mesh) -> int:
    """The number of ranks of a one-dimensional mesh, or of a group.

    Raises:
        OptionError: if the mesh has several dimensions, or this process is none of its ranks.
    """
    if _is_of_others(mesh):
        raise OptionError(
            "ulysses_mesh: this process is not in that group, so torch.distributed gave it a number in place of the "
            "group. Pass a group only on its own ranks; each of the others needs the group that it is in"
        )
    if isinstance(mesh, dist.ProcessGroup):
        return mesh.size()
    names = mesh.mesh_dim_names
    if mesh.ndim != 1 and names:
        sizes = ", ".join(f"{name!r} ({size})" for name, size in zip(names, mesh.shape, strict=True))
        raise OptionError(
            f"ulysses_mesh has {mesh.ndim} dimensions, {sizes}: pass the one whose ranks share a sample, such as "
            f"ulysses_mesh=mesh[{names[-1]!r}]"
        )
    if mesh.ndim != 1:
        raise OptionError(
            f"ulysses_mesh has {mesh.ndim} dimensions without names, of {' and '.join(map(str, mesh.shape))} ranks: "
            "name them by mesh_dim_names, and pass the one whose ranks share a sample, such as mesh['ulysses']"
        )
    if mesh.get_coordinate() is None:
        raise OptionError(
            f"ulysses_mesh has the ranks {', '.join(map(str, mesh.mesh.tolist()))}, and this process is rank "
            f"{mesh.get_rank()}: pass it on its own ranks only"
        )
    return mesh.size()


def ranks_of(size: int, mesh: Mesh | None = None) -> Ranks | None:
    """The ranks that share a sample with this one; None for 1. All processes must call it together.

    Args:
        size: their number.
        mesh: these ranks. None = `size` consecutive ones. Their group is made once: torch.distributed keeps it until
            `destroy_process_group`.

    Raises:
        OptionError: without a process group, or if `size` does not divide its ranks.
        RankMissing: if another process does not make the groups too.
    """
    if size == 1:
        return None
    if not dist.is_available() or not dist.is_initialized():
        launch = "" if _is_launched() else f"start the program with torchrun --nproc_per_node={size}, and "
        raise OptionError(
            f"ulysses_size={size} needs {size} processes that know of each other: {launch}call "
            "torch.distributed.init_process_group() before"
        )
    introduce()
    if mesh is not None:
        return _ranks_in(mesh)
    world = dist.get_world_size()
    if world % size:
        allowed = [number for number in range(1, world + 1) if world % number == 0]
        raise OptionError(f"ulysses_size={size} must divide the number of ranks, {world}: choose one of {allowed}")
    if size == world:
        group = dist.group.WORLD
        assert group is not None
        return Ranks(group.group_name, size, group)
    title = f"cachedit_ulysses_{size}"
    mine = next((each for each in dist.distributed_c10d._world.pg_map if each.group_desc == title), None)
    if mine is None and dist.get_backend() != "fake":  # a rank that does not make the groups too is named
        everyone = dist.group.WORLD
        assert everyone is not None
        with Presence.of(everyone, size, title).meeting():
            pass
    for first in range(0, world, size) if mine is None else ():
        group = dist.new_group(range(first, first + size), group_desc=title)
        mine = group if first <= dist.get_rank() < first + size else mine
    assert isinstance(mine, dist.ProcessGroup)
    return Ranks(mine.group_name, size, mine)


def _ranks_in(mesh: Mesh) -> Ranks:
    try:
        group = mesh if isinstance(mesh, dist.ProcessGroup) else mesh.get_group()
        _resolve_process_group(group.group_name)
    except RuntimeError as error:
        raise OptionError("ulysses_mesh: its group was destroyed, or is another job's: make the mesh anew") from error
    return Ranks(group.group_name, group.size(), group)


def _is_launched() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()
