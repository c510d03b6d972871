"""Real diffusers pipelines, one a model family, of tiny components drawn at random and without text encoders.

    family = FAMILIES["QwenImage"]
    pipe = family.build()
    latents = family.latents(pipe)

An entry builds the pipeline with the scheduler and the guidance that its family is used with, and says what is then
true of a run: blocks, CFG branches, steps of each transformer. Prompts are given as embeddings, nothing is decoded.
"""

from __future__ import annotations

from . import images, videos  # noqa: F401 - their entries
from .base import FAMILIES, STEPS, Family, Pipeline

__all__ = ["FAMILIES", "STEPS", "Family", "Pipeline"]
