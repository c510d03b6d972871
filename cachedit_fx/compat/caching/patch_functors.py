"""The patch functors by name; none of them does anything (`PatchFunctor`)."""

from cachedit_fx.compat.patterns import PatchFunctor


class BriaFiboPatchFunctor(PatchFunctor):
    """For Bria Fibo."""


class ChromaPatchFunctor(PatchFunctor):
    """For Chroma."""


class Cosmos3OmniPatchFunctor(PatchFunctor):
    """For Cosmos 3 Omni."""


class DiTPatchFunctor(PatchFunctor):
    """For DiT."""


class ErnieImagePatchFunctor(PatchFunctor):
    """For ERNIE-Image."""


class FluxPatchFunctor(PatchFunctor):
    """For FLUX.1."""


class GlmImagePatchFunctor(PatchFunctor):
    """For GLM-Image."""


class HiDreamPatchFunctor(PatchFunctor):
    """For HiDream."""


class HunyuanDiTPatchFunctor(PatchFunctor):
    """For HunyuanDiT."""


class LTX2PatchFunctor(PatchFunctor):
    """For LTX-2."""


class QwenImageControlNetPatchFunctor(PatchFunctor):
    """For Qwen-Image with a ControlNet."""


class WanVACEPatchFunctor(PatchFunctor):
    """For Wan VACE."""


class ZImageControlNetPatchFunctor(PatchFunctor):
    """For Z-Image with a ControlNet."""


__all__ = [
    "BriaFiboPatchFunctor",
    "ChromaPatchFunctor",
    "Cosmos3OmniPatchFunctor",
    "DiTPatchFunctor",
    "ErnieImagePatchFunctor",
    "FluxPatchFunctor",
    "GlmImagePatchFunctor",
    "HiDreamPatchFunctor",
    "HunyuanDiTPatchFunctor",
    "LTX2PatchFunctor",
    "PatchFunctor",
    "QwenImageControlNetPatchFunctor",
    "WanVACEPatchFunctor",
    "ZImageControlNetPatchFunctor",
]
