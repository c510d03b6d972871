"""Ten known models in their true configurations, without weights: what `cachedit bench motion` counts on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

DTYPE = torch.bfloat16


def _tokens(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def _flux() -> tuple[Any, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True), {
        "hidden_states": _tokens(1, 256, 64),
        "encoder_hidden_states": _tokens(1, 64, 4096),
        "pooled_projections": _tokens(1, 768),
        "timestep": _tokens(1),
        "guidance": _tokens(1),
        "img_ids": _tokens(256, 3),
        "txt_ids": _tokens(64, 3),
    }


def _qwen_image() -> tuple[Any, dict[str, Any]]:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(), {
        "hidden_states": _tokens(1, 256, 64),
        "encoder_hidden_states": _tokens(1, 64, 3584),
        "encoder_hidden_states_mask": None,
        "timestep": _tokens(1),
        "img_shapes": [[(1, 16, 16)]],
    }


def _sd3() -> tuple[Any, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    sizes = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
    return SD3Transformer2DModel(joint_attention_dim=4096, pooled_projection_dim=2048, **sizes), {
        "hidden_states": _tokens(1, 16, 32, 32),
        "encoder_hidden_states": _tokens(1, 64, 4096),
        "pooled_projections": _tokens(1, 2048),
        "timestep": _tokens(1),
    }


def _auraflow() -> tuple[Any, dict[str, Any]]:
    from diffusers import AuraFlowTransformer2DModel

    return AuraFlowTransformer2DModel(pos_embed_max_size=9216), {
        "hidden_states": _tokens(1, 4, 32, 32),
        "encoder_hidden_states": _tokens(1, 64, 2048),
        "timestep": _tokens(1),
    }


def _hunyuan_video() -> tuple[Any, dict[str, Any]]:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(), {
        "hidden_states": _tokens(1, 16, 1, 32, 32),
        "timestep": _tokens(1),
        "encoder_hidden_states": _tokens(1, 64, 4096),
        "encoder_attention_mask": torch.empty(1, 64, dtype=torch.bool),
        "pooled_projections": _tokens(1, 768),
        "guidance": _tokens(1),
    }


def _cogvideox() -> tuple[Any, dict[str, Any]]:
    from diffusers import CogVideoXTransformer3DModel

    sizes = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
    return CogVideoXTransformer3DModel(**sizes), {
        "hidden_states": _tokens(1, 2, 16, 32, 32),
        "encoder_hidden_states": _tokens(1, 226, 4096),
        "timestep": torch.empty(1, dtype=torch.int64),
        "image_rotary_emb": (_tokens(512, 64), _tokens(512, 64)),
    }


def _wan() -> tuple[Any, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(), {
        "hidden_states": _tokens(1, 16, 1, 32, 32),
        "timestep": torch.empty(1, dtype=torch.int64),
        "encoder_hidden_states": _tokens(1, 512, 4096),
    }


def _cogview4() -> tuple[Any, dict[str, Any]]:
    from diffusers import CogView4Transformer2DModel

    return CogView4Transformer2DModel(), {
        "hidden_states": _tokens(1, 16, 32, 32),
        "encoder_hidden_states": _tokens(1, 64, 4096),
        "timestep": _tokens(1),
        "original_size": _tokens(1, 2),
        "target_size": _tokens(1, 2),
        "crop_coords": _tokens(1, 2),
    }


def _dit() -> tuple[Any, dict[str, Any]]:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(in_channels=4, out_channels=8, num_layers=28, sample_size=64), {
        "hidden_states": _tokens(1, 4, 64, 64),
        "timestep": torch.empty(1, dtype=torch.int64),
        "class_labels": torch.empty(1, dtype=torch.int64),
    }


def _ltx() -> tuple[Any, dict[str, Any]]:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(), {
        "hidden_states": _tokens(1, 256, 128),
        "encoder_hidden_states": _tokens(1, 64, 4096),
        "timestep": _tokens(1),
        "encoder_attention_mask": torch.empty(1, 64),
        "num_frames": 1,
        "height": 16,
        "width": 16,
    }


MODELS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "FLUX.1-dev": _flux,
    "Qwen-Image": _qwen_image,
    "SD3 medium": _sd3,
    "AuraFlow": _auraflow,
    "HunyuanVideo": _hunyuan_video,
    "CogVideoX-5B": _cogvideox,
    "CogView4": _cogview4,
    "DiT-XL/2": _dit,
    "LTX-Video": _ltx,
    "Wan 2.1 14B": _wan,
}
"""Model -> makes its module, and the inputs of one call, on the present device. Few tokens, since weights count."""


def make(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in bfloat16 and in eval mode, and the keyword arguments of one call, on the meta device."""
    with torch.device("meta"):
        module, arguments = MODELS[name]()
    return module.to(DTYPE).eval(), arguments
