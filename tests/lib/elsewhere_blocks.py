"""Shapes of blocks that public code has outside diffusers, 6 to 15: from results to experts and writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lib.elsewhere_streams import ZeroBlock
from lib.models import (
    WIDTH,
    Block,
    JointBlock,
    LastDiffers,
    Toy,
    _Plain,
    time_embedding,
)
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# 6. What blocks return
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class BlockOutput:
    hidden: Tensor
    text: Tensor
    extra: Tensor | None = None


class Wrapped(nn.Module):
    """Joint blocks that return `wrap(text, hidden)`, from which `unwrap` takes both again."""

    def __init__(self, wrap: Callable[..., Any], unwrap: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Wrapping(wrap) for _ in range(5))
        self.project = nn.Linear(WIDTH, WIDTH)
        self.unwrap = unwrap

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        temb, x = time_embedding(timestep), hidden_states
        for block in self.blocks:
            text, x = self.unwrap(block(x, text, temb))
        return self.project(x + text.mean(1, keepdim=True))


class _Wrapping(JointBlock):
    def __init__(self, wrap: Callable[..., Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, hidden: Tensor, text: Tensor, temb: Tensor) -> Any:
        return self.wrap(*super().forward(hidden, text, temb))


# ---------------------------------------------------------------------------------------------------------------------
# 7. ControlNet residuals
# ---------------------------------------------------------------------------------------------------------------------


class Sparse(Toy):
    """Fewer residuals than blocks: each serves several."""

    def __init__(self) -> None:
        super().__init__(6)

    def forward(self, hidden_states: Tensor, timestep: Tensor, residuals: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        temb, x = time_embedding(timestep), self.embed(hidden_states)
        interval = math.ceil(len(self.blocks) / len(residuals))
        for index, block in enumerate(self.blocks):
            x = block(x, temb) + residuals[index // interval]
        return self.project(x)


class Every(Toy):
    """Fewer residuals than blocks: behind every second block one is added."""

    def __init__(self) -> None:
        super().__init__(6)

    def forward(self, hidden_states: Tensor, timestep: Tensor, residuals: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        temb, x = time_embedding(timestep), self.embed(hidden_states)
        for index, block in enumerate(self.blocks):
            x = block(x, temb)
            if index % 2 == 0:
                x = x + residuals[index // 2]
        return self.project(x)


# ---------------------------------------------------------------------------------------------------------------------
# 8. Refiners
# ---------------------------------------------------------------------------------------------------------------------


class TwoRefiners(nn.Module):
    """Two blocks for the text and two for the noisy picture, then joint ones for both."""

    def __init__(self, joint: int = 12, width: int = WIDTH) -> None:
        super().__init__()
        self.x_embedder, self.cap_embedder = nn.Linear(width, width), nn.Linear(width, width)
        self.noise_refiner = nn.ModuleList(Block(width) for _ in range(2))
        self.context_refiner = nn.ModuleList(_Plain(width) for _ in range(2))
        self.layers = nn.ModuleList(Block(width) for _ in range(joint))
        self.final = nn.Linear(width, width)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        temb = time_embedding(t)
        x, text = self.x_embedder(x), self.cap_embedder(text)
        for layer in self.noise_refiner:
            x = layer(x, temb)
        for layer in self.context_refiner:
            text = layer(text)
        unified = torch.cat([x, text], dim=1)
        for layer in self.layers:
            unified = layer(unified, temb)
        return self.final(unified[:, : x.shape[1]])


# ---------------------------------------------------------------------------------------------------------------------
# 9. Side branches
# ---------------------------------------------------------------------------------------------------------------------


class Hinting(Block):
    """A block of the side branch: hands its stream on, and a hint beside it."""

    def __init__(self, width: int = WIDTH, first: bool = False) -> None:
        super().__init__(width)
        self.before = nn.Linear(width, width) if first else None
        self.after = nn.Linear(width, width)

    def forward(self, c: Tensor, x: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if self.before is not None:
            c = self.before(c) + x
        c = super().forward(c, temb)
        return c, self.after(c)


class VACE(nn.Module):
    """A second loop beside the main one; its hints are added behind every second main block.

    `ahead` computes all hints first; otherwise each is computed just before the main block that takes it.
    """

    def __init__(self, ahead: bool, num_blocks: int = 8, width: int = WIDTH) -> None:
        super().__init__()
        self.ahead = ahead
        self.embed, self.control_embed, self.project = (nn.Linear(width, width) for _ in range(3))
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.vace_blocks = nn.ModuleList(Hinting(width, first=i == 0) for i in range(num_blocks // 2))

    def forward(self, x: Tensor, t: Tensor, control: Tensor) -> Tensor:
        temb, x, c = time_embedding(t), self.embed(x), self.control_embed(control)
        start, hints = x, []
        if self.ahead:
            for block in self.vace_blocks:
                c, hint = block(c, start, temb)
                hints.append(hint)
        for index, block in enumerate(self.blocks):
            if not self.ahead and index % 2 == 0:
                c, hint = self.vace_blocks[index // 2](c, start, temb)
                hints.append(hint)
            x = block(x, temb)
            if index % 2 == 0:
                x = x + hints[index // 2]
        return self.project(x)


# ---------------------------------------------------------------------------------------------------------------------
# 10. Interleaved loops
# ---------------------------------------------------------------------------------------------------------------------


class SpatialTemporal(nn.Module):
    """(batch, frames, tokens, width): a block over the tokens of each frame, one over the frames of each token, ..."""

    def __init__(self, pairs: int = 5, width: int = WIDTH) -> None:
        super().__init__()
        self.embed, self.project = nn.Linear(width, width), nn.Linear(width, width)
        self.spatial_blocks = nn.ModuleList(Block(width) for _ in range(pairs))
        self.temporal_blocks = nn.ModuleList(Block(width) for _ in range(pairs))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb = time_embedding(t)
        batch, frames, tokens, width = x.shape
        per_frame, per_token = temb.repeat_interleave(frames, 0), temb.repeat_interleave(tokens, 0)
        x = self.embed(x).reshape(batch * frames, tokens, width)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, per_frame)
            x = x.reshape(batch, frames, tokens, width).permute(0, 2, 1, 3).reshape(batch * tokens, frames, width)
            x = temporal(x, per_token)
            x = x.reshape(batch, tokens, frames, width).permute(0, 2, 1, 3).reshape(batch * frames, tokens, width)
        return self.project(x).reshape(batch, frames, tokens, width)


# ---------------------------------------------------------------------------------------------------------------------
# 11. Mixtures of experts
# ---------------------------------------------------------------------------------------------------------------------


class DenseExperts(nn.Module):
    """Every expert sees every token; what is not among the best two weighs nothing."""

    def __init__(self, width: int, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        best, index = scores.topk(2, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, index, best)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class RoutedExperts(DenseExperts):
    """An expert sees the tokens that chose it, picked by their indices: how many depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        best, index = self.gate(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(index == i)
            out.index_add_(0, token, expert(flat[token]) * best[token, place, None])
        return out.view_as(x)


class Mixture(Toy):
    """Attention, then experts."""

    def __init__(self, experts: Callable[[int], nn.Module]) -> None:
        super().__init__(5)
        for block in self.blocks:
            block.ff = nn.ModuleList([experts(WIDTH)])


# ---------------------------------------------------------------------------------------------------------------------
# 12. In-place writes
# ---------------------------------------------------------------------------------------------------------------------


class WritingBlock(Block):
    """Adds to the stream in place, in one of the ways that people write it."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        change = self.attn(self.norm(x)) + temb[:, None]
        if self.style == "iadd":
            x += change
        elif self.style == "add_":
            x.add_(change, alpha=0.5)
        elif self.style == "addcmul_":
            x.addcmul_(change, temb[:, None])
        elif self.style == "part":
            x[:, 2:] += change[:, 2:]
        elif self.style == "assigned":
            x[:, 2:] = x[:, 2:] + change[:, 2:]
        return x.add_(self.ff[2](F.gelu(self.ff[0](self.norm(x)))))


class Writing(Toy):
    def __init__(self, style: str) -> None:
        super().__init__(5, container=lambda blocks: nn.ModuleList(WritingBlock(style) for _ in blocks))


class WrittenResiduals(Toy):
    """A ControlNet's residuals are written into the image's part of a joint stream, behind each block."""

    def __init__(self) -> None:
        super().__init__(5)

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor, residuals: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        temb, length = time_embedding(timestep), text.shape[1]
        x = torch.cat([text, self.embed(hidden_states)], dim=1)
        for block, residual in zip(self.blocks, residuals, strict=True):
            x = block(x, temb)
            x[:, length:, ...] += residual
        return self.project(x[:, length:])


# ---------------------------------------------------------------------------------------------------------------------
# 13 to 15. Blocks without skip connection, a last block of its own, loops that have nothing to do with each other
# ---------------------------------------------------------------------------------------------------------------------


class ReplacingBlock(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.attn, self.mix = _Plain(width).attn, nn.Linear(width, width)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.attn(x) + temb[:, None]))


class Replacing(Toy):
    """x = block(x), and nothing of x is left."""

    def __init__(self) -> None:
        super().__init__(5)

    def make_block(self, index: int, width: int) -> nn.Module:
        return ReplacingBlock(width)


class LargerLast(Toy):
    """The last block is another class, and does more."""

    def __init__(self, num_blocks: int = 5) -> None:
        super().__init__(num_blocks)

    def make_block(self, index: int, width: int) -> nn.Module:
        return Block(width) if index < 4 else _TwiceBlock(width)


class _TwiceBlock(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.cross = _Plain(width)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.cross(super().forward(x, temb))


class DroppingLast(LastDiffers):
    """Joint blocks, projections around them; the last one hands no text on."""

    def __init__(self, num_blocks: int = 5) -> None:
        super().__init__(num_blocks)
        self.embed, self.project = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.project(super().forward(self.embed(hidden_states), timestep, text))


class Bridged(nn.Module):
    """Two loops with a layer of their own between them."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embed, self.bridge, self.project = (nn.Linear(width, width) for _ in range(3))
        self.first_blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.second_blocks = nn.ModuleList(ZeroBlock(width) for _ in range(5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb, x = time_embedding(t), self.embed(x)
        for block in self.first_blocks:
            x = block(x, temb)
        x = self.bridge(x)
        for block in self.second_blocks:
            x = block(x, temb)
        return self.project(x)


class CrossBlock(Block):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        x = super().forward(x, temb)
        k, v = self.kv(context).chunk(2, dim=-1)
        return x + F.scaled_dot_product_attention(self.q(x), k, v)


class Conditioned(nn.Module):
    """An encoder of a reference picture, whose result every block of the denoiser attends to."""

    def __init__(self, encoder: int = 6, denoiser: int = 5, width: int = WIDTH) -> None:
        super().__init__()
        self.embed, self.project = nn.Linear(width, width), nn.Linear(width, width)
        self.encoder = nn.ModuleList(_Plain(width) for _ in range(encoder))
        self.blocks = nn.ModuleList(CrossBlock(width) for _ in range(denoiser))

    def forward(self, x: Tensor, t: Tensor, reference: Tensor) -> Tensor:
        temb, x = time_embedding(t), self.embed(x)
        for block in self.encoder:
            reference = block(reference)
        for block in self.blocks:
            x = block(x, temb, reference)
        return self.project(x)
