"""Videos with sound, and videos refined: Kandinsky 6, MiniMax H3, Cosmos 3, SANA-WM."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

from .base import Case, at, entry, grid, length, noise, patches, sides, tiny, yes


@entry(blocks=4)
def Kandinsky6Transformer3DModel() -> Case:
    module = tiny(
        "Kandinsky6Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=12,
        in_text_dim2=8,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=2,
        num_visual_blocks=4,
        axes_dims=(4, 2, 2),
        in_audio_dim=6,
        out_audio_dim=6,
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 2, *sides(size), 4 + 4 + 1),
            "encoder_hidden_states": noise(1, 5, 12),
            "pooled_projections": noise(1, 8),
            "timestep": at(),
            "audio_hidden_states": noise(1, length(size), 6),
            "encoder_attention_mask": yes(1, 5),
        }

    return module, inputs


@entry(blocks=4)
def Kandinsky6SRTransformer3DModel() -> Case:
    """Super-resolution: 8 x 8 tokens are a block of its sparse attention."""
    module = tiny(
        "Kandinsky6SRTransformer3DModel",
        in_visual_dim=4,
        out_visual_dim=8,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_visual_blocks=4,
        axes_dims=(8, 4, 4),
        nabla_window=(1, 1, 1),
    )

    def inputs(size: int) -> dict[str, Any]:
        return {"hidden_states": noise(1, 2, 8, 8 * size, 4 + 4 + 1), "timestep": at()}

    return module, inputs


@entry(blocks=4)
def MiniMaxH3Transformer3DModel() -> Case:
    """Text, sound and video are rows of one packed sequence, each at a timestep of its own."""
    module = tiny(
        "MiniMaxH3Transformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        hidden_size=16,
        num_layers=4,
        num_refiner_layers=2,
        ffn_dim=32,
        in_channels=4,
        audio_in_channels=6,
        text_dim=12,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=2,
    )

    def inputs(size: int) -> dict[str, Any]:
        frames, (height, width) = 2, patches(size)
        text, audio, video = 5, length(size), frames * height * width
        rows = torch.arange(text + audio + video)
        along = torch.arange(text + audio).repeat(3, 1).T.float()
        return {
            "hidden_states": noise(1, video, 16),
            "audio_hidden_states": noise(1, audio, 6),
            "encoder_hidden_states": noise(1, text, 12),
            "timestep": torch.tensor([0.5, 0.6, 0.9]),
            "timestep_indices": torch.tensor([2] * text + [1] * audio + [0] * video),
            "token_tags": torch.tensor([1] * text + [2] * audio + [0] * video),
            "position_ids": torch.cat([along, grid(frames, height, width)]),
            "text_indices": rows[:text],
            "audio_indices": rows[text : text + audio],
            "video_indices": rows[text + audio :],
        }

    return module, inputs


@entry(blocks=4)
def Cosmos3OmniTransformer(key_heads: int = 1) -> Case:
    """Text runs through weights of its own beside the tokens of video and sound, which attend to it."""
    module = tiny(
        "Cosmos3OmniTransformer",
        head_dim=8,
        hidden_size=16,
        intermediate_size=32,
        latent_channel=4,
        patch_latent_dim=16,
        num_attention_heads=2,
        num_hidden_layers=4,
        num_key_value_heads=key_heads,
        vocab_size=20,
        rope_axes_dim=(2, 1, 1),
        sound_dim=6,
        sound_gen=True,
    )

    def inputs(size: int) -> dict[str, Any]:
        frames, (height, width) = 2, patches(size)
        text, video, sound = 6, frames * height * width, length(size)
        rows = torch.arange(text + video + sound)
        seen, heard = rows[text : text + video], rows[text + video :]
        positions = torch.cat(
            [rows[:text].repeat(3, 1).T.float(), 100 + grid(frames, height, width), 100 + grid(sound, 1, 1)]
        )
        return {
            "input_ids": torch.arange(text),
            "text_indexes": rows[:text],
            "position_ids": positions.T.contiguous(),
            "und_len": text,
            "sequence_length": len(rows),
            "vision_tokens": [noise(1, 4, frames, *sides(size))],
            "vision_token_shapes": [(frames, height, width)],
            "vision_sequence_indexes": seen,
            "vision_mse_loss_indexes": seen,
            "vision_timesteps": torch.full((video,), 500.0),
            "vision_noisy_frame_indexes": [torch.arange(frames)],
            "sound_tokens": [noise(6, sound)],
            "sound_token_shapes": [(sound, 1, 1)],
            "sound_sequence_indexes": heard,
            "sound_mse_loss_indexes": heard,
            "sound_timesteps": torch.full((sound,), 500.0),
            "sound_noisy_frame_indexes": [torch.arange(sound)],
        }

    return module, inputs


@entry(blocks=5)
def SanaWMTransformer3DModel() -> Case:
    """Every fourth block attends by softmax, the others by a recurrence; a camera steers all of them."""
    module = tiny(
        "SanaWMTransformer3DModel",
        in_channels=4,
        num_layers=5,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        chunk_plucker_channels=6,
        caption_channels=12,
        image_size=64,
    )

    def inputs(size: int) -> dict[str, Any]:
        frames, (height, width) = 2, patches(size)
        camera = torch.cat([torch.eye(4).flatten(), torch.tensor([8.0, 8.0, width / 2, height / 2])])
        return {
            "hidden_states": noise(1, 4, frames, height, width),
            "timestep": torch.full((1, 1, frames), 500.0),
            "encoder_hidden_states": noise(1, 1, 5, 12),
            "encoder_attention_mask": yes(1, 5),
            "camera_conditions": camera.repeat(1, frames, 1),
            "chunk_plucker": noise(1, 6, frames, height, width),
        }

    return module, inputs


@entry(blocks=4)
def SanaWMLTX2RefinerTransformer3DModel() -> Case:
    """A denoising step of a block of frames: it attends to the first frames and to recent ones, which are cached."""
    module: Any = tiny(
        "SanaWMLTX2RefinerTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=4,
        caption_channels=12,
        rope_double_precision=False,
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        tokens = height * width

        def positions(*frames: int) -> tuple[torch.Tensor, torch.Tensor]:
            return module.build_rotary_emb_for_absolute_positions(
                1, list(frames), height, width, device=torch.device("cpu"), fps=24.0
            )

        cache = SanaWMRefinerKVCache(4)
        cache.sink_pe = positions(0)
        for layer in cache.layer_caches:
            layer.store_sink(noise(1, tokens, 16), noise(1, tokens, 16))
            layer.store_history(noise(1, tokens, 16), noise(1, tokens, 16))
        return {
            "hidden_states": noise(1, 2 * tokens, 4),
            "encoder_hidden_states": noise(1, 5, 12),
            "timestep": torch.full((1, 2 * tokens), 500.0),
            "video_rotary_emb": positions(2, 3),
            "encoder_attention_mask": yes(1, 5),
            "kv_cache": cache,
            "kv_cache_mode": "inject",
        }

    return module, inputs
