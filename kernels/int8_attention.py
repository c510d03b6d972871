"""Attention whose scores come from the int8 matrix unit, for any length, mask and group of heads.

    k     = key - its mean over the length             softmax is the same; the log-sum-exp is less by query · mean
    q8, a = int8(query * scale * log2(e)), max / 127   a scale for each row
    k8, b = int8(k), max / 127                         a scale for `KEY_ROWS` keys
    p     = 2^(a b (q8 · k8) + mask * log2(e) - top)   float32; top: the row's largest exponent so far
    out   = Σ p value / Σ p                            p in value's dtype, sums in float32

Keys often share a large offset. Their differences, which alone decide, would get few of the 255 codes. The mean is
subtracted for that reason.

Bytes, for 16-bit inputs, of N_q = batch * heads * query length * head_dim elements of queries, and N_k of keys:

| launch | reads | writes |
| --- | --- | --- |
| column statistics | keys, 2 N_k | 16 partial sums of each column |
| codes | keys, 2 N_k; the partial sums, N_k from the L2 cache | codes, N_k; a scale for 64 keys |
| attention, once | queries, 2 N_q | out, 2 N_q; 4 bytes a row |
| attention, a tile of 128 x 64 | 64 head_dim of codes, 128 head_dim of values, a scale | |

The values are read where they lie. With `fp8_values` there is a launch more, for their columns' largest sizes; values
are read twice (4 N_k) and written once (N_k), and a tile reads 64 head_dim of them. Weights and values in e4m3 make the
error three times as large.

A row whose keys are all masked out is zeros, with a log-sum-exp of -inf, as `scaled_dot_product_attention` has it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .layout import runs_on_triton

FLOATS = (torch.bfloat16, torch.float16)
"""Dtypes that the kernel takes."""
CPU_FLOATS = (*FLOATS, torch.float32)
"""Dtypes that its stand-ins take on a CPU. On a GPU, tiles of float32 values leave too few registers."""
MAX_HEAD_DIM = 256
WIDE_HEAD_DIM = 128
"""The widest head beside a mask, or values in e4m3: the registers hold no more."""
UNIT = 8
"""Head dims are multiples of this: rows of 16-bit elements then start at multiples of 16 bytes."""
KEY_ROWS = 64
"""Keys that share a scale."""
LOG2_E = 1 / math.log(2)
LARGEST_INT8, LARGEST_FP8 = 127.0, 448.0
SMALLEST_AMAX = 1e-30
"""Keeps 0/0 apart from a number: zeros give zeros. The Triton kernels spell this and the two above out."""
FP8_WEIGHT = 256.0
"""The largest weight before e4m3, so that small ones are not lost."""


def refusal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> str | None:
    """Why the kernel does not take such inputs, in words; None if it does. Only looks at shapes, dtypes and device."""
    if not query.ndim == key.ndim == value.ndim == 4:
        return "query, key and value must have four dimensions"
    batch, heads, _, head_dim = query.shape
    _, key_heads, length, _ = key.shape
    if query.dtype not in (CPU_FLOATS if query.is_cpu else FLOATS) or not query.dtype == key.dtype == value.dtype:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}: bfloat16 or float16 for all, or float32 on a CPU"
    if head_dim % UNIT or not UNIT <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim {head_dim}: a multiple of {UNIT} up to {MAX_HEAD_DIM}"
    if value.shape != key.shape or key.shape[0] != batch or key.shape[3] != head_dim or not length:
        return (
            f"shapes {[*query.shape]}, {[*key.shape]}, {[*value.shape]}: keys and values as the queries, of one length"
        )
    if heads != key_heads and not (enable_gqa and key_heads and heads % key_heads == 0):
        return f"{heads} heads of queries for {key_heads} of keys"
    return None if attn_mask is None else _mask_refusal(query, key, attn_mask, is_causal)


def _mask_refusal(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, is_causal: bool) -> str | None:
    if is_causal:
        return "a mask and is_causal at once"
    if mask.dtype not in (torch.bool, query.dtype):
        return f"a mask of {mask.dtype}: bool or the queries' dtype"
    scores = (*query.shape[:3], key.shape[2])
    if not 2 <= mask.ndim <= 4 or mask.shape[-1] != scores[-1]:
        return f"a mask of {[*mask.shape]}: it must name each of the {scores[-1]} keys"
    if any(size not in (1, whole) for size, whole in zip(mask.shape, scores[4 - mask.ndim :], strict=True)):
        return f"a mask of {[*mask.shape]} for scores of {[*scores]}"
    if query.shape[3] > WIDE_HEAD_DIM:
        return f"a mask beside a head_dim of {query.shape[3]}: up to {WIDE_HEAD_DIM}"
    return None


def takes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> bool:
    """Whether the kernel takes such inputs; `refusal` says why not."""
    return refusal(query, key, value, attn_mask, is_causal, enable_gqa) is None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _has_kernel(query: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the inputs are on a GPU with matrix units for int8 and bfloat16."""
    return runs_on_triton(query, *others) and query.device.type == "cuda" and _capability(query.device) >= (8, 0)


def int8_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    fp8_values: bool = False,
) -> Any:
    """softmax(query key^T * scale + attn_mask) value.

    On a GPU by the kernel. On a CPU, and for what `refusal` names, by `scaled_dot_product_attention`.

    Args:
        query: [batch, heads, query length, head_dim]; bfloat16 or float16; float32 too on a CPU. Any strides: inputs
            are copied only if their rows are not adjacent elements that start at multiples of 16 bytes.
        key, value: [batch, key heads, length, head_dim] of the same dtype. Keys must be finite, masked ones too, since
            all of them are in the mean.
        attn_mask: bool (True takes part) or `query`'s dtype (added to the scores); of two to four dimensions,
            to be broadcast to [batch, heads, query length, length].
        is_causal: query i attends to keys 0 to i.
        scale: of the scores; 1 / sqrt(head_dim) unless given.
        enable_gqa: heads / key heads consecutive heads of queries share one of keys.
        return_lse: return the log-sum-exp too.
        fp8_values: weights and values in e4m3, on NVIDIA GPUs of compute capability 8.9 or above.

    Returns:
        [batch, heads, query length, head_dim] in `query`'s dtype. In memory the heads of a token are adjacent, so that
        `out.transpose(1, 2).flatten(2)` needs no copy. With `return_lse` a pair, of that and the natural logarithm of
        the sum of the exponentials of a row's scores: float32, [batch, heads, query length]. Rows without a key that
        takes part are 0 and -inf.

    Raises:
        ValueError: with `return_lse`, off the CPU, for what the kernel does not take; with `fp8_values` on a GPU
            without e4m3, or heads above 128 there.
    """
    reason = refusal(query, key, value, attn_mask, is_causal, enable_gqa)
    if reason is None and _has_kernel(query, key, value, attn_mask):
        from .int8_attention_triton import launch

        if fp8_values and (torch.version.hip or _capability(query.device) < (8, 9)):
            raise ValueError("int8_attention: fp8_values needs an NVIDIA GPU of capability 8.9 or above")
        if fp8_values and query.shape[3] > WIDE_HEAD_DIM:
            raise ValueError(f"int8_attention: fp8_values needs heads of {WIDE_HEAD_DIM} channels at most")
        return launch(query, key, value, attn_mask, is_causal, scale, return_lse, fp8_values)
    if return_lse:
        return _attention_with_lse(query, key, value, attn_mask, is_causal, scale, reason)
    out = scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    return _tokens_first(out)


def _attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    reason: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By torch's op for CPUs.

    The op takes no group of heads, no bool and no query of no rows. It reads channels as if they were adjacent, and
    calls the log-sum-exp of nothing 0.
    """
    if not query.is_cpu or reason is not None:
        raise ValueError(f"int8_attention: no log-sum-exp on {query.device} for {reason or 'a GPU without the kernel'}")
    if not query.numel():
        return empty_out(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale
    )
    if bias is not None:
        lse = lse.masked_fill((bias == -math.inf).all(-1), -math.inf)
    return _tokens_first(out), lse.contiguous()


def _bias(attn_mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What a mask adds to the scores, in `query`'s dtype and as large as they are."""
    if attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
    return attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])


def empty_out(query: torch.Tensor, head_dim: int | None = None) -> torch.Tensor:
    """Memory for what `int8_attention` returns."""
    batch, heads, length, _ = query.shape
    return query.new_empty((batch, length, heads, head_dim or query.shape[3])).transpose(1, 2)


def _tokens_first(out: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def int8_attention_emulated(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    fp8_values: bool = False,
) -> Any:
    """The reference, and a stand-in for the kernel where there is no GPU: its roundings in torch's ops.

    As `int8_attention`, but for the scores of all rows at once: batch * heads * query length * length in float32. The
    maximum is a row's final one, so that weights round at other places than in the kernel's running sums.

    Raises:
        ValueError: for what the kernel does not take.
    """
    reason = refusal(query, key, value, attn_mask, is_causal, enable_gqa)
    if reason is not None:
        raise ValueError(f"int8_attention_emulated: {reason}")
    group = query.shape[1] // key.shape[1]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    mean = key.float().mean(2, keepdim=True)
    query_codes, query_scales = _codes(query.float() * (scale * LOG2_E))
    padded = torch.nn.functional.pad(key.float() - mean, (0, 0, 0, -key.shape[2] % KEY_ROWS))
    codes, scales = _codes(padded.unflatten(2, (-1, KEY_ROWS)).flatten(3))
    keys = codes.unflatten(3, (KEY_ROWS, -1)).flatten(2, 3)[:, :, : key.shape[2]].repeat_interleave(group, 1)
    key_scales = scales.repeat_interleave(KEY_ROWS, 2)[:, :, : key.shape[2]].repeat_interleave(group, 1)
    x = (query_codes @ keys.mT) * (query_scales * key_scales.mT)  # whole numbers below 2^24: their sums are exact
    if is_causal:
        x = x.masked_fill(~x.new_ones(x.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    elif attn_mask is not None and attn_mask.dtype is torch.bool:
        x = x.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        bias = (attn_mask.float() * LOG2_E).clamp(min=-3e38)
        x += bias.masked_fill(attn_mask == -math.inf, -math.inf)
    top = x.amax(-1, keepdim=True)
    p = torch.exp2(x - top.masked_fill(top == -math.inf, 0))
    total = p.sum(-1, keepdim=True)
    values = value.float()
    if fp8_values:
        amax = values.abs().amax(2, keepdim=True).clamp(min=SMALLEST_AMAX)
        values = (values * (LARGEST_FP8 / amax)).to(torch.float8_e4m3fn).float() * (amax / LARGEST_FP8)
        p = (p * FP8_WEIGHT).to(torch.float8_e4m3fn).float() / FP8_WEIGHT
    else:
        p = p.to(value.dtype).float()
    out = p @ values.repeat_interleave(group, 1) / total.masked_fill(total == 0, 1)
    out = _tokens_first(out.to(query.dtype))
    if not return_lse:
        return out
    shift = query.float() @ mean.repeat_interleave(group, 1).mT * scale
    return out, ((top + total.log2()) / LOG2_E + shift).squeeze(-1)


def _codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers from -127 to 127 in float32, and the scales [..., 1] of their last dimension."""
    amax = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_AMAX)
    return (x * (torch.full_like(amax, LARGEST_INT8) / amax)).round(), amax / LARGEST_INT8


library = torch.library.Library("cachedit_fx", "FRAGMENT")
"""Graphs hold these in place of `scaled_dot_product_attention`, as `torch.ops.cachedit_fx.*`."""
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, bool is_causal=False, float? scale=None, "
    "bool enable_gqa=False"
)


def _register(name: str, function, with_lse: bool) -> None:
    library.define(f"{name}({_ARGUMENTS}, bool fp8_values=False) -> {'(Tensor, Tensor)' if with_lse else 'Tensor'}")

    def run(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False, fp8_values=False):
        return function(query, key, value, attn_mask, is_causal, scale, enable_gqa, with_lse, fp8_values)

    def fake(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False, fp8_values=False):
        out = empty_out(query, value.shape[3])
        return (out, query.new_empty(query.shape[:3], dtype=torch.float32)) if with_lse else out

    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cachedit_fx::{name}", fake, lib=library)


_register("int8_attention", int8_attention, False)
_register("int8_attention_lse", int8_attention, True)
_register("int8_attention_emulated", int8_attention_emulated, False)
