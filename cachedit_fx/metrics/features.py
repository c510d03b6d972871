"""Metrics by trained networks on pictures: FID and LPIPS. Weights come from files; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from itertools import groupby, islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cachedit_fx.metrics.pictures import PictureError, Source, named, paired

Extractor: TypeAlias = Callable[[Tensor], Tensor]
"""uint8 [N, 3, H, W] in 0..255 -> features [N, D]; it resizes as it needs."""


class WeightsError(PictureError):
    """Weights are missing or do not fit; the message says what is needed, and where to get it."""


def load_extractor(path: str | Path) -> Extractor:
    """A feature extractor for FID from a TorchScript file.

    The file `inception-2015-12-05.pt`, which NVIDIA's repositories of StyleGAN name, holds the Inception of the
    original FID. Any other module with the interface of `Extractor` will do too.

    Raises:
        WeightsError: if the file cannot be loaded.
    """
    if not Path(path).is_file():
        raise WeightsError(f"FID needs a TorchScript Inception, and {path} is no file: get inception-2015-12-05.pt")
    try:
        module = torch.jit.load(path, map_location="cpu").eval()
    except RuntimeError as error:
        raise WeightsError(f"{path} is no TorchScript file: {str(error).splitlines()[0]}") from error
    has_logits = any(argument.name == "return_features" for argument in module.forward.schema.arguments)
    return lambda pictures: module(pictures, return_features=True) if has_logits else module(pictures)


def fid(pictures: Source, reference: Source, extractor: Extractor, batch: int = 16) -> float:
    """Frechet distance of two sets of pictures (Heusel et al. 2017), by torchmetrics. Sets need no pairs.

        |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))          mean m and covariance C (over n - 1) of features

    With fewer pictures than features the covariances are singular: compare only values of equally large sets.

    Args:
        pictures, reference: two or more pictures each, of any sizes. They are rounded to 8 bits.
        extractor: from pictures to features; see `load_extractor`.
        batch: pictures at a time.

    Raises:
        ImportError: if torchmetrics is not installed.
        PictureError: if a set has fewer than two pictures.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    sets = []
    for source in (reference, pictures):
        with torch.no_grad():
            features = [extractor(part).double().flatten(1) for part in _batches(source, batch)]
        count = sum(map(len, features))
        if count < 2:
            raise PictureError(f"FID compares sets of pictures, and one has {count}: give two or more on either side")
        sets.append(torch.cat(features))
    distance = FrechetInceptionDistance(feature=_Features(sets[0].shape[1]))
    for values, is_reference in zip(sets, (True, False), strict=True):
        distance.update(values, real=is_reference)
    return float(distance.compute())


class _Features(nn.Identity):
    """In the place of an extractor whose features are there already."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count


def _batches(source: Source, batch: int) -> Iterator[Tensor]:
    """uint8 [n, 3, H, W]: neighbours of one size, `batch` at most."""
    for _, group in groupby((picture for _, picture in named(source)), key=lambda picture: picture.shape):
        while some := list(islice(group, batch)):
            yield torch.from_numpy(np.stack(some) * 255).round().byte().movedim(-1, 1).expand(-1, 3, -1, -1)


class Lpips(nn.Module):
    """LPIPS with AlexNet, version 0.1 (Zhang et al. 2018).

        sum over layers of the mean over pixels of  w . (f(x) / |f(x)| - f(y) / |f(y)|)^2

    f: the five convolutions of AlexNet after their ReLU, normed over channels at each pixel; w: the trained weights of
    channels, from torchmetrics' package.

    Args:
        path: torchvision's weights of AlexNet (`alexnet-owt-7be5be79.pth`), .pth or .safetensors.

    Raises:
        ImportError: if torchmetrics is not installed.
        WeightsError: if the weights are missing or do not fit.
    """

    LAYERS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))
    """Index in torchvision's `features`, stride, padding, and whether a max-pool comes first."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        weights = _load_weights(path)
        heads = torch.load(_heads(), map_location="cpu", weights_only=True)
        try:
            self.convolutions = [
                (weights[f"features.{i}.weight"], weights[f"features.{i}.bias"]) for i, *_ in self.LAYERS
            ]
        except KeyError as error:
            raise WeightsError(f"{path} holds no AlexNet of torchvision: {error} is missing") from None
        self.heads = [heads[f"lin{index}.model.1.weight"].flatten() for index in range(len(self.LAYERS))]
        for (weight, _), head in zip(self.convolutions, self.heads, strict=True):
            if len(weight) != len(head):
                raise WeightsError(f"{path} has a layer of {len(weight)} channels: LPIPS's AlexNet has {len(head)}")
        self.shift, self.scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def forward(self, pictures: Tensor, reference: Tensor) -> Tensor:
        """[N, 3, H, W] in 0..1, twice -> [N]."""
        total = torch.zeros(len(pictures))
        for left, right, head in zip(self._features(pictures), self._features(reference), self.heads, strict=True):
            change = (_normed(left) - _normed(right)).square()
            total = total + (change * head.view(-1, 1, 1)).sum(1).mean((1, 2))
        return total

    def _features(self, pictures: Tensor) -> Iterator[Tensor]:
        values = ((2 * pictures - 1) - self.shift.view(-1, 1, 1)) / self.scale.view(-1, 1, 1)
        for (_, stride, padding, pools), (weight, bias) in zip(self.LAYERS, self.convolutions, strict=True):
            if pools:
                values = F.max_pool2d(values, 3, 2)
            values = F.conv2d(values, weight, bias, stride, padding).relu()
            yield values


def _normed(values: Tensor) -> Tensor:
    return values / (values.square().sum(1, keepdim=True) + 1e-8).sqrt()


def _heads() -> str:
    import torchmetrics

    return str(files(torchmetrics) / "functional/image/lpips_models/alex.pth")


def _load_weights(path: str | Path) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise WeightsError(f"LPIPS needs torchvision's AlexNet, and {path} is no file: get alexnet-owt-7be5be79.pth")
    return state_dict_of(path)


def state_dict_of(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file of weights by name.

    Raises:
        WeightsError: if the file holds anything else.
    """
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightsError(f"{path} is no file of weights: {reason}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise WeightsError(f"{path} is no file of weights: it must hold tensors by name, as a state dict does")
    return weights


SMALLEST = 31
"""Pixels on a side that AlexNet's pooling needs."""


def lpips(pictures: Source, reference: Source, network: Lpips) -> list[float]:
    """LPIPS of each picture; 0 for identical ones. See `Lpips`.

    Args:
        pictures, reference: 31 pixels or more wide and high.
        network: with its weights.
    """
    values = []
    for name, *both in paired(pictures, reference):
        if min(both[0].shape[:2]) < SMALLEST:
            raise PictureError(f"picture {name} is too small for LPIPS: it must be {SMALLEST} pixels or more on a side")
        left, right = (torch.from_numpy(part).float().movedim(-1, 0)[None].expand(-1, 3, -1, -1) for part in both)
        with torch.no_grad():
            values.append(float(network(left, right)))
    return values
