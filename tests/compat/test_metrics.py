"""cache-dit's functions of metrics: names, order of arguments, (value, n)."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lib.small_networks import save_clip, save_image_reward
from PIL import Image

from cachedit_fx.compat import metrics
from cachedit_fx.metrics import PictureError
from cachedit_fx.metrics.text import load_clip

skimage = pytest.importorskip("skimage.metrics", reason="the extra [metrics] has it")
pytest.importorskip("torchmetrics", reason="the extra [metrics] has it")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    for index in range(3):
        picture = np.random.default_rng(index).integers(0, 200, (16, 16, 3), dtype=np.uint8)
        for name, change in (("true", 0), ("test", 16 * (index > 0))):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(picture + np.uint8(change)).save(tmp_path / name / f"{index}.png")
    return str(tmp_path / "true"), str(tmp_path / "test")


def test_values_and_counts(folders: tuple[str, str]) -> None:
    assert metrics.compute_psnr(*folders) == pytest.approx((20 * math.log10(255 / 16), 3))
    assert metrics.compute_mse(*folders) == pytest.approx((2 / 3 * 256, 3))
    pairs = [[np.asarray(Image.open(Path(folder) / f"{i}.png")) for folder in folders] for i in range(3)]
    expected = sum(skimage.structural_similarity(*pair, channel_axis=2) for pair in pairs) / 3
    assert metrics.compute_ssim(*folders) == pytest.approx((expected, 3), abs=1e-6)
    assert metrics.compute_psnr(pairs[1][0], pairs[1][1])[1] == 1
    assert metrics.compute_video_psnr(folders[0], folders[0]) == (math.inf, 3)


def test_prompts_come_first_or_second(folders: tuple[str, str], tmp_path: Path, monkeypatch) -> None:
    save_clip(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\na blue circle\na red circle\n")
    ways: list[tuple[Any, Any]] = [
        (folders[1], str(prompts)),
        (str(prompts), folders[1]),
        (folders[1], ["a red square", "a blue circle", "a red circle"]),
    ]
    results = [metrics.compute_clip_score(first, second, tmp_path) for first, second in ways]
    assert results[0] == results[1] == results[2] and results[0][1] == 3
    monkeypatch.setenv("CLIP_MODEL_DIR", str(tmp_path))
    picture = Path(folders[1]) / "0.png"
    expected = load_clip(tmp_path)(Image.open(picture), "a red square")
    assert metrics.compute_clip_score(picture, "a red square") == pytest.approx((expected, 1))
    save_image_reward(tmp_path)
    assert metrics.compute_image_reward(str(prompts), folders[1], imagereward_model_path=tmp_path)[1] == 3


def test_a_file_of_prompts_that_is_not_there_is_no_prompt(folders: tuple[str, str]) -> None:
    for both in ((folders[0], "prompts.txt"), ("prompts.txt", folders[0])):
        with pytest.raises(PictureError, match="prompts.txt is no file of prompts"):
            metrics.compute_clip_score(*both)


def test_what_is_missing_is_told(folders: tuple[str, str]) -> None:
    for call, message in (
        (metrics.compute_fid, "FID needs an Inception"),
        (metrics.compute_lpips, "LPIPS needs an AlexNet"),
        (metrics.compute_clip_score, "there are no prompts"),
    ):
        with pytest.raises(PictureError, match=message):
            call(*folders)
