"""ShapesBench: its prompts, and whether its verdict can be trusted, on pictures that are right by construction."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from cachedit_fx.shapes import accuracy, bench_prompts, check_image, held_out_prompts, parse_caption, tokenize
from cachedit_fx.shapes.bench import GUIDANCE, OTHER, PROMPTS
from cachedit_fx.shapes.dataset import BACKGROUNDS, COLORS, POSITIONS, RADII, RELATIONS, SHAPES, render, sample_scenes


def key(scene_or_request):
    """What fixes the geometry of a scene, but for size where a prompt leaves it open."""
    shapes = tuple(item.shape for item in scene_or_request.objects)
    return shapes, scene_or_request.position, scene_or_request.relation


@pytest.fixture(scope="module")
def pictures():
    """For every prompt of ShapesBench two renderings of scenes that fit it: [200, 2, 3, 32, 32] in 0..1."""
    pool: dict[tuple, list] = {}
    for scene in sample_scenes(40_000, torch.Generator().manual_seed(0), two_objects=0.6):
        pool.setdefault(key(scene), []).append(scene)
    found = []
    for prompt in bench_prompts():
        request = parse_caption(prompt)
        sizes = [item.size for item in request.objects]
        fitting = [
            scene
            for scene in pool[key(request)]
            if all(size in (None, item.size) for size, item in zip(sizes, scene.objects, strict=True))
        ]
        for scene in fitting[:2]:
            objects = (
                replace(item, color=asked.color) for item, asked in zip(scene.objects, request.objects, strict=True)
            )
            background = request.background or scene.background
            found.append(replace(scene, objects=tuple(objects), background=background))
    assert len(found) == 400
    return (render(found) / 2 + 0.5).unflatten(0, (200, 2))


def test_200_prompts_in_six_categories_no_two_alike():
    assert {name: len(prompts) for name, prompts in PROMPTS.items()} == {
        "colour": 40,
        "shape": 30,
        "size": 30,
        "position": 36,
        "two objects": 32,
        "relation": 32,
    }
    assert len(set(bench_prompts())) == 200 and GUIDANCE == 3.0
    assert tokenize(bench_prompts()).shape[0] == 200


def test_each_category_runs_through_its_values_equally_often():
    def counted(category, value):
        return Counter(value(parse_caption(prompt)) for prompt in PROMPTS[category])

    def even(counts, values, times):
        return counts == dict.fromkeys(values, times)

    assert even(counted("colour", lambda r: r.objects[0].color), COLORS, 5)
    assert even(counted("shape", lambda r: r.objects[0].shape), SHAPES, 6)
    assert even(counted("size", lambda r: r.objects[0].size), RADII, 15)
    assert even(counted("position", lambda r: r.position), POSITIONS, 4)
    assert even(counted("position", lambda r: r.background), BACKGROUNDS, 9)
    assert even(counted("relation", lambda r: r.relation), RELATIONS, 8)
    assert even(counted("two objects", lambda r: r.relation), RELATIONS, 8)


def test_what_tells_the_two_objects_apart():
    for prompt in PROMPTS["two objects"]:
        first, second = parse_caption(prompt).objects
        assert first.color != second.color and first.shape != second.shape
    for prompt in PROMPTS["relation"]:
        first, second = parse_caption(prompt).objects
        assert first.color != second.color and replace(first, color=second.color) == second


def test_the_checker_finds_renderings_right(pictures):
    twice = [prompt for prompt in bench_prompts() for _ in range(2)]
    shares = accuracy(pictures.flatten(0, 1), twice)
    assert list(shares) == ["all", *PROMPTS]
    assert shares["all"] > 0.99


def test_the_checker_rejects_renderings_of_other_prompts(pictures):
    prompts = bench_prompts()
    wrong = 0
    for shift in (1, 7):
        shifted = [prompts[(index + shift) % 200] for index in range(200)]
        wrong += sum(check_image(picture, prompt).ok for picture, prompt in zip(pictures[:, 0], shifted, strict=True))
    assert wrong == 0


@pytest.mark.parametrize("category", list(PROMPTS))
def test_one_wrong_word_is_rejected(pictures, category):
    """In the word that the category is about."""
    swaps = {
        "colour": list(COLORS),
        "shape": list(SHAPES),
        "size": list(RADII),
        "position": list(POSITIONS),
        "two objects": list(SHAPES),
        "relation": list(RELATIONS),
    }
    names = sorted(swaps[category], key=len, reverse=True)
    for index, prompt in enumerate(bench_prompts()):
        if prompt not in PROMPTS[category]:
            continue
        said = next(name for name in names if f" {name} " in f"{prompt} ")
        other = swaps[category][(swaps[category].index(said) + 1) % len(names)]
        changed = prompt.replace(said, other, 1).replace("a orange", "an orange")
        assert not check_image(pictures[index, 0], changed).ok, (prompt, changed)


@pytest.mark.parametrize("count", [1, 6, 24, 150, 200])
def test_fewer_prompts_come_from_all_categories(count):
    prompts = bench_prompts(count)
    assert len(set(prompts)) == count
    if count >= 24:
        found = Counter(next(name for name in PROMPTS if prompt in PROMPTS[name]) for prompt in prompts)
        assert all(abs(found[name] - count * len(PROMPTS[name]) / 200) <= 1 for name in PROMPTS)


@pytest.mark.parametrize("count", [0, 201])
def test_how_many_prompts_there_are(count):
    with pytest.raises(ValueError, match="200 prompts"):
        bench_prompts(count)


def test_held_out_prompts():
    prompts = held_out_prompts(32, 1)
    assert prompts == held_out_prompts(32, 1) and len(set(prompts)) == 32
    assert not set(held_out_prompts(500, 1)) & set(bench_prompts())
    assert len(set(prompts) & set(held_out_prompts(32, 2))) < 3
    requests = [parse_caption(prompt) for prompt in prompts]
    assert all(request.background and all(item.size for item in request.objects) for request in requests)


def test_accuracy_counts():
    one, other = "a small red circle at the top left on white", "a small red circle on white"
    blank = torch.ones(3, 3, 32, 32)
    assert accuracy(blank, [one, other, other]) == {"all": 0, "colour": 0, OTHER: 0}
    with pytest.raises(ValueError, match="3 pictures for 2 prompts"):
        accuracy(blank, [one, other])
