"""Small models for the tests: toys that each show one shape of block loop, and diffusers' own classes made tiny.

A toy is called as `toy(hidden_states, timestep)` unless it says otherwise; `inputs()` makes these.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 16


def inputs(batch: int = 1, tokens: int = 6, width: int = WIDTH, timestep: float = 500.0) -> tuple[Tensor, Tensor]:
    """(hidden_states, timestep) for a toy."""
    return torch.randn(batch, tokens, width), torch.full((batch,), timestep)


def time_embedding(timestep: Tensor, width: int = WIDTH) -> Tensor:
    """The usual sinusoids."""
    frequencies = torch.exp(-torch.arange(width // 2, device=timestep.device) * (9.0 / width))
    angles = timestep[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Attention(nn.Module):
    """Self-attention over all tokens, two heads."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A DiT block: modulated attention and a feed-forward list, both added to the stream."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulation = nn.Linear(width, 3 * width)
        self.attn = Attention(width)
        self.ff = nn.ModuleList([nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)])

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(temb))[:, None].chunk(3, dim=-1)
        x = x + gate * self.attn(self.norm(x) * (1 + scale) + shift)
        y = self.norm(x)
        for layer in self.ff:
            y = layer(y)
        return x + y


class JointBlock(nn.Module):
    """Two streams, text and image, attended together. Returns (text, hidden), or hidden alone where `last`."""

    def __init__(self, width: int = WIDTH, last: bool = False) -> None:
        super().__init__()
        self.norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.ff = Attention(width), nn.Linear(width, width)
        self.text_ff = None if last else nn.Linear(width, width)

    def forward(self, hidden: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor | None, Tensor]:
        length = text.shape[1]
        joint = torch.cat([self.text_norm(text), self.norm(hidden)], dim=1) + temb[:, None]
        joint = self.attn(joint)
        hidden = hidden + joint[:, length:]
        hidden = hidden + self.ff(hidden)
        if self.text_ff is None:
            return None, hidden
        text = text + joint[:, :length]
        return text + self.text_ff(text), hidden


class Toy(nn.Module):
    """Embed, run the blocks of a container, project. `container` puts the blocks where the names are to be."""

    def __init__(self, num_blocks: int = 4, width: int = WIDTH, container: Callable[..., Any] = nn.ModuleList) -> None:
        super().__init__()
        self.embed, self.project = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = container([self.make_block(index, width) for index in range(num_blocks)])

    def make_block(self, index: int, width: int) -> nn.Module:
        return Block(width)

    def members(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        temb = time_embedding(timestep, hidden_states.shape[-1])
        x = self.embed(hidden_states)
        for block in self.members():
            x = block(x, temb)
        return self.project(x)


class InDict(Toy):
    """Blocks in a ModuleDict whose keys end in a number."""

    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__(num_blocks, container=lambda blocks: nn.ModuleDict({f"b{i}": b for i, b in enumerate(blocks)}))

    def members(self) -> Sequence[nn.Module]:
        return list(self.blocks.values())


class InSequential(nn.Module):
    """Blocks called by a Sequential, with nothing but the stream."""

    def __init__(self, num_blocks: int = 4, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Plain(width) for _ in range(num_blocks)))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.blocks(hidden_states + time_embedding(timestep)[:, None])


class _Plain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), Attention(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


class Numbered(Toy):
    """Blocks as attributes that end in a number."""

    def __init__(self, num_blocks: int = 4, pattern: str = "block{}") -> None:
        super().__init__(num_blocks, container=list)
        blocks, self.names = self.blocks, [pattern.format(index) for index in range(num_blocks)]
        for name, block in zip(self.names, blocks, strict=True):
            setattr(self, name, block)
        del self.blocks

    def members(self) -> Sequence[nn.Module]:
        return [getattr(self, name) for name in self.names]


class Shared(Toy):
    """One block, called `num_calls` times."""

    def __init__(self, num_calls: int = 4) -> None:
        super().__init__(1)
        self.num_calls = num_calls

    def members(self) -> Sequence[nn.Module]:
        return [self.blocks[0]] * self.num_calls


class TwoLoops(nn.Module):
    """Joint blocks, then single blocks, with the streams of FLUX.

    `style` says where text and image meet: "authors" concatenates them between the loops and slices after (FLUX as
    its authors wrote it), "image" goes on with the image stream alone, without any glue.
    """

    def __init__(self, joint: int = 3, single: int = 4, width: int = WIDTH, style: str = "authors") -> None:
        super().__init__()
        self.style = style
        self.embed, self.text_embed, self.project = (nn.Linear(width, width) for _ in range(3))
        self.double_blocks = nn.ModuleList(JointBlock(width) for _ in range(joint))
        self.single_blocks = nn.ModuleList(Block(width) for _ in range(single))

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        temb = time_embedding(timestep, hidden_states.shape[-1])
        x, text = self.embed(hidden_states), self.text_embed(text)
        for block in self.double_blocks:
            text, x = block(x, text, temb)
        if self.style == "authors":
            x = torch.cat((text, x), 1)
        for block in self.single_blocks:
            x = block(x, temb)
        if self.style == "authors":
            x = x[:, text.shape[1] :]
        return self.project(x)


class LastDiffers(nn.Module):
    """Joint blocks of which the last drops the text stream."""

    def __init__(self, num_blocks: int = 4, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(JointBlock(width, last=i == num_blocks - 1) for i in range(num_blocks))

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        temb = time_embedding(timestep, hidden_states.shape[-1])
        for block in self.blocks:
            text, hidden_states = block(hidden_states, text, temb)
        return hidden_states


class Refined(Toy):
    """Small refiners ahead of the blocks, on a text stream that then joins the image stream."""

    def __init__(self, num_blocks: int = 8, num_refiners: int = 2, width: int = WIDTH) -> None:
        super().__init__(num_blocks, width)
        self.refiners = nn.ModuleList(_Plain(width) for _ in range(num_refiners))

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        for block in self.refiners:
            text = block(text)
        joint = super().forward(torch.cat([text, hidden_states], dim=1), timestep)
        return joint[:, text.shape[1] :]


class Parallel(nn.Module):
    """Text and image each run through blocks of their own, side by side, and meet in the blocks behind them."""

    def __init__(self, num_blocks: int = 3, single: int = 4, width: int = WIDTH, text_first: bool = True) -> None:
        super().__init__()
        self.text_first = text_first
        self.text_blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.image_blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.single_blocks = nn.ModuleList(Block(width) for _ in range(single))

    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        temb, x, length = time_embedding(timestep, hidden_states.shape[-1]), hidden_states, text.shape[1]
        if self.text_first:
            for block in self.text_blocks:
                text = block(text, temb)
        for block in self.image_blocks:
            x = block(x, temb)
        if not self.text_first:
            for block in self.text_blocks:
                text = block(text, temb)
        x = torch.cat([text, x], dim=1)
        for block in self.single_blocks:
            x = block(x, temb)
        return x[:, length:]


class Controlled(Toy):
    """A residual of its own is added behind each block, as ControlNets have it."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, timestep: Tensor, residuals: Sequence[Tensor]
    ) -> Tensor:
        temb = time_embedding(timestep)
        x = self.embed(hidden_states)
        for block, residual in zip(self.blocks, residuals, strict=True):
            x = block(x, temb) + residual
        return self.project(x)


class UShaped(nn.Module):
    """HunyuanDiT: what block i makes enters block N-1-i again."""

    def __init__(self, num_blocks: int = 7, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Skipping(width, i > num_blocks // 2) for i in range(num_blocks))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        temb = time_embedding(timestep)
        skips: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            late = index > len(self.blocks) // 2
            hidden_states = block(hidden_states, temb, skips.pop() if late else None)
            if index < (len(self.blocks) - 1) // 2:
                skips.append(hidden_states)
        return hidden_states


class _Skipping(Block):
    def __init__(self, width: int, skip: bool) -> None:
        super().__init__(width)
        self.skip = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, temb: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip is not None and skip is not None:
            x = self.skip(torch.cat([x, skip], dim=-1))
        return super().forward(x, temb)


class InPlace(Toy):
    """Blocks that add to their input in place."""

    def make_block(self, index: int, width: int) -> nn.Module:
        return _AddsInPlace(width)


class _AddsInPlace(Block):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x += self.attn(self.norm(x)) + temb[:, None]
        return x.add_(self.ff[2](F.gelu(self.ff[0](self.norm(x)))))


def functional(weights: Sequence[tuple[Tensor, ...]], x: Tensor, temb: Tensor) -> Tensor:
    """The blocks as plain functions over a list of weights (qkv, out, up, down)."""
    for qkv, out, up, down in weights:
        q, k, v = F.linear(F.layer_norm(x, x.shape[-1:]) + temb[:, None], qkv).chunk(3, dim=-1)
        x = x + F.linear(F.scaled_dot_product_attention(q, k, v), out)
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:]), up)), down)
    return x


def functional_weights(num_blocks: int = 4, width: int = WIDTH) -> list[tuple[Tensor, ...]]:
    shapes = ((3 * width, width), (width, width), (2 * width, width), (width, 2 * width))
    return [tuple(torch.randn(shape) / shape[1] ** 0.5 for shape in shapes) for _ in range(num_blocks)]


# ---------------------------------------------------------------------------------------------------------------------
# diffusers' classes: the zoo's (tests/lib/zoo), with weights as diffusers starts them and inputs that differ each time
# ---------------------------------------------------------------------------------------------------------------------

Case = tuple[nn.Module, dict[str, Any]]


def _case(file: str, name: str, **changes: Any) -> Case:
    """An entry of the zoo, which is imported when first needed: diffusers takes seconds."""
    make = getattr(importlib.import_module(f"lib.zoo.{file}"), name)
    module, inputs = inspect.unwrap(make)(**changes)
    return module, inputs(1) | {"return_dict": False}


def flux(double: int = 3, single: int = 4, batch: int = 1, tokens: int = 16, text: int = 6) -> Case:
    model, _ = _case(
        "images_joint", "FluxTransformer2DModel", num_layers=double, num_single_layers=single, guidance_embeds=False
    )
    return model, flux_inputs(batch, tokens, text)


def flux_inputs(batch: int = 1, tokens: int = 16, text: int = 6, timestep: float = 0.5) -> dict[str, Any]:
    from lib.zoo.base import packed

    return packed(1, tokens, batch, text) | {
        "pooled_projections": torch.randn(batch, 10),
        "timestep": torch.full((batch,), timestep),
        "return_dict": False,
    }


def sd3(num_layers: int = 4) -> Case:
    return _case("images_joint", "SD3Transformer2DModel", num_layers=num_layers, dual_attention_layers=())


def qwen_image(num_layers: int = 4) -> Case:
    return _case("images_joint", "QwenImageTransformer2DModel", num_layers=num_layers)


def wan(num_layers: int = 4) -> Case:
    return _case("videos_wan", "WanTransformer3DModel", num_layers=num_layers, image=False)


def pixart(num_layers: int = 4) -> Case:
    return _case("images", "PixArtTransformer2DModel", num_layers=num_layers)


def sana(num_layers: int = 4) -> Case:
    return _case("images", "SanaTransformer2DModel", num_layers=num_layers, guidance_embeds=False)


def cogvideox(num_layers: int = 4) -> Case:
    return _case("videos", "CogVideoXTransformer3DModel", num_layers=num_layers)


def ltx(num_layers: int = 4) -> Case:
    return _case("videos", "LTXVideoTransformer3DModel", num_layers=num_layers)


def hunyuan_dit(num_layers: int = 8) -> Case:
    return _case("images", "HunyuanDiT2DModel", num_layers=num_layers)
