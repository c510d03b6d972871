"""A zoo of diffusion transformers: every denoiser class that diffusers exports, made tiny, with inputs of one forward.

    module, inputs = ZOO["FluxTransformer2DModel"]()
    module(**inputs(1))   # a step at a small resolution; inputs(2) is a larger one

At least four blocks in each loop, widths of 16 or so: a forward takes milliseconds on a CPU. Weights and inputs are
random but the same at every call. `BLOCKS` says how many blocks a class's chain has, `EXCLUDED` why an exported class
is not here. Nothing in the package that is tested looks at these names.
"""

from __future__ import annotations

from diffusers.models import transformers

from . import audio, images, images_joint, others, videos, videos_more, videos_wan  # noqa: F401 - their entries
from .base import BLOCKS, ZOO, Case, Inputs

__all__ = ["BLOCKS", "EXCLUDED", "MISSING", "SHORT", "ZOO", "Case", "Inputs"]

EXCLUDED: dict[str, str] = {
    "DreamLiteTransformer2DModel": "a layer of DreamLite's UNet, which has the timestep and the loop over such layers",
    "DualTransformer2DModel": "a wrapper: two Transformer2DModels side by side, a layer of Versatile Diffusion's UNet",
    "MiniMaxMusic3RVQDepthDecoder": "no denoiser: a language model that samples codes, without a timestep",
    "TransformerTemporalModel": "a layer of video UNets (AnimateDiff's motion modules); its blocks take no timestep",
}
"""Exported classes that are no denoisers, and why."""

SHORT = {
    "HiDreamImageTransformer2DModel": r"transformer_hidream_image\.py:\d+, in moe_infer",
    "HunyuanImageTransformer2DModel": r"attention_dispatch\.py:\d+, in _native_attention",
    "WanAnimate2Transformer3DModel": r"transformer_wan_animate_2\.py:\d+",
}
"""Classes whose blocks no capture puts into one graph, and the line upstream that breaks it: uncached, and right."""

MISSING = [name for name in dir(transformers) if name[0].isupper() and name not in ZOO and name not in EXCLUDED]
"""Exported classes that nobody has entered yet: a new release of diffusers may bring some."""
