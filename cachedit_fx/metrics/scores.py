"""Computes several metrics of the same pictures: values by picture, means, and the reasons of what is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cachedit_fx.metrics.image import mean_psnr, mse, psnr, ssim
from cachedit_fx.metrics.pictures import PictureError, Source, named, paired


@dataclass(frozen=True)
class Weights:
    """Files and folders with the weights of trained networks. Nothing is downloaded."""

    clip: str | Path | None = None
    """A folder, or a model of the hub in the local cache; None: `metrics.text.CLIP`. See `metrics.text.load_clip`."""
    inception: str | Path | None = None
    """See `metrics.features.load_extractor`."""
    lpips: str | Path | None = None
    """See `metrics.features.Lpips`."""
    image_reward: str | Path | None = None
    """See `metrics.image_reward.load_image_reward`."""


@dataclass(frozen=True)
class Inputs:
    """What metrics are computed from."""

    pictures: Source
    reference: Source | None = None
    prompts: Sequence[str] = ()
    """One for each picture."""
    weights: Weights = Weights()
    fid_batch: int = 16
    """Pictures that the extractor of FID takes at a time."""


@dataclass(frozen=True)
class Metric:
    """One metric."""

    title: str
    compute: Callable[[Inputs], list[float]]
    """The value of each picture, or the one of all."""
    higher_is_better: bool
    unit: str = ""
    compares: Literal["pairs", "sets", "prompts"] = "pairs"
    """A picture with its reference, all pictures with all references, or a picture with its prompt."""
    mean: Callable[[Sequence[float]], float] = lambda values: math.fsum(values) / len(values)


@dataclass(frozen=True)
class Score:
    """A metric's result."""

    metric: str
    """A key of `METRICS`."""
    value: float
    """The mean; PSNR leaves identical pictures out of it."""
    n: int
    """Pictures that were compared."""
    values: tuple[float, ...] = ()
    """Of each picture; empty for a metric of the whole set."""


@dataclass(frozen=True)
class Scores:
    """The results of several metrics on the same pictures."""

    scores: tuple[Score, ...]
    names: tuple[str, ...]
    """The pictures', in the order of `Score.values`."""
    unpaired: tuple[str, ...] = ()
    """Files and frames without a counterpart."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Metric -> why it was not computed."""


def _fid(inputs: Inputs) -> list[float]:
    from cachedit_fx.metrics.features import WeightsError, fid, load_extractor

    if inputs.weights.inception is None:
        raise WeightsError("FID needs an Inception: name its TorchScript file (inception-2015-12-05.pt)")
    return [fid(inputs.pictures, _reference(inputs), load_extractor(inputs.weights.inception), inputs.fid_batch)]


def _lpips(inputs: Inputs) -> list[float]:
    from cachedit_fx.metrics.features import Lpips, WeightsError, lpips

    if inputs.weights.lpips is None:
        raise WeightsError("LPIPS needs an AlexNet: name torchvision's file of weights (alexnet-owt-7be5be79.pth)")
    return lpips(inputs.pictures, _reference(inputs), Lpips(inputs.weights.lpips))


def _clip_score(inputs: Inputs) -> list[float]:
    from cachedit_fx.metrics.text import CLIP, load_clip, prompt_scores

    return prompt_scores(inputs.pictures, inputs.prompts, load_clip(inputs.weights.clip or CLIP))


def _image_reward(inputs: Inputs) -> list[float]:
    from cachedit_fx.metrics.features import WeightsError
    from cachedit_fx.metrics.image_reward import load_image_reward
    from cachedit_fx.metrics.text import prompt_scores

    if inputs.weights.image_reward is None:
        raise WeightsError("ImageReward needs its weights: name the folder with ImageReward.pt and med_config.json")
    return prompt_scores(inputs.pictures, inputs.prompts, load_image_reward(inputs.weights.image_reward))


def _reference(inputs: Inputs) -> Source:
    if inputs.reference is None:
        raise PictureError("there is no reference: this metric compares pictures with others")
    return inputs.reference


METRICS: dict[str, Metric] = {
    "psnr": Metric("PSNR", lambda inputs: psnr(inputs.pictures, _reference(inputs)), True, "dB", mean=mean_psnr),
    "ssim": Metric("SSIM", lambda inputs: ssim(inputs.pictures, _reference(inputs)), True),
    "mse": Metric("MSE", lambda inputs: mse(inputs.pictures, _reference(inputs)), False),
    "lpips": Metric("LPIPS", _lpips, False),
    "fid": Metric("FID", _fid, False, compares="sets"),
    "clip_score": Metric("CLIP score", _clip_score, True, compares="prompts"),
    "image_reward": Metric("ImageReward", _image_reward, True, compares="prompts"),
}
"""Name -> metric."""


def compare(inputs: Inputs, metrics: Sequence[str] | None = None) -> Scores:
    """Compute metrics.

    Args:
        inputs: pictures, their references, their prompts.
        metrics: keys of `METRICS`. None: all that the inputs allow; the others are in `Scores.left_out`.

    Raises:
        PictureError: if a metric that was asked for cannot be computed, or none can.
    """
    unknown = [name for name in metrics or () if name not in METRICS]
    if unknown:
        raise PictureError(f"{unknown[0]!r} is no metric: choose from {', '.join(METRICS)}")
    has_pairs = any(METRICS[name].compares == "pairs" for name in metrics or METRICS)
    pairs = paired(inputs.pictures, inputs.reference) if inputs.reference is not None and has_pairs else None
    names = pairs.names if pairs else tuple(name for name, _ in named(inputs.pictures))
    scores, left_out = [], {}
    for name in metrics or METRICS:
        try:
            scores.append(_score(name, inputs, len(names)))
        except (PictureError, ImportError) as error:
            reason = _words(name, error)
            if metrics is not None:
                raise PictureError(reason) from error
            left_out[name] = reason
    if not scores:
        raise PictureError(f"no metric can be computed: {'; '.join(dict.fromkeys(left_out.values()))}")
    return Scores(tuple(scores), names, pairs.unpaired if pairs else (), left_out)


def _score(name: str, inputs: Inputs, count: int) -> Score:
    metric = METRICS[name]
    if metric.compares == "prompts" and not inputs.prompts:
        raise PictureError(f"{metric.title} compares pictures with prompts: give a prompt for each picture")
    values = metric.compute(inputs)
    return Score(name, metric.mean(values), count, () if metric.compares == "sets" else tuple(values))


def _words(name: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{METRICS[name].title} needs {error.name} (pip install 'cachedit-fx[metrics]')"
    return str(error)
