"""Does a picture show what its prompt asked for? An exact answer, by measuring, with no learned model.

``parse_caption`` reads a prompt into a :class:`SceneRequest`; ``check_image`` finds each requested object by its
colour, fits every shape of the data set to it, and compares shape, size, position, relation and background. What the
prompt leaves open is not checked; anything in the picture that nobody asked for is a failure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from cachedit_fx.shapes.dataset import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    EXTENT,
    POSITIONS,
    RADII,
    RELATIONS,
    SHAPES,
    SceneObject,
    coverage,
)

SIZE_LIMIT = 4.8
"""Radius between small and large, in pixels: half-way between the sizes of the data set."""

MIN_OVERLAP = 0.8
"""Least overlap (intersection over union of soft masks) between what is found and the best-fitting shape."""

COLOR_TOLERANCE = 60.0
"""Distance (8-bit RGB) up to which a colour counts as the background's."""

STRAY_PIXELS = 8
"""Pixels that may belong to neither background nor a requested object; more of them are a failure."""


@dataclass(frozen=True)
class ObjectRequest:
    """What a prompt says of one object; `size` is None where it says nothing."""

    shape: str
    color: str
    size: str | None = None


@dataclass(frozen=True)
class SceneRequest:
    """What a prompt says of a picture; None where it says nothing."""

    objects: tuple[ObjectRequest, ...]
    position: str | None = None
    relation: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class CheckResult:
    """The verdict on one picture: `problems` in words (none if it is right) and the objects found, as measured."""

    problems: tuple[str, ...]
    found: tuple[SceneObject, ...]

    @property
    def ok(self) -> bool:
        """True if the picture shows what was asked for."""
        return not self.problems


def _alternatives(names: Sequence[str]) -> str:
    return "|".join(sorted(names, key=len, reverse=True))


def _noun(index: int) -> str:
    size, color, shape = (_alternatives(tuple(names)) for names in (RADII, COLORS, SHAPES))
    return rf"(?:an? )?(?:(?P<size{index}>{size}) )?(?P<color{index}>{color}) (?P<shape{index}>{shape})"


_CAPTION = re.compile(
    rf"{_noun(0)}(?: (?P<relation>{_alternatives(RELATIONS)}) {_noun(1)}"
    rf"| at the (?P<position>{_alternatives(tuple(POSITIONS))}))?"
    rf"(?: on (?P<background>{_alternatives(tuple(BACKGROUNDS))}))?"
)


def parse_caption(text: str) -> SceneRequest:
    """Read a caption such as ``"a small red circle left of a large blue square on navy"``.

    Raises ``ValueError`` if it is not of the form that `Scene.caption` writes.
    """
    match = _CAPTION.fullmatch(" ".join(text.lower().split()))
    if match is None:
        raise ValueError(
            f"cannot read {text!r}: expected 'a [size] colour shape [at the position] [on background]' or "
            "'a [size] colour shape relation a [size] colour shape [on background]'"
        )
    part = match.groupdict()
    count = 1 if part["relation"] is None else 2
    objects = tuple(ObjectRequest(part[f"shape{i}"], part[f"color{i}"], part[f"size{i}"]) for i in range(count))
    return SceneRequest(objects, part["position"], part["relation"], part["background"])


def check_image(image: torch.Tensor, request: SceneRequest | str) -> CheckResult:
    """Compare one picture ([3, 32, 32], floats in 0..1 or uint8) with a request or a caption.

    Raises ``ValueError`` for another shape of picture or a caption that `parse_caption` cannot read.
    """
    if isinstance(request, str):
        request = parse_caption(request)
    if image.shape != (3, CANVAS, CANVAS):
        raise ValueError(f"expected a picture of shape [3, {CANVAS}, {CANVAS}], got {list(image.shape)}")
    picture = image.float() if image.dtype == torch.uint8 else image.float() * 255
    problems: list[str] = []
    border = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], dim=1)
    seen = border.median(dim=1).values
    background = min(BACKGROUNDS, key=lambda name: float((_rgb(BACKGROUNDS[name]) - seen).norm()))
    if float((_rgb(BACKGROUNDS[background]) - seen).norm()) > COLOR_TOLERANCE:
        problems.append(f"background has colour {[round(v) for v in seen.tolist()]}, none of the known ones")
    elif request.background is not None and background != request.background:
        problems.append(f"background is {background}, not {request.background}")

    palette = torch.stack([_rgb(rgb) for rgb in (BACKGROUNDS[background], *COLORS.values())])
    nearest = (picture[None] - palette[:, :, None, None]).norm(dim=1).argmin(0)
    unexplained = (picture - palette[0][:, None, None]).norm(dim=0) > COLOR_TOLERANCE
    found: list[SceneObject] = []
    for wanted in request.objects:
        label = list(COLORS).index(wanted.color) + 1
        blob = _largest_component(nearest == label)
        if int(blob.sum()) < 6:
            problems.append(f"no {wanted.color} object")
            continue
        around = _dilate(blob)
        axis = palette[label] - palette[0]
        alpha = ((picture - palette[0][:, None, None]) * axis[:, None, None]).sum(0) / axis.square().sum()
        item, overlap = _fit(alpha.clamp(0, 1) * around, wanted.color)
        unexplained &= ~around
        found.append(item)
        if overlap < MIN_OVERLAP:
            problems.append(f"the {wanted.color} object is no clean shape (best: {item.shape}, overlap {overlap:.2f})")
        elif item.shape != wanted.shape:
            problems.append(f"the {wanted.color} object is a {item.shape}, not a {wanted.shape}")
        if wanted.size is not None and item.size != wanted.size:
            problems.append(f"the {wanted.color} object is {item.size}, not {wanted.size}")
    if int(unexplained.sum()) > STRAY_PIXELS:
        problems.append(f"{int(unexplained.sum())} pixels show something that was not asked for")
    if len(found) == len(request.objects):
        problems += _check_layout(request, found)
    return CheckResult(tuple(problems), tuple(found))


def _check_layout(request: SceneRequest, found: Sequence[SceneObject]) -> list[str]:
    if request.position is not None:
        item = found[0]
        place = min(POSITIONS, key=lambda name: math.dist(POSITIONS[name], (item.x, item.y)))
        if place != request.position:
            return [f"the {item.color} object is at the {place}, not at the {request.position}"]
    if request.relation is not None:
        dx, dy = found[0].x - found[1].x, found[0].y - found[1].y
        if abs(dx) >= abs(dy):
            relation = "left of" if dx < 0 else "right of"
        else:
            relation = "above" if dy < 0 else "below"
        if relation != request.relation:
            return [f"the {found[0].color} object is {relation} the {found[1].color} one, not {request.relation} it"]
    return []


def _rgb(color: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(color, dtype=torch.float32)


def _dilate(mask: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(mask[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0


def _largest_component(mask: torch.Tensor) -> torch.Tensor:
    """The largest 8-connected part of a [32, 32] mask."""
    numbers = torch.arange(1, mask.numel() + 1, dtype=torch.float32).view(mask.shape) * mask
    while True:
        grown = F.max_pool2d(numbers[None, None], 3, stride=1, padding=1)[0, 0] * mask
        if torch.equal(grown, numbers):
            break
        numbers = grown
    labels = numbers[mask]
    if labels.numel() == 0:
        return mask
    values, counts = labels.unique(return_counts=True)
    return numbers == values[counts.argmax()]


def _fit(alpha: torch.Tensor, color: str) -> tuple[SceneObject, float]:
    """The shape, centre and radius whose coverage overlaps a soft mask [32, 32] best, and the overlap (0..1)."""
    hard = alpha > 0.5
    rows, columns = hard.any(1).nonzero().flatten(), hard.any(0).nonzero().flatten()
    if rows.numel() == 0:
        return SceneObject("circle", color, "small", 0.0, 0.0, 0.0), 0.0
    center_y, center_x = (float(line[0] + line[-1] + 1) / 2 for line in (rows, columns))
    half = float(max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1) / 2
    offsets = torch.linspace(-0.75, 0.75, 7)
    dx, dy, growth = torch.cartesian_prod(offsets, offsets, torch.linspace(-0.8, 0.8, 9)).unbind(1)
    x, y = center_x + dx, center_y + dy
    best, best_overlap = SceneObject("circle", color, "small", center_x, center_y, 0.0), 0.0
    for shape in SHAPES:
        radius = ((half + growth) / EXTENT[shape]).clamp_min(0.5)
        drawn = coverage(shape, x, y, radius)
        overlap = torch.minimum(drawn, alpha).sum((1, 2)) / torch.maximum(drawn, alpha).sum((1, 2))
        i = int(overlap.argmax())
        if float(overlap[i]) > best_overlap:
            size = "small" if float(radius[i]) < SIZE_LIMIT else "large"
            best = SceneObject(shape, color, size, float(x[i]), float(y[i]), float(radius[i]))
            best_overlap = float(overlap[i])
    return best, best_overlap
