"""The bundled model: a small FLUX that draws captioned scenes, its data set, vocabulary, checker and pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachedit_fx.shapes.bench import accuracy, bench_prompts, held_out_prompts
from cachedit_fx.shapes.checker import CheckResult, SceneRequest, check_image, parse_caption
from cachedit_fx.shapes.dataset import Scene, SceneObject, render, sample_batch, sample_scenes
from cachedit_fx.shapes.text import VOCABULARY, UnknownWordError, tokenize

if TYPE_CHECKING:
    from cachedit_fx.shapes.pipeline import encode_prompts, generate, load_pipeline, to_uint8

__all__ = [
    "VOCABULARY",
    "CheckResult",
    "Scene",
    "SceneObject",
    "SceneRequest",
    "UnknownWordError",
    "accuracy",
    "bench_prompts",
    "check_image",
    "encode_prompts",
    "generate",
    "held_out_prompts",
    "load_pipeline",
    "parse_caption",
    "render",
    "sample_batch",
    "sample_scenes",
    "to_uint8",
    "tokenize",
]

_PIPELINE_NAMES = ("encode_prompts", "generate", "load_pipeline", "to_uint8")


def __getattr__(name: str) -> Any:
    # The pipeline imports diffusers, which takes seconds; scenes, captions and the checker need torch alone.
    if name in _PIPELINE_NAMES:
        from cachedit_fx.shapes import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
