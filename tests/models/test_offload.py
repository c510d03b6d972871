"""Offloading, by accelerate's hooks and by diffusers': cached where the blocks stay in one graph; else uncached and
right, with one warning that names the place where the graph breaks. The device is the CPU on both sides."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from lib import models
from lib.marks import only_in
from lib.wrapped import SKIPS, call, check, check_next_generation, enabled, generation, plain, steps, toy
from torch import nn

from cachedit_fx import CacheWarning, disable_cache, summary

CPU = torch.device("cpu")


def flux():
    return models.flux(double=2, single=2)


SUBJECTS = {"toy": lambda: toy(blocks=2), "flux": flux}
on_a_toy = pytest.mark.parametrize("subject", only_in("wrappings", SUBJECTS, but=["toy"]))
"""The hooks are what is tested: by default a toy has them. One test has those of a class of diffusers."""


def group_offload(model, kind, size=None):
    apply_group_offloading(
        model, onload_device=CPU, offload_device=CPU, offload_type=kind, num_blocks_per_group=size, use_stream=False
    )


@pytest.fixture(scope="module", autouse=True)
def _hooks_have_run():
    """Accelerate makes the functions of its hooks at their first call. If dynamo traces that call, it can fail.

    It fails under the backend `eager` of torch 2.13 and 2.14 too, without a cache.
    """
    cpu_offload(nn.Linear(1, 1), execution_device=CPU)(torch.zeros(1, 1))


WHOLE = {
    "model offload": lambda model: cpu_offload_with_hook(model, execution_device=CPU),
    "aligned devices": lambda model: add_hook_to_module(
        model, AlignDevicesHook(execution_device=CPU, io_same_device=True)
    ),
}
BREAKING = {
    "sequential offload": lambda model: cpu_offload(model, execution_device=CPU),
    "a group a block": lambda model: group_offload(model, "block_level", 1),
    "a group a leaf": lambda model: group_offload(model, "leaf_level"),
}


@on_a_toy
@pytest.mark.parametrize("how", WHOLE)
def test_hooks_on_the_whole_model_keep_it_one_graph(how, subject):
    model, inputs = SUBJECTS[subject]()
    expected = plain(model, inputs)
    WHOLE[how](model)
    assert torch.equal(check(model, inputs), expected)


@pytest.mark.parametrize("how", only_in("wrappings", WHOLE, but=["aligned devices"]))
def test_hooks_put_on_and_taken_off_after_compiling(how):
    model, inputs = flux()
    enabled(model, SKIPS)
    expected = generation(model, inputs)
    WHOLE[how](model)
    assert torch.equal(check_next_generation(model, inputs), expected)
    remove_hook_from_module(model)
    assert torch.equal(check_next_generation(model, inputs), expected)


@on_a_toy
def test_a_model_that_is_offloaded_between_generations(subject):
    """What an accelerator's offload does to weights: the same parameters, other memory."""
    model, inputs = SUBJECTS[subject]()
    _, hook = cpu_offload_with_hook(model, execution_device=CPU)
    enabled(model, SKIPS)
    expected = generation(model, inputs)
    hook.offload()
    for weight in model.parameters():
        weight.data = weight.data.clone()
    assert torch.equal(check_next_generation(model, inputs), expected)


@on_a_toy
@pytest.mark.parametrize("how", only_in("wrappings", BREAKING, but=["sequential offload", "a group a block"]))
def test_hooks_within_the_model_break_it_into_frames(how, subject):
    model, inputs = SUBJECTS[subject]()
    expected = plain(model, inputs)
    BREAKING[how](model)
    enabled(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(call(model, inputs), expected)
    assert steps(model) == [(0, [], 3)] and summary(model)[0].work == 1.0
    (message,) = [str(item.message) for item in caught if item.category is CacheWarning]
    place = re.search(r"([\w./-]+\.py):(\d+)", message)
    assert place is not None, message
    line = Path(place[1]).read_text().splitlines()[int(place[2]) - 1].strip()
    assert line and line in message


@pytest.mark.budget(60, "captured with its hooks, and again without them")
@on_a_toy
def test_enabled_anew_without_its_hooks_the_model_caches(subject):
    """Dynamo does not look again at a frame that it gave up, so enabling anew is needed."""
    model, inputs = SUBJECTS[subject]()
    expected = plain(model, inputs)
    cpu_offload(model, execution_device=CPU)
    enabled(model)
    with pytest.warns(CacheWarning):
        call(model, inputs)
    remove_hook_from_module(model, recurse=True)
    disable_cache(model)
    assert torch.equal(check(model, inputs), expected)
