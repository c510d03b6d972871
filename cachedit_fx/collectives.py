"""Moves parts of tensors between the ranks of a process group: all communication of rewritten graphs goes through here.

    cut_sequence      whole tensor    ──► this rank's part          no communication
    gather_sequence   parts           ──► whole tensor              all-gather
    exchange          cut along one   ──► cut along another axis    all-to-all; in eight bits: exchange_float8
    sum_over_ranks    partial sums    ──► their sum                 all-reduce

Segments are pairs (count, unit), as in `passes.layouts`: of each segment a rank holds consecutive units, the first
ranks one more if the ranks do not divide them. Lengths follow from the whole lengths, so ranks never tell each other
lengths. Only an all-gather pads a part, by the units that the first rank has more.

Each collective has two halves in `HALVES`: one starts it, the other waits for it. Other work may run between them.

All functions are traceable: inductor sees functional collectives of torch.distributed. Which collective runs does not
depend on whether a length is a number or a symbol, since that may differ between ranks.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from cachedit_fx.kernels.quant_fp8 import SCALE_BYTES  # registers the operators too

Segments = Sequence[tuple[Any, Any]]
"""(count, unit) of each segment of an axis as a whole."""


def cut_sequence(x: torch.Tensor, axis: int, segments: Segments, group: str) -> torch.Tensor:
    """This rank's part of a whole tensor, contiguous."""
    rank, ranks = place_in(group)
    parts, start = [], 0
    for count, unit in segments:
        own, before = _own(count, rank, ranks), _before(count, rank, ranks)
        parts.append(x.narrow(axis, start + before * unit, own * unit))
        start = start + count * unit
    return _joined(parts, axis).contiguous()


def gather_sequence(x: torch.Tensor, axis: int, segments: Segments, group: str) -> torch.Tensor:
    """The whole tensor, from all ranks' parts."""
    return _whole(gather_sequence, x, axis, segments, group)


def start_gather_sequence(x: torch.Tensor, axis: int, segments: Segments, group: str) -> torch.Tensor:
    """Begin what `wait_gather_sequence` ends."""
    rank, ranks = place_in(group)
    flat = x.movedim(axis, 0).contiguous()
    if isinstance(missing := _length(segments, 0, ranks) - _length(segments, rank, ranks), torch.SymInt) or missing:
        flat = torch.cat([flat, flat.new_zeros(missing, *flat.shape[1:])])
    return _start(flat, lambda real: torch.ops._c10d_functional.all_gather_into_tensor(real, ranks, group))


def wait_gather_sequence(
    started: torch.Tensor, x: torch.Tensor, axis: int, segments: Segments, group: str
) -> torch.Tensor:
    """The result of what was started with these arguments. Of `x` only the form is read."""
    _, ranks = place_in(group)
    lengths = [_length(segments, each, ranks) for each in range(ranks)]
    whole = _wait(started, x)
    if len(segments) > 1 or not _are_equal(lengths):
        sent = whole.split([size for length in lengths for size in (length, lengths[0] - length)])[::2]
        parts = [part.split(_lengths(segments, each, ranks)) for each, part in enumerate(sent)]
        whole = torch.cat([part[index] for index in range(len(segments)) for part in parts])
    return whole.movedim(0, axis).contiguous()


def exchange(
    x: torch.Tensor,
    axis: int,
    segments: Segments,
    new_axis: int,
    new_segments: Segments,
    group: str,
    ring: str = "",
) -> torch.Tensor:
    """A tensor that is cut along `axis`, cut along `new_axis` instead.

    A whole axis of several segments is in the order of the ranks' parts, both in `x` and in the result. The arguments
    after `x` are the way of the exchange, which all forms of it take.

    Args:
        ring: another group. Its ranks share the tokens, the later one of the two axes, with those of `group`.
    """
    return _whole(exchange, x, axis, segments, new_axis, new_segments, group, ring)


def start_exchange(x: torch.Tensor, *way: Any) -> torch.Tensor:
    """Begin what `wait_exchange` ends."""
    axis, _, new_axis, _, group, *_ = way
    (rank, _), (old, new) = place_in(group), _parts_of_both(*way)
    sent = x.movedim((new_axis, axis), (0, 1)).contiguous()
    width = _product(sent.shape[2:])
    received_lengths = [new[rank] * length * width for length in old]
    sent_lengths = [length * old[rank] * width for length in new]
    return _start(
        sent.flatten(),
        lambda real: torch.ops._c10d_functional.all_to_all_single(real, received_lengths, sent_lengths, group),
    )


def wait_exchange(started: torch.Tensor, x: torch.Tensor, *way: Any) -> torch.Tensor:
    """The result of what was started with these arguments. Of `x` only the form is read."""
    return _from_ranks(_wait(started, x), _others(x, *way), *way)


def exchange_float8(x: torch.Tensor, *way: Any) -> torch.Tensor:
    """As `exchange`, with rows of the last dimension sent in eight bits and a scale each (`kernels.quant_fp8`).

    Infinities arrive as NaN, since a row's scale is that of its finite numbers.

    Args:
        x: float16, bfloat16 or float32, with [..., head_dim] as the last dimension, which is whole.
    """
    return _whole(exchange_float8, x, *way)


def start_exchange_float8(x: torch.Tensor, *way: Any) -> torch.Tensor:
    """Begin what `wait_exchange_float8` ends."""
    packed = torch.ops.cachedit_fx.quant_fp8(torch.where(x.isinf(), torch.nan, x).unsqueeze(-2))
    return start_exchange(packed, *way)


def wait_exchange_float8(started: torch.Tensor, x: torch.Tensor, *way: Any) -> torch.Tensor:
    """The result of what was started with these arguments. Of `x` only the form is read."""
    sizes = *_others(x, *way)[:-1], x.shape[-1] + SCALE_BYTES
    received = _from_ranks(_wait(started, x), sizes, *way)
    values: torch.Tensor = torch.ops.cachedit_fx.dequant_fp8(received, 1, x.dtype)
    return values.squeeze(-2)


def exchange_centred_float8(x: torch.Tensor, *way: Any) -> torch.Tensor:
    """As `exchange_float8`, less the mean of each rank's part along the old axis, which travels beside it.

    Keys often share a large offset, which would take most of the codes.
    """
    return _whole(exchange_centred_float8, x, *way)


def start_exchange_centred_float8(x: torch.Tensor, *way: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Begin what `wait_exchange_centred_float8` ends: two collectives."""
    axis, segments, _, _, group, *ring = way
    length = max(_parts(segments, group, *ring)[place_in(group)[0]], 1)
    mean = (x.sum(axis, keepdim=True, dtype=torch.float32) / length).to(x.dtype)
    return start_exchange_float8(x - mean, *way), start_exchange(mean, *_way_of_means(*way))


def wait_exchange_centred_float8(
    started: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, *way: Any
) -> torch.Tensor:
    """The result of what was started with these arguments. Of `x` only the form is read."""
    axis, segments, _, _, group, *ring = way
    received = wait_exchange_float8(started[0], x, *way)
    means = wait_exchange(started[1], x, *_way_of_means(*way))
    each = [
        part.expand(*part.shape[:axis], length, *part.shape[axis + 1 :])
        for part, length in zip(means.split(1, axis), _parts(segments, group, *ring), strict=True)
    ]
    return received + torch.cat(each, axis)


def sum_over_ranks(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum of all ranks' tensors."""
    return _whole(sum_over_ranks, x, group)


def start_sum_over_ranks(x: torch.Tensor, group: str) -> torch.Tensor:
    """Begin what `wait_sum_over_ranks` ends."""
    return _start(x.contiguous(), lambda real: torch.ops._c10d_functional.all_reduce(real, "sum", group))


def wait_sum_over_ranks(started: torch.Tensor, x: torch.Tensor, group: str) -> torch.Tensor:
    """The result of what was started with these arguments. Of `x` only the form is read."""
    return _wait(started, x)


def order_by_rank(x: torch.Tensor, axis: int, segments: Segments, group: str) -> torch.Tensor:
    """A whole tensor with an axis in the order of the ranks' parts: what gathered parts would be side by side."""
    _, ranks = place_in(group)
    wholes = x.split([count * unit for count, unit in segments], axis)
    parts = [
        part.split([_own(count, rank, ranks) * unit for rank in range(ranks)], axis)
        for part, (count, unit) in zip(wholes, segments, strict=True)
    ]
    return torch.cat([part[rank] for rank in range(ranks) for part in parts], axis)


def take_segments(x: torch.Tensor, axis: int, segments: Segments, first: int, last: int, group: str) -> torch.Tensor:
    """This rank's part of the segments [first, last), from its part of all segments."""
    rank, ranks = place_in(group)
    lengths = _lengths(segments, rank, ranks)
    return x.narrow(axis, sum(lengths[:first]), sum(lengths[first:last]))


def split_segments(
    x: torch.Tensor, axis: int, segments: Segments, ranges: Sequence[tuple[int, int]], group: str
) -> tuple[torch.Tensor, ...]:
    """Several such runs of segments."""
    return tuple(take_segments(x, axis, segments, first, last, group) for first, last in ranges)


def write_segments_(
    x: torch.Tensor, value: Any, axis: int, segments: Segments, first: int, last: int, group: str
) -> torch.Tensor:
    """Write this rank's part of the segments [first, last) into its part of all segments, in place."""
    part = take_segments(x, axis, segments, first, last, group)
    part[...] = value
    return x


def whole_size(x: torch.Tensor, axis: int, segments: Segments, asked: int | None, group: str) -> Any:
    """The size of the whole tensor: of the axis `asked`, or of all as a tuple."""
    length = sum(count * unit for count, unit in segments)
    sizes = (*x.shape[:axis], length, *x.shape[axis + 1 :])
    return sizes if asked is None else sizes[asked]


HALVES: dict[Callable[..., Any], tuple[Callable[..., Any], Callable[..., Any]]] = {
    gather_sequence: (start_gather_sequence, wait_gather_sequence),
    exchange: (start_exchange, wait_exchange),
    exchange_float8: (start_exchange_float8, wait_exchange_float8),
    exchange_centred_float8: (start_exchange_centred_float8, wait_exchange_centred_float8),
    sum_over_ranks: (start_sum_over_ranks, wait_sum_over_ranks),
}
"""Collective -> its halves."""
COMMUNICATING = frozenset(HALVES).union(start for start, _ in HALVES.values())
"""The functions that all ranks of a group must call together."""
LOCAL = frozenset({cut_sequence, order_by_rank, take_segments, split_segments, write_segments_, whole_size})
"""The other ones that rewritten graphs call."""


def number_of_ranks(group: str) -> int:
    """How many ranks the group has."""
    return place_in(group)[1]


def place_in(group: str) -> tuple[int, int]:
    """(this process's rank in the group, number of ranks)."""
    resolved = _resolve_process_group(group)  # type: ignore[arg-type]
    return dist.get_rank(resolved), dist.get_world_size(resolved)


def _own(count: Any, rank: int, ranks: int) -> Any:
    """How many of `count` units the rank holds."""
    return (count + (ranks - 1 - rank)) // ranks


def _before(count: Any, rank: int, ranks: int) -> Any:
    """How many units the ranks before it hold."""
    return sum(_own(count, other, ranks) for other in range(rank))


def _lengths(segments: Segments, rank: int, ranks: int) -> list[Any]:
    """The lengths of the rank's parts of the segments."""
    return [_own(count, rank, ranks) * unit for count, unit in segments]


def _length(segments: Segments, rank: int, ranks: int) -> Any:
    return sum(_lengths(segments, rank, ranks))


def _parts(segments: Segments, group: str, ring: str = "") -> list[Any]:
    """The lengths of the parts of the group's ranks, of which each rank of the ring has a group."""
    (_, ranks), (at, rings) = place_in(group), place_in(ring) if ring else (0, 1)
    return [_length(segments, at * ranks + each, rings * ranks) for each in range(ranks)]


def lengths_in_ring(segments: Segments, ring: str, ulysses: str) -> list[Any]:
    """For each rank of the ring, the length of its part and of those of its neighbours of Ulysses together.

    Args:
        ulysses: a group; empty without neighbours.
    """
    rings, ranks = place_in(ring)[1], place_in(ulysses)[1] if ulysses else 1
    each = [_length(segments, at, rings * ranks) for at in range(rings * ranks)]
    return [sum(each[at * ranks : (at + 1) * ranks]) for at in range(rings)]


def _parts_of_both(
    axis: int, segments: Segments, new_axis: int, new_segments: Segments, group: str, ring: str = ""
) -> tuple[list[Any], list[Any]]:
    """The lengths of the group's parts along both axes of an exchange. A ring shares the later axis, the tokens."""
    rings = (ring, "") if axis > new_axis else ("", ring)
    return _parts(segments, group, rings[0]), _parts(new_segments, group, rings[1])


def _are_equal(lengths: Sequence[Any]) -> bool:
    """Whether all are the same number. Symbols count as unequal, since comparing them would fix them."""
    return all(isinstance(length, int) for length in lengths) and len(set(lengths)) == 1


def _joined(parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def _product(sizes: Sequence[Any]) -> Any:
    return functools.reduce(operator.mul, sizes, 1)


def _whole(collective: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a collective, from its halves."""
    start, wait = HALVES[collective]
    return wait(start(*arguments), *arguments)


def _way_of_means(axis: int, _: Segments, new_axis: int, new_segments: Segments, group: str, *ring: str) -> Any:
    """The way of one row of each rank's part. The ranks of a ring have none of each other's."""
    return axis, ((place_in(group)[1], 1),), new_axis, new_segments, group


def _others(x: torch.Tensor, axis: int, _: Segments, new_axis: int, *rest: Any) -> Sequence[Any]:
    """The sizes of the axes that an exchange leaves alone."""
    return x.movedim((new_axis, axis), (0, 1)).shape[2:]


def _from_ranks(received: torch.Tensor, others: Sequence[Any], *way: Any) -> torch.Tensor:
    """The result of an exchange, from what the ranks sent: one after another, flat. `others` are the other sizes."""
    axis, _, new_axis, _, group, *_ = way
    (rank, ranks), (old, new) = place_in(group), _parts_of_both(*way)
    own = new[rank]
    if _are_equal(old):
        parts = received.view(ranks, own, old[rank], *others)
        joined = parts.transpose(0, 1).reshape(own, ranks * old[rank], *others)
    else:
        pieces = received.split([own * length * _product(others) for length in old])
        joined = torch.cat([p.view(own, n, *others) for p, n in zip(pieces, old, strict=True)], 1)
    return joined.movedim((0, 1), (new_axis, axis))


def _start(x: torch.Tensor, collective: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Begin a collective. Complex numbers travel as pairs, since gloo knows no others."""
    return collective(torch.view_as_real(x) if x.is_complex() else x)


def _wait(started: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The result of a collective that `_start` began, of the dtype of `x`."""
    result: torch.Tensor = torch.ops._c10d_functional.wait_tensor(started)
    return torch.view_as_complex(result) if x.is_complex() else result
