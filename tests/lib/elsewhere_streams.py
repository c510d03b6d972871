"""Shapes of blocks that public code has outside diffusers, 1 to 5: streams, skips, containers, functional blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lib.models import (
    WIDTH,
    Toy,
    UShaped,
    _Plain,
    time_embedding,
)
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# 1. FLUX as its authors wrote it
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Modulated:
    """What one modulation layer hands to one half of a block."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (1 + self.scale) * F.layer_norm(x, x.shape[-1:]) + self.shift


class Modulation(nn.Module):
    def __init__(self, width: int, double: bool) -> None:
        super().__init__()
        self.parts = 6 if double else 3
        self.lin = nn.Linear(width, self.parts * width)

    def forward(self, vec: Tensor) -> tuple[Modulated, Modulated | None]:
        out = self.lin(F.silu(vec))[:, None, :].chunk(self.parts, dim=-1)
        return Modulated(*out[:3]), Modulated(*out[3:]) if self.parts == 6 else None


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    """Rotary embedding by 2x2 matrices, (tokens, width / 2, 2, 2)."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).reshape(x.shape).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(rotate(q, pe), rotate(k, pe), v)
    return out.transpose(1, 2).flatten(2)


def heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


class DoubleStreamBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(width, True), Modulation(width, True)
        self.img_qkv, self.txt_qkv = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.img_proj, self.txt_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.img_mlp, self.txt_mlp = (
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))
            for _ in range(2)
        )

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)
        img_q, img_k, img_v = heads(self.img_qkv(img_mod1(img)))
        txt_q, txt_k, txt_v = heads(self.txt_qkv(txt_mod1(txt)))
        q, k, v = (torch.cat(pair, dim=2) for pair in ((txt_q, img_q), (txt_k, img_k), (txt_v, img_v)))
        attn = attend(q, k, v, pe)
        txt_attn, img_attn = attn[:, : txt.shape[1]], attn[:, txt.shape[1] :]
        img = img + img_mod1.gate * self.img_proj(img_attn)
        img = img + img_mod2.gate * self.img_mlp(img_mod2(img))
        txt = txt + txt_mod1.gate * self.txt_proj(txt_attn)
        txt = txt + txt_mod2.gate * self.txt_mlp(txt_mod2(txt))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and feed-forward side by side, between one linear layer in and one out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear1, self.linear2 = nn.Linear(width, 5 * width), nn.Linear(3 * width, width)
        self.modulation = Modulation(width, False)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        mod, _ = self.modulation(vec)
        qkv, mlp = torch.split(self.linear1(mod(x)), [3 * self.width, 2 * self.width], dim=-1)
        attn = attend(*heads(qkv), pe)
        return x + mod.gate * self.linear2(torch.cat((attn, F.gelu(mlp, approximate="tanh")), 2))


class Flux(nn.Module):
    """Both streams are concatenated between the loops, and the image is sliced off behind them."""

    def __init__(self, double: int = 4, single: int = 5, width: int = WIDTH) -> None:
        super().__init__()
        self.img_in, self.txt_in, self.vector_in = (nn.Linear(width, width) for _ in range(3))
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(width) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(width) for _ in range(single))
        self.final_mod, self.final = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def embed_positions(self, tokens: int, text: int) -> Tensor:
        places = torch.cat([torch.zeros(text), torch.arange(tokens).float()])
        angles = places[:, None] / 10 ** (torch.arange(WIDTH // 4) / 2)
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))

    def forward(self, img: Tensor, timesteps: Tensor, txt: Tensor) -> Tensor:
        vec = self.vector_in(time_embedding(timesteps)) + txt.mean(1)
        img, txt = self.img_in(img), self.txt_in(txt)
        pe = self.embed_positions(img.shape[1], txt.shape[1])
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        img = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=pe)
        img = img[:, txt.shape[1] :, ...]
        shift, scale = self.final_mod(F.silu(vec)).chunk(2, dim=1)
        return self.final((1 + scale[:, None, :]) * F.layer_norm(img, img.shape[-1:]) + shift[:, None, :])


# ---------------------------------------------------------------------------------------------------------------------
# 2. DiT with a class label
# ---------------------------------------------------------------------------------------------------------------------


class ZeroBlock(nn.Module):
    """adaLN-zero: six vectors modulate both halves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = _Plain(width).attn
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(self.norm1(x) * (1 + scale_a.unsqueeze(1)) + shift_a.unsqueeze(1))
        return x + gate_m.unsqueeze(1) * self.mlp(self.norm2(x) * (1 + scale_m.unsqueeze(1)) + shift_m.unsqueeze(1))


class DiT(nn.Module):
    """Patches of a picture, a label; noise and variance come out."""

    pos_embed: Tensor

    def __init__(self, depth: int = 5, width: int = WIDTH) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(4, width, 2, stride=2)
        self.t_embedder = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(11, width)
        self.register_buffer("pos_embed", torch.randn(1, 64, width))
        self.blocks = nn.ModuleList(ZeroBlock(width) for _ in range(depth))
        self.final_modulation, self.final = nn.Linear(width, 2 * width), nn.Linear(width, 2 * 2 * 8)

    def unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x.reshape(x.shape[0], height, width, 2, 2, 8)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], 8, height * 2, width * 2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x)
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        x = x + self.pos_embed[:, : x.shape[1]]
        c = self.t_embedder(time_embedding(t)) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_modulation(F.silu(c)).chunk(2, dim=1)
        x = self.final(F.layer_norm(x, x.shape[-1:]) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))
        return self.unpatchify(x, height, width)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Skips across the chain
# ---------------------------------------------------------------------------------------------------------------------


class HunyuanDiT(UShaped):
    """Projections around blocks of which the second half takes what the first half made."""

    def __init__(self, num_blocks: int = 8) -> None:
        super().__init__(num_blocks)
        self.embed, self.project = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.project(super().forward(self.embed(hidden_states), timestep))


class LongSkip(nn.Module):
    """A pre-norm block; with `skip` it takes another stream beside its own."""

    def __init__(self, width: int, skip: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _Plain(width).attn
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """The time is a token; half of the blocks, one in the middle, and half that take what the first half made."""

    def __init__(self, half: int = 4, width: int = WIDTH) -> None:
        super().__init__()
        self.patch_embed, self.time_embed = nn.Linear(width, width), nn.Linear(width, width)
        self.in_blocks = nn.ModuleList(LongSkip(width) for _ in range(half))
        self.mid_block = LongSkip(width)
        self.out_blocks = nn.ModuleList(LongSkip(width, skip=True) for _ in range(half))
        self.norm, self.decoder_pred = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        x = self.patch_embed(x)
        length = x.shape[1]
        x = torch.cat((self.time_embed(time_embedding(timesteps)).unsqueeze(1), x), dim=1)
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))
        return x[:, x.shape[1] - length :, :]


# ---------------------------------------------------------------------------------------------------------------------
# 4. Where blocks are kept
# ---------------------------------------------------------------------------------------------------------------------


class Listed(Toy):
    """Blocks in a plain list that no container sees, registered under `names`, or not at all."""

    def __init__(self, names: Sequence[str | None] = ("alpha", "beta", "gamma", "delta", "epsilon")) -> None:
        super().__init__(len(names), container=list)
        for name, block in zip(names, self.blocks, strict=True):
            if name is not None:
                self.add_module(name, block)


class Worded(Toy):
    """A ModuleDict whose keys count nothing."""

    def __init__(self, names: Sequence[str] = ("first", "second", "third", "fourth")) -> None:
        super().__init__(len(names), container=lambda blocks: nn.ModuleDict(dict(zip(names, blocks, strict=True))))

    def members(self) -> Sequence[nn.Module]:
        return list(self.blocks.values())


# ---------------------------------------------------------------------------------------------------------------------
# 5. One block, many weights
# ---------------------------------------------------------------------------------------------------------------------


def functional_block(x: Tensor, temb: Tensor, qkv: Tensor, out: Tensor, up: Tensor, down: Tensor) -> Tensor:
    q, k, v = F.linear(F.layer_norm(x, x.shape[-1:]) + temb[:, None], qkv).chunk(3, dim=-1)
    x = x + F.linear(F.scaled_dot_product_attention(q, k, v), out)
    return x + F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:]), up)), down)


class Stacked(nn.Module):
    """The weights of all blocks in one tensor for each layer, (blocks, ...)."""

    def __init__(self, num_blocks: int = 5, width: int = WIDTH) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.embed, self.project = nn.Linear(width, width), nn.Linear(width, width)
        self.qkv, self.out, self.up, self.down = (
            nn.Parameter(torch.randn(num_blocks, *shape) / math.sqrt(shape[1]))
            for shape in ((3 * width, width), (width, width), (2 * width, width), (width, 2 * width))
        )

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x, temb = self.embed(hidden_states), time_embedding(timestep)
        for i in range(self.num_blocks):
            x = functional_block(x, temb, self.qkv[i], self.out[i], self.up[i], self.down[i])
        return self.project(x)
