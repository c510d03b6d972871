"""ShapesBench: 200 fixed prompts in six categories, and how many of the pictures drawn for them are right.

| category | prompts | what runs through all its values | left unsaid |
|---|---:|---|---|
| colour | 40 | every colour with every shape | - |
| shape | 30 | shapes | background |
| size | 30 | sizes | - |
| position | 36 | every position on every background | size |
| two objects | 32 | pairs of unlike colours and shapes | - |
| relation | 32 | every relation with every colour; the two objects differ in colour alone | - |

A rule makes them from the vocabulary; what a category is not about takes its turns beside it. A picture is right if
`check_image` finds nothing wrong: colour, shape, size, place, relation and background, where the prompt says them, and
nothing else in the picture. Accuracy is stated at `GUIDANCE`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cachedit_fx.shapes.checker import check_image
from cachedit_fx.shapes.dataset import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    RADII,
    RELATIONS,
    SHAPES,
    Scene,
    SceneObject,
    sample_scenes,
)

GUIDANCE = 3.0
"""`true_cfg_scale` at which ShapesBench's accuracy is stated."""

OTHER = "other"
"""The category of prompts that are not ShapesBench's."""

_COLORS, _SIZES, _POSITIONS, _BACKGROUNDS = (tuple(names) for names in (COLORS, RADII, POSITIONS, BACKGROUNDS))


def _turn(names: Sequence[str], number: int) -> str:
    """Whose turn it is; each time through begins one further on, so that lists of equal length mix."""
    return names[(number + number // len(names)) % len(names)]


def _object(number: int, shape: str | None = None, color: str | None = None, size: str | None = None) -> SceneObject:
    """What is left out takes its turn. Where the object is does not matter: only its words are wanted."""
    words = (shape or _turn(SHAPES, number), color or _turn(_COLORS, number), size or _turn(_SIZES, number))
    return SceneObject(*words, 0.0, 0.0, 0.0)


def _one(number: int, item: SceneObject, position: str | None = None, background: str | None = None) -> Scene:
    position, background = position or _turn(_POSITIONS, number), background or _turn(_BACKGROUNDS, number)
    return Scene((item,), background, position=position)


def _two_objects(number: int) -> Scene:
    first, second = number % 8, (number + 1 + number // 8) % 8
    shape = number % 5
    other = SHAPES[(shape + 1 + number // 5 % 4) % 5]
    pair = _object(number, SHAPES[shape], _COLORS[first]), _object(number + 1, other, _COLORS[second])
    return Scene(pair, _turn(_BACKGROUNDS, number), relation=_turn(RELATIONS, number))


def _relation(number: int) -> Scene:
    colors = number % 8, (number + 3 + number // 8) % 8
    left, right = (_object(number, color=_COLORS[color]) for color in colors)
    return Scene((left, right), _turn(_BACKGROUNDS, number), relation=RELATIONS[number // 8])


def _make_prompts() -> dict[str, tuple[str, ...]]:
    colors = (_one(n, _object(n, SHAPES[n // 8], _COLORS[n % 8])) for n in range(40))
    shapes = (_one(n, _object(n, SHAPES[n % 5])) for n in range(30))
    sizes = (_one(n + 5, _object(n, size=_SIZES[n % 2])) for n in range(30))
    places = (_one(n, _object(n), _POSITIONS[n % 9], _BACKGROUNDS[n // 9]) for n in range(36))
    return {
        "colour": tuple(scene.caption() for scene in colors),
        "shape": tuple(scene.caption(background=False) for scene in shapes),
        "size": tuple(scene.caption() for scene in sizes),
        "position": tuple(scene.caption(size=False) for scene in places),
        "two objects": tuple(_two_objects(n).caption() for n in range(32)),
        "relation": tuple(_relation(n).caption() for n in range(32)),
    }


PROMPTS: dict[str, tuple[str, ...]] = _make_prompts()
"""Category -> its prompts: 200 in all, no two alike."""

_CATEGORY = {prompt: category for category, prompts in PROMPTS.items() for prompt in prompts}


def bench_prompts(count: int = len(_CATEGORY)) -> tuple[str, ...]:
    """`count` of the 200 prompts, spread evenly over the categories and within them.

    Raises:
        ValueError: if `count` is not in 1..200.
    """
    if not 1 <= count <= len(_CATEGORY):
        raise ValueError(f"ShapesBench has {len(_CATEGORY)} prompts; {count} were asked for")
    prompts = tuple(_CATEGORY)
    return tuple(prompts[index * len(prompts) // count] for index in range(count))


def held_out_prompts(count: int, seed: int) -> tuple[str, ...]:
    """`count` full captions of scenes sampled from the data set's distribution; no two alike, none of ShapesBench.

    Two runs with different seeds have few in common: one seed to choose settings with, another to report on.
    """
    found: dict[str, None] = {}
    generator = torch.Generator().manual_seed(seed)
    while len(found) < count:
        captions = (scene.caption() for scene in sample_scenes(count, generator))
        found |= {caption: None for caption in captions if caption not in _CATEGORY}
    return tuple(found)[:count]


def accuracy(images: torch.Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """The share of pictures that are right, 0 to 1: by category, in the order of `PROMPTS`, and of all under "all".

    Args:
        images: [B, 3, 32, 32], floats in 0..1 or uint8.
        prompts: what each was drawn for; those that are not ShapesBench's count under `OTHER`.

    Raises:
        ValueError: for a prompt that `parse_caption` cannot read, or another number or shape of pictures.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts: give one for each")
    right: dict[str, list[bool]] = {}
    for image, prompt in zip(images, prompts, strict=True):
        right.setdefault(_CATEGORY.get(prompt, OTHER), []).append(check_image(image, prompt).ok)
    shares = {name: sum(right[name]) / len(right[name]) for name in (*PROMPTS, OTHER) if name in right}
    return {"all": sum(map(sum, right.values())) / len(prompts)} | shares
