"""Models as they are written outside diffusers, made tiny: each is one shape of denoiser that exists in public code.

`MODELS` is the table: how to make one, what to call it with, and, counted by hand, which blocks make up its chain. A
model is called as `model(*arguments)`, the sample first and the timestep second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lib.models import (
    WIDTH,
    Block,
    Controlled,
    InDict,
    JointBlock,
    LastDiffers,
    Numbered,
    Refined,
    Shared,
    Toy,
    UShaped,
    _Plain,
    time_embedding,
)
from lib.models import TwoLoops as ImageOnly
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


# ---------------------------------------------------------------------------------------------------------------------
# Near misses
# ---------------------------------------------------------------------------------------------------------------------


class ParallelExperts(nn.Module):
    """Blocks that all read the same stream, summed: none takes what another made."""

    def __init__(self, experts: int = 5, width: int = WIDTH) -> None:
        super().__init__()
        self.embed, self.project = nn.Linear(width, width), nn.Linear(width, width)
        self.experts = nn.ModuleList(Block(width) for _ in range(experts))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        temb, x = time_embedding(timestep), self.embed(hidden_states)
        return self.project(sum(expert(x, temb) for expert in self.experts))


class AccumulatingExperts(ParallelExperts):
    """The same, added to a stream one behind the other."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        temb, x = time_embedding(timestep), self.embed(hidden_states)
        total = x
        for expert in self.experts:
            total = total + expert(x, temb)
        return self.project(total)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

Turn = Any
"""What runs in one block, to be counted on the plain model: a module, a function of this file, or a tuple of them."""


class Arguments(NamedTuple):
    """How `tokens` shapes a call."""

    sample: Callable[[int], Tensor]
    others: Callable[[int], tuple[Any, ...]] = lambda tokens: ()


def stream(tokens: int) -> Tensor:
    return torch.randn(1, tokens, WIDTH)


def residuals(number: int) -> Callable[[int], tuple[Any, ...]]:
    return lambda tokens: ([stream(tokens) for _ in range(number)],)


TOKENS = Arguments(stream)
WITH_TEXT = Arguments(stream, lambda tokens: (stream(5),))
WITH_CONTROL = Arguments(stream, lambda tokens: (stream(tokens),))


@dataclass(frozen=True)
class Elsewhere:
    """A row: a model, its arguments, and for each loop of its chain what runs in each of its blocks.

    `beside` names what need not run where the blocks in the middle are bypassed, but is no block of the chain.
    """

    make: Callable[[], nn.Module]
    loops: Callable[[Any], Sequence[Sequence[Turn]]]
    blocks: int
    arguments: Arguments = TOKENS
    tokens: tuple[int, int] = (6, 9)
    beside: Callable[[Any], Sequence[nn.Module]] = field(default=lambda model: ())
    bare: Callable[[Any], Sequence[Sequence[Turn]]] | None = None
    """What the loops are to one who sees no names, where that differs: what repeats may be several blocks."""


def one_loop(name: str = "blocks") -> Callable[[Any], Sequence[Sequence[Turn]]]:
    return lambda model: [list(getattr(model, name))]


def members(model: Any) -> Sequence[Sequence[Turn]]:
    return [model.members()]


def pairs(model: Any) -> Sequence[Sequence[Turn]]:
    return [list(zip(model.blocks[::2], model.blocks[1::2], strict=True))]


def both(first: str, second: str) -> Callable[[Any], Sequence[Sequence[Turn]]]:
    return lambda model: [list(getattr(model, first)), list(getattr(model, second))]


MODELS: dict[str, Elsewhere] = {
    "flux": Elsewhere(Flux, both("double_blocks", "single_blocks"), 4 + 5, WITH_TEXT),
    "flux_image_only": Elsewhere(
        lambda: ImageOnly(4, 5, style="image"), both("double_blocks", "single_blocks"), 4 + 5, WITH_TEXT
    ),
    "dit": Elsewhere(
        DiT,
        one_loop(),
        5,
        Arguments(lambda size: torch.randn(1, 4, size, size), lambda size: (torch.tensor([3]),)),
        tokens=(6, 8),
    ),
    "hunyuan_dit": Elsewhere(HunyuanDiT, one_loop(), 8),
    "u_vit": Elsewhere(UViT, lambda m: [[*m.in_blocks, m.mid_block], list(m.out_blocks)], 4 + 1 + 4),
    "numbered": Elsewhere(lambda: Numbered(5, "block_{}"), members, 5),
    "numbered_in_the_middle": Elsewhere(lambda: Numbered(5, "layer{}_dit"), members, 5),
    "module_dict": Elsewhere(lambda: InDict(5), members, 5),
    "module_dict_of_words": Elsewhere(Worded, members, 4),
    "list_added_by_other_names": Elsewhere(Listed, one_loop(), 5),
    "list_unregistered": Elsewhere(lambda: Listed([None] * 5), one_loop(), 5),
    "stacked": Elsewhere(Stacked, lambda model: [[functional_block] * 5], 5),
    "shared": Elsewhere(lambda: Shared(5), members, 5),
    "tuples": Elsewhere(
        lambda: Wrapped(lambda t, x: (x, (t, None)), lambda y: (y[1][0], y[0])), one_loop(), 5, WITH_TEXT
    ),
    "dicts": Elsewhere(
        lambda: Wrapped(lambda t, x: {"hidden": x, "text": t}, lambda y: (y["text"], y["hidden"])),
        one_loop(),
        5,
        WITH_TEXT,
    ),
    "dataclasses": Elsewhere(
        lambda: Wrapped(lambda t, x: BlockOutput(x, t), lambda y: (y.text, y.hidden)), one_loop(), 5, WITH_TEXT
    ),
    "controlnet": Elsewhere(lambda: Controlled(5), one_loop(), 5, Arguments(stream, residuals(5))),
    "controlnet_interval": Elsewhere(Sparse, one_loop(), 6, Arguments(stream, residuals(3))),
    "controlnet_every_second": Elsewhere(Every, one_loop(), 6, Arguments(stream, residuals(3)), bare=pairs),
    "text_refiner": Elsewhere(lambda: Refined(8, 2), one_loop(), 8, WITH_TEXT),
    "two_refiners": Elsewhere(TwoRefiners, one_loop("layers"), 12, WITH_TEXT),
    "vace_ahead": Elsewhere(lambda: VACE(ahead=True), one_loop(), 8, WITH_CONTROL, bare=pairs),
    "vace_interleaved": Elsewhere(
        lambda: VACE(ahead=False),
        one_loop(),
        8,
        WITH_CONTROL,
        beside=lambda m: list(m.vace_blocks),
        bare=lambda m: [list(zip(m.vace_blocks, m.blocks[::2], m.blocks[1::2], strict=True))],
    ),
    "spatial_temporal": Elsewhere(
        SpatialTemporal,
        lambda m: [list(zip(m.spatial_blocks, m.temporal_blocks, strict=True))],
        5,
        Arguments(lambda tokens: torch.randn(1, 3, tokens, WIDTH)),
    ),
    "experts_dense": Elsewhere(lambda: Mixture(DenseExperts), one_loop(), 5),
    "experts_routed": Elsewhere(lambda: Mixture(RoutedExperts), one_loop(), 5),
    "in_place_operator": Elsewhere(lambda: Writing("iadd"), one_loop(), 5),
    "in_place_method": Elsewhere(lambda: Writing("add_"), one_loop(), 5),
    "in_place_addcmul": Elsewhere(lambda: Writing("addcmul_"), one_loop(), 5),
    "in_place_part": Elsewhere(lambda: Writing("part"), one_loop(), 5),
    "in_place_assigned": Elsewhere(lambda: Writing("assigned"), one_loop(), 5),
    "in_place_residuals": Elsewhere(
        WrittenResiduals, one_loop(), 5, Arguments(stream, lambda n: (stream(5), *residuals(5)(n)))
    ),
    "replacing": Elsewhere(Replacing, one_loop(), 5),
    "last_drops_text": Elsewhere(DroppingLast, one_loop(), 5, WITH_TEXT),
    "last_is_larger": Elsewhere(
        LargerLast,
        one_loop(),
        5,
        bare=lambda m: [[*m.blocks[:4], (m.blocks[4].modulation, m.blocks[4].attn, *m.blocks[4].ff)]],
    ),
    "bridged": Elsewhere(Bridged, both("first_blocks", "second_blocks"), 4 + 5, beside=lambda model: [model.bridge]),
    "conditioned": Elsewhere(Conditioned, one_loop(), 5, WITH_CONTROL),
}


def make(name: str) -> nn.Module:
    """The model of a row, the same weights each time."""
    torch.manual_seed(0)
    return MODELS[name].make().eval()


def arguments(name: str, timestep: float = 500.0, larger: bool = False) -> tuple[Any, ...]:
    """Arguments of one call, the same each time; `larger` makes more tokens of them."""
    torch.manual_seed(1)
    row = MODELS[name]
    tokens = row.tokens[larger]
    return row.arguments.sample(tokens), torch.tensor([timestep]), *row.arguments.others(tokens)
