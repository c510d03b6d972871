"""A small model with everything that can be hoisted: modulations, cross attention, rotary tables, two conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lib.models import WIDTH, time_embedding
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

TEXT, TOKENS = 5, 6


class CrossAttention(nn.Module):
    """The image asks the text, whose keys are normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm_k = nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.norm_k(self.to_k(text)), self.to_v(text)
        q, k, v = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Modulated by the timestep and the pooled text; turned by a rotary table; asks the text."""

    def __init__(self, scales: bool) -> None:
        super().__init__()
        self.norm, self.cross, self.ff = nn.LayerNorm(WIDTH), CrossAttention(), nn.Linear(WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.table = nn.Parameter(torch.randn(1, 3 * WIDTH) / 4) if scales else None

    def forward(self, x: Tensor, temb: Tensor, rotary: Tensor, text: Tensor) -> Tensor:
        modulation = self.modulation(F.silu(temb))
        if self.table is not None:
            modulation = modulation + self.table
        shift, scale, gate = modulation[:, None].chunk(3, dim=-1)
        x = x + gate * self.ff(self.norm(x) * (1 + scale) + shift) * rotary
        return x + self.cross(x, text)


class Conditioned(nn.Module):
    """`pooled=False` leaves the timestep alone in the modulations."""

    def __init__(self, blocks: int = 4, pooled: bool = True, scales: bool = False) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.time, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.pooled = nn.Linear(WIDTH, WIDTH) if pooled else None
        self.norm_out = nn.Linear(WIDTH, 2 * WIDTH)
        self.blocks = nn.ModuleList(Block(scales) for _ in range(blocks))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled: Tensor, ids: Tensor
    ) -> Tensor:
        temb = self.time(time_embedding(timestep).to(hidden_states.dtype))
        if self.pooled is not None:
            temb = temb + self.pooled(pooled)
        angles = ids[:, None].float() * torch.linspace(0.1, 1, WIDTH, device=ids.device)
        rotary = torch.cat([angles.cos()[:, ::2], angles.sin()[:, ::2]], dim=-1)[None].to(hidden_states.dtype)
        text = self.text(encoder_hidden_states)
        x = self.embed(hidden_states)
        for block in self.blocks:
            x = block(x, temb, rotary, text)
        scale, shift = self.norm_out(F.silu(temb))[:, None].chunk(2, dim=-1)
        return self.out(x * (1 + scale) + shift)


def conditions(
    seed: int = 0, batch: int = 1, tokens: int = TOKENS, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """What a prompt and a size give: the arguments beside sample and timestep."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder_hidden_states": torch.randn(batch, TEXT, WIDTH, generator=generator).to(dtype),
        "pooled": torch.randn(batch, WIDTH, generator=generator).to(dtype),
        "ids": torch.arange(tokens),
    }


def sample(step: int = 0, batch: int = 1, tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sample of a step."""
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(100 + step)).to(dtype)


def times(steps: int = 4, batch: int = 1) -> list[Tensor]:
    """The timesteps of a generation."""
    return [torch.full((batch,), 900.0 - 200 * step) for step in range(steps)]


class StorageWatch(TorchDispatchMode):
    """Notes the storages of all tensors that operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        self.storages |= {each.untyped_storage()._cdata for each in leaves if isinstance(each, torch.Tensor)}
        return func(*args, **(kwargs or {}))

    def has_read(self, weights: Sequence[Tensor]) -> list[bool]:
        """For each weight, whether an operation has read it."""
        return [weight.untyped_storage()._cdata in self.storages for weight in weights]
