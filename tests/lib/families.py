"""Real diffusers pipelines, one a model family, of tiny components drawn at random and without text encoders.

    family = FAMILIES["QwenImage"]
    pipe = family.build()
    latents = family.latents(pipe)

An entry builds the pipeline with the scheduler and the guidance that its family is used with, and says what is then
true of a run: blocks, CFG branches, steps of each transformer. Prompts are given as embeddings, nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.guiders import AdaptiveProjectedMixGuidance
from torch import Tensor

STEPS = 6
TEXT, POOLED = 12, 10
"""Widths of a prompt's embeddings: of each token, and of the whole."""

SMALL = {"height": 64, "width": 64}, {"height": 64, "width": 96}
LARGE = {"height": 128, "width": 128}, {"height": 128, "width": 192}
"""Two resolutions; the large ones are for autoencoders that shrink an image 32 times."""

Pipeline = Any  # of diffusers' classes, which no type checker finds
Build = Callable[[], Pipeline]


@dataclass(frozen=True)
class Family:
    """One pipeline and what is known of it.

    Attributes:
        build: makes the pipeline, with the same weights every time.
        call: how it is called, size and seed aside.
        blocks: of the chain of each transformer; 0 where dynamo captures none.
        branches: of guidance, as a transformer sees them: 1 where it is a doubled batch, an input or none.
        sizes: two resolutions.
        steps: calls of each transformer for each branch; they add up to `STEPS`.
    """

    build: Build
    call: dict[str, Any]
    blocks: int
    branches: int
    sizes: tuple[dict[str, int], dict[str, int]]
    steps: tuple[int, ...]

    def latents(self, pipe: Pipeline, size: int = 0, seed: int = 0) -> Tensor:
        """What the pipeline makes of that seed's noise."""
        given = self.call | self.sizes[size] | {"generator": torch.Generator().manual_seed(seed)}
        (latents,) = pipe(**given, num_inference_steps=STEPS, output_type="latent", return_dict=False)
        return latents


FAMILIES: dict[str, Family] = {}


def family(
    blocks: int,
    branches: int,
    sizes: tuple[dict[str, int], dict[str, int]] = SMALL,
    steps: tuple[int, ...] = (STEPS,),
    **call: Any,
) -> Callable[[Build], Build]:
    """Enter a builder under its own name, the rest being `Family`'s attributes and the arguments of the call.

    Every weight of a transformer is drawn anew: gates and projections that start at zero would make a block do nothing.
    """

    def enter(build: Build) -> Build:
        def seeded() -> Pipeline:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                pipe = build()
                for name, component in pipe.components.items():
                    if name.startswith("transformer") and component is not None:
                        for parameter in component.parameters():
                            parameter.normal_(std=0.2)
            pipe.set_progress_bar_config(disable=True)
            return pipe

        FAMILIES[build.__name__] = Family(seeded, call, blocks, branches, sizes, steps)
        return seeded

    return enter


# ---------------------------------------------------------------------------------------------------------------------
# Words for entries
# ---------------------------------------------------------------------------------------------------------------------

_words = torch.Generator().manual_seed(1)


def words(*shape: int) -> Tensor:
    """An embedding, another one each time."""
    return torch.randn(shape, generator=_words)


def prompts(suffix: str = "", length: int = 6, width: int = TEXT) -> dict[str, Any]:
    """Embeddings of a prompt and of a negative one."""
    return {f"{sign}prompt_embeds{suffix}": words(1, length, width) for sign in ("", "negative_")}


def pooled() -> dict[str, Any]:
    return {f"{sign}pooled_prompt_embeds": words(1, POOLED) for sign in ("", "negative_")}


def masks(name: str = "prompt_attention_mask", length: int = 6, dtype: torch.dtype = torch.long) -> dict[str, Any]:
    """The tokens of the two prompts that are no padding: the negative one is two tokens shorter."""
    whole = torch.ones(1, length, dtype=dtype)
    shorter = whole.clone()
    shorter[:, -2:] = 0
    return {name: whole, f"negative_{name}": shorter}


UNBINNED: dict[str, Any] = {"negative_prompt": None, "use_resolution_binning": False}
"""Whose negative prompt is "" by default, which excludes embeddings, also choose among resolutions of their own."""


def make(pipeline: str, encoders: int, **components: Any) -> Pipeline:
    """The pipeline, its first `encoders` text encoders and tokenizers left out."""
    missing = [f"{kind}{number}" for number in ("", "_2", "_3")[:encoders] for kind in ("text_encoder", "tokenizer")]
    return getattr(diffusers, pipeline)(**dict.fromkeys(missing), **components)


def tiny(name: str, **config: Any) -> Any:
    """A model of diffusers, in eval mode."""
    return getattr(diffusers, name)(**config).eval()


def image_vae(channels: int = 4, name: str = "AutoencoderKL", **config: Any) -> Any:
    """Makes latents of an eighth of the size."""
    given = {"block_out_channels": (4,) * 4, "norm_num_groups": 1, "layers_per_block": 1} | config
    if name == "AutoencoderKL":
        given |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return tiny(name, latent_channels=channels, **given)


def wan_vae(name: str = "AutoencoderKLWan") -> Any:
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return tiny(name, base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, **statistics)


def heads(dim: int = 8, count: int = 2) -> dict[str, Any]:
    return {"attention_head_dim": dim, "num_attention_heads": count}


def flow(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Videos
# ---------------------------------------------------------------------------------------------------------------------


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
