"""The functions of the back ends.

All take (query, key, value, mask, is_causal, scale, enable_gqa), the arguments of sdpa without dropout. They call
operators directly, so that no process-wide setting decides or changes.

    query [B, H, Lq, D], key and value [B, Hkv, Lk, D], mask broadcast to [B, H, Lq, Lk]  ->  [B, H, Lq, D]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cachedit_fx.config.rules import OptionError

aten = torch.ops.aten
Function: TypeAlias = Callable[..., Any]


def replacement(name: str, function: Function, is_tokens_first: bool) -> Function:
    """What a node calls in place of `scaled_dot_product_attention`, with the same arguments.

    The result lies in memory as the model's own does: later nodes take views of it.

    Args:
        name: of the back end.
        function: one of this file's form.
        is_tokens_first: whether the result [B, H, L, D] is laid out as [B, L, H, D].
    """

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,  # noqa: ARG001 - calls with dropout keep their nodes
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        result: Tensor = function(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        return result.transpose(-3, -2).contiguous().transpose(-3, -2) if is_tokens_first else result.contiguous()

    attention.__name__ = f"{name}_attention"
    return attention


def of_callable(attention: Function) -> Function:
    """The form of this file, from a function with the arguments of `scaled_dot_product_attention`.

    Raises:
        OptionError: when called, if the function returns another shape or dtype than sdpa does.
    """

    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Any:
        extra = {"enable_gqa": True} if enable_gqa else {}
        result = attention(query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=is_causal, scale=scale, **extra)
        shape = (*query.shape[:-1], value.shape[-1])
        is_tensor = isinstance(result, Tensor)
        keeps_dtype = is_tensor and (result.dtype == query.dtype or torch.is_autocast_enabled(query.device.type))
        if not is_tensor or result.shape != shape or not keeps_dtype:
            returned = f"{result.dtype} {[*result.shape]}" if is_tensor else type(result).__name__
            raise OptionError(f"attention: {attention} returned {returned}, and sdpa returns {query.dtype} {[*shape]}")
        return result

    return function


def takes_arguments(attention: Function) -> bool:
    """Whether a function can be called as `scaled_dot_product_attention` is. True if its signature is not known."""
    try:
        inspect.signature(attention).bind(None, None, None, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def holds_tensors(attention: Any) -> bool:
    """Whether a function reads tensors other than its arguments: those of a module, or of its closure."""
    cells = (cell.cell_contents for cell in getattr(attention, "__closure__", None) or ())
    partial = (getattr(attention, "func", None), *getattr(attention, "args", ()))
    held = (attention, getattr(attention, "__self__", None), *cells, *partial)
    return any(isinstance(each, (Tensor, torch.nn.Module)) for each in held)


def added(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask as four-dimensional numbers that are added to scores: -inf for False."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=mask.device)
        mask = torch.where(mask, zero, float("-inf"))
    return mask[(None,) * (4 - mask.dim())]


def math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Any:
    """Two products of matrices and a softmax. All scores are kept in memory."""
    return aten._scaled_dot_product_attention_math(
        query, key, value, added(mask, query), 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def flash_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, *_: Any
) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=added(mask, query), scale=scale
    )[0]


def flash_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, _: None, is_causal: bool, scale: float | None, *__: Any
) -> Any:
    return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)[0]


def cudnn(query: Tensor, key: Tensor, value: Tensor, _: None, is_causal: bool, scale: float | None, *__: Any) -> Any:
    return aten._scaled_dot_product_cudnn_attention(query, key, value, None, False, 0.0, is_causal, False, scale=scale)[
        0
    ]


def flex(query: Tensor, key: Tensor, value: Tensor, _: None, __: bool, scale: float | None, *___: Any) -> Any:
    """The higher-order operator behind torch's `flex_attention`. Compilers make one kernel of it."""
    from torch._higher_order_ops.flex_attention import flex_attention
    from torch.nn.attention.flex_attention import _create_empty_block_mask

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = {"OUTPUT_LOGSUMEXP": False, "OUTPUT_MAX": False}
    blocks = _create_empty_block_mask(query, key).as_tuple()
    return flex_attention(query, key, value, _unchanged, blocks, scale, options)[0]


def _unchanged(score: Tensor, *_: Tensor) -> Tensor:
    return score
