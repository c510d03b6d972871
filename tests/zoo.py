"""diffusers' transformer classes made tiny: `ZOO[name]()` is a module and the arguments of one forward.

Pure data. Four blocks or more in each loop, widths of 16 or so, every weight drawn anew (many gates and projections
start at zero, which would make a block do nothing). `BLOCKS` says how many blocks the chain has; `SHORT` names the
classes that are not cached as they should be yet, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import torch
from diffusers.models import transformers
from torch import Tensor, nn

Case = tuple[nn.Module, dict[str, Any]]
ZOO: dict[str, Callable[[], Case]] = {}


def entry(make: Callable[[], Case]) -> Callable[[], Case]:
    """Enter a function into the zoo under its own name, which is the class's."""

    def seeded() -> Case:
        torch.manual_seed(0)
        module, arguments = make()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dtype.is_floating_point:
                    parameter.normal_(std=0.2)
        return module, {"return_dict": False} | arguments

    ZOO[make.__name__] = seeded
    return seeded


def tiny(name: str, **config: Any) -> nn.Module:
    return getattr(transformers, name)(**config).eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


def at(timestep: float = 500.0) -> Tensor:
    return torch.tensor([timestep])


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def grid(*sizes: int) -> Tensor:
    """Coordinates of every point of a grid, one a row."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).float()


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


@entry
def FluxTransformer2DModel() -> Case:
    return models.flux(double=4, single=4)


@entry
def Flux2Transformer2DModel() -> Case:
    return tiny(
        "Flux2Transformer2DModel",
        in_channels=4,
        num_layers=4,
        num_single_layers=5,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
    ), {
        "hidden_states": noise(1, 16, 4),
        "encoder_hidden_states": noise(1, 6, 12),
        "timestep": at(0.5),
        "guidance": at(1.0),
        "img_ids": grid(1, 4, 4, 1)[None],
        "txt_ids": grid(1, 1, 1, 6).reshape(1, 6, 4),
    }


@entry
def QwenImageTransformer2DModel() -> Case:
    return models.qwen_image()


@entry
def SD3Transformer2DModel() -> Case:
    return models.sd3()


@entry
def HunyuanDiT2DModel() -> Case:
    return models.hunyuan_dit()


@entry
def CogView3PlusTransformer2DModel() -> Case:
    return tiny(
        "CogView3PlusTransformer2DModel",
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
    ), {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states": noise(1, 5, 12),
        "timestep": at(),
        "original_size": torch.tensor([[64.0, 64.0]]),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.tensor([[0.0, 0.0]]),
    }


@entry
def CogView4Transformer2DModel() -> Case:
    return tiny(
        "CogView4Transformer2DModel",
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
        rope_axes_dim=(8, 8),
    ), {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states": noise(1, 5, 12),
        "timestep": at(),
        "original_size": torch.tensor([[64.0, 64.0]]),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.tensor([[0.0, 0.0]]),
    }


@entry
def PixArtTransformer2DModel() -> Case:
    return models.pixart()


@entry
def DiTTransformer2DModel() -> Case:
    return tiny(
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
    ), {"hidden_states": noise(1, 4, 8, 8), "timestep": at(), "class_labels": torch.tensor([3])}


@entry
def SanaTransformer2DModel() -> Case:
    return models.sana()


@entry
def Lumina2Transformer2DModel() -> Case:
    return tiny(
        "Lumina2Transformer2DModel",
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=6,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=12,
    ), {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states": noise(1, 5, 12),
        "timestep": at(0.5),
        "encoder_attention_mask": ones(1, 5, dtype=torch.bool),
    }


@entry
def LuminaNextDiT2DModel() -> Case:
    return tiny(
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
    ), {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states": noise(1, 5, 12),
        "timestep": at(0.5),
        "encoder_mask": ones(1, 5),
        "image_rotary_emb": noise(32, 32, 4),
        "cross_attention_kwargs": {},
    }


@entry
def ZImageTransformer2DModel() -> Case:
    return tiny(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=16,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=1,
        n_kv_heads=1,
        cap_feat_dim=12,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 32, 32],
    ), {"x": [noise(4, 1, 8, 8)], "cap_feats": [noise(6, 12)], "t": at(0.5)}


@entry
def AuraFlowTransformer2DModel() -> Case:
    return tiny(
        "AuraFlowTransformer2DModel",
        sample_size=8,
        num_mmdit_layers=4,
        num_single_dit_layers=5,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    ), {"hidden_states": noise(1, 4, 8, 8), "encoder_hidden_states": noise(1, 5, 12), "timestep": at(0.5)}


@entry
def ChromaTransformer2DModel() -> Case:
    return tiny(
        "ChromaTransformer2DModel",
        in_channels=4,
        num_layers=4,
        num_single_layers=5,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ), {
        "hidden_states": noise(1, 16, 4),
        "encoder_hidden_states": noise(1, 6, 12),
        "timestep": at(0.5),
        "img_ids": grid(1, 4, 4),
        "txt_ids": torch.zeros(6, 3),
    }


@entry
def BriaTransformer2DModel() -> Case:
    return tiny(
        "BriaTransformer2DModel",
        in_channels=4,
        num_layers=4,
        num_single_layers=5,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=[0, 4, 4],
    ), {
        "hidden_states": noise(1, 16, 4),
        "encoder_hidden_states": noise(1, 6, 12),
        "timestep": at(),
        "img_ids": grid(1, 4, 4),
        "txt_ids": torch.zeros(6, 3),
    }


@entry
def BriaFiboTransformer2DModel() -> Case:
    return tiny(
        "BriaFiboTransformer2DModel",
        in_channels=4,
        num_layers=4,
        num_single_layers=5,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=[0, 4, 4],
        text_encoder_dim=8,
    ), {
        "hidden_states": noise(1, 16, 4),
        "encoder_hidden_states": noise(1, 6, 12),
        "text_encoder_layers": [noise(1, 6, 8) for _ in range(9)],
        "timestep": at(),
        "img_ids": grid(1, 4, 4),
        "txt_ids": torch.zeros(6, 3),
    }


@entry
def OmniGenTransformer2DModel() -> Case:
    tokens = 6 + 1 + 16
    return tiny(
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
    ), {
        "hidden_states": noise(1, 4, 8, 8),
        "timestep": at(0.5),
        "input_ids": torch.arange(6)[None],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": ones(1, tokens, tokens),
        "position_ids": torch.arange(tokens)[None],
    }


@entry
def PRXTransformer2DModel() -> Case:
    return tiny(
        "PRXTransformer2DModel",
        in_channels=4,
        context_in_dim=12,
        hidden_size=16,
        num_heads=2,
        depth=4,
        axes_dim=[4, 4],
    ), {"hidden_states": noise(1, 4, 8, 8), "timestep": at(0.5), "encoder_hidden_states": noise(1, 5, 12)}


@entry
def HiDreamImageTransformer2DModel() -> Case:
    return tiny(
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
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=tuple(range(9)),
        force_inference_output=True,
    ), {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states_t5": noise(1, 5, 8),
        "encoder_hidden_states_llama3": noise(9, 1, 5, 4),
        "pooled_embeds": noise(1, 8),
        "timesteps": at(),
    }


@entry
def HunyuanImageTransformer2DModel() -> Case:
    return tiny(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        num_single_layers=5,
        num_refiner_layers=1,
        text_embed_dim=12,
        rope_axes_dim=(4, 4),
    ), {
        "hidden_states": noise(1, 4, 4, 4),
        "timestep": at(),
        "encoder_hidden_states": noise(1, 5, 12),
        "encoder_attention_mask": ones(1, 5, dtype=torch.bool),
    }


def _packed(name: str, **config: Any) -> Case:
    """The many that share one signature: packed latents, ids of both streams."""
    return tiny(
        name,
        in_channels=4,
        num_layers=4,
        num_single_layers=5,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
        **config,
    ), {
        "hidden_states": noise(1, 16, 4),
        "encoder_hidden_states": noise(1, 6, 12),
        "timestep": at(0.5),
        "img_ids": grid(1, 4, 4),
        "txt_ids": torch.zeros(6, 3),
    }


@entry
def OvisImageTransformer2DModel() -> Case:
    return _packed("OvisImageTransformer2DModel", out_channels=4)


@entry
def LongCatImageTransformer2DModel() -> Case:
    return _packed("LongCatImageTransformer2DModel", pooled_projection_dim=12)


@entry
def ErnieImageTransformer2DModel() -> Case:
    return tiny(
        "ErnieImageTransformer2DModel",
        hidden_size=16,
        num_attention_heads=2,
        num_layers=4,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        text_in_dim=12,
        rope_axes_dim=(2, 2, 4),
    ), {
        "hidden_states": noise(1, 4, 4, 4),
        "timestep": at(),
        "text_bth": noise(1, 5, 12),
        "text_lens": torch.tensor([5]),
    }


@entry
def PriorTransformer() -> Case:
    return tiny(
        "PriorTransformer",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        embedding_dim=12,
        num_embeddings=5,
        additional_embeddings=4,
    ), {
        "hidden_states": noise(1, 12),
        "timestep": at(),
        "proj_embedding": noise(1, 12),
        "encoder_hidden_states": noise(1, 5, 12),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Videos
# ---------------------------------------------------------------------------------------------------------------------


@entry
def WanTransformer3DModel() -> Case:
    return models.wan()


@entry
def WanVACETransformer3DModel() -> Case:
    return tiny(
        "WanVACETransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=8,
        rope_max_seq_len=32,
        vace_layers=[0, 2, 4, 6],
        vace_in_channels=12,
    ), {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "timestep": at(),
        "encoder_hidden_states": noise(1, 6, 16),
        "control_hidden_states": noise(1, 12, 2, 8, 8),
    }


@entry
def SkyReelsV2Transformer3DModel() -> Case:
    return tiny(
        "SkyReelsV2Transformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=32,
    ), {"hidden_states": noise(1, 4, 2, 8, 8), "timestep": at(), "encoder_hidden_states": noise(1, 6, 16)}


@entry
def ChronoEditTransformer3DModel() -> Case:
    return tiny(
        "ChronoEditTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=32,
    ), {"hidden_states": noise(1, 4, 3, 8, 8), "timestep": at(), "encoder_hidden_states": noise(1, 6, 16)}


def _hunyuan_video(name: str, **config: Any) -> nn.Module:
    return tiny(
        name,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        **config,
    )


@entry
def HunyuanVideoTransformer3DModel() -> Case:
    return _hunyuan_video("HunyuanVideoTransformer3DModel", num_single_layers=5, pooled_projection_dim=8), {
        "hidden_states": noise(1, 4, 2, 4, 4),
        "timestep": at(),
        "encoder_hidden_states": noise(1, 5, 12),
        "encoder_attention_mask": ones(1, 5),
        "pooled_projections": noise(1, 8),
        "guidance": at(1000.0),
    }


@entry
def HunyuanVideo15Transformer3DModel() -> Case:
    module = _hunyuan_video(
        "HunyuanVideo15Transformer3DModel", text_embed_2_dim=8, image_embed_dim=12, target_size=16, task_type="t2v"
    )
    return module, {
        "hidden_states": noise(1, 4, 2, 4, 4),
        "timestep": at(),
        "encoder_hidden_states": noise(1, 5, 12),
        "encoder_attention_mask": ones(1, 5),
        "encoder_hidden_states_2": noise(1, 4, 8),
        "encoder_attention_mask_2": ones(1, 4),
        "image_embeds": torch.zeros(1, 3, 12),
    }


@entry
def CogVideoXTransformer3DModel() -> Case:
    return models.cogvideox()


@entry
def ConsisIDTransformer3DModel() -> Case:
    return tiny(
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
    ), {
        "hidden_states": noise(1, 2, 4, 8, 8),
        "encoder_hidden_states": noise(1, 5, 8),
        "timestep": at(),
        "id_cond": noise(1, 2),
        "id_vit_hidden": [noise(1, 2, 2)],
    }


@entry
def LTXVideoTransformer3DModel() -> Case:
    return models.ltx()


@entry
def LTX2VideoTransformer3DModel() -> Case:
    return tiny(
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
        caption_channels=12,
        rope_double_precision=False,
    ), {
        "hidden_states": noise(1, 2 * 4 * 4, 4),
        "audio_hidden_states": noise(1, 9, 4),
        "encoder_hidden_states": noise(1, 5, 12),
        "audio_encoder_hidden_states": noise(1, 5, 12),
        "timestep": at(),
        "encoder_attention_mask": ones(1, 5, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 9,
        "fps": 25.0,
    }


@entry
def MochiTransformer3DModel() -> Case:
    return tiny(
        "MochiTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=6,
    ), {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "encoder_hidden_states": noise(1, 6, 16),
        "timestep": at(),
        "encoder_attention_mask": ones(1, 6, dtype=torch.bool),
    }


@entry
def AllegroTransformer3DModel() -> Case:
    return tiny(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        cross_attention_dim=16,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=12,
    ), {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "encoder_hidden_states": noise(1, 5, 12),
        "timestep": at(),
    }


@entry
def EasyAnimateTransformer3DModel() -> Case:
    return tiny(
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
    ), {"hidden_states": noise(1, 4, 2, 8, 8), "timestep": at(), "encoder_hidden_states": noise(1, 5, 12)}


@entry
def CosmosTransformer3DModel() -> Case:
    return tiny(
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
    ), {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "timestep": at(),
        "encoder_hidden_states": noise(1, 5, 16),
        "fps": 30,
    }


@entry
def LatteTransformer3DModel() -> Case:
    return tiny(
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
    ), {"hidden_states": noise(1, 4, 2, 8, 8), "timestep": at(), "encoder_hidden_states": noise(1, 5, 12)}


@entry
def Kandinsky5Transformer3DModel() -> Case:
    return tiny(
        "Kandinsky5Transformer3DModel",
        in_text_dim=12,
        in_text_dim2=8,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=2,
        num_visual_blocks=6,
        axes_dims=(4, 2, 2),
    ), {
        "hidden_states": noise(1, 2, 8, 8, 4),
        "encoder_hidden_states": noise(1, 5, 12),
        "timestep": at(),
        "pooled_projections": noise(1, 8),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(5),
    }


@entry
def SanaVideoTransformer3DModel() -> Case:
    return tiny(
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
    ), {"hidden_states": noise(1, 4, 2, 8, 8), "encoder_hidden_states": noise(1, 5, 12), "timestep": at()}


# ---------------------------------------------------------------------------------------------------------------------
# Sound
# ---------------------------------------------------------------------------------------------------------------------


@entry
def StableAudioDiTModel() -> Case:
    return tiny(
        "StableAudioDiTModel",
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=12,
        cross_attention_input_dim=12,
    ), {
        "hidden_states": noise(1, 4, 8),
        "timestep": at(),
        "encoder_hidden_states": noise(1, 5, 12),
        "global_hidden_states": noise(1, 1, 12),
        "rotary_embedding": (noise(9, 4), noise(9, 4)),
    }


@entry
def LongCatAudioDiTTransformer() -> Case:
    return tiny("LongCatAudioDiTTransformer", dit_dim=16, dit_depth=4, dit_heads=2, dit_text_dim=12, latent_dim=4), {
        "hidden_states": noise(1, 8, 4),
        "encoder_hidden_states": noise(1, 5, 12),
        "encoder_attention_mask": ones(1, 5, dtype=torch.bool),
        "timestep": at(0.5),
        "latent_cond": noise(1, 8, 4),
    }


@entry
def MiniMaxMusic3Transformer1DModel() -> Case:
    return tiny(
        "MiniMaxMusic3Transformer1DModel",
        in_channels=4,
        condition_dim=12,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=8,
        ff_inner_dim=32,
        rotary_dim=4,
        fourier_embedding_dim=8,
    ), {"hidden_states": noise(1, 4, 8), "timestep": at(0.5), "encoder_hidden_states": noise(1, 8, 12)}


# ---------------------------------------------------------------------------------------------------------------------
# Newer ones
# ---------------------------------------------------------------------------------------------------------------------


@entry
def Flux3Transformer2DModel() -> Case:
    return tiny(
        "Flux3Transformer2DModel",
        in_channels=4,
        cond_in_channels=4,
        num_layers=4,
        num_single_layers=5,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
    ), {
        "hidden_states": noise(1, 16, 4),
        "encoder_hidden_states": noise(1, 6, 12),
        "timestep": at(0.5),
        "img_ids": grid(1, 4, 4, 1),
        "txt_ids": grid(1, 1, 1, 6),
    }


@entry
def Krea2Transformer2DModel() -> Case:
    return tiny(
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
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    ), {
        "hidden_states": noise(1, 16, 4),
        "encoder_hidden_states": noise(1, 5, 2, 16),
        "timestep": at(0.5),
        "position_ids": torch.cat([torch.zeros(5, 3), grid(1, 4, 4)]),
    }


@entry
def JoyImageEditTransformer3DModel() -> Case:
    return tiny(
        "JoyImageEditTransformer3DModel",
        in_channels=4,
        hidden_size=16,
        num_attention_heads=2,
        text_dim=12,
        num_layers=4,
        rope_dim_list=[4, 2, 2],
    ), {"hidden_states": noise(1, 4, 1, 8, 8), "timestep": at(), "encoder_hidden_states": noise(1, 5, 12)}


@entry
def AnyFlowTransformer3DModel() -> Case:
    return tiny(
        "AnyFlowTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=32,
    ), {
        "hidden_states": noise(1, 2, 4, 8, 8),
        "timestep": torch.full((1, 2), 500.0),
        "r_timestep": torch.zeros(1, 2),
        "encoder_hidden_states": noise(1, 6, 16),
    }


@entry
def MotifVideoTransformer3DModel() -> Case:
    return tiny(
        "MotifVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        num_single_layers=5,
        text_embed_dim=12,
        rope_axes_dim=(4, 2, 2),
    ), {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "timestep": at(),
        "encoder_hidden_states": noise(1, 5, 12),
        "encoder_attention_mask": ones(1, 5),
    }


@entry
def NucleusMoEImageTransformer2DModel() -> Case:
    return tiny(
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
    ), {
        "hidden_states": noise(1, 16, 16),
        "img_shapes": [(1, 4, 4)],
        "encoder_hidden_states": noise(1, 5, 12),
        "timestep": at(0.5),
    }


@entry
def StableAudio3DiTModel() -> Case:
    return tiny(
        "StableAudio3DiTModel",
        io_channels=4,
        embed_dim=64,
        depth=4,
        num_heads=2,
        cond_token_dim=12,
        global_cond_dim=12,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        num_memory_tokens=2,
    ), {
        "hidden_states": noise(1, 4, 8),
        "timestep": at(0.5),
        "encoder_hidden_states": noise(1, 5, 12),
        "global_hidden_states": noise(1, 12),
    }


@entry
def AceStepTransformer1DModel() -> Case:
    return tiny(
        "AceStepTransformer1DModel",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        sliding_window=4,
    ), {
        "hidden_states": noise(1, 8, 4),
        "timestep": at(0.5),
        "timestep_r": at(0.5),
        "encoder_hidden_states": noise(1, 5, 16),
        "context_latents": noise(1, 8, 8),
    }


@entry
def GlmImageTransformer2DModel() -> Case:
    return tiny(
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
    ), {
        "hidden_states": noise(1, 4, 8, 8),
        "encoder_hidden_states": noise(1, 5, 12),
        "prior_token_id": torch.arange(16)[None],
        "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
        "timestep": at(),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.tensor([[0.0, 0.0]]),
    }


@entry
def HunyuanVideoFramepackTransformer3DModel() -> Case:
    return tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        num_single_layers=5,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=12,
        has_clean_x_embedder=True,
    ), {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "timestep": at(),
        "encoder_hidden_states": noise(1, 5, 12),
        "encoder_attention_mask": ones(1, 5),
        "pooled_projections": noise(1, 8),
        "image_embeds": noise(1, 3, 12),
        "indices_latents": torch.arange(2),
        "guidance": at(1000.0),
        "latents_clean": noise(1, 4, 1, 8, 8),
        "indices_latents_clean": torch.arange(1),
        "latents_history_2x": noise(1, 4, 2, 8, 8),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": noise(1, 4, 4, 8, 8),
        "indices_latents_history_4x": torch.arange(4),
    }


@entry
def HeliosTransformer3DModel() -> Case:
    return tiny(
        "HeliosTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=False,
        zero_history_timestep=False,
        guidance_cross_attn=False,
    ), {"hidden_states": noise(1, 4, 2, 8, 8), "timestep": at(), "encoder_hidden_states": noise(1, 6, 16)}


# ---------------------------------------------------------------------------------------------------------------------
# What to expect
# ---------------------------------------------------------------------------------------------------------------------

BLOCKS: dict[str, int] = {
    "FluxTransformer2DModel": 8,
    "Flux2Transformer2DModel": 9,
    "Flux3Transformer2DModel": 9,
    "QwenImageTransformer2DModel": 4,
    "SD3Transformer2DModel": 4,
    "HunyuanDiT2DModel": 8,
    "CogView3PlusTransformer2DModel": 4,
    "CogView4Transformer2DModel": 4,
    "PixArtTransformer2DModel": 4,
    "DiTTransformer2DModel": 4,
    "SanaTransformer2DModel": 4,
    "Lumina2Transformer2DModel": 6,
    "LuminaNextDiT2DModel": 4,
    "ZImageTransformer2DModel": 6,
    "AuraFlowTransformer2DModel": 9,
    "ChromaTransformer2DModel": 9,
    "BriaTransformer2DModel": 9,
    "BriaFiboTransformer2DModel": 9,
    "OmniGenTransformer2DModel": 5,
    "PRXTransformer2DModel": 4,
    "HunyuanImageTransformer2DModel": 9,
    "OvisImageTransformer2DModel": 9,
    "LongCatImageTransformer2DModel": 9,
    "ErnieImageTransformer2DModel": 4,
    "GlmImageTransformer2DModel": 4,
    "Krea2Transformer2DModel": 6,
    "JoyImageEditTransformer3DModel": 4,
    "PriorTransformer": 4,
    "WanTransformer3DModel": 4,
    "WanVACETransformer3DModel": 8,
    "SkyReelsV2Transformer3DModel": 4,
    "ChronoEditTransformer3DModel": 4,
    "AnyFlowTransformer3DModel": 4,
    "HeliosTransformer3DModel": 4,
    "HunyuanVideoTransformer3DModel": 9,
    "CogVideoXTransformer3DModel": 4,
    "ConsisIDTransformer3DModel": 6,
    "LTXVideoTransformer3DModel": 4,
    "LTX2VideoTransformer3DModel": 4,
    "AllegroTransformer3DModel": 4,
    "EasyAnimateTransformer3DModel": 4,
    "CosmosTransformer3DModel": 4,
    "LatteTransformer3DModel": 4,
    "Kandinsky5Transformer3DModel": 6,
    "SanaVideoTransformer3DModel": 4,
    "MotifVideoTransformer3DModel": 9,
    "StableAudioDiTModel": 4,
    "StableAudio3DiTModel": 4,
    "AceStepTransformer1DModel": 4,
    "LongCatAudioDiTTransformer": 4,
    "MiniMaxMusic3Transformer1DModel": 4,
}
"""Blocks of the chain, all loops of it together."""

SHORT: dict[str, str] = {
    "MochiTransformer3DModel": "uncached: nonzero of the text mask in each block's attention breaks the graph; one "
    "graph and 4 blocks with both capture flags",
    "HunyuanVideo15Transformer3DModel": "uncached: `if torch.all(image_embeds == 0)` and text picked by masks stand "
    "ahead of the blocks; 4 blocks in one of two graphs with both capture flags",
    "NucleusMoEImageTransformer2DModel": "uncached: tokens per expert are read back in each block (tolist); one graph "
    "with both capture flags, where 3 dense and 2 expert blocks are found but the last, a dense one again, is not",
    "HiDreamImageTransformer2DModel": "uncached: the expert loop breaks the graph in each block (bincount, then the "
    "counts as a numpy array), with both capture flags too",
    "HunyuanVideoFramepackTransformer3DModel": "uncached: several graphs; one with both capture flags, where the 4 "
    "joint blocks are found but the 5 single ones are not, since each slices at a length read from the text mask and "
    "so makes streams of new unbacked sizes",
}
"""Classes whose calls are right but not cached, or not as they should be."""
