"""Scores of pictures with their prompts in a bench: which ones, and why others are not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cachedit_fx.bench.errors import RequestError

if TYPE_CHECKING:
    from cachedit_fx.metrics.text import Scorer

DEFAULT_CLIP = "default"
"""The CLIP that is used if it is in the hub's cache; its column is left out if not."""


def load_scorers(clip: str | None, image_reward: str | None) -> dict[str, Scorer]:
    """Field of `Measured` -> scorer.

    Args:
        clip: see `Settings.clip`.
        image_reward: see `Settings.image_reward`.

    Raises:
        RequestError: if weights that were named are not there.
    """
    if clip is None and image_reward is None:
        return {}
    from cachedit_fx.metrics.features import WeightsError
    from cachedit_fx.metrics.image_reward import load_image_reward
    from cachedit_fx.metrics.text import CLIP, load_clip

    loaders: dict[str, tuple[str | None, Callable[[str], Scorer]]] = {
        "clip_score": (CLIP if clip == DEFAULT_CLIP else clip, load_clip),
        "image_reward": (image_reward, load_image_reward),
    }
    scorers = {}
    for name, (source, load) in loaders.items():
        try:
            if source is not None:
                scorers[name] = load(source)
        except WeightsError as error:
            if name != "clip_score" or clip != DEFAULT_CLIP:
                raise RequestError(str(error)) from error
    return scorers
