"""Attention of which the ranks of a ring share the keys: each keeps its queries, and keys and values pass by.

    rank 0    q0 · k0    q0 · k2    q0 · k1        each passes on what it has while it computes with it
    rank 1    q1 · k1    q1 · k0    q1 · k2
    rank 2    q2 · k2    q2 · k1    q2 · k0

Each product gives a result and its log-sum-exp, by which results are merged in float32. Unlike an exchange for heads,
this asks for no number of heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from cachedit_fx import collectives
from cachedit_fx.attention.calls import same
from cachedit_fx.attention.functions import added
from cachedit_fx.collectives import Segments

aten = torch.ops.aten

Partial = tuple[Tensor, Tensor]
"""What queries get from some of the keys [..., Lq, D], and the log-sum-exp of their scores [..., Lq], -inf for none."""


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 - it is 0
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    queries: Segments,
    keys: Segments,
    ring: str,
    ulysses: str,
) -> Tensor:
    """As `scaled_dot_product_attention`, of this rank's queries and the keys of all ranks of the ring.

    Args:
        query, key, value: the tokens of this rank, or those of its neighbours of Ulysses side by side.
        attn_mask: of all tokens, in the order of the ranks' parts.
        is_causal: the tokens are one segment, so that this order is theirs.
        queries, keys: the segments of the tokens as a whole.
        ring, ulysses: names of groups. The second one is empty if no neighbours exchange heads.
    """
    place, places = collectives.place_in(ring)
    rows, columns = (collectives.lengths_in_ring(each, ring, ulysses) for each in (queries, keys))
    merged: Partial | None = None
    coming: Tensor | None = None
    for step in range(places):
        holder = (place - step) % places
        if coming is not None:
            key, value = _unpacked(torch.ops._c10d_functional.wait_tensor(coming), key, value, columns[holder])
        if step + 1 < places:
            coming = _passed_on(key, value, columns[(holder - 1) % places], ring)
        mask = _mask_of(attn_mask, is_causal, rows, columns, place, holder, query)
        partial = attend(query, key, value, mask, scale, enable_gqa)
        merged = partial if merged is None else merge(merged, partial)
    assert merged is not None
    result = merged[0].to(query.dtype)
    return result.transpose(-3, -2).contiguous().transpose(-3, -2) if result.dim() > 3 else result


def merge(first: Partial, second: Partial) -> Partial:
    """What queries get from the keys of both, which have none in common."""
    (out, lse), (other, other_lse) = first, second
    total = torch.logaddexp(lse, other_lse)

    def weight(each: Tensor) -> Tensor:
        return torch.where(total == -torch.inf, 0.0, (each - total).exp()).unsqueeze(-1)

    return out * weight(lse) + other * weight(other_lse), total


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, enable_gqa: bool
) -> Partial:
    """What the queries get from these keys alone, in float32 (float64 from float64).

    Args:
        mask: added to scores; None adds nothing.
    """
    if enable_gqa and not same(query.shape[-3], key.shape[-3]):
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    if not _fits_kernels(query, key, value, mask):
        return _by_products(query, key, value, mask, scale)
    out, lse = _kernel_of(query, mask)(*map(_dense, (query, key, value)), mask, scale)
    out, lse = out.to(lse.dtype), lse.narrow(-1, 0, query.shape[-2])
    if mask is None:
        return out, lse
    is_seen = (mask > -torch.inf).any(-1)  # kernels return 0 for the log-sum-exp of queries that see no key
    return torch.where(is_seen.unsqueeze(-1), out, 0.0), torch.where(is_seen, lse, -torch.inf)


# ---------------------------------------------------------------------------------------------------------------------
# Passing on
# ---------------------------------------------------------------------------------------------------------------------


def _passed_on(key: Tensor, value: Tensor, length: Any, ring: str) -> Tensor:
    """The keys and values of the rank before, `length` tokens of them, not waited for; the rank after gets these."""
    place, places = collectives.place_in(ring)
    packed = torch.cat([key.flatten(), value.flatten()])
    sent, received = [0] * places, [0] * places
    sent[(place + 1) % places] = packed.shape[0]
    received[(place - 1) % places] = _size(key, length) + _size(value, length)
    result: Tensor = torch.ops._c10d_functional.all_to_all_single(packed, received, sent, ring)
    return result


def _unpacked(packed: Tensor, key: Tensor, value: Tensor, length: Any) -> tuple[Tensor, Tensor]:
    """Keys and values like these, of `length` tokens."""
    parts = packed.split([_size(key, length), _size(value, length)])
    keys, values = (
        part.view(*like.shape[:-2], length, like.shape[-1]) for part, like in zip(parts, (key, value), strict=True)
    )
    return keys, values


def _size(like: Tensor, length: Any) -> Any:
    for size in (*like.shape[:-2], like.shape[-1]):
        length = length * size
    return length


def _mask_of(
    mask: Tensor | None,
    is_causal: bool,
    rows: Sequence[Any],
    columns: Sequence[Any],
    place: int,
    holder: int,
    query: Tensor,
) -> Tensor | None:
    """What is added to the scores of the queries of one place with the keys of another."""
    first_row, first_column = sum(rows[:place]), sum(columns[:holder])
    if is_causal:
        at_row = torch.arange(rows[place], device=query.device) + first_row
        return added(at_row[:, None] >= torch.arange(columns[holder], device=query.device) + first_column, query)
    if mask is None:
        return None
    mask = torch.atleast_2d(mask)
    for axis, start, length in ((-2, first_row, rows[place]), (-1, first_column, columns[holder])):
        size = mask.shape[axis]
        if not isinstance(size, int) or size != 1:
            mask = mask.narrow(axis, start, length)
    return added(mask, query)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels that return the log-sum-exp
# ---------------------------------------------------------------------------------------------------------------------


def _fits_kernels(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether torch's kernels take such tensors. They may end the process if there is no token."""
    tensors = query, key, value
    if any(each.dim() != 4 or each.dtype != query.dtype for each in tensors) or (mask is not None and mask.dim() != 4):
        return False
    if any(
        size == 0 if isinstance(size, int) else has_free_unbacked_symbols(size) for x in tensors for size in x.shape
    ):
        return False
    is_alike = all(same(each.shape[axis], query.shape[axis]) for each in tensors for axis in (0, 1, 3))
    is_aligned = query.device.type == "cpu" or query.shape[-1] * query.element_size() % 16 == 0
    has_kernel = query.dtype in (torch.float16, torch.bfloat16, torch.float32)
    has_kernel |= query.device.type == "cpu" and query.dtype is torch.float64
    return is_alike and is_aligned and has_kernel and query.device.type in ("cpu", "cuda")


def _kernel_of(query: Tensor, mask: Tensor | None) -> Any:
    if query.device.type == "cpu":
        return _flash_on_cpu
    is_half = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256
    is_flash = is_half and mask is None and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return _flash if is_flash else _efficient


def _dense(x: Tensor) -> Tensor:
    return x if same(x.stride(-1), 1) else x.contiguous()


def _flash_on_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask, scale=scale)


def _flash(query: Tensor, key: Tensor, value: Tensor, _: None, scale: float | None) -> Any:
    return aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]


def _efficient(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Any:
    """The kernel pads the log-sum-exp, and wants rows of the mask that begin at multiples of 16 elements."""
    if mask is not None:
        columns = key.shape[-2]
        mask = mask.to(query.dtype).expand(*query.shape[:-1], columns)
        mask = torch.nn.functional.pad(mask, (0, -columns % 16)).narrow(-1, 0, columns)
    return aten._scaled_dot_product_efficient_attention(query, key, value, mask, True, scale=scale)[:2]


def _by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Partial:
    """With all scores in memory, for what the kernels do not take."""
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
    scores = scores if mask is None else scores + mask
    lse = scores.logsumexp(-1)
    shift = torch.where(lse == -torch.inf, 0.0, lse)
    return (scores - shift.unsqueeze(-1)).exp() @ value.to(dtype), lse


COMMUNICATING = collectives.COMMUNICATING | {ring_attention}
"""The functions that all ranks of a group must call together."""
