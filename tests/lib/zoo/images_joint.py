"""Images, where text and image tokens attend to one another: FLUX, SD3 and what came of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import Case, at, entry, grid, noise, packed, pair, patches, sides, tiny, yes


def _two_loops(name: str, **config: Any) -> nn.Module:
    """The configuration that FLUX's descendants share: joint blocks, then single ones."""
    given = {"num_layers": 4, "num_single_layers": 5, "axes_dims_rope": (2, 2, 4)} | config
    return tiny(name, in_channels=4, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12, **given)


@entry(blocks=8)
def FluxTransformer2DModel(num_layers: int = 4, num_single_layers: int = 4, guidance_embeds: bool = True) -> Case:
    module = _two_loops(
        "FluxTransformer2DModel",
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        pooled_projection_dim=10,
        guidance_embeds=guidance_embeds,
    )

    def inputs(size: int) -> dict[str, Any]:
        guidance = {"guidance": at(3.5)} if guidance_embeds else {}
        return packed(*patches(size)) | {"pooled_projections": noise(1, 10), "timestep": at(0.5)} | guidance

    return module, inputs


@entry(blocks=9)
def Flux2Transformer2DModel() -> Case:
    module = _two_loops("Flux2Transformer2DModel", timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2))

    def inputs(size: int) -> dict[str, Any]:
        return packed(*patches(size)) | {
            "timestep": at(0.5),
            "guidance": at(4.0),
            "img_ids": grid(1, *patches(size), 1)[None],
            "txt_ids": grid(1, 1, 1, 6)[None],
        }

    return module, inputs


@entry(blocks=9)
def Flux3Transformer2DModel() -> Case:
    module = _two_loops(
        "Flux3Transformer2DModel", cond_in_channels=4, timestep_channels=16, axes_dims_rope=(2, 2, 2, 2)
    )

    def inputs(size: int) -> dict[str, Any]:
        return packed(*patches(size)) | {
            "timestep": at(0.5),
            "img_ids": grid(1, *patches(size), 1),
            "txt_ids": grid(1, 1, 1, 6),
        }

    return module, inputs


@entry(blocks=9)
def ChromaTransformer2DModel() -> Case:
    module = _two_loops(
        "ChromaTransformer2DModel",
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=2,
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        return packed(height, width) | {"timestep": at(0.5), "attention_mask": yes(1, 6 + height * width)}

    return module, inputs


@entry(blocks=9)
def BriaTransformer2DModel() -> Case:
    module = _two_loops("BriaTransformer2DModel", axes_dims_rope=[0, 4, 4])
    return module, lambda size: packed(*patches(size)) | {"timestep": at()}


@entry(blocks=9)
def BriaFiboTransformer2DModel() -> Case:
    module = _two_loops("BriaFiboTransformer2DModel", axes_dims_rope=[0, 4, 4], text_encoder_dim=8)

    def inputs(size: int) -> dict[str, Any]:
        return packed(*patches(size)) | {
            "text_encoder_layers": [noise(1, 6, 8) for _ in range(9)],
            "timestep": at(),
        }

    return module, inputs


@entry(blocks=9)
def OvisImageTransformer2DModel() -> Case:
    module = _two_loops("OvisImageTransformer2DModel", out_channels=4)
    return module, lambda size: packed(*patches(size)) | {"timestep": at(0.5)}


@entry(blocks=9)
def LongCatImageTransformer2DModel() -> Case:
    module = _two_loops("LongCatImageTransformer2DModel", pooled_projection_dim=12)
    return module, lambda size: packed(*patches(size)) | {"timestep": at(0.5)}


@entry(blocks=5)
def SD3Transformer2DModel(num_layers: int = 5, dual_attention_layers: tuple[int, ...] = (0, 1)) -> Case:
    """As SD3.5 medium: the first blocks attend to the image a second time."""
    module = tiny(
        "SD3Transformer2DModel",
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
        dual_attention_layers=dual_attention_layers,
        qk_norm="rms_norm",
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, *sides(size)),
            "encoder_hidden_states": noise(1, 5, 12),
            "pooled_projections": noise(1, 10),
            "timestep": at(),
        }

    return module, inputs


@entry(blocks=4)
def QwenImageTransformer2DModel(num_layers: int = 4) -> Case:
    module = tiny(
        "QwenImageTransformer2DModel",
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        return {
            "hidden_states": noise(1, height * width, 16),
            "encoder_hidden_states": noise(1, 5, 12),
            "encoder_hidden_states_mask": yes(1, 5),
            "timestep": at(0.5),
            "img_shapes": [[(1, height, width)]],
        }

    return module, inputs


def _cogview(name: str, **config: Any) -> Case:
    module = tiny(
        name,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        **config,
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = sides(size)
        return {
            "hidden_states": noise(1, 4, height, width),
            "encoder_hidden_states": noise(1, 5, 12),
            "timestep": at(),
            "original_size": pair(8 * height, 8 * width),
            "target_size": pair(8 * height, 8 * width),
            "crop_coords": pair(0, 0),
        }

    return module, inputs


@entry(blocks=4)
def CogView3PlusTransformer2DModel() -> Case:
    return _cogview("CogView3PlusTransformer2DModel")


@entry(blocks=4)
def CogView4Transformer2DModel() -> Case:
    return _cogview("CogView4Transformer2DModel", rope_axes_dim=(8, 8))


@entry(blocks=4)
def GlmImageTransformer2DModel() -> Case:
    module = tiny(
        "GlmImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=16,
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = sides(size)
        tokens = height * width // 4
        return {
            "hidden_states": noise(1, 4, height, width),
            "encoder_hidden_states": noise(1, 5, 12),
            "prior_token_id": torch.arange(tokens)[None] % 16,
            "prior_token_drop": torch.zeros(1, tokens, dtype=torch.bool),
            "timestep": at(),
            "target_size": pair(8 * height, 8 * width),
            "crop_coords": pair(0, 0),
        }

    return module, inputs


@entry(blocks=9)
def AuraFlowTransformer2DModel() -> Case:
    module = tiny(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        num_mmdit_layers=4,
        num_single_dit_layers=5,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, *sides(size)),
            "encoder_hidden_states": noise(1, 5, 12),
            "timestep": at(0.5),
        }

    return module, inputs


@entry(blocks=9)
def HiDreamImageTransformer2DModel() -> Case:
    module = tiny(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_single_layers=5,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[8, 4],
        text_emb_dim=8,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=tuple(range(9)),
        force_inference_output=True,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, *sides(size)),
            "encoder_hidden_states_t5": noise(1, 5, 8),
            "encoder_hidden_states_llama3": noise(9, 1, 5, 4),
            "pooled_embeds": noise(1, 8),
            "timesteps": at(),
        }

    return module, inputs


@entry(blocks=9)
def HunyuanImageTransformer2DModel() -> Case:
    module = tiny(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        num_single_layers=5,
        num_refiner_layers=2,
        text_embed_dim=12,
        text_embed_2_dim=8,
        rope_axes_dim=(4, 4),
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, *patches(size)),
            "timestep": at(),
            "encoder_hidden_states": noise(1, 5, 12),
            "encoder_attention_mask": yes(1, 5),
            "encoder_hidden_states_2": noise(1, 4, 8),
            "encoder_attention_mask_2": yes(1, 4),
        }

    return module, inputs


@entry(blocks=6)
def NucleusMoEImageTransformer2DModel() -> Case:
    module = tiny(
        "NucleusMoEImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=6,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=12,
        axes_dims_rope=(4, 2, 2),
        num_experts=4,
        moe_intermediate_dim=8,
        capacity_factors=2.0,
    )

    def inputs(size: int) -> dict[str, Any]:
        height, width = patches(size)
        return {
            "hidden_states": noise(1, height * width, 16),
            "img_shapes": [(1, height, width)],
            "encoder_hidden_states": noise(1, 5, 12),
            "timestep": at(0.5),
        }

    return module, inputs
