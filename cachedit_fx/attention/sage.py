"""sageattention as an operator: INT8 queries and keys. Its inputs stay as they are, and no result is wrong.

Version 1.0.6 subtracts the keys' mean from the keys in place, and computes wrong results for key lengths that 64 does
not divide, unless the call is causal (relative error 0.14 to 0.36, measured). It gets a copy of the keys. A call with
another length runs in torch's attention. The length is known in the call alone if it is dynamic.
"""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import scaled_dot_product_attention

KEY_MULTIPLE = 64
"""Divides the key lengths that version 1 takes."""


@functools.cache
def major_version() -> int | None:
    """Of the installed package; None without one."""
    try:
        return int(version("sageattention").partition(".")[0])
    except PackageNotFoundError:
        return None


def takes_length(keys: int, is_causal: bool, major: int | None) -> bool:
    """Whether the package of this major version computes right results for a number of keys."""
    return major != 1 or is_causal or keys % KEY_MULTIPLE == 0


def is_tokens_first(query: Tensor) -> bool:
    """Whether [B, H, L, D] is laid out as [B, L, H, D]."""
    return statically_known_true(query.stride(1) < query.stride(2))


@torch.library.custom_op("cachedit_fx::sage_attention", mutates_args=())
def sage_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Attention by sageattention, or by torch if its result would be wrong.

    Args:
        query: [B, H, Lq, D] in float16, bfloat16 or float32, on a GPU, its channels side by side.
        key, value: [B, Hkv, Lk, D].
        mask: must be None, as the package ignores it.

    Returns:
        [B, H, Lq, D], laid out as [B, Lq, H, D] if the query is.
    """
    assert mask is None, "sageattention takes no mask"
    if takes_length(key.shape[2], is_causal, major_version()):
        from sageattention import sageattn

        tensors = query, key.clone(), value  # the keys change in place
        result = sageattn(
            *(x.transpose(1, 2) for x in tensors), tensor_layout="NHD", is_causal=is_causal, sm_scale=scale
        ).transpose(1, 2)
    else:
        result = scaled_dot_product_attention(
            query, key, value, None, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return _in_layout(result, is_tokens_first(query))


@sage_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    return _in_layout(query.new_empty(query.shape), is_tokens_first(query))


def _in_layout(result: Tensor, is_tokens_first: bool) -> Tensor:
    """The result in dense memory that no input shares."""
    return result.transpose(1, 2).contiguous().transpose(1, 2) if is_tokens_first else result.contiguous()
