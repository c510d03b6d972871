"""PSNR, SSIM and MSE against scikit-image and torchmetrics; sources, folders, videos, and their errors."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lib.command_line import invoke, plain
from PIL import Image

from cachedit_fx.metrics import PictureError, mse, paired, psnr, ssim
from cachedit_fx.metrics.pictures import read
from cachedit_fx.metrics.scores import Inputs, compare

torchmetrics = pytest.importorskip("torchmetrics", reason="the extra [metrics] has it")
skimage = pytest.importorskip("skimage.metrics", reason="the extra [metrics] has it")


def levels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@given(st.integers(0, 999), st.integers(11, 24), st.integers(11, 24), st.sampled_from([0, 1, 16, 255]))
def test_values_equal_scikit_image_on_8_bits(seed: int, height: int, width: int, change: int) -> None:
    left = levels(seed, height, width, 3)
    right = np.clip(left.astype(int) + np.random.default_rng(seed).integers(-change, change + 1, left.shape), 0, 255)
    right = right.astype(np.uint8)
    (error,), (ratio,), (gauss,), (uniform,) = (
        mse(left, right), psnr(left, right), ssim(left, right), ssim(left, right, window="uniform")
    )  # fmt: skip
    assert error == pytest.approx(skimage.mean_squared_error(left, right), abs=1e-6)
    if change == 0:
        assert ratio == math.inf and gauss == uniform == 1
    else:
        assert ratio == pytest.approx(skimage.peak_signal_noise_ratio(left, right), abs=1e-6)
    expected = skimage.structural_similarity(left, right, channel_axis=2)
    assert uniform == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_values_equal_torchmetrics(noise: float) -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    metrics: list[Any] = [peak_signal_noise_ratio, structural_similarity_index_measure]
    left = torch.rand(3, 3, 20, 24, dtype=torch.float64)
    right = (left + noise * torch.randn_like(left)).clamp(0, 1)
    for index, (ratio, similarity) in enumerate(zip(psnr(left, right), ssim(left, right), strict=True)):
        pair = left[index : index + 1], right[index : index + 1]
        expected = [metric(*pair, data_range=1.0).item() for metric in metrics]
        assert similarity == pytest.approx(expected[1], abs=1e-6)
        assert ratio == pytest.approx(expected[0], rel=1e-6)  # they take the logarithm in float32


def test_a_large_error_of_8_bits_does_not_wrap() -> None:
    dark = np.zeros((12, 12, 3), np.uint8)
    assert psnr(dark + 16, dark) == pytest.approx([20 * math.log10(255 / 16)])
    assert psnr(dark + 255, dark) == pytest.approx([0.0])


def test_all_ways_to_give_a_picture_are_equal(tmp_path: Path) -> None:
    values = levels(0, 2, 13, 12, 3)
    tensor = torch.from_numpy(values).movedim(-1, 1)
    Image.fromarray(values[0]).save(tmp_path / "picture.png")
    np.save(tmp_path / "array.npy", values)
    torch.save(tensor, tmp_path / "tensor.pt")
    sources: list[Any] = [values, tensor, tensor / 255, list(tensor), [Image.fromarray(part) for part in values],
               tmp_path / "array.npy", str(tmp_path / "tensor.pt")]  # fmt: skip
    for source in sources:
        assert np.abs(np.stack(read(source)) - values / 255).max() < 1e-7
    np.testing.assert_array_equal(read(tmp_path / "picture.png")[0], values[0] / 255)


def test_folders_are_paired_by_name_and_the_rest_is_listed(tmp_path: Path) -> None:
    for folder, names in (
        ("a", ("one.png", "two.png", "sub/three.png")),
        ("b", ("two.bmp", "sub/three.png", "four.png")),
    ):
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(levels(len(name), 12, 12, 3)).save(path)
    pairs = paired(tmp_path / "a", tmp_path / "b")
    assert pairs.names == ("sub/three", "two")
    assert [Path(text.split(" (")[0]).name for text in pairs.unpaired] == ["one.png", "four.png"]
    assert psnr(tmp_path / "a", tmp_path / "b") == [math.inf, math.inf]


def test_files_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("10", "9", "img_2", "img_10", "img_1"):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{name}.png")
    assert paired(tmp_path, tmp_path).names == ("9", "10", "img_1", "img_2", "img_10")


def test_videos_are_compared_frame_by_frame(tmp_path: Path) -> None:
    frames = levels(0, 5, 12, 12, 3)
    for folder, part in (("a", frames), ("b", frames[:3])):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "clip.npy", part)
    pairs = paired(tmp_path / "a", tmp_path / "b")
    assert pairs.names == ("clip#0", "clip#1", "clip#2") and pairs.unpaired == ("2 frames of clip",)


def test_a_gif_is_a_video(tmp_path: Path) -> None:
    pytest.importorskip("imageio", reason="scikit-image brings it along")
    shades = [Image.new("RGB", (12, 12), (shade,) * 3) for shade in (0, 100, 200)]
    shades[0].save(tmp_path / "clip.gif", save_all=True, append_images=shades[1:])
    assert [round(255 * frame.mean()) for frame in read(tmp_path / "clip.gif")] == [0, 100, 200]


GREY = np.zeros((12, 12, 3))
BAD = [
    (lambda: psnr(GREY, np.zeros((12, 13, 3))), "is 12 x 12 with 3 channels, and its reference 13 x 12"),
    (lambda: psnr(GREY - 1, GREY), "floats must be in 0..1"),
    (lambda: psnr(GREY * math.nan, GREY), "floats must be in 0..1"),
    (lambda: psnr(GREY.astype(np.int64), GREY), "it must hold uint8, or floats in 0..1"),
    (lambda: psnr(torch.zeros(12, 12), GREY), r"it must be \[3, H, W\] or \[N, 3, H, W\]"),
    (lambda: psnr(torch.zeros(12, 12, 3), GREY), r"it must be \[3, H, W\]"),
    (lambda: psnr([], []), "there is no picture"),
    (lambda: psnr("missing.png", GREY), "there is no such file or folder"),
    (lambda: psnr(__file__, GREY), "is no picture: its name must end with one of"),
    (lambda: psnr(3, GREY), "int is no picture"),  # type: ignore[arg-type]
    (lambda: psnr("missing", Path(__file__).parent), "missing cannot be read: there is no such file or folder"),
    (lambda: psnr(Path(__file__).parent, "missing"), "missing cannot be read: there is no such file or folder"),
    (lambda: psnr([Path(__file__).parent], [GREY]), "metrics is a folder: give it alone"),
    (lambda: psnr(np.zeros((0, 12, 12, 3)), GREY), "has no values"),
    (lambda: psnr(torch.zeros(3, 0, 12), GREY), "has no values"),
    (lambda: compare(Inputs(GREY), None), r"^no metric can be computed: there is no reference: [^;]*; LPIPS"),
    (lambda: psnr(Image.new("I;16", (12, 12)), GREY), "more than 8 bits a channel"),
    (lambda: ssim(GREY[:5], GREY[:5]), "too small for SSIM: it must be 6 pixels"),
    (lambda: ssim(GREY, GREY, window="box"), "must be one of gaussian, uniform"),  # type: ignore[arg-type]
    (lambda: compare(Inputs(GREY, GREY), ["psrn"]), "'psrn' is no metric: choose from psnr, ssim"),
    (lambda: compare(Inputs(GREY), ["psnr"]), "there is no reference"),
    (lambda: compare(Inputs(GREY, GREY), ["clip_score"]), "CLIP score compares pictures with prompts"),
    (lambda: compare(Inputs(GREY, GREY), ["fid"]), "FID needs an Inception"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_told_why(call, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        call()


def test_folders_without_a_common_name_and_names_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    for name in ("a/one.png", "b/two.png", "c/one.png", "c/one.bmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (12, 12)).save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    for folder, message in (("b", "no names in common"), ("c", "have one name"), ("empty", "has no pictures")):
        with pytest.raises(PictureError, match=message):
            paired(tmp_path / "a", tmp_path / folder)
    with pytest.raises(PictureError, match="one of both is a folder"):
        paired(tmp_path / "a", tmp_path / "a" / "one.png")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """uncached: three pictures; runs/near and runs/far: the same but for 1 and 16 levels, one of `near` identical."""
    for index, name in enumerate("xyz"):
        picture = levels(index, 16, 16, 3) // 2
        for folder, change in (("uncached", 0), ("runs/near", int(name != "y")), ("runs/far", 16)):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture + np.uint8(change)).save(tmp_path / folder / f"{name}.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "runs/far/alone.png")
    return tmp_path


def test_the_command_compares_folders_and_leaves_files(folders: Path) -> None:
    paths = ("-r", folders / "uncached", "-d", folders / "runs", "--out", folders / "out")
    result = invoke("metrics", "psnr", "mse", *paths, columns=200)
    assert result.exit_code == 0, result.output
    page = json.loads((folders / "out/metrics.json").read_text())["results"]
    values = {
        Path(name).name: {score["metric"]: score["value"] for score in part["scores"]} for name, part in page.items()
    }
    assert values["far"] == pytest.approx({"psnr": 20 * math.log10(255 / 16), "mse": 256.0})
    assert values["near"] == pytest.approx({"psnr": 20 * math.log10(255), "mse": 2 / 3})
    words = "".join(result.output.split())  # a long path breaks lines anywhere
    assert "near:1of3picturesareidentical" in words and "alone.png" in words
    table = (folders / "out/metrics.md").read_text()
    assert "| 3 | 24.0484 | 256.0000 |" in table and "alone.png (no reference)" in table


def test_flags_of_cache_dits_command_are_taken(folders: Path) -> None:
    pictures = ("-i1", folders / "uncached", "-i2", folders / "runs/far")
    result = invoke("metrics", *pictures, "-s", "-table", "-verbose", "--psnr-type", "custom", "-b", 2)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == ["| pictures | n | PSNR dB↑ |", "| --- | ---: | ---: |",
                                          f"| {folders / 'runs/far'} | 3 | 24.0484 |"]  # fmt: skip


def test_all_computes_what_can_be_and_says_why_the_rest_is_not(folders: Path) -> None:
    result = invoke("metrics", "all", "-i1", folders / "uncached", "-i2", folders / "runs/far", columns=300)
    assert result.exit_code == 0, result.output
    words = plain(result.output)
    assert "24.0484" in words and "SSIM↑" in words
    for reason in ("FID needs an Inception", "LPIPS needs an AlexNet", "CLIP score compares", "ImageReward compares"):
        assert f"left out: {reason}" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-i1", "a.png"), "give -i2, what is judged"),
        (("-i2", "a.png"), "give -i1, the reference, or -p"),
        (("-i1", "a.png", "-i2", "b.png"), "b.png cannot be read: there is no such file"),
        (("fid", "-i1", "uncached", "-i2", "runs/near"), "FID needs an Inception"),
        (("clip_score", "-p", "none.txt", "-i2", "runs/near"), "none.txt is no file of prompts"),
        (("psnr", "-r", "uncached", "-d", "uncached"), "holds no folders and no videos"),
        (("psnr", "-r", "uncached", "-d", "runs", "-plog", "log"), "cachedit bench measures them"),
        (("psnr", "-r", "uncached", "-d", "runs", "-ptags", "F8B0"), "cachedit bench measures them"),
        (("psnr", "-r", "uncached", "-d", "runs", "-extra-ptags", "F8B0"), "cachedit bench measures them"),
        (("psnr", "-r", "uncached", "-d", "runs", "--cal-speedup"), "cachedit bench measures them"),
        (("psnr", "-i1", "unkached", "-i2", "runs/near"), "unkached cannot be read: there is no such file or folder"),
    ],
)
def test_the_command_tells_bad_requests(folders: Path, monkeypatch, arguments: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(folders)
    result = invoke("metrics", *arguments, columns=200)
    assert result.exit_code == 2 and message in plain(result.output)
