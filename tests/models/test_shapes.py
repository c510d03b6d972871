"""The bundled model: data set, vocabulary, checker, pipeline and weights."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cachedit_fx.shapes import (
    VOCABULARY,
    Scene,
    SceneObject,
    UnknownWordError,
    check_image,
    parse_caption,
    render,
    sample_batch,
    sample_scenes,
    tokenize,
)
from cachedit_fx.shapes.dataset import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    EXTENT,
    POSITIONS,
    RADII,
    RELATIONS,
    SHAPES,
    coverage,
)
from cachedit_fx.shapes.text import MAX_WORDS, ShapesTextEncoder


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene_of(shape: str = "circle", size: str = "large", x: float = 16.0, y: float = 16.0, **fields: str) -> Scene:
    radius = sum(RADII[size]) / 2
    item = SceneObject(shape, fields.get("color", "red"), size, x, y, radius)
    return Scene((item,), fields.get("background", "white"), position=fields.get("position", "center"))


# --- scenes and renderer ---------------------------------------------------------------------------------------------


def test_scenes_depend_on_the_seed_alone():
    first, again, other = sample_scenes(50, seeded(3)), sample_scenes(50, seeded(3)), sample_scenes(50, seeded(4))
    assert first == again
    assert first != other
    assert torch.equal(render(first), render(again))


def test_sampled_scenes_cover_everything_and_stay_in_bounds():
    scenes = sample_scenes(1500, seeded())
    items = [item for scene in scenes for item in scene.objects]
    assert {item.shape for item in items} == set(SHAPES)
    assert {item.color for item in items} == set(COLORS)
    assert {item.size for item in items} == set(RADII)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.position for scene in scenes if len(scene.objects) == 1} == set(POSITIONS)
    assert {scene.relation for scene in scenes if len(scene.objects) == 2} == set(RELATIONS)
    assert 0.35 < sum(len(scene.objects) == 2 for scene in scenes) / len(scenes) < 0.45
    for item in items:
        assert RADII[item.size][0] <= item.radius <= RADII[item.size][1]
        assert min(item.x, item.y) - item.extent >= 0
        assert max(item.x, item.y) + item.extent <= CANVAS


def test_two_objects_stand_in_their_relation_apart_and_in_different_colors():
    for scene in sample_scenes(300, seeded(1), two_objects=1.0):
        first, second = scene.objects
        assert first.color != second.color
        dx, dy = second.x - first.x, second.y - first.y
        along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[str(scene.relation)]
        assert along >= first.extent + second.extent + 1.0 - 1e-6
        assert along > abs(dy if scene.relation in ("left of", "right of") else dx)


def test_colors_are_far_apart():
    palette = {**COLORS, **BACKGROUNDS}
    assert len(palette) == len(COLORS) + len(BACKGROUNDS)
    for one, other in itertools.combinations(palette.values(), 2):
        assert math.dist(one, other) >= 100


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", lambda r: math.pi * r**2),
        ("square", lambda r: (2 * EXTENT["square"] * r) ** 2),
        ("triangle", lambda r: 2 * (EXTENT["triangle"] * r) ** 2),
        ("diamond", lambda r: 2 * (EXTENT["diamond"] * r) ** 2),
        ("cross", lambda r: 4 * (0.8 * EXTENT["cross"] * r**2) - 0.64 * r**2),
    ],
)
def test_coverage_has_the_area_and_centre_of_the_shape(shape, area):
    x, y, radius = torch.tensor([16.3]), torch.tensor([15.2]), torch.tensor([6.0])
    alpha = coverage(shape, x, y, radius)[0]
    assert alpha.min() >= 0 and alpha.max() == 1
    assert float(alpha.sum()) == pytest.approx(area(6.0), rel=0.03)
    axis = torch.arange(CANVAS) + 0.5
    assert float((alpha.sum(0) * axis).sum() / alpha.sum()) == pytest.approx(16.3, abs=0.05)
    if shape != "triangle":
        assert float((alpha.sum(1) * axis).sum() / alpha.sum()) == pytest.approx(15.2, abs=0.05)


def test_render_paints_exact_colors_up_from_down():
    picture = (render([scene_of(x=8.0, y=24.0, color="green", background="navy")])[0] + 1) * 127.5
    assert picture.shape == (3, CANVAS, CANVAS)
    assert torch.allclose(picture[:, 24, 8], torch.tensor(COLORS["green"]).float(), atol=1e-3)
    assert torch.allclose(picture[:, 8, 24], torch.tensor(BACKGROUNDS["navy"]).float(), atol=1e-3)


def test_rendering_a_scene_alone_or_in_a_batch_is_the_same():
    scenes = sample_scenes(12, seeded(5))
    assert torch.equal(render(scenes), torch.cat([render([scene]) for scene in scenes]))


# --- captions and vocabulary -----------------------------------------------------------------------------------------


def test_captions_read_back_as_what_they_say():
    for scene in sample_scenes(200, seeded(2)):
        read = parse_caption(scene.caption())
        assert [(item.shape, item.color, item.size) for item in read.objects] == [
            (item.shape, item.color, item.size) for item in scene.objects
        ]
        assert (read.position, read.relation, read.background) == (scene.position, scene.relation, scene.background)


def test_captions_can_leave_things_out():
    scene = scene_of("square", color="orange")
    assert scene.caption() == "a large orange square at the center on white"
    assert scene.caption(size=False) == "an orange square at the center on white"
    assert scene.caption(position=False, background=False) == "a large orange square"
    read = parse_caption(scene.caption(size=False, position=False, background=False))
    assert read == dataclasses.replace(read, position=None, background=None)
    assert read.objects[0].size is None


@pytest.mark.parametrize("text", ["", "a red", "red circle at the", "a red circle left of", "a red circle on red"])
def test_what_is_no_caption_is_refused(text):
    with pytest.raises(ValueError, match="cannot read"):
        parse_caption(text)


def test_every_caption_fits_the_vocabulary():
    images, captions, scenes = sample_batch(400, seeded(6))
    assert images.shape == (400, 3, CANVAS, CANVAS)
    assert images.abs().max() <= 1
    assert len(captions) == len(scenes) == 400
    tokens = tokenize(captions)
    assert tokens.shape == (400, MAX_WORDS)
    assert max(len(caption.split()) for caption in captions) == MAX_WORDS
    assert [VOCABULARY[token] for token in tokens[0] if token] == captions[0].split()


def test_tokens_ignore_case_and_punctuation():
    assert torch.equal(tokenize(["A red circle, on white."]), tokenize(["a red circle on white"]))
    assert int(tokenize([""]).sum()) == 0


def test_unknown_words_are_named_with_the_nearest_and_what_is_allowed():
    with pytest.raises(UnknownWordError) as error:
        tokenize(["a read circle on xylophone"])
    message = str(error.value)
    assert "'read' (nearest known: 'red')" in message
    assert "'xylophone'" in message
    for word in (*COLORS, *SHAPES, *POSITIONS, *RELATIONS, *BACKGROUNDS):
        assert word in message


def test_too_many_words_and_a_bare_string_are_refused():
    with pytest.raises(ValueError, match="13 words.*at most 12"):
        tokenize(["a " * 13])
    with pytest.raises(TypeError, match="list of prompts"):
        tokenize("a red circle")


def test_text_encoder_knows_word_order_and_shapes():
    encoder = ShapesTextEncoder().eval()
    with torch.no_grad():
        embeds, pooled = encoder(
            tokenize(["a red circle left of a blue square", "a blue square left of a red circle", ""])
        )
    assert embeds.shape == (3, MAX_WORDS, 96)
    assert pooled.shape == (3, 96)
    assert pooled.isfinite().all()
    assert not torch.allclose(pooled[0], pooled[1], atol=1e-4)


# --- checker ---------------------------------------------------------------------------------------------------------


def test_checker_accepts_every_true_picture_even_noisy():
    scenes = sample_scenes(80, seeded(7))
    pictures = render(scenes) / 2 + 0.5
    noisy = (pictures + 0.04 * torch.randn(pictures.shape, generator=seeded(8))).clamp(0, 1)
    for scene, clean, rough in zip(scenes, pictures, noisy, strict=True):
        assert check_image(clean, scene.caption()).problems == ()
        assert check_image((rough * 255).round().to(torch.uint8), scene.caption()).problems == ()


def test_checker_measures_where_the_objects_are():
    scene = sample_scenes(1, seeded(9), two_objects=1.0)[0]
    found = check_image(render([scene])[0] / 2 + 0.5, scene.caption()).found
    for item, truth in zip(found, scene.objects, strict=True):
        assert item.x == pytest.approx(truth.x, abs=0.4)
        assert item.y == pytest.approx(truth.y, abs=0.4)
        assert item.radius == pytest.approx(truth.radius, abs=0.4)


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("a large red circle at the center on white", None),
        ("a red circle", None),
        ("a large blue circle at the center on white", "no blue object"),
        ("a large red square at the center on white", "is a circle, not a square"),
        ("a small red circle at the center on white", "is large, not small"),
        ("a large red circle at the left on white", "is at the center, not at the left"),
        ("a large red circle at the center on black", "background is white, not black"),
    ],
)
def test_checker_names_what_is_wrong(prompt, problem):
    result = check_image(render([scene_of()])[0] / 2 + 0.5, prompt)
    assert result.ok is (problem is None)
    assert problem is None or any(problem in line for line in result.problems)


@pytest.mark.parametrize("relation", RELATIONS)
def test_checker_reads_relations(relation):
    scenes = [scene for scene in sample_scenes(100, seeded(11), two_objects=1.0) if scene.relation == relation]
    picture = render(scenes[:1])[0] / 2 + 0.5
    for claimed in RELATIONS:
        claim = dataclasses.replace(scenes[0], relation=claimed)
        assert check_image(picture, claim.caption()).ok is (claimed == relation)


def test_checker_sees_what_nobody_asked_for():
    scene = sample_scenes(1, seeded(12), two_objects=1.0)[0]
    picture = render([scene])[0] / 2 + 0.5
    alone = Scene(scene.objects[:1], scene.background).caption()
    assert any("not asked for" in line for line in check_image(picture, alone).problems)


def test_checker_finds_no_object_in_noise():
    assert not check_image(torch.rand(3, CANVAS, CANVAS, generator=seeded(13)), "a red circle").ok
    with pytest.raises(ValueError, match="shape"):
        check_image(torch.zeros(3, 8, 8), "a red circle")


# --- pipeline and weights --------------------------------------------------------------------------------------------


def test_scenes_need_no_diffusers():
    code = "import sys, cachedit_fx.shapes as s; s.render(s.sample_scenes(1, __import__('torch').Generator())); "
    code += "assert 'diffusers' not in sys.modules; s.load_pipeline; assert 'diffusers' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.fixture(scope="module")
def pipe():
    from cachedit_fx.shapes import load_pipeline

    return load_pipeline()


def test_packing_is_the_pipelines_own():
    from diffusers import FluxPipeline

    from cachedit_fx.shapes.pipeline import LATENT_SIDE, image_ids, pack_images, unpack_images

    images = torch.randn(2, 3, CANVAS, CANVAS, generator=seeded())
    latents = torch.nn.functional.pixel_unshuffle(images, 2)
    theirs = FluxPipeline._pack_latents(latents, 2, 12, LATENT_SIDE, LATENT_SIDE)
    assert torch.equal(pack_images(images), theirs)
    assert torch.equal(unpack_images(theirs), images)
    half = LATENT_SIDE // 2
    assert torch.equal(image_ids(), FluxPipeline._prepare_latent_image_ids(1, half, half, "cpu", torch.float32))


def test_bundled_weights_are_small_and_described():
    from safetensors.torch import load_file

    from cachedit_fx.shapes.pipeline import CONFIG_FILE, WEIGHTS_DIR, WEIGHTS_FILE

    assert (WEIGHTS_DIR / WEIGHTS_FILE).stat().st_size <= 14_000_000
    state = load_file(WEIGHTS_DIR / WEIGHTS_FILE)
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert all(value.isfinite().all() for value in state.values())
    config = json.loads((WEIGHTS_DIR / CONFIG_FILE).read_text())
    assert config["training"]["step"] > 0
    assert config["transformer"]["num_layers"] + config["transformer"]["num_single_layers"] >= 18


def test_pipeline_is_the_real_thing(pipe):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    assert type(pipe) is FluxPipeline
    assert type(pipe.transformer) is FluxTransformer2DModel
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert not pipe.transformer.training


def test_generate_is_deterministic_and_independent_of_the_batch(pipe):
    from cachedit_fx.shapes import generate, to_uint8

    prompts = ["a large red circle at the center on white", "a small blue square at the top left on black"]
    images = generate(pipe, prompts, num_inference_steps=2, seed=5)
    assert images.shape == (2, 3, CANVAS, CANVAS)
    assert images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, generate(pipe, prompts, num_inference_steps=2, seed=5))
    assert torch.allclose(images[1:], generate(pipe, prompts[1:], num_inference_steps=2, seed=6), atol=1e-4)
    assert not torch.allclose(images, generate(pipe, prompts, num_inference_steps=2, seed=50), atol=1e-2)
    assert to_uint8(images).dtype == torch.uint8


def test_guidance_calls_the_transformer_twice_a_step(pipe):
    from cachedit_fx.shapes import generate

    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        plain = generate(pipe, ["a red circle"], num_inference_steps=3)
        assert len(calls) == 3
        guided = generate(pipe, ["a red circle"], num_inference_steps=3, true_cfg_scale=3.0)
        assert len(calls) == 9
    finally:
        handle.remove()
    assert not torch.allclose(plain, guided, atol=1e-3)


def test_one_object_prompts_come_out_right(pipe):
    from cachedit_fx.shapes import generate

    prompts = [
        "a large red circle at the center on white",
        "a small blue square at the top left on black",
        "a large green triangle at the bottom right on gray",
        "a large yellow cross at the left on navy",
        "a small orange diamond at the right on white",
        "a small pink circle at the bottom on black",
    ]
    images = generate(pipe, prompts, num_inference_steps=20)
    wrong = {p: check_image(i, p).problems for p, i in zip(prompts, images, strict=True) if not check_image(i, p).ok}
    assert not wrong


def test_prompt_embeddings_take_the_transformers_dtype():
    from cachedit_fx.shapes import encode_prompts, generate, load_pipeline

    half = load_pipeline(torch.bfloat16)
    embeds, pooled = encode_prompts(half, ["a red circle", ""])
    assert embeds.shape == (2, MAX_WORDS, 96) and pooled.shape == (2, 96)
    assert embeds.dtype == pooled.dtype == torch.bfloat16
    assert generate(half, ["a red circle"], num_inference_steps=1).dtype == torch.float32


def test_missing_and_misfitting_weights_say_so(tmp_path: Path):
    from cachedit_fx.shapes import load_pipeline
    from cachedit_fx.shapes.pipeline import CONFIG_FILE, build_models, save_weights

    with pytest.raises(FileNotFoundError, match="train_shapes.py"):
        load_pipeline(weights_dir=tmp_path)
    transformer, text_encoder = build_models()
    save_weights(transformer.state_dict(), text_encoder.state_dict(), tmp_path, training={"step": 1})
    loaded = load_pipeline(weights_dir=tmp_path)
    weight = transformer.x_embedder.weight
    assert torch.equal(loaded.transformer.x_embedder.weight, weight.half().float())
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config["transformer"]["num_layers"] = 5
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit"):
        load_pipeline(weights_dir=tmp_path)
