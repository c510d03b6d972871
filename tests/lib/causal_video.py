"""A small causal video transformer, after the papers on autoregressive video (Self-Forcing, Rolling Forcing).

A video is made chunk by chunk. In each call every block writes the chunk's keys and values into a cache, at the chunk's
place, and attends to the cache up to there. A chunk takes some denoising steps, then one call with the clean chunk at
timestep 0, for what it writes alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, TOKENS, CHUNKS, BLOCKS = 8, 3, 3, 4
TIMESTEPS = (1000.0, 750.0, 500.0, 250.0)

Cache = dict[str, Tensor]
Store = Literal["arguments", "one argument", "buffers", "attributes", "containers"]
STORES: tuple[Store, ...] = ("arguments", "one argument", "buffers", "attributes", "containers")


class Block(nn.Module):
    """Attention to all tokens so far, then a linear layer."""

    k_cache: Tensor
    v_cache: Tensor
    calls: Tensor

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.qkv, self.text, self.out = (nn.Linear(WIDTH, width) for width in (3 * WIDTH, WIDTH, WIDTH))
        if store == "buffers":
            self.register_buffer("k_cache", torch.zeros(1, CHUNKS * TOKENS, WIDTH))
            self.register_buffer("v_cache", torch.zeros(1, CHUNKS * TOKENS, WIDTH))
        if store == "attributes":
            self.k_cache = self.v_cache = torch.zeros(1, CHUNKS * TOKENS, WIDTH)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, hidden: Tensor, temb: Tensor, text: Tensor, cache: Cache, start: int) -> Tensor:
        self.calls += 1
        q, k, v = self.qkv(F.layer_norm(hidden, (WIDTH,)) + temb).chunk(3, dim=-1)
        keys, values = self.append(cache, k, v, start)
        cache["text"].copy_(self.text(text))
        end = start + TOKENS
        keys = torch.cat([keys[:, :end], cache["text"]], dim=1)
        values = torch.cat([values[:, :end], cache["text"]], dim=1)
        return hidden + self.out(F.scaled_dot_product_attention(q, keys, values))

    def append(self, cache: Cache, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Put the chunk's keys and values in their place, and return all of them."""
        place = slice(start, start + TOKENS)
        if self.store in ("arguments", "one argument"):
            cache["k"][:, place] = k
            cache["v"].data[:, place].copy_(v)
            return cache["k"], cache["v"]
        if self.store == "buffers":
            self.k_cache[:, place] = k
            self.v_cache[:, place] = v
            return self.k_cache, self.v_cache
        old = (cache["k"], cache["v"]) if self.store == "containers" else (self.k_cache, self.v_cache)
        keys, values = (
            torch.cat([whole[:, :start], part, whole[:, place.stop :]], dim=1)
            for whole, part in zip(old, (k, v), strict=True)
        )
        if self.store == "containers":
            cache["k"], cache["v"] = keys, values
        else:
            self.k_cache, self.v_cache = keys, values
        return keys, values


class CausalVideo(nn.Module):
    """Blocks between two projections."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.proj_in, self.proj_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(store) for _ in range(BLOCKS))

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor, caches: list[Cache], start: int) -> Tensor:
        temb = (timestep / 1000)[:, None, None].sin()
        hidden = self.proj_in(hidden_states)
        for block, cache in zip(self.blocks, caches, strict=True):
            hidden = block(hidden, temb, text, cache, start)
        return self.proj_out(hidden)


@torch.no_grad()
def build(store: Store) -> CausalVideo:
    """The model, the same weights at every call."""
    torch.manual_seed(0)
    return CausalVideo(store).eval()


def empty_caches(store: Store) -> list[Cache]:
    """A cache for each block; slices of one tensor for "one argument"."""
    shape = (1, CHUNKS * TOKENS, WIDTH)
    if store == "one argument":
        whole = torch.zeros(BLOCKS, 2, *shape)
        return [{"k": part[0], "v": part[1], "text": torch.zeros(1, 2, WIDTH)} for part in whole]
    return [{"k": torch.zeros(shape), "v": torch.zeros(shape), "text": torch.zeros(1, 2, WIDTH)} for _ in range(BLOCKS)]


@torch.no_grad()
def rollout(model: Callable[..., Any], module: CausalVideo) -> list[list[Tensor]]:
    """Make a video. For each call: its result, and everything that the call may have written to."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, 2, WIDTH, generator=generator)
    caches, record = empty_caches(module.store), []

    def call(chunk: Tensor, time: float, start: int) -> Tensor:
        result: Tensor = model(chunk, torch.tensor([time]), text, caches, start)
        state = [tensor for cache in caches for tensor in cache.values()]
        state += [tensor for block in module.blocks for tensor in block.buffers()]
        if module.store == "attributes":
            state += [tensor for block in module.blocks for tensor in (block.k_cache, block.v_cache)]  # type: ignore[misc]
        record.append([tensor.clone() for tensor in (result, *state)])
        return result

    for number in range(CHUNKS):
        chunk = torch.randn(1, TOKENS, WIDTH, generator=generator)
        for time in TIMESTEPS:
            chunk = chunk - 0.25 * call(chunk, time, number * TOKENS)
        call(chunk, 0.0, number * TOKENS)
    return record


def plain_rollout(store: Store) -> list[list[Tensor]]:
    """The video of the plain model."""
    model = copy.deepcopy(build(store))
    return rollout(model, model)
