"""cache-dit's functions of metrics on those of `cachedit_fx.metrics`: each returns (value, n).

    psnr, n = compute_psnr("true_dir", "test_dir")            the reference comes first

A value is the mean over pictures; PSNR leaves identical ones out of it. n is the number of pictures that were compared.
Differences: PSNR is right for 8-bit pictures (docs/metrics.md), files of folders are paired by name alone, identical
folders have an infinite PSNR in place of None, and nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from cachedit_fx.metrics.image import mean_psnr, mse, psnr, ssim
from cachedit_fx.metrics.pictures import PictureError, Source
from cachedit_fx.metrics.scores import Inputs, Weights, compare

Result = tuple[float, int]


def compute_psnr(image_true: Source, image_test: Source) -> Result:
    """PSNR in dB, see `cachedit_fx.metrics.psnr`."""
    values = psnr(image_test, image_true)
    return mean_psnr(values), len(values)


def compute_ssim(image_true: Source, image_test: Source) -> Result:
    """SSIM with scikit-image's default window, see `cachedit_fx.metrics.ssim`."""
    return _mean(ssim(image_test, image_true, window="uniform"))


def compute_mse(image_true: Source, image_test: Source) -> Result:
    """MSE in squared 8-bit units, see `cachedit_fx.metrics.mse`."""
    return _mean(mse(image_test, image_true))


def _mean(values: Sequence[float]) -> Result:
    return sum(values) / len(values), len(values)


def compute_lpips(image_true: Source, image_test: Source, lpips_path: str | Path | None = None) -> Result:
    """LPIPS with AlexNet, whose weights are in the file `lpips_path`; see `cachedit_fx.metrics.features.Lpips`."""
    return _score("lpips", Inputs(image_test, image_true, weights=Weights(lpips=lpips_path)))


def compute_fid(image_true: Source, image_test: Source, inception_path: str | Path | None = None) -> Result:
    """FID by the extractor in the file `inception_path`; see `cachedit_fx.metrics.features.load_extractor`."""
    return _score("fid", Inputs(image_test, image_true, weights=Weights(inception=inception_path)))


def compute_clip_score(img_dir: Source, prompts: Source, clip_model_path: str | Path | None = None) -> Result:
    """CLIP score; pictures and prompts in either order.

    Args:
        img_dir: pictures. With the other order, prompts.
        prompts: a text file with a prompt a line, a list of prompts, or the prompt of a single picture.
        clip_model_path: a folder or a name; None: that in the environment variable CLIP_MODEL_DIR, or the default.
    """
    source, texts = _in_order(img_dir, prompts)
    weights = Weights(clip=clip_model_path or os.environ.get("CLIP_MODEL_DIR"))
    return _score("clip_score", Inputs(source, prompts=texts, weights=weights))


def compute_reward_score(img_dir: Source, prompts: Source, imagereward_model_path: str | Path | None = None) -> Result:
    """ImageReward; pictures and prompts in either order, as in `compute_clip_score`.

    Args:
        imagereward_model_path: the folder of the weights; None: the environment variable IMAGEREWARD_MODEL_DIR.
    """
    source, texts = _in_order(img_dir, prompts)
    weights = Weights(image_reward=imagereward_model_path or os.environ.get("IMAGEREWARD_MODEL_DIR"))
    return _score("image_reward", Inputs(source, prompts=texts, weights=weights))


def _score(name: str, inputs: Inputs) -> Result:
    (score,) = compare(inputs, [name]).scores
    return score.value, score.n


def _in_order(first: Source, second: Source) -> tuple[Source, list[str]]:
    """Pictures and prompts, whichever came first: the older README and cache-dit 1.5.3 disagree."""
    for source, prompts in ((first, second), (second, first)):
        if isinstance(prompts, (list, tuple)) and all(isinstance(prompt, str) for prompt in prompts):
            return source, list(prompts)
        if isinstance(prompts, (str, Path)) and Path(prompts).suffix == ".txt":
            return source, _lines_of(Path(prompts))
    if isinstance(second, str) and not Path(second).exists():
        return first, [second]
    raise PictureError("there are no prompts: give a text file with a prompt a line, or a list of prompts")


def _lines_of(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PictureError(f"{path} is no file of prompts ({error})") from error


compute_image_reward: Callable[..., Result] = compute_reward_score
"""The older README's name."""
compute_video_psnr: Callable[..., Result] = compute_psnr
compute_video_ssim: Callable[..., Result] = compute_ssim
compute_video_mse: Callable[..., Result] = compute_mse
compute_video_lpips: Callable[..., Result] = compute_lpips
compute_video_fid: Callable[..., Result] = compute_fid
