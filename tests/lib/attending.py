"""A model with self- and cross-attention, and the same model with attention replaced by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from .toys import make

HEADS = 2


def heads(x: Tensor) -> Tensor:
    """[B, L, H * D] -> [B, H, L, D]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Attention(nn.Module):
    """From one stream to another, or to itself. Heads, then tokens, or the other way round, in memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = heads(self.query(hidden)), heads(self.key(source)), heads(self.value(source))
        result = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(result.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(width), nn.Linear(width, width)
        self.attn1, self.attn2 = Attention(width), Attention(width)

    def forward(self, hidden: Tensor, text: Tensor, temb: Tensor, mask: Tensor | None = None) -> Tensor:
        change = self.norm(hidden) * (1 + self.scale(temb)[:, None])
        hidden = hidden + self.attn1(change, change)
        return hidden + self.attn2(self.norm(hidden), text, mask)


class Attending(nn.Module):
    """Blocks of self-attention, then cross-attention to the text, with a key-padding mask if one is given."""

    frequencies: Tensor

    def __init__(self, blocks: int = 3, width: int = 32) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0.1, 3, width))
        self.embed, self.time, self.out = (nn.Linear(width, width) for _ in range(3))
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        temb = self.time(torch.cos(timestep.reshape(-1, 1) / 1000 * self.frequencies))
        hidden = self.embed(hidden_states)
        for block in self.blocks:
            hidden = block(hidden, encoder_hidden_states, temb, mask)
        return self.out(hidden)


def attending(blocks: int = 3, **arguments: Any) -> Any:
    return make(Attending, blocks=blocks, **arguments).requires_grad_(False)


def exact(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """A user's attention, written out: no dropout, not causal, of the default scale."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


class Replaced(TorchFunctionMode):
    """Calls a function in place of sdpa while a module of `modules` runs."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.depth = function, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention and self.depth:
            with torch._C.DisableTorchFunction():
                return self.function(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def replaced(modules: list[nn.Module], function: Callable[..., Tensor]) -> Iterator[None]:
    """Plain modules, with another attention in some of them."""
    mode = Replaced(function)

    def enter(*_: Any) -> None:
        mode.depth += 1

    def leave(*_: Any) -> None:
        mode.depth -= 1

    handles = [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(leave) for module in modules]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
