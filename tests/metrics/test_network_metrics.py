"""FID, LPIPS, CLIP score and ImageReward by small random networks, against torchmetrics and the formulas."""

import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lib.small_networks import save_clip, save_image_reward
from PIL import Image
from torch import nn

from cachedit_fx.metrics import PictureError
from cachedit_fx.metrics.features import Lpips, WeightsError, fid, load_extractor, lpips
from cachedit_fx.metrics.image_reward import MEAN, STD, load_image_reward
from cachedit_fx.metrics.scores import Inputs, Weights, compare
from cachedit_fx.metrics.text import load_clip, prompt_scores

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
pytest.importorskip("torchmetrics", reason="the extra [metrics] has it")


class Means(nn.Module):
    """An extractor: the mean of each colour, and of each half."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        values = pictures.float() / 255
        return torch.cat([values.mean((2, 3)), values[..., : values.shape[-1] // 2].mean((2, 3))], 1)


def test_fid_equals_the_formula_and_needs_no_pairs(tmp_path: Path) -> None:
    torch.jit.script(Means()).save(str(tmp_path / "extractor.pt"))
    extractor = load_extractor(tmp_path / "extractor.pt")
    left, right = torch.rand(9, 3, 8, 8), torch.rand(7, 3, 8, 8) ** 2
    features = [Means()((part * 255).round().byte()).double() for part in (left, right)]
    (m, n), (c, d) = [part.mean(0) for part in features], [torch.cov(part.T) for part in features]
    root = torch.linalg.eigvals(c @ d).sqrt().real.sum()
    expected = float((m - n).square().sum() + c.trace() + d.trace() - 2 * root)
    assert fid(left, right, extractor, batch=4) == pytest.approx(expected, abs=1e-6)
    assert abs(fid(left, left, extractor)) < 1e-6
    scores = compare(Inputs(left, right, weights=Weights(inception=tmp_path / "extractor.pt")), ["fid"])
    assert scores.scores[0].value == pytest.approx(expected, abs=1e-6) and scores.scores[0].values == ()
    with pytest.raises(PictureError, match="one has 1: give two or more"):
        fid(left[:1], right, extractor)
    with pytest.raises(WeightsError, match=r"is no file: get inception-2015-12-05\.pt"):
        load_extractor(tmp_path / "missing.pt")
    (tmp_path / "bad.pt").write_bytes(b"bad")
    with pytest.raises(WeightsError, match="is no TorchScript file"):
        load_extractor(tmp_path / "bad.pt")


def alexnet() -> nn.Sequential:
    """torchvision's `alexnet().features`, random."""
    torch.manual_seed(0)
    pool = nn.MaxPool2d(3, 2)
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), pool, nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), pool,
        nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(), pool,
    )  # fmt: skip


def test_lpips_equals_torchmetrics(tmp_path: Path, monkeypatch) -> None:
    from torchmetrics.functional.image import lpips as theirs

    network = alexnet()
    torch.save({f"features.{name}": value for name, value in network.state_dict().items()}, tmp_path / "alexnet.pth")
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained=False: network)
    monkeypatch.setattr(theirs, "_TORCHVISION_AVAILABLE", True, raising=False)
    left, right = torch.rand(2, 3, 40, 48), torch.rand(2, 3, 40, 48)
    expected = theirs._LPIPS(pretrained=True, net="alex")(left, right, normalize=True).flatten().tolist()
    assert lpips(left, right, Lpips(tmp_path / "alexnet.pth")) == pytest.approx(expected, abs=1e-6)
    assert lpips(left, left, Lpips(tmp_path / "alexnet.pth")) == [0, 0]
    with pytest.raises(PictureError, match="too small for LPIPS: it must be 31 pixels"):
        lpips(left[..., :20], right[..., :20], Lpips(tmp_path / "alexnet.pth"))
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(WeightsError, match=r"no AlexNet of torchvision: 'features\.0\.weight' is missing"):
        Lpips(tmp_path / "empty.pth")
    with pytest.raises(WeightsError, match=r"is no file: get alexnet-owt"):
        Lpips(tmp_path / "missing.pth")


JUNK = {
    "text": lambda path: path.write_text("no weights"),
    "nothing": lambda path: path.write_bytes(b""),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "list": lambda path: torch.save([1, 2], path),
    "names": lambda path: torch.save({"features.0.weight": 1, "features.0.bias": 1}, path),
    "picture": lambda path: Image.new("RGB", (4, 4)).save(path, "PNG"),
    "archive": lambda path: zipfile.ZipFile(path, "w").close(),
}
"""What a file of weights may hold by mistake."""


@pytest.mark.parametrize("junk", JUNK)
def test_any_other_file_in_place_of_weights_is_named(tmp_path: Path, junk: str) -> None:
    save_image_reward(tmp_path)
    for name, load in (
        ("alexnet.pth", lambda path: Lpips(path)),
        ("alexnet.safetensors", lambda path: Lpips(path)),
        ("inception.pt", lambda path: load_extractor(path)),
        ("ImageReward.pt", lambda path: load_image_reward(path.parent)),
        ("med_config.json", lambda path: load_image_reward(path.parent)),
    ):
        path = tmp_path / name
        before = path.read_bytes() if path.exists() else None
        JUNK[junk](path)
        with pytest.raises(WeightsError, match=name):
            load(path)
        if before is not None:
            path.write_bytes(before)


def test_clip_score_is_the_cosine(tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    save_clip(tmp_path)
    pictures, prompts = torch.rand(3, 3, 20, 24), ["a red square", "a blue circle", "a red circle"]
    scores = prompt_scores(pictures, prompts, load_clip(tmp_path))
    model, processor = CLIPModel.from_pretrained(tmp_path), CLIPProcessor.from_pretrained(tmp_path)
    images = [(part * 255).round().byte().movedim(0, -1).numpy() for part in pictures]
    inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        result = model(**inputs)
    cosines = 100 * torch.nn.functional.cosine_similarity(result.image_embeds, result.text_embeds)
    assert scores == pytest.approx(cosines.clamp(0).tolist(), abs=1e-4) and len(set(scores)) > 1
    assert any(score > 0 for score in scores)
    with pytest.raises(PictureError, match="there are 3 pictures and 1 prompts"):
        prompt_scores(pictures, prompts[:1], load_clip(tmp_path))
    with pytest.raises(WeightsError, match="neither a folder with one nor in the hub's cache"):
        load_clip(tmp_path / "nothing")


def test_image_reward_depends_on_picture_and_prompt_and_is_normed(tmp_path: Path) -> None:
    """The translation of names was compared with the code of the authors once: equal to four digits."""
    save_image_reward(tmp_path)
    score = load_image_reward(tmp_path)
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (48, 40, 3), dtype=np.uint8)) for i in (0, 1)]
    values = [score(picture, prompt) for picture in pictures for prompt in ("a red square", "a blue circle")]
    assert all(map(math.isfinite, values)) and len({round(value, 5) for value in values}) == 4
    assert score(pictures[0], "a red square") == values[0]
    weights = torch.load(tmp_path / "ImageReward.pt")
    for name in ("mlp.layers.2.weight", "mlp.layers.2.bias"):
        weights[name].zero_()
    torch.save(weights, tmp_path / "ImageReward.pt")
    assert load_image_reward(tmp_path)(pictures[0], "a red square") == pytest.approx(-MEAN / STD)
    del weights["blip.visual_encoder.blocks.0.norm1.bias"]
    torch.save(weights, tmp_path / "ImageReward.pt")
    with pytest.raises(WeightsError, match=r"layer_norm1\.bias are missing or unknown"):
        load_image_reward(tmp_path)
    (tmp_path / "ImageReward.pt").unlink()
    with pytest.raises(WeightsError, match="no such file: get zai-org/ImageReward"):
        load_image_reward(tmp_path)
