"""Reads pictures from wherever they are, and pairs them with their references.

tensor, array, PIL image, sequence of them ─┐
file of a picture, of a video, of a tensor  ├──►  {name: Pictures}  ──►  Pairs: common names, unpaired names
folder of such files                        ┘
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL import Image

Source: TypeAlias = "torch.Tensor | np.ndarray | Image.Image | str | Path | Sequence[Any]"
"""Pictures, given in any of these ways.

- A tensor [3, H, W] or [N, 3, H, W], channels first; one channel is allowed too. Floats in 0..1, or uint8.
- An array [H, W, 3] or [N, H, W, 3], channels last. Floats in 0..1, or uint8.
- A PIL image; it is converted to RGB.
- The path of a picture, of a video, of a tensor (.pt, .safetensors) or an array (.npy), or of a folder of such files.
- A sequence of any of these but folders.
"""

PICTURES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
TENSORS = frozenset({".npy", ".pt", ".safetensors"})
VIDEOS = frozenset({".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm"})
KINDS = PICTURES | TENSORS | VIDEOS


class PictureError(ValueError):
    """Pictures cannot be read or compared; the message says which, and what is allowed."""


@dataclass(frozen=True)
class Pairs:
    """Pictures and their references, by name."""

    names: tuple[str, ...]
    """A pair each. A frame of a video is named `clip#3`."""
    unpaired: tuple[str, ...]
    """Files and frames without a counterpart, and the side that has them."""
    _load: Callable[[], Iterator[tuple[str, np.ndarray, np.ndarray]]]

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(name, picture, reference): float64 [H, W, C] in 0..1. Files are read one after the other."""
        return self._load()


def paired(pictures: Source, reference: Source) -> Pairs:
    """Pair pictures with their references: those of two folders by name, without the ending; others by position.

    Raises:
        PictureError: if a source cannot be read, nothing is paired, or the sizes of a pair differ.
    """
    for source in (pictures, reference):
        if isinstance(source, (str, Path)) and not Path(source).exists():
            raise PictureError(_absent(source))
    left, right = _files(pictures), _files(reference)
    if isinstance(left, Mapping) != isinstance(right, Mapping):
        raise PictureError("one of both is a folder, the other is not: compare two folders, or two files")
    if not isinstance(left, Mapping) or not isinstance(right, Mapping):
        return _frames_paired({"": pictures}, {"": reference}, ())
    common = [name for name in left if name in right]
    alone = [f"{left[name]} (no reference)" for name in left if name not in right]
    alone += [f"{right[name]} (only the reference)" for name in right if name not in left]
    if not common:
        raise PictureError(
            f"{pictures} and {reference} have no names in common: files are paired by name, without the ending"
        )
    return _frames_paired({name: left[name] for name in common}, {name: right[name] for name in common}, tuple(alone))


def _frames_paired(left: Mapping[str, Source], right: Mapping[str, Source], alone: tuple[str, ...]) -> Pairs:
    """The pairs of equally named sources, frame by frame."""
    counts = {name: (_count(left[name]), _count(right[name])) for name in left}
    names = tuple(
        f"{name}#{index}" if max(both) > 1 else name or "0"
        for name, both in counts.items()
        for index in range(min(both))
    )
    more = [f"{abs(a - b)} frames of {name or 'the longer one'}" for name, (a, b) in counts.items() if a != b]
    if not names:
        raise PictureError("there is no picture: give at least one")

    def load() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        labels = iter(names)
        for name in left:
            for picture, other in zip(read(left[name]), read(right[name]), strict=False):
                label = next(labels)
                if picture.shape != other.shape:
                    sizes = f"is {_size(picture)}, and its reference {_size(other)}"
                    raise PictureError(f"picture {label} {sizes}: both must have one size")
                yield label, picture, other

    return Pairs(names, (*alone, *more), load)


def _size(picture: np.ndarray) -> str:
    height, width, channels = picture.shape
    return f"{width} x {height} with {channels} channel{'s' * (channels > 1)}"


def named(source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """(name, picture) of every picture of a source, those of a folder by name: float64 [H, W, C] in 0..1."""
    files = _files(source)
    sources = files if isinstance(files, Mapping) else {"": source}
    for name, part in sources.items():
        pictures = read(part)
        for index, picture in enumerate(pictures):
            yield f"{name}#{index}" if len(pictures) > 1 else name or "0", picture


def _files(source: Source) -> Mapping[str, Path] | None:
    """Name -> file, sorted by name, numbers by value; None if the source is no folder. Folders inside are searched."""
    folder = Path(source) if isinstance(source, (str, Path)) else None
    if folder is None or not folder.is_dir():
        return None
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*"), key=_by_number):
        if path.suffix.lower() in KINDS and path.is_file():
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in files:
                raise PictureError(f"{files[name]} and {path} have one name, and files are paired by it: rename one")
            files[name] = path
    if not files:
        raise PictureError(f"{folder} has no pictures: it must hold files such as {', '.join(sorted(KINDS))}")
    return files


def _by_number(path: Path) -> list[tuple[int, str]]:
    """`2.png` comes before `10.png`: prompts are numbered so."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _count(source: Source) -> int:
    """The number of pictures. Only a file of one picture need not be read."""
    if isinstance(source, (str, Path)) and Path(source).suffix.lower() in PICTURES:
        return 1
    return len(read(source))


def read(source: Any) -> Sequence[np.ndarray]:
    """The pictures of a source that is no folder: float64 [H, W, C] in 0..1 each; uint8 is divided by 255.

    Raises:
        PictureError: if the source is no `Source`.
    """
    if isinstance(source, (str, Path)):
        return _read_file(Path(source))
    if isinstance(source, (list, tuple)):
        return [picture for part in source for picture in read(part)]
    if hasattr(source, "detach"):
        return _from_tensor(source, "the tensor")
    if isinstance(source, np.ndarray):
        return _from_array(source, "the array")
    if hasattr(source, "convert"):
        return _from_array(np.asarray(_as_rgb(source, "the image")), "the image")
    raise PictureError(f"{type(source).__name__} is no picture: give a tensor, an array, a PIL image or a path")


def _read_file(path: Path) -> Sequence[np.ndarray]:
    kind = path.suffix.lower()
    if path.is_dir():
        raise PictureError(f"{path} is a folder: give it alone, or a list of its files")
    if not path.is_file():
        raise PictureError(_absent(path))
    if kind not in KINDS:
        raise PictureError(f"{path} is no picture: its name must end with one of {', '.join(sorted(KINDS))}")
    try:
        if kind in PICTURES:
            from PIL import Image

            with Image.open(path) as image:
                return _from_array(np.asarray(_as_rgb(image, str(path))), str(path))
        if kind == ".npy":
            return _from_array(np.load(path), str(path))
        if kind in TENSORS:
            return _from_tensor(_load_tensor(path), str(path))
    except PictureError:
        raise
    except Exception as error:  # each library has its own
        raise PictureError(f"{path} cannot be read: {error}") from error
    return _read_video(path)


def _absent(path: str | Path) -> str:
    return f"{path} cannot be read: there is no such file or folder"


def _load_tensor(path: Path) -> torch.Tensor:
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        tensors = list(load_file(path).values())
    else:
        import torch

        tensors = [torch.load(path, map_location="cpu", weights_only=True)]
    if len(tensors) != 1 or not hasattr(tensors[0], "detach"):
        raise PictureError(f"{path} must hold one tensor")
    return tensors[0]


def _read_video(path: Path) -> Sequence[np.ndarray]:
    """All frames, by imageio, which scikit-image brings along; its readers of mp4 are PyAV and imageio-ffmpeg."""
    try:
        import imageio.v3 as imageio
    except ImportError:
        raise PictureError(
            f"{path}: videos need imageio (pip install 'cachedit-fx[metrics]'), or a folder of frames"
        ) from None
    try:
        frames = imageio.imread(path)
    except Exception as error:  # imageio raises what its readers do
        raise PictureError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): install a reader (pip install av), or give a "
            "folder of frames"
        ) from error
    return _from_array(frames, str(path))


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    """Transparency is dropped. Pictures of more than 8 bits would lose them, and are refused."""
    if image.mode.startswith(("I", "F")):
        raise PictureError(f"{name} has more than 8 bits a channel ({image.mode}): give it as an array or a tensor")
    return image.convert("RGB")


def _from_tensor(tensor: torch.Tensor, name: str) -> Sequence[np.ndarray]:
    values = tensor.detach().cpu()
    if values.ndim not in (3, 4) or values.shape[-3] not in (1, 3):
        raise PictureError(f"{name} has the shape {list(values.shape)}: it must be [3, H, W] or [N, 3, H, W]")
    values = values.movedim(-3, -1)
    return _from_array((values if values.dtype.itemsize == 1 else values.double()).numpy(), name)


def _from_array(array: np.ndarray, name: str) -> Sequence[np.ndarray]:
    if array.ndim not in (3, 4) or array.shape[-1] not in (1, 3):
        raise PictureError(f"{name} has the shape {list(array.shape)}: it must be [H, W, 3] or [N, H, W, 3]")
    if not array.size:
        raise PictureError(f"{name} has no values: its shape is {list(array.shape)}")
    if array.dtype == np.uint8:
        values = array / 255.0
    elif np.issubdtype(array.dtype, np.floating):
        values = array.astype(np.float64)
    else:
        raise PictureError(f"{name} holds {array.dtype}: it must hold uint8, or floats in 0..1")
    if not np.isfinite(values).all() or values.min() < -1e-6 or values.max() > 1 + 1e-6:
        raise PictureError(
            f"{name} has values from {values.min():g} to {values.max():g}: floats must be in 0..1 (divide 8-bit "
            "values by 255, and bring -1..1 to 0..1)"
        )
    return list(values.reshape(-1, *values.shape[-3:]))
