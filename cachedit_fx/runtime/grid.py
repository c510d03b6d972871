"""Finds the ranks that share the work on one sample, and makes their groups: a grid of three dimensions.

    cfg_parallel=True, ring_size=2, ulysses_size=2      eight consecutive ranks

    branch 0   ring 0:  rank 0  rank 1        0 1 exchange heads, 0 2 pass keys on, 0 4 compute two branches
               ring 1:  rank 2  rank 3
    branch 1   ring 0:  rank 4  rank 5
               ring 1:  rank 6  rank 7

Ulysses sends most, so its ranks are neighbours; branches send least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from cachedit_fx.config.rules import OptionError
from cachedit_fx.runtime.presence import Presence, introduce
from cachedit_fx.runtime.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Mesh: TypeAlias = "DeviceMesh | dist.ProcessGroup"
"""What a user may pass to say which ranks share a sample."""


class Sizes(NamedTuple):
    """How many ranks share a sample, in each dimension of the grid."""

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def total(self) -> int:
        """Of all ranks that share a sample."""
        return self.cfg * self.tokens

    @property
    def tokens(self) -> int:
        """Of ranks that share the tokens of a call."""
        return self.ring * self.ulysses

    @property
    def words(self) -> str:
        """The options that ask for them; empty if none does."""
        words = ["cfg_parallel=True"] if self.cfg > 1 else []
        words += [f"ring_size={self.ring}"] if self.ring > 1 else []
        words += [f"ulysses_size={self.ulysses}"] if self.ulysses > 1 else []
        return ", ".join(words)


@dataclass(frozen=True)
class Grid:
    """The ranks that share a sample with this one. A dimension of one rank is None.

    Attributes:
        everyone: all of them.
        branches: those that compute the same part of the tokens, for the branches of guidance.
        tokens: those that share the tokens of a call, by ring and Ulysses.
        ring: those that pass keys and values around.
        ulysses: those that exchange tokens for heads.
    """

    everyone: Ranks
    branches: Ranks | None
    tokens: Ranks | None
    ring: Ranks | None
    ulysses: Ranks | None


def grid_of(sizes: Sizes, mesh: Mesh | None = None) -> Grid | None:
    """The ranks that share a sample with this one; None if it works alone. All processes must call it together.

    Args:
        sizes: of the dimensions.
        mesh: these ranks. None = consecutive ones. Their groups are made once: torch.distributed keeps them until
            `destroy_process_group`.

    Raises:
        OptionError: without a process group, or if the ranks cannot be divided into such grids.
        RankMissing: if another process does not make the groups too.
    """
    if sizes.total == 1:
        return None
    _check_group(sizes.words, str(sizes.total))
    introduce()
    if mesh is not None:
        return _grid_in(mesh, sizes)
    world = dist.get_world_size()
    if world % sizes.total:
        raise OptionError(_division_error(sizes, world))

    def row(size: int, stride: int) -> Ranks | None:
        return _ranks_of(size, stride, world, sizes.words) if size > 1 else None

    everyone = row(sizes.total, 1)
    assert everyone is not None
    return Grid(
        everyone,
        row(sizes.cfg, sizes.tokens),
        row(sizes.tokens, 1),
        row(sizes.ring, sizes.ulysses),
        row(sizes.ulysses, 1),
    )


def all_ranks(words: str) -> Grid | None:
    """All ranks, while it is not known yet how they share a sample; None if this process is the only one.

    Args:
        words: the option that asks for them.

    Raises:
        OptionError: without a process group.
    """
    _check_group(words, "")
    world = dist.get_world_size()
    if world == 1:
        return None
    introduce()
    return Grid(_ranks_of(world, 1, world, words), None, None, None, None)


def _check_group(words: str, number: str) -> None:
    """Raise unless there is a process group, of this many processes; empty: of any number."""
    if dist.is_available() and dist.is_initialized():
        return
    launch = "" if _is_launched() else f"start the program with torchrun --nproc_per_node={number or 'gpu'}, and "
    raise OptionError(
        f"{words} needs {number or 'several'} processes that know of each other: {launch}call "
        "torch.distributed.init_process_group() before"
    )


def _division_error(sizes: Sizes, world: int) -> str:
    if sizes.total != sizes.ulysses:
        return (
            f"{sizes.words} needs {sizes.total} ranks for a sample, which must divide the number of ranks, {world}: "
            f"start {sizes.total} processes, or choose smaller sizes"
        )
    allowed = [number for number in range(1, world + 1) if world % number == 0]
    return f"{sizes.words} must divide the number of ranks, {world}: choose one of {allowed}"


def _ranks_of(size: int, stride: int, world: int, words: str) -> Ranks:
    """The group of this rank, of all groups of `size` ranks, each `stride` after the one before."""
    if size == world:
        group = dist.group.WORLD
        assert group is not None
        return Ranks(group.group_name, size, group, words)
    title = f"cachedit_{size}_by_{stride}"
    mine = _known(title)
    if mine is None:
        if dist.get_backend() != "fake":  # a rank that does not make the groups too is named
            everyone = dist.group.WORLD
            assert everyone is not None
            with Presence.of(everyone, words, title).meeting():
                pass
        firsts = [first + place for first in range(0, world, size * stride) for place in range(stride)]
        for first in firsts:
            members = range(first, first + size * stride, stride)
            group = dist.new_group(members, group_desc=title)
            mine = group if dist.get_rank() in members else mine
    assert mine is not None
    return Ranks(mine.group_name, size, mine, words)


def _known(title: str) -> dist.ProcessGroup | None:
    """A group that was made under this title, if this process is in it."""
    return next((each for each in dist.distributed_c10d._world.pg_map if each.group_desc == title), None)


# ---------------------------------------------------------------------------------------------------------------------
# Meshes
# ---------------------------------------------------------------------------------------------------------------------


def is_mesh(value: Any) -> bool:
    """Whether the value is a mesh or a group."""
    if not dist.is_available():
        return False
    from torch.distributed.device_mesh import DeviceMesh

    return isinstance(value, (DeviceMesh, dist.ProcessGroup)) or _is_of_others(value)


def _is_of_others(value: Any) -> bool:
    """Whether the value is what torch.distributed hands to a process in place of a group that it is not in."""
    return isinstance(value, int) and value == dist.GroupMember.NON_GROUP_MEMBER


def sizes_of(mesh: Mesh) -> Sizes:
    """The sizes of a mesh, or of a group. One dimension of another name is that of Ulysses.

    Raises:
        OptionError: if the mesh has other dimensions, or this process is none of its ranks.
    """
    if _is_of_others(mesh):
        raise OptionError(
            "ulysses_mesh: this process is not in that group, so torch.distributed gave it a number in place of the "
            "group. Pass a group only on its own ranks; each of the others needs the group that it is in"
        )
    if isinstance(mesh, dist.ProcessGroup):
        return Sizes(ulysses=mesh.size())
    names = mesh.mesh_dim_names
    is_known = names is not None and set(names) <= set(Sizes._fields)
    if mesh.ndim != 1 and names and not is_known:
        sizes = ", ".join(f"{name!r} ({size})" for name, size in zip(names, mesh.shape, strict=True))
        raise OptionError(
            f"ulysses_mesh has {mesh.ndim} dimensions, {sizes}: pass the one whose ranks share a sample, such as "
            f"ulysses_mesh=mesh[{names[-1]!r}]; or the ones named 'cfg', 'ring' and 'ulysses'"
        )
    if mesh.ndim != 1 and not is_known:
        raise OptionError(
            f"ulysses_mesh has {mesh.ndim} dimensions without names, of {' and '.join(map(str, mesh.shape))} ranks: "
            "name them by mesh_dim_names, and pass the one whose ranks share a sample, such as mesh['ulysses']"
        )
    if mesh.get_coordinate() is None:
        raise OptionError(
            f"ulysses_mesh has the ranks {', '.join(map(str, mesh.mesh.flatten().tolist()))}, and this process is rank "
            f"{mesh.get_rank()}: pass it on its own ranks only"
        )
    if not is_known or names is None:
        return Sizes(ulysses=mesh.size())
    sizes_by_name = Sizes(**dict(zip(names, mesh.shape, strict=True)))
    if sizes_by_name.cfg > 2:
        raise OptionError(f"ulysses_mesh: its dimension 'cfg' has {sizes_by_name.cfg} ranks, and must have 1 or 2")
    return sizes_by_name


def _grid_in(mesh: Mesh, sizes: Sizes) -> Grid:
    """The grid of a mesh's ranks."""
    try:
        group = mesh if isinstance(mesh, dist.ProcessGroup) else mesh.get_group(0)
        _resolve_process_group(group.group_name)
    except RuntimeError as error:
        raise OptionError("ulysses_mesh: its group was destroyed, or is another job's: make the mesh anew") from error
    if isinstance(mesh, dist.ProcessGroup) or mesh.ndim == 1:
        ranks = Ranks(group.group_name, group.size(), group, sizes.words)
        cfg, ring, ulysses = (ranks if size > 1 else None for size in sizes)
        return Grid(ranks, cfg, ring or ulysses, ring, ulysses)
    names = mesh.mesh_dim_names
    assert names is not None
    groups = {name: mesh.get_group(name) for name in names}
    cfg, ring, ulysses = (
        Ranks(groups[name].group_name, size, groups[name], sizes.words) if size > 1 else None
        for name, size in zip(Sizes._fields, sizes, strict=True)
    )
    members = mesh.mesh.permute([names.index(name) for name in Sizes._fields if name in names])
    everyone = _ranks_among(members.flatten().tolist(), sizes.words)
    coordinate = mesh.get_coordinate()
    if "cfg" in names and coordinate is not None:
        members = members[coordinate[names.index("cfg")]]
    if any(bool((members.diff(dim=axis) < 0).any()) for axis in range(members.dim())):
        raise OptionError(
            f"ulysses_mesh has the ranks {members.tolist()}: those of a row must ascend, since torch.distributed sorts "
            "the ranks of a group"
        )
    tokens = _ranks_among(members.flatten().tolist(), sizes.words) if sizes.tokens > 1 else None
    return Grid(everyone, cfg, tokens, ring, ulysses)


def _ranks_among(members: Sequence[int], words: str) -> Ranks:
    """The group of these ranks in this order, which alone make it."""
    title = f"cachedit_{'_'.join(map(str, members))}"
    group = _known(title) or dist.new_group(
        list(members), group_desc=title, use_local_synchronization=True, sort_ranks=False
    )
    return Ranks(group.group_name, len(members), group, words)


def _is_launched() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()
