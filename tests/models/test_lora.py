"""LoRA by peft, through diffusers' own methods: loaded before and after compiling, scaled, fused, swapped, deleted."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from lib import models
from lib.marks import only_in
from lib.toys import FALLING
from lib.wrapped import (
    COMPUTES,
    SKIPS,
    InTuple,
    call,
    check,
    check_next_generation,
    enabled,
    generation,
    plain,
    small_pipeline,
    steps,
    toy,
)
from peft import LoraConfig, get_peft_model_state_dict
from torch._dynamo.utils import counters

from cachedit_fx import refresh_context, summary
from cachedit_fx.shapes.pipeline import generate, make_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:.*lru_cache")
LOADS = ("add_adapter", "load_lora_adapter")
PROMPTS = ["a small red circle on navy"]


def lora(rank: int = 2, modules: Sequence[str] = ("to_q", "to_out.0", "up", "down")) -> LoraConfig:
    """With weights that change something: peft's own start at zero."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules), init_lora_weights=False)


def flux():
    return models.flux(double=2, single=2)


class Adapted(PeftAdapterMixin, InTuple):
    """A toy that takes adapters as diffusers' models do."""


def adapted():
    return toy(Adapted)


def adapter(model, rank: int = 2, seed: int = 1) -> dict[str, Any]:
    """A state dict as a file would hold it, for models like `model`."""
    torch.manual_seed(seed)
    twin = copy.deepcopy(model)
    twin.add_adapter(lora(rank))
    return {f"transformer.{name}": value.clone() for name, value in get_peft_model_state_dict(twin).items()}


def load(model, state, name: str, **options):
    model.load_lora_adapter(dict(state), adapter_name=name, **options)


def follow(model, inputs, *changes):
    """Each change is made behind a generation; the next one has the new weights and nothing of the old."""
    enabled(model, SKIPS)
    before = generation(model, inputs)
    for change in changes:
        change()
        after = check_next_generation(model, inputs)
        assert not torch.equal(after, before)
        before = after
    return before


@pytest.mark.parametrize("how", only_in("wrappings", LOADS, but=["load_lora_adapter"]))
def test_loaded_before_compiling(how):
    model, inputs = flux()
    without = plain(model, inputs)
    if how == "add_adapter":
        model.add_adapter(lora(), "a")
    else:
        load(model, adapter(model), "a")
    assert not torch.equal(check(model, inputs), without)


@pytest.mark.parametrize("how", only_in("wrappings", LOADS, but=["load_lora_adapter"]))
def test_loaded_after_compiling(how):
    model, inputs = flux()
    state = adapter(model)
    follow(
        model,
        inputs,
        lambda: model.add_adapter(lora(), "a") if how == "add_adapter" else load(model, state, "a"),
    )


def test_adapters_are_scaled_weighted_and_switched():
    model, inputs = adapted()
    load(model, adapter(model, seed=1), "a")
    load(model, adapter(model, seed=2), "b")
    model.set_adapters("a")
    follow(
        model,
        inputs,
        lambda: model.set_adapters("a", 0.5),
        lambda: model.set_adapters("b", 0.5),
        lambda: model.set_adapters(["a", "b"], [0.3, 0.4]),
        model.disable_lora,
        model.enable_lora,
    )


@pytest.mark.full("wrappings")
def test_a_scale_that_moves_from_generation_to_generation():
    """Ten scales are more than the graphs that dynamo keeps of one model."""
    model, inputs = flux()
    model.add_adapter(lora(), "a")
    enabled(model, SKIPS)
    results = []
    for number in range(10):
        model.set_adapters("a", 0.1 + 0.1 * number)
        results.append(generation(model, inputs))
        assert steps(model) == [(5, [1, 3], 0)]
    refresh_context(model, cache_config=COMPUTES)
    assert torch.equal(generation(model, inputs), generation(model._call_impl, inputs))
    assert all(not torch.equal(a, b) for a, b in zip(results, results[1:], strict=False))


def test_fused_unfused_and_deleted():
    model, inputs = adapted()
    base = generation(enabled(copy.deepcopy(model), SKIPS), inputs)
    load(model, adapter(model), "a")
    follow(
        model,
        inputs,
        lambda: model.fuse_lora(lora_scale=0.7),
        model.unfuse_lora,
        lambda: model.delete_adapters("a"),
        lambda: load(model, adapter(copy.deepcopy(model), seed=3), "b"),
        model.unload_lora,
    )
    found = generation(model, inputs)
    assert torch.allclose(found, base, atol=1e-5), "fusing and unfusing round"


def test_hot_swapped_adapters_share_one_graph():
    """Of three ranks, padded to the largest."""
    model, inputs = adapted()
    states = [adapter(model, rank, seed) for seed, rank in enumerate((2, 4, 1), 1)]
    model.enable_lora_hotswap(target_rank=4)
    load(model, states[0], "a")
    enabled(model, SKIPS)
    generation(model, inputs)
    graphs = counters["stats"]["unique_graphs"]
    follow(model, inputs, *(lambda state=state: load(model, state, "a", hotswap=True) for state in states[1:]))
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.full("wrappings")
def test_ten_adapters_loaded_in_turn_stay_cached():
    """Each load wraps the linear layers anew, and so makes a graph; dynamo's own limit is eight."""
    model, inputs = toy(Adapted, blocks=3)
    expected = generation(model, inputs, FALLING)
    policy = SKIPS.reset(steps_computation_mask="00" + "10" * (len(FALLING) // 2 - 1))
    enabled(model, policy)
    for number in range(10):
        name = f"adapter_{number}"
        model.add_adapter(lora(modules=("up", "down")), name)
        model.set_adapters(name)
        generation(model, inputs, FALLING)
        assert steps(model) == [(10, [1, 3, 5, 7, 9], 0)]
        model.delete_adapters(name)
    refresh_context(model, cache_config=policy.reset(steps_computation_mask="1" * len(FALLING)))
    assert torch.equal(generation(model, inputs, FALLING), expected)


@pytest.mark.parametrize("adapted", only_in("wrappings", [False, True]))
def test_the_scale_among_a_calls_arguments(adapted):
    """`joint_attention_kwargs={"scale": ...}` multiplies every adapter for one call."""
    model, inputs = flux()
    if adapted:
        model.add_adapter(lora(), "a")
    results = []
    for scale in (1.0, 0.5, 0.25):
        results.append(check(model, inputs | {"joint_attention_kwargs": {"scale": scale}}))
        refresh_context(model)
    assert torch.equal(results[0], results[2]) is not adapted
    assert torch.equal(call(model, inputs), plain(model, inputs)), "the scale outlived its call"


def test_a_pipeline_loads_fuses_and_unloads():
    """`pipe.load_lora_weights` and its like, after compiling."""
    pipe = small_pipeline()
    twin = make_pipeline(copy.deepcopy(pipe.transformer), pipe.shapes_text_encoder)
    state = adapter(pipe.transformer, 4)
    skips, computes = (SKIPS.reset(steps_computation_mask=mask) for mask in ("0010", "1111"))
    enabled(pipe, skips)
    before = generate(pipe, PROMPTS, 4)
    changes: list[tuple[str, dict[str, Any]]] = [
        ("load_lora_weights", {"pretrained_model_name_or_path_or_dict": state, "adapter_name": "a"}),
        ("fuse_lora", {"lora_scale": 0.5}),
        ("unfuse_lora", {}),
        ("unload_lora_weights", {}),
    ]
    for name, arguments in changes:
        for one in (pipe, twin):
            getattr(one, name)(**copy.copy(arguments))
        found = generate(pipe, PROMPTS, 4)
        (region,) = summary(pipe)
        assert region.cached_steps == [1, 3] and region.uncached_calls == 0
        assert not torch.equal(found, before)
        before = found
        refresh_context(pipe, cache_config=computes)
        assert torch.equal(generate(pipe, PROMPTS, 4), generate(twin, PROMPTS, 4))
        refresh_context(pipe, cache_config=skips)
        assert torch.equal(generate(pipe, PROMPTS, 4), found)


def test_layers_behind_the_timestep_are_fused_and_unfused():
    """peft fuses through `.data`, which no version counter shows; what was hoisted before must not come back."""
    model, inputs = adapted()
    config = lora(modules=("time", "scale", "to_q", "up"))
    model.add_adapter(config, "a")
    enabled(model, SKIPS)
    results = [generation(model, inputs)]
    changes = [
        lambda: model.fuse_lora(lora_scale=0.7),
        model.unload_lora,  # the graph without adapters, with weights that keep what was fused
        lambda: model.add_adapter(config, "b"),
        lambda: model.set_adapters("b", 0.5),
        model.fuse_lora,
        model.unfuse_lora,
    ]
    for change in changes:
        change()
        results.append(check_next_generation(model, inputs))
    assert torch.equal(results[1], results[2])
    assert not any(torch.equal(results[0], later) for later in results[1:])
