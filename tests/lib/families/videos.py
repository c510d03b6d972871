"""Families that make videos."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .base import (
    LARGE,
    POOLED,
    TEXT,
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
)


def _wan_transformer() -> Any:
    return tiny(
        "WanTransformer3DModel",
        **heads(12),
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=32,
    )


def _wan(**components: Any) -> Pipeline:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    return make("WanPipeline", 1, transformer=_wan_transformer(), vae=wan_vae(), scheduler=scheduler, **components)


@family(4, 2, num_frames=5, **prompts(), guidance_scale=5.0)
def Wan21() -> Pipeline:
    return _wan(transformer_2=None)


@family(4, 2, steps=(2, 4), num_frames=5, **prompts(), guidance_scale=4.0, guidance_scale_2=3.0)
def Wan22() -> Pipeline:
    """One transformer for the noisy steps, another for the rest."""
    return _wan(transformer_2=_wan_transformer(), boundary_ratio=0.95)


@family(9, 2, num_frames=5, **prompts(), **pooled(), **masks(), true_cfg_scale=3.0)
def HunyuanVideo() -> Pipeline:
    transformer = tiny(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        **heads(),
        num_layers=4,
        num_single_layers=5,
        num_refiner_layers=2,
        text_embed_dim=TEXT,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(2, 2, 4),
    )
    vae = image_vae(name="AutoencoderKLHunyuanVideo")
    return make("HunyuanVideoPipeline", 2, transformer=transformer, vae=vae, scheduler=flow(shift=7.0))


@family(4, 1, num_frames=5, **prompts(), guidance_scale=6.0)
def CogVideoX() -> Pipeline:
    """As CogVideoX 5B: positions are rotations."""
    transformer = tiny(
        "CogVideoXTransformer3DModel",
        **heads(16),
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=4,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
    )
    vae = image_vae(name="AutoencoderKLCogVideoX")
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
        snr_shift_scale=1.0,
    )
    return make("CogVideoXPipeline", 1, transformer=transformer, vae=vae, scheduler=scheduler)


@family(4, 1, LARGE, num_frames=9, **prompts(), **masks(), guidance_scale=3.0)
def LTX() -> Pipeline:
    transformer = tiny(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        **heads(),
        cross_attention_dim=16,
        num_layers=4,
        caption_channels=TEXT,
    )
    width, depth = (8,) * 4, (1,) * 5
    vae = tiny(
        "AutoencoderKLLTXVideo",
        latent_channels=8,
        block_out_channels=width,
        decoder_block_out_channels=width,
        layers_per_block=depth,
        decoder_layers_per_block=depth,
    )
    scheduler = flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1)
    return make("LTXPipeline", 1, transformer=transformer, vae=vae, scheduler=scheduler)


@family(4, 1, num_frames=7, **prompts(width=16), **masks(dtype=torch.bool), guidance_scale=4.5)
def Mochi() -> Pipeline:
    """Its timestep rises."""
    transformer = tiny(
        "MochiTransformer3DModel",
        **heads(),
        num_layers=4,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=16,  # its text pooling has 8 heads, whatever the configuration
        time_embed_dim=4,
        max_sequence_length=6,
    )
    width, depth = (32,) * 4, (1,) * 5
    vae = tiny(
        "AutoencoderKLMochi",
        encoder_block_out_channels=width,
        decoder_block_out_channels=width,
        layers_per_block=depth,
    )
    return make("MochiPipeline", 1, transformer=transformer, vae=vae, scheduler=flow(invert_sigmas=True))
