"""Metrics of a picture and its prompt by trained networks: CLIP score and ImageReward. Weights come from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from cachedit_fx.metrics.features import WeightsError
from cachedit_fx.metrics.pictures import PictureError, Source, named

Scorer: TypeAlias = Callable[[Image.Image, str], float]
"""(picture, its prompt) -> score."""

CLIP = "openai/clip-vit-large-patch14"
"""The CLIP that is looked for in the hub's cache if no other one is named."""


def load_clip(name: str | Path = CLIP) -> Scorer:
    """CLIP score (Hessel et al. 2021), by transformers: from 0 to 100.

        100 max(0, cos(image features, text features))

    Pictures are resized and cropped as the model's processor says. Prompts are cut at the model's length (77 tokens).

    Args:
        name: a folder with a CLIP of transformers and its processor, or a model of the hub that is in the local cache.

    Raises:
        WeightsError: if there is no such model. Nothing is downloaded.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(name, local_files_only=True).eval()
        processor: Any = CLIPProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"CLIP score needs a CLIP of transformers, and {name} is neither a folder with one nor in the hub's cache: "
            f"name a folder, or download it (hf download {CLIP})"
        ) from error

    def score(picture: Image.Image, prompt: str) -> float:
        inputs = processor(text=[prompt], images=[picture], return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            result = model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(result.image_embeds, result.text_embeds)
        return max(0.0, 100 * float(cosine))

    return score


def prompt_scores(pictures: Source, prompts: Sequence[str], scorer: Scorer) -> list[float]:
    """The score of each picture with its prompt. Pictures are rounded to 8 bits.

    Args:
        pictures: as many as prompts; those of a folder in the order of their names.
        prompts: one for each picture.
        scorer: such as `load_clip` returns.

    Raises:
        PictureError: if there are more or fewer pictures than prompts.
    """
    images = list(named(pictures))
    if len(images) != len(prompts):
        raise PictureError(
            f"there are {len(images)} pictures and {len(prompts)} prompts: give a prompt for each picture"
        )
    return [scorer(_as_image(values), prompt) for (_, values), prompt in zip(images, prompts, strict=True)]


def _as_image(values: np.ndarray) -> Image.Image:
    levels = (values * 255).round().astype(np.uint8)
    return Image.fromarray(np.broadcast_to(levels, (*levels.shape[:2], 3)).copy())
