"""A FLUX of any depth with random weights: what start-up and overhead are measured on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Size(NamedTuple):
    """Of the model and its inputs. The defaults are the 6 + 12 blocks that the project's anchors were measured on."""

    double: int = 6
    single: int = 12
    width: int = 192
    side: int = 12
    """Image tokens a side."""
    head: int = 64
    """Channels of an attention head."""
    text: int = 16
    """Text tokens."""

    @property
    def blocks(self) -> int:
        return self.double + self.single


STEP = 2**-10
"""By which the timestep falls from call to call."""


def size_of(blocks: int, **more: int) -> Size:
    """A third of the blocks double-stream, as in FLUX.1 (19 of 57)."""
    return Size(blocks // 3, blocks - blocks // 3, **more)


def make(size: Size) -> torch.nn.Module:
    """The model, in float32 on the CPU, the same weights every time."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=size.double,
        num_single_layers=size.single,
        attention_head_dim=size.head,
        num_attention_heads=size.width // size.head,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=False,
        axes_dims_rope=(16, (size.head - 16) // 2, (size.head - 16) // 2),
    ).eval()


def inputs_in(dtype: torch.dtype, size: Size, step: int = 0) -> dict[str, Any]:
    """Arguments of one call as `inputs` has them, all tensors but the timestep in this dtype."""
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and name != "timestep" else value
        for name, value in inputs(size, step).items()
    }


def inputs(size: Size, step: int = 0) -> dict[str, Any]:
    """Arguments of one call: batch 1, `side` squared image tokens, `text` text tokens."""
    tokens = size.side**2
    return {
        "hidden_states": torch.randn(1, tokens, 16),
        "encoder_hidden_states": torch.randn(1, size.text, 64),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1 - step * STEP]),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(size.text, 3),
        "return_dict": False,
    }
