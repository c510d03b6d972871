"""Videos, and images treated as videos of one frame."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from torch import nn

from .base import Case, at, entry, noise, ones, patches, sides, tiny, yes


def _hunyuan_video(name: str, **config: Any) -> nn.Module:
    return tiny(
        name,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        num_refiner_layers=2,
        patch_size_t=1,
        text_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        **{"patch_size": 1} | config,
    )


@entry(blocks=9)
def HunyuanVideoTransformer3DModel() -> Case:
    module = _hunyuan_video("HunyuanVideoTransformer3DModel", num_single_layers=5, pooled_projection_dim=8)

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, 2, *patches(size)),
            "timestep": at(),
            "encoder_hidden_states": noise(1, 5, 12),
            "encoder_attention_mask": ones(1, 5),
            "pooled_projections": noise(1, 8),
            "guidance": at(6000.0),
        }

    return module, inputs


@entry(blocks=4)
def HunyuanVideo15Transformer3DModel() -> Case:
    module = _hunyuan_video("HunyuanVideo15Transformer3DModel", text_embed_2_dim=8, image_embed_dim=12, target_size=16)

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, 2, *patches(size)),
            "timestep": at(),
            "encoder_hidden_states": noise(1, 5, 12),
            "encoder_attention_mask": ones(1, 5),
            "encoder_hidden_states_2": noise(1, 4, 8),
            "encoder_attention_mask_2": ones(1, 4),
            "image_embeds": noise(1, 3, 12),
        }

    return module, inputs


@entry(blocks=9)
def HunyuanVideoFramepackTransformer3DModel() -> Case:
    module = _hunyuan_video(
        "HunyuanVideoFramepackTransformer3DModel",
        num_single_layers=5,
        pooled_projection_dim=8,
        patch_size=2,
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=12,
        has_clean_x_embedder=True,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, 2, *sides(size)),
            "timestep": at(),
            "encoder_hidden_states": noise(1, 5, 12),
            "encoder_attention_mask": ones(1, 5),
            "pooled_projections": noise(1, 8),
            "image_embeds": noise(1, 3, 12),
            "indices_latents": torch.arange(2),
            "guidance": at(6000.0),
            "latents_clean": noise(1, 4, 1, *sides(size)),
            "indices_latents_clean": torch.arange(1),
            "latents_history_2x": noise(1, 4, 2, *sides(size)),
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": noise(1, 4, 4, *sides(size)),
            "indices_latents_history_4x": torch.arange(4),
        }

    return module, inputs


@entry(blocks=4)
def CogVideoXTransformer3DModel(num_layers: int = 4) -> Case:
    """As CogVideoX 5B: positions are rotations."""
    module = tiny(
        "CogVideoXTransformer3DModel",
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
        use_rotary_positional_embeddings=True,
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        tokens = 2 * height * width
        return {
            "hidden_states": noise(1, 2, 4, *sides(size)),
            "encoder_hidden_states": noise(1, 5, 12),
            "timestep": torch.tensor([500]),
            "image_rotary_emb": (noise(tokens, 16), noise(tokens, 16)),
        }

    return module, inputs


@entry(blocks=6)
def ConsisIDTransformer3DModel() -> Case:
    module = tiny(
        "ConsisIDTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=8,
        num_layers=6,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=2,
        cross_attn_dim_head=4,
        cross_attn_num_heads=1,
        LFE_id_dim=2,
        LFE_vit_dim=2,
        LFE_depth=5,
        LFE_dim_head=4,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=10,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        tokens = 2 * height * width
        return {
            "hidden_states": noise(1, 2, 4, *sides(size)),
            "encoder_hidden_states": noise(1, 5, 8),
            "timestep": at(),
            "image_rotary_emb": (noise(tokens, 8), noise(tokens, 8)),
            "id_cond": noise(1, 2),
            "id_vit_hidden": [noise(1, 2, 2)],
        }

    return module, inputs


@entry(blocks=4)
def LTXVideoTransformer3DModel(num_layers: int = 4) -> Case:
    module = tiny(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=num_layers,
        caption_channels=12,
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        return {
            "hidden_states": noise(1, 2 * height * width, 8),
            "encoder_hidden_states": noise(1, 5, 12),
            "timestep": torch.tensor([500]),
            "encoder_attention_mask": yes(1, 5),
            "num_frames": 2,
            "height": height,
            "width": width,
        }

    return module, inputs


@entry(blocks=4)
def LTX2VideoTransformer3DModel() -> Case:
    """As LTX 2.3: gated attention, and the text is modulated too."""
    module = tiny(
        "LTX2VideoTransformer3DModel",
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
        gated_attn=True,
        cross_attn_mod=True,
        audio_gated_attn=True,
        audio_cross_attn_mod=True,
        caption_channels=12,
        rope_double_precision=False,
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        return {
            "hidden_states": noise(1, 2 * height * width, 4),
            "audio_hidden_states": noise(1, 9, 4),
            "encoder_hidden_states": noise(1, 5, 12),
            "audio_encoder_hidden_states": noise(1, 5, 12),
            "timestep": at(),
            "sigma": at(),
            "encoder_attention_mask": yes(1, 5),
            "audio_encoder_attention_mask": yes(1, 5),
            "num_frames": 2,
            "height": height,
            "width": width,
            "audio_num_frames": 9,
            "fps": 25.0,
        }

    return module, inputs


@entry(blocks=4)
def MochiTransformer3DModel() -> Case:
    module = tiny(
        "MochiTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=6,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, 2, *sides(size)),
            "encoder_hidden_states": noise(1, 6, 16),
            "timestep": at(),
            "encoder_attention_mask": yes(1, 6),
        }

    return module, inputs


@entry(blocks=4)
def AllegroTransformer3DModel() -> Case:
    module = tiny(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=4,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=12,
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        *frequencies, t, h, w = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (height, width)), (height, width), 2)
        positions = torch.cartesian_prod(t.long(), h.long(), w.long()).T[:, None].contiguous()
        return {
            "hidden_states": noise(1, 4, 2, *sides(size)),
            "encoder_hidden_states": noise(1, 5, 12),
            "timestep": at(),
            "attention_mask": None,
            "encoder_attention_mask": ones(1, 5),
            "image_rotary_emb": (tuple(frequencies), tuple(positions)),
        }

    return module, inputs


@entry(blocks=4)
def EasyAnimateTransformer3DModel() -> Case:
    module = tiny(
        "EasyAnimateTransformer3DModel",
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        mmdit_layers=4,
        num_layers=4,
        text_embed_dim=12,
        time_embed_dim=8,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, 2, *sides(size)),
            "timestep": at(),
            "encoder_hidden_states": noise(1, 5, 12),
        }

    return module, inputs


@entry(blocks=4)
def CosmosTransformer3DModel() -> Case:
    module = tiny(
        "CosmosTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=4,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,  # which needs torchvision, resizing it
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, 2, *sides(size)),
            "timestep": at(),
            "encoder_hidden_states": noise(1, 5, 16),
            "fps": 30,
        }

    return module, inputs


@entry(blocks=4)
def LatteTransformer3DModel() -> Case:
    module = tiny(
        "LatteTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        attention_bias=True,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=12,
        video_length=2,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, 2, *sides(size)),
            "timestep": at(),
            "encoder_hidden_states": noise(1, 5, 12),
        }

    return module, inputs


@entry(blocks=6)
def Kandinsky5Transformer3DModel() -> Case:
    module = tiny(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        in_text_dim=12,
        in_text_dim2=8,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=2,
        num_visual_blocks=6,
        axes_dims=(4, 2, 2),
        visual_cond=True,
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        return {
            "hidden_states": noise(1, 2, *sides(size), 4 + 4 + 1),
            "encoder_hidden_states": noise(1, 5, 12),
            "timestep": at(),
            "pooled_projections": noise(1, 8),
            "visual_rope_pos": [torch.arange(2), torch.arange(height), torch.arange(width)],
            "text_rope_pos": torch.arange(5),
        }

    return module, inputs


@entry(blocks=4)
def SanaVideoTransformer3DModel() -> Case:
    module = tiny(
        "SanaVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=12,
        sample_size=8,
        rope_max_seq_len=32,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, 2, *sides(size)),
            "encoder_hidden_states": noise(1, 5, 12),
            "encoder_attention_mask": ones(1, 5),
            "timestep": at(),
        }

    return module, inputs


@entry(blocks=4)
def JoyImageEditTransformer3DModel() -> Case:
    module = tiny(
        "JoyImageEditTransformer3DModel",
        in_channels=4,
        hidden_size=16,
        num_attention_heads=2,
        text_dim=12,
        num_layers=4,
        rope_dim_list=[4, 2, 2],
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, 1, *sides(size)),
            "timestep": at(),
            "encoder_hidden_states": noise(1, 5, 12),
        }

    return module, inputs


@entry(blocks=12)
def MotifVideoTransformer3DModel() -> Case:
    """Its last single blocks are a decoder: they begin with the embedded latents again, and see what came before."""
    module = tiny(
        "MotifVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        num_single_layers=8,
        num_decoder_layers=4,
        text_embed_dim=12,
        image_embed_dim=10,
        rope_axes_dim=(4, 2, 2),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, 2, *sides(size)),
            "timestep": at(),
            "encoder_hidden_states": noise(1, 5, 12),
            "encoder_attention_mask": ones(1, 5),
            "image_embeds": noise(1, 3, 10),
        }

    return module, inputs
