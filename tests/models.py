"""Small models for the tests: toys that each show one shape of block loop, and diffusers' own classes made tiny.

A toy is called as `toy(hidden_states, timestep)` unless it says otherwise; `inputs()` makes these.
"""

from __future__ import annotations

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
    frequencies = torch.exp(-torch.arange(width // 2) * (9.0 / width))
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
# diffusers' classes, tiny
# ---------------------------------------------------------------------------------------------------------------------

Case = tuple[nn.Module, dict[str, Any]]


def flux(double: int = 3, single: int = 4, batch: int = 1, tokens: int = 16, text: int = 6) -> Case:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    return model, flux_inputs(batch, tokens, text)


def flux_inputs(batch: int = 1, tokens: int = 16, text: int = 6, timestep: float = 0.5) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, tokens, 8),
        "encoder_hidden_states": torch.randn(batch, text, 12),
        "pooled_projections": torch.randn(batch, 10),
        "timestep": torch.full((batch,), timestep),
        "img_ids": torch.arange(tokens)[:, None].float().repeat(1, 3),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def sd3(num_layers: int = 4) -> Case:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=num_layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()
    return model, {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "pooled_projections": torch.randn(1, 10),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }


def qwen_image(num_layers: int = 4) -> Case:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    return model, {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.bool),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
        "return_dict": False,
    }


def wan(num_layers: int = 4) -> Case:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=num_layers,
        rope_max_seq_len=32,
    ).eval()
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "return_dict": False,
    }


def pixart(num_layers: int = 4) -> Case:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=num_layers,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
        patch_size=2,
        norm_num_groups=1,
        use_additional_conditions=False,
    ).eval()
    return model, {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def sana(num_layers: int = 4) -> Case:
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=num_layers,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
    ).eval()
    return model, {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }


def cogvideox(num_layers: int = 4) -> Case:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=num_layers,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=5,
    ).eval()
    return model, {
        "hidden_states": torch.randn(1, 2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }


def ltx(num_layers: int = 4) -> Case:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=num_layers,
        caption_channels=12,
    ).eval()
    return model, {
        "hidden_states": torch.randn(1, 2 * 4 * 4, 8),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "return_dict": False,
    }


def hunyuan_dit(num_layers: int = 8) -> Case:
    from diffusers import HunyuanDiT2DModel

    model = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=num_layers,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        text_len=4,
        text_len_t5=4,
        activation_fn="gelu-approximate",
    ).eval()
    return model, {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 4, 8),
        "text_embedding_mask": torch.ones(1, 4),
        "encoder_hidden_states_t5": torch.randn(1, 4, 8),
        "text_embedding_mask_t5": torch.ones(1, 4),
        "image_meta_size": torch.randint(0, 10, (1, 6)).float(),
        "style": torch.zeros(1, dtype=torch.long),
        "image_rotary_emb": (torch.randn(16, 8), torch.randn(16, 8)),
        "return_dict": False,
    }
