"""Families that make images."""

from __future__ import annotations

import diffusers
import torch
from diffusers.guiders import AdaptiveProjectedMixGuidance

from .base import (
    LARGE,
    POOLED,
    TEXT,
    UNBINNED,
    Pipeline,
    family,
    flow,
    heads,
    image_vae,
    make,
    masks,
    pooled,
    prompts,
    tiny,
    wan_vae,
    words,
)


@family(8, 2, **prompts(), **pooled(), true_cfg_scale=3.0)
def Flux() -> Pipeline:
    """True CFG on top of the distilled guidance, as two calls of one prompt each."""
    transformer = tiny(
        "FluxTransformer2DModel",
        in_channels=16,
        num_layers=4,
        num_single_layers=4,
        **heads(),
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    scheduler = flow(shift=3.0, use_dynamic_shifting=True)
    return make("FluxPipeline", 2, transformer=transformer, vae=image_vae(), scheduler=scheduler)


@family(9, 1, prompt_embeds=words(1, 6, TEXT), guidance_scale=4.0)
def Flux2() -> Pipeline:
    transformer = tiny(
        "Flux2Transformer2DModel",
        in_channels=16,
        num_layers=4,
        num_single_layers=5,
        **heads(),
        joint_attention_dim=TEXT,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
    )
    vae = image_vae(name="AutoencoderKLFlux2")
    scheduler = flow(shift=3.0, use_dynamic_shifting=True)
    return make("Flux2Pipeline", 1, transformer=transformer, vae=vae, scheduler=scheduler)


@family(5, 1, **prompts(), **pooled(), guidance_scale=7.0)
def SD3() -> Pipeline:
    """As SD3.5 medium: the first blocks attend to the image a second time."""
    transformer = tiny(
        "SD3Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        **heads(),
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return make("StableDiffusion3Pipeline", 3, transformer=transformer, vae=image_vae(), scheduler=flow(shift=3.0))


@family(4, 2, **prompts(), **masks("prompt_embeds_mask"), true_cfg_scale=4.0)
def QwenImage() -> Pipeline:
    transformer = tiny(
        "QwenImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=4,
        **heads(),
        joint_attention_dim=TEXT,
        axes_dims_rope=(2, 2, 4),
    )
    scheduler = flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02)
    vae = wan_vae("AutoencoderKLQwenImage")
    return make("QwenImagePipeline", 1, transformer=transformer, vae=vae, scheduler=scheduler)


@family(4, 1, **prompts(), **masks(), **UNBINNED, guidance_scale=4.5)
def PixArtSigma() -> Pipeline:
    transformer = tiny(
        "PixArtTransformer2DModel",
        **heads(count=3),
        num_layers=4,
        cross_attention_dim=24,
        caption_channels=TEXT,
        sample_size=8,
        patch_size=2,
        norm_num_groups=1,
        use_additional_conditions=False,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return make("PixArtSigmaPipeline", 1, transformer=transformer, vae=image_vae(), scheduler=scheduler)


@family(6, 2, **prompts(), **masks(dtype=torch.bool), guidance_scale=4.0)
def Lumina2() -> Pipeline:
    """Names no branches; its timestep rises."""
    transformer = tiny(
        "Lumina2Transformer2DModel",
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=6,
        num_refiner_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=TEXT,
    )
    return make("Lumina2Pipeline", 1, transformer=transformer, vae=image_vae(), scheduler=flow(shift=6.0))


@family(6, 1, prompt_embeds=[words(6, TEXT)], negative_prompt_embeds=[words(4, TEXT)], guidance_scale=4.0)
def ZImage() -> Pipeline:
    """Takes lists of images and prompts, of different lengths."""
    transformer = tiny(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=16,
        n_layers=6,
        n_refiner_layers=2,
        n_heads=1,
        n_kv_heads=1,
        cap_feat_dim=TEXT,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 32, 32],
    )
    return make("ZImagePipeline", 1, transformer=transformer, vae=image_vae(), scheduler=flow(shift=3.0))


@family(4, 1, LARGE, **prompts(), **masks(), **UNBINNED, guidance_scale=4.5)
def Sana() -> Pipeline:
    transformer = tiny(
        "SanaTransformer2DModel",
        in_channels=4,
        out_channels=4,
        **heads(),
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT,
        sample_size=8,
    )
    shape = {f"{side}_block_out_channels": (8,) * 6 for side in ("encoder", "decoder")}
    shape |= {f"{side}_layers_per_block": (1,) * 6 for side in ("encoder", "decoder")}
    vae = tiny("AutoencoderDC", latent_channels=4, attention_head_dim=4, **shape)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return make("SanaPipeline", 1, transformer=transformer, vae=vae, scheduler=scheduler)


@family(9, 2, **prompts(), **masks(dtype=torch.bool), guidance_scale=5.0)
def Chroma() -> Pipeline:
    transformer = tiny(
        "ChromaTransformer2DModel",
        in_channels=16,
        num_layers=4,
        num_single_layers=5,
        **heads(),
        joint_attention_dim=TEXT,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=2,
    )
    return make("ChromaPipeline", 1, transformer=transformer, vae=image_vae(), scheduler=flow())


@family(9, 1, **prompts(), **masks(), guidance_scale=3.5)
def AuraFlow() -> Pipeline:
    transformer = tiny(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        num_mmdit_layers=4,
        num_single_dit_layers=5,
        **heads(),
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return make("AuraFlowPipeline", 1, transformer=transformer, vae=image_vae(), scheduler=flow(shift=1.73))


@family(
    0, 2, LARGE, **prompts(), **masks("prompt_embeds_mask"), **prompts("_2", 4, 8), **masks("prompt_embeds_mask_2", 4)
)
def HunyuanImage() -> Pipeline:
    """Its guider calls the transformer for each prompt, and names the calls. The tokens of two texts are picked out by
    their masks, which makes their number depend on data, and breaks the graph inside the loop over the blocks."""
    transformer = tiny(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        **heads(),
        num_layers=4,
        num_single_layers=5,
        num_refiner_layers=2,
        text_embed_dim=TEXT,
        text_embed_2_dim=8,
        rope_axes_dim=(4, 4),
    )
    vae = tiny(
        "AutoencoderKLHunyuanImage",
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32,) * 6,
        layers_per_block=1,
        spatial_compression_ratio=32,
        sample_size=128,
    )
    guider = AdaptiveProjectedMixGuidance(guidance_scale=3.5)
    components = {"transformer": transformer, "vae": vae, "scheduler": flow(shift=5.0), "guider": guider}
    return make("HunyuanImagePipeline", 2, **components)
