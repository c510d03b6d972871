"""Wan and what came of it."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch
from diffusers.models.transformers import transformer_wan_animate_2
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from .base import Case, at, entry, noise, patches, sides, tiny

WIDTH = 24
TEXT, IMAGE = 512, 5
"""Tokens. Blocks that see an image take all but the last 512 for it, whatever the text's length."""


def _wan(name: str, num_layers: int = 4, **config: Any) -> nn.Module:
    return tiny(
        name,
        num_attention_heads=2,
        attention_head_dim=12,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=num_layers,
        **{"in_channels": 4} | config,
    )


@entry(blocks=4)
def WanTransformer3DModel(num_layers: int = 4, image: bool = True) -> Case:
    """As Wan 2.1 image-to-video: latents, mask and first frame as channels, the first frame's embedding attended to."""
    given = {"in_channels": 12, "image_dim": 10, "added_kv_proj_dim": WIDTH} if image else {}
    module = _wan("WanTransformer3DModel", num_layers, rope_max_seq_len=32, **given)

    def inputs(size: int) -> dict[str, Any]:
        seen = {"encoder_hidden_states_image": noise(1, IMAGE, 10)} if image else {}
        return seen | {
            "hidden_states": noise(1, 12 if image else 4, 2, *sides(size)),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": noise(1, TEXT if image else 6, 16),
        }

    return module, inputs


@entry(blocks=8)
def WanVACETransformer3DModel() -> Case:
    module = _wan("WanVACETransformer3DModel", 8, rope_max_seq_len=32, vace_layers=[0, 2, 4, 6], vace_in_channels=12)

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, 2, *sides(size)),
            "timestep": at(),
            "encoder_hidden_states": noise(1, 6, 16),
            "control_hidden_states": noise(1, 12, 2, *sides(size)),
        }

    return module, inputs


@entry(blocks=4)
def SkyReelsV2Transformer3DModel() -> Case:
    """As its diffusion forcing: every frame has a timestep of its own."""
    module = _wan("SkyReelsV2Transformer3DModel", rope_max_seq_len=32, inject_sample_info=True)

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, 2, *sides(size)),
            "timestep": torch.tensor([[400, 500]]),
            "encoder_hidden_states": noise(1, 6, 16),
            "enable_diffusion_forcing": True,
            "fps": [1],
        }

    return module, inputs


@entry(blocks=4)
def ChronoEditTransformer3DModel() -> Case:
    module = _wan(
        "ChronoEditTransformer3DModel", rope_max_seq_len=32, in_channels=12, image_dim=10, added_kv_proj_dim=WIDTH
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 12, 2, *sides(size)),
            "timestep": at(),
            "encoder_hidden_states": noise(1, TEXT, 16),
            "encoder_hidden_states_image": noise(1, IMAGE, 10),
        }

    return module, inputs


@entry(blocks=4)
def AnyFlowTransformer3DModel() -> Case:
    module = _wan("AnyFlowTransformer3DModel", rope_max_seq_len=32)

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 2, 4, *sides(size)),
            "timestep": torch.full((1, 2), 500.0),
            "r_timestep": torch.full((1, 2), 100.0),
            "encoder_hidden_states": noise(1, 6, 16),
        }

    return module, inputs


@entry(blocks=4)
def AnyFlowFARTransformer3DModel() -> Case:
    """A chunk of frames, which attends to what earlier chunks left in the cache."""
    module = _wan("AnyFlowFARTransformer3DModel", rope_max_seq_len=32, full_chunk_limit=3, chunk_partition=(1, 2, 2))

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        return {
            "hidden_states": noise(1, 2, 4, *sides(size)),
            "timestep": torch.full((1, 2), 500.0),
            "r_timestep": torch.full((1, 2), 100.0),
            "encoder_hidden_states": noise(1, 6, 16),
            "chunk_partition": [1, 2, 2],
            "kv_cache": [
                {
                    "compressed_cache": noise(2, 1, 2, height * width // 4, 12),
                    "full_cache": noise(2, 1, 2, 3 * height * width, 12),
                }
                for _ in range(4)
            ],
            "kv_cache_flag": {"num_cached_chunks": 2, "is_cache_step": False},
        }

    return module, inputs


@entry(blocks=4)
def HeliosTransformer3DModel() -> Case:
    """Two frames to make, and a history of nearer and farther ones ahead of them in the sequence."""
    module = _wan("HeliosTransformer3DModel", rope_dim=(4, 4, 4))

    def inputs(size: int) -> dict[str, Any]:
        frames = torch.arange(10)[None]
        return {
            "hidden_states": noise(1, 4, 2, *sides(size)),
            "timestep": at(),
            "encoder_hidden_states": noise(1, 6, 16),
            "indices_hidden_states": frames[:, 8:],
            "indices_latents_history_short": frames[:, [0, 7]],
            "indices_latents_history_mid": frames[:, 5:7],
            "indices_latents_history_long": frames[:, 1:5],
            "latents_history_short": noise(1, 4, 2, *sides(size)),
            "latents_history_mid": noise(1, 4, 2, *sides(size)),
            "latents_history_long": noise(1, 4, 4, *sides(size)),
        }

    return module, inputs


@entry(blocks=8)
def WanAnimateTransformer3DModel() -> Case:
    """After some of the blocks the motion of a face is attended to."""
    module = _wan(
        "WanAnimateTransformer3DModel",
        8,
        in_channels=12,
        latent_channels=4,
        image_dim=10,
        added_kv_proj_dim=WIDTH,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=4,
        motion_encoder_batch_size=4,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 12, 3, *sides(size)),
            "timestep": at(),
            "encoder_hidden_states": noise(1, TEXT, 16),
            "encoder_hidden_states_image": noise(1, IMAGE, 10),
            "pose_hidden_states": noise(1, 4, 2, *sides(size)),
            "face_pixel_values": noise(1, 3, 8, 16, 16),
        }

    return module, inputs


@entry(blocks=4)
def WanAnimate2Transformer3DModel() -> Case:
    """A denoising step: keys and values of the reference video are in the cache."""
    module: Any = tiny(
        "WanAnimate2Transformer3DModel",
        text_len=8,
        in_dim=12,
        dim=32,
        ffn_dim=32,
        freq_dim=16,
        text_dim=16,
        out_dim=4,
        num_heads=2,
        num_layers=4,
    )
    frames = 2
    uncompiled = functools.partial(create_block_mask, _compile=False)  # by inductor, it takes a minute
    with mock.patch.object(
        transformer_wan_animate_2, "create_block_mask", lambda *a, _compile, **k: uncompiled(*a, **k)
    ):
        for height, width in map(patches, (1, 2)):
            module.block_masks[frames, height * width] = module.create_mask(frames, height * width, torch.device("cpu"))

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        cache = WanAnimate2KVCache(4)
        for layer in cache.layer_caches:
            layer.store(noise(1, frames * height * width, 2, 16), noise(1, frames * height * width, 2, 16))
        return {
            "hidden_states": [noise(4, frames, *sides(size))],
            "timestep": at(),
            "encoder_hidden_states": [noise(6, 16)],
            "condition_latents": [noise(8, frames, *sides(size))],
            "kv_cache": cache,
            "kv_cache_mode": "cached",
            "seq_len": frames * height * width,
            "encoder_hidden_states_image": noise(1, IMAGE, 1280),
            "reference_grid_sizes": torch.tensor([[frames, height, width]]),
            "origin_len": 4 * (frames - 1) + 1,
            "origin_area": [16 * height, 16 * width],
        }

    return module, inputs
