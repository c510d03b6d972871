"""Captioned scenes of one or two coloured shapes, 32 x 32 RGB, drawn procedurally.

A :class:`Scene` is the exact description of a picture: it can say its caption, and :func:`render` draws it. Scenes
are sampled from a ``torch.Generator``, so that a data set is its seed and nothing is stored. Coordinates are pixels:
x to the right, y **down**, the centre of the upper left pixel at (0.5, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

CANVAS = 32
"""Height and width of a picture, in pixels."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 20, 40),
    "green": (30, 170, 50),
    "blue": (40, 90, 255),
    "yellow": (255, 230, 30),
    "orange": (255, 120, 0),
    "purple": (150, 30, 200),
    "cyan": (0, 220, 235),
    "pink": (255, 130, 210),
}
"""Colours of objects, 8-bit RGB. Any two, backgrounds included, are at least 100 apart (Euclidean distance)."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "navy": (0, 0, 110),
}
"""Colours of backgrounds, 8-bit RGB."""

RADII: dict[str, tuple[float, float]] = {"small": (3.2, 3.8), "large": (5.8, 6.6)}
"""Range of the radius of each size, in pixels."""

POSITIONS: dict[str, tuple[float, float]] = {
    "top left": (8.0, 8.0),
    "top": (16.0, 8.0),
    "top right": (24.0, 8.0),
    "left": (8.0, 16.0),
    "center": (16.0, 16.0),
    "right": (24.0, 16.0),
    "bottom left": (8.0, 24.0),
    "bottom": (16.0, 24.0),
    "bottom right": (24.0, 24.0),
}
"""Nominal centre (x, y) of the object in a one-object scene, in pixels; sampled scenes differ by at most `JITTER`."""

RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")

JITTER = 0.6
"""Largest distance along x or y between a sampled one-object centre and its nominal position, in pixels."""

EXTENT: dict[str, float] = {"circle": 1.0, "square": 0.9, "triangle": 1.1, "diamond": 1.15, "cross": 1.05}
"""Half the side of a shape's bounding box, in radii: areas stay comparable and every large shape fits a corner."""

_DRAWS_PER_SCENE = 20


@dataclass(frozen=True)
class SceneObject:
    """One shape: what a caption calls it, and where it is.

    ``x`` and ``y`` are the centre of its bounding box and ``radius`` its nominal radius, all in pixels.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def extent(self) -> float:
        """Half the side of the bounding box, in pixels."""
        return self.radius * EXTENT[self.shape]

    def phrase(self, with_size: bool = True) -> str:
        """The noun phrase, such as ``"a small red circle"``."""
        words = f"{self.size} {self.color} {self.shape}" if with_size else f"{self.color} {self.shape}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """A picture described exactly: one object at a named position, or two in a relation, on a background.

    ``position`` is a key of `POSITIONS` (one object) and ``relation`` one of `RELATIONS` (two objects: the first is,
    say, left of the second).
    """

    objects: tuple[SceneObject, ...]
    background: str
    position: str | None = None
    relation: str | None = None

    def caption(self, size: bool = True, position: bool = True, background: bool = True) -> str:
        """The sentence for this scene; sizes, position and background can be left out, a relation cannot."""
        text = self.objects[0].phrase(size)
        if self.relation is not None:
            text += f" {self.relation} {self.objects[1].phrase(size)}"
        elif position and self.position is not None:
            text += f" at the {self.position}"
        return f"{text} on {self.background}" if background else text


def sample_scenes(count: int, generator: torch.Generator, two_objects: float = 0.4) -> list[Scene]:
    """Draw `count` scenes; a share `two_objects` (0 to 1) of them, on average, has two objects."""
    table: list[list[float]] = torch.rand(count, _DRAWS_PER_SCENE, generator=generator).tolist()
    return [_scene_from_draws(row, two_objects) for row in table]


def sample_batch(
    count: int, generator: torch.Generator, two_objects: float = 0.4, omit: float = 0.15
) -> tuple[torch.Tensor, list[str], list[Scene]]:
    """Draw `count` pictures with captions.

    Each of size, position and background is missing from a caption with probability `omit`. Returns the pictures
    (float32 [count, 3, 32, 32] in -1..1), their captions and the scenes.
    """
    scenes = sample_scenes(count, generator, two_objects)
    keep = (torch.rand(count, 3, generator=generator) >= omit).tolist()
    captions = [scene.caption(*flags) for scene, flags in zip(scenes, keep, strict=True)]
    return render(scenes), captions, scenes


def _pick(names: Sequence[str], draw: float) -> str:
    return names[min(int(draw * len(names)), len(names) - 1)]


def _object_from_draws(draws: Sequence[float], colors: Sequence[str]) -> SceneObject:
    shape, color, size = _pick(SHAPES, draws[0]), _pick(colors, draws[1]), _pick(tuple(RADII), draws[2])
    low, high = RADII[size]
    return SceneObject(shape, color, size, CANVAS / 2, CANVAS / 2, low + (high - low) * draws[3])


def _scene_from_draws(draws: Sequence[float], two_objects: float) -> Scene:
    background = _pick(tuple(BACKGROUNDS), draws[1])
    first = _object_from_draws(draws[2:6], tuple(COLORS))
    if draws[0] >= two_objects:
        position = _pick(tuple(POSITIONS), draws[6])
        x, y = (center + JITTER * (2 * u - 1) for center, u in zip(POSITIONS[position], draws[7:9], strict=True))
        return Scene((_moved(first, x, y),), background, position=position)
    second = _object_from_draws(draws[9:13], tuple(name for name in COLORS if name != first.color))
    relation = _pick(RELATIONS, draws[13])
    # The one that comes first along the axis of the relation, then the other; free room is shared out around them.
    swap = relation in ("right of", "below")
    near, far = (second, first) if swap else (first, second)
    room = CANVAS - 2.0 - 2 * (near.extent + far.extent)
    before, between = 0.25 + 0.15 * draws[14], 0.25 + 0.15 * draws[15]
    near_at = 0.5 + room * before + near.extent
    far_at = near_at + near.extent + 1.0 + room * between + far.extent
    near_off, far_off = (CANVAS / 2 + 2.5 * (2 * u - 1) for u in draws[16:18])
    if relation in ("left of", "right of"):
        near, far = _moved(near, near_at, near_off), _moved(far, far_at, far_off)
    else:
        near, far = _moved(near, near_off, near_at), _moved(far, far_off, far_at)
    return Scene((far, near) if swap else (near, far), background, relation=relation)


def _moved(item: SceneObject, x: float, y: float) -> SceneObject:
    """The object at (x, y), pushed inside the canvas where its bounding box would leave it."""
    low, high = item.extent + 0.3, CANVAS - item.extent - 0.3
    return SceneObject(item.shape, item.color, item.size, min(max(x, low), high), min(max(y, low), high), item.radius)


def _distance(shape: str, dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels, negative inside, from offsets to the centre; exact up to corners."""
    ax, ay, extent = dx.abs(), dy.abs(), radius * EXTENT[shape]
    if shape == "circle":
        return torch.hypot(dx, dy) - extent
    if shape == "square":
        return torch.maximum(ax, ay) - extent
    if shape == "triangle":  # points up and fills its bounding box: a flat base and two slanted sides
        return torch.maximum(dy - extent, (2 * ax - dy - extent) / math.sqrt(5.0))
    if shape == "diamond":
        return (ax + ay - extent) / math.sqrt(2.0)
    half = radius * 0.4
    return torch.minimum(torch.maximum(ax - extent, ay - half), torch.maximum(ay - extent, ax - half))


def coverage(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """How much of each pixel objects of one shape cover, 0..1: float32 [N, 32, 32].

    `x`, `y` and `radius` (pixels) have shape [N]. The edge is the signed distance, cut off half a pixel on either side.
    """
    axis = torch.arange(CANVAS, dtype=torch.float32) + 0.5
    dx = axis - x[:, None, None]
    dy = axis[:, None] - y[:, None, None]
    return (0.5 - _distance(shape, dx, dy, radius[:, None, None])).clamp(0.0, 1.0)


def render(scenes: Sequence[Scene]) -> torch.Tensor:
    """Draw the scenes: [len(scenes), 3, 32, 32], float32 in -1..1 (8-bit colour c becomes c / 127.5 - 1)."""
    background = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], dtype=torch.float32)
    picture = background[:, :, None, None].repeat(1, 1, CANVAS, CANVAS)
    for place in range(2):
        for shape in SHAPES:
            here = [i for i, scene in enumerate(scenes) if place < len(scene.objects)]
            rows = [i for i in here if scenes[i].objects[place].shape == shape]
            if rows:
                items = [scenes[i].objects[place] for i in rows]
                x, y, radius = torch.tensor([(item.x, item.y, item.radius) for item in items]).unbind(1)
                color = torch.tensor([COLORS[item.color] for item in items], dtype=torch.float32)[:, :, None, None]
                picture[rows] += coverage(shape, x, y, radius)[:, None] * (color - picture[rows])
    return picture / 127.5 - 1.0
