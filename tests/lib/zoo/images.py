"""Images, where the text is cross-attended or stands in one stream with the image from the start."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR

from .base import Case, at, entry, grid, noise, ones, patches, sides, tiny, yes


@entry(blocks=4)
def DiTTransformer2DModel() -> Case:
    """Makes squares only."""
    module = tiny(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        norm_num_groups=1,
        num_embeds_ada_norm=10,
    )

    def inputs(size: int) -> dict[str, Any]:
        height, _ = sides(size)
        return {"hidden_states": noise(1, 4, height, height), "timestep": at(), "class_labels": torch.tensor([3])}

    return module, inputs


@entry(blocks=8)
def HunyuanDiT2DModel(num_layers: int = 8) -> Case:
    module = tiny(
        "HunyuanDiT2DModel",
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
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        return {
            "hidden_states": noise(1, 4, *sides(size)),
            "timestep": at(),
            "encoder_hidden_states": noise(1, 4, 8),
            "text_embedding_mask": ones(1, 4),
            "encoder_hidden_states_t5": noise(1, 4, 8),
            "text_embedding_mask_t5": ones(1, 4),
            "image_meta_size": torch.tensor([[64.0, 96.0, 64.0, 96.0, 0.0, 0.0]]),
            "style": torch.zeros(1, dtype=torch.long),
            "image_rotary_emb": (noise(height * width, 8), noise(height * width, 8)),
        }

    return module, inputs


@entry(blocks=4)
def PixArtTransformer2DModel(num_layers: int = 4) -> Case:
    """As PixArt-alpha at 1024: told the resolution and the aspect ratio."""
    module = tiny(
        "PixArtTransformer2DModel",
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=num_layers,
        cross_attention_dim=24,
        caption_channels=12,
        sample_size=8,
        patch_size=2,
        norm_num_groups=1,
        use_additional_conditions=True,
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = sides(size)
        return {
            "hidden_states": noise(1, 4, height, width),
            "encoder_hidden_states": noise(1, 5, 12),
            "encoder_attention_mask": ones(1, 5),
            "timestep": torch.tensor([500]),
            "added_cond_kwargs": {
                "resolution": torch.tensor([[8.0 * height, 8.0 * width]]),
                "aspect_ratio": torch.tensor([[height / width]]),
            },
        }

    return module, inputs


@entry(blocks=4)
def SanaTransformer2DModel(num_layers: int = 4, guidance_embeds: bool = True) -> Case:
    """As Sana Sprint, which takes its guidance as an input."""
    module = tiny(
        "SanaTransformer2DModel",
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
        guidance_embeds=guidance_embeds,
        qk_norm="rms_norm_across_heads" if guidance_embeds else None,
    )

    def inputs(size: int) -> dict[str, Any]:
        guidance = {"guidance": at(4.5)} if guidance_embeds else {}
        return guidance | {
            "hidden_states": noise(1, 4, *patches(size)),
            "encoder_hidden_states": noise(1, 5, 12),
            "encoder_attention_mask": ones(1, 5),
            "timestep": at(),
        }

    return module, inputs


@entry(blocks=16)
def Lumina2Transformer2DModel() -> Case:
    """With 2 refiners of the image in 18 blocks; it is 2 in 28."""
    module = tiny(
        "Lumina2Transformer2DModel",
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=16,
        num_refiner_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=12,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, *sides(size)),
            "encoder_hidden_states": noise(1, 5, 12),
            "timestep": at(0.5),
            "encoder_attention_mask": yes(1, 5),
        }

    return module, inputs


@entry(blocks=4)
def LuminaNextDiT2DModel() -> Case:
    module = tiny(
        "LuminaNextDiT2DModel",
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=4,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        learn_sigma=False,
        cross_attention_dim=12,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, *sides(size)),
            "encoder_hidden_states": noise(1, 5, 12),
            "timestep": at(0.5),
            "encoder_mask": ones(1, 5),
            "image_rotary_emb": noise(32, 32, 4),
            "cross_attention_kwargs": {},
        }

    return module, inputs


@entry(blocks=16)
def ZImageTransformer2DModel(heads: int = 1) -> Case:
    """With 2 refiners of the image in 18 blocks; it is 2 in 32."""
    module = tiny(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=16 * heads,
        n_layers=16,
        n_refiner_layers=2,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=12,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 32, 32],
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = sides(size)
        return {"x": [noise(4, 1, height, width)], "cap_feats": [noise(6, 12)], "t": at(0.5)}

    return module, inputs


@entry(blocks=5)
def OmniGenTransformer2DModel() -> Case:
    module = tiny(
        "OmniGenTransformer2DModel",
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=32,
        num_layers=5,
        pad_token_id=0,
        vocab_size=20,
        time_step_dim=4,
        rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = sides(size)
        tokens = 6 + 1 + height * width // 4
        return {
            "hidden_states": noise(1, 4, height, width),
            "timestep": at(0.5),
            "input_ids": torch.arange(6)[None],
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": ones(1, tokens, tokens),
            "position_ids": torch.arange(tokens)[None],
        }

    return module, inputs


@entry(blocks=4)
def PRXTransformer2DModel() -> Case:
    module = tiny(
        "PRXTransformer2DModel",
        in_channels=4,
        context_in_dim=12,
        hidden_size=16,
        num_heads=2,
        depth=4,
        axes_dim=[4, 4],
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, *sides(size)),
            "timestep": at(0.5),
            "encoder_hidden_states": noise(1, 5, 12),
            "attention_mask": yes(1, 5),
        }

    return module, inputs


@entry(blocks=4)
def ErnieImageTransformer2DModel() -> Case:
    module = tiny(
        "ErnieImageTransformer2DModel",
        hidden_size=16,
        num_attention_heads=2,
        num_layers=4,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        text_in_dim=12,
        rope_axes_dim=(2, 2, 4),
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, *patches(size)),
            "timestep": at(),
            "text_bth": noise(1, 5, 12),
            "text_lens": torch.tensor([5]),
        }

    return module, inputs


@entry(blocks=6)
def Krea2Transformer2DModel() -> Case:
    module = tiny(
        "Krea2Transformer2DModel",
        in_channels=4,
        num_layers=6,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=2,
        num_refiner_text_blocks=2,
        axes_dims_rope=(4, 2, 2),
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        return {
            "hidden_states": noise(1, height * width, 4),
            "encoder_hidden_states": noise(1, 5, 2, 16),
            "timestep": at(0.5),
            "position_ids": torch.cat([torch.zeros(5, 3), grid(1, height, width)]),
        }

    return module, inputs


@entry(blocks=4)
def Transformer2DModel() -> Case:
    """As the first PixArt checkpoints have it; in its other configurations it is a part of UNets."""
    module = tiny(
        "Transformer2DModel",
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=24,
        caption_channels=12,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        use_additional_conditions=False,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, *sides(size)),
            "encoder_hidden_states": noise(1, 5, 12),
            "encoder_attention_mask": ones(1, 5),
            "timestep": torch.tensor([500]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    return module, inputs


@entry(blocks=16)
def BriaFibo2Transformer2DModel(heads: int = 1) -> Case:
    """Some of its blocks attend to the text once more. With 2 refiners of the image in 18 blocks; it is 2 in 46."""
    module = tiny(
        "BriaFibo2Transformer2DModel",
        in_channels=4,
        dim=24 * heads,
        n_layers=16,
        n_heads=heads,
        cap_feat_dim=12,
        injection_layer_ids=(2, 6, 10, 14),
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(8, 8, 8),
        axes_lens=(64, 32, 32),
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, *sides(size)),
            "timestep": at(0.5),
            "encoder_hidden_states": noise(1, 5, 6, 12),
        }

    return module, inputs


@entry(blocks=4)
def Ideogram4Transformer2DModel() -> Case:
    """Text and image are one packed sequence, told apart by an indicator."""
    module = tiny(
        "Ideogram4Transformer2DModel",
        in_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=8,
        llm_features_dim=12,
        mrope_section=(2, 1, 1),
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        text, image = 5, height * width
        return {
            "hidden_states": noise(1, text + image, 4),
            "timestep": at(0.5),
            "encoder_hidden_states": noise(1, text + image, 12),
            "position_ids": torch.cat([torch.arange(text).repeat(3, 1).T, grid(1, height, width).long()])[None],
            "segment_ids": torch.ones(1, text + image, dtype=torch.long),
            "indicator": torch.tensor([[LLM_TOKEN_INDICATOR] * text + [OUTPUT_IMAGE_INDICATOR] * image]),
        }

    return module, inputs


@entry(blocks=4)
def QwenImage21Transformer2DModel() -> Case:
    """With one image as a condition ahead of the one that is made; a slot of the mask is four latents."""
    module = tiny(
        "QwenImage21Transformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=12,
        axes_dims_rope=(2, 2, 4),
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        shapes = [(1, 4, 4), (1, height, width)]
        slots = [4, height * width // 4]
        text = 5
        return {
            "hidden_states": noise(1, 4 * sum(slots), 4),
            "encoder_hidden_states": noise(1, slots[0] + text, 12),
            "encoder_hidden_states_mask": yes(1, slots[0] + text),
            "timestep": at(0.5),
            "img_shapes": [shapes],
            "img_mask": torch.tensor([[True] * slots[0] + [False] * text + [True] * slots[1]]),
        }

    return module, inputs


@entry(blocks=4)
def JoyImageEditPlusTransformer3DModel() -> Case:
    """The image that is made and one that it is made from, each as patches."""
    module = tiny(
        "JoyImageEditPlusTransformer3DModel",
        in_channels=4,
        hidden_size=16,
        num_attention_heads=2,
        text_dim=12,
        num_layers=4,
        rope_dim_list=[4, 2, 2],
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        return {
            "hidden_states": noise(1, height * width + 4 * 4, 4, 1, 2, 2),
            "timestep": at(),
            "encoder_hidden_states": noise(1, 5, 12),
            "encoder_hidden_states_mask": ones(1, 5),
            "shape_list": [[(1, height, width), (1, 4, 4)]],
        }

    return module, inputs
