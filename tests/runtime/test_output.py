"""The model's output as what is predicted: the region runs to the end of the graph, or is the whole of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lib import models
from lib.helpers import capture, planned
from lib.marks import only_in
from lib.toys import FALLING, Timeless, denoise, make, noise
from torch import nn

import cachedit_fx
from cachedit_fx import DBCacheConfig, LagrangeCalibratorConfig, enable_cache, summary
from cachedit_fx.metrics.flops import FlopCounter

EAGER: dict[str, Any] = {"inner_backend": "eager"}
MASK = DBCacheConfig(0, steps_computation_mask=(1, 0, 0), steps_computation_policy="static")
"""One computed step, then nothing of the model."""

REAL: dict[str, Callable[[], models.Case]] = {
    "flux": models.flux,
    "sd3": models.sd3,
    "qwen_image": models.qwen_image,
    "wan": models.wan,
    "pixart": models.pixart,
    "cogvideox": models.cogvideox,
    "hunyuan_dit": models.hunyuan_dit,
}


@pytest.mark.parametrize("name", only_in("zoo", REAL, but=["flux", "hunyuan_dit"]))
def test_a_cached_step_of_a_real_class_runs_nothing_and_repeats_exactly(name):
    torch.manual_seed(0)
    model, inputs = REAL[name]()
    model.eval()
    with torch.no_grad():
        plain = model(**inputs)[0]
        enable_cache(model, MASK.reset(enable_separate_cfg=False), LagrangeCalibratorConfig(), **EAGER)
        computed = model(**inputs)[0]
        with FlopCounter() as work:
            reused = model(**inputs)[0]
    assert torch.equal(computed, plain) and torch.equal(reused, plain)
    assert reused.data_ptr() != computed.data_ptr()
    assert work.flops == 0
    (region,) = summary(model)
    assert region.cached_steps == [1] and region.work == pytest.approx(0.5)
    assert region.bytes_held == plain.numel() * 8


def test_every_tensor_that_the_model_puts_out_is_restored():
    class Pair(Timeless):
        def forward(self, hidden_states, encoder_hidden_states):
            result = super().forward(hidden_states, encoder_hidden_states)
            return result, {"mean": result.mean(1), "text": encoder_hidden_states}

    model, inputs = make(Pair), (noise(), noise(1, 3, seed=2))
    enable_cache(model, MASK, LagrangeCalibratorConfig(), **EAGER)
    with torch.no_grad():
        first, second = model(*inputs), model(*inputs)
    assert summary(model)[0].cached_steps == [1]
    assert torch.equal(first[0], second[0]) and torch.equal(first[1]["mean"], second[1]["mean"])
    assert second[1]["text"] is inputs[1]


def test_what_the_caller_does_to_a_result_leaves_the_stored_one():
    model, inputs = make(Timeless), (noise(), noise(1, 3, seed=2))
    enable_cache(model, MASK, LagrangeCalibratorConfig(), **EAGER)
    with torch.no_grad():
        kept = model(*inputs).clone()
        for _ in range(2):
            assert torch.equal(model(*inputs).mul_(3) / 3, kept * 3 / 3)


def test_another_shape_computes():
    """With no first blocks nothing but the inputs tells shapes apart."""
    model = make()
    config = DBCacheConfig(0, steps_computation_mask=(1, 0, 0, 0), steps_computation_policy="static")
    enable_cache(model, config, LagrangeCalibratorConfig(), **EAGER)
    with torch.no_grad():
        for tokens in (5, 7):
            for step in (3.0, 2.0):
                inputs = noise(1, tokens), torch.tensor([step]), noise(1, 3, seed=2)
                result = model(*inputs)
                assert result.shape == (1, tokens, 8)
            assert summary(model)[0].cached_steps == [1]


def test_branches_are_predicted_by_themselves():
    texts = noise(1, 3, seed=2), noise(1, 3, seed=3)
    model = make()
    config = DBCacheConfig(0, steps_computation_mask=[1, 1, 0] * 3 + [1], steps_computation_policy="static")
    enable_cache(model, config, LagrangeCalibratorConfig(), **EAGER)
    plain, found = denoise(make(), FALLING, texts), denoise(model, FALLING, texts)
    (region,) = summary(model)
    assert [len(branch.cached_steps) for branch in region.branches] == [3, 3]
    assert 0 < (found - plain).abs().max() < 0.02 * plain.abs().max()


def test_the_difference_decides_behind_first_blocks():
    model = make()
    config = DBCacheConfig(1, max_warmup_steps=2, residual_diff_threshold=0.1)
    enable_cache(model, config, LagrangeCalibratorConfig(), **EAGER)
    denoise(model)
    (region,) = summary(model)
    assert 0 < len(region.cached_steps) < 8 and region.residual_diffs
    enable_cache(model, config.reset(residual_diff_threshold=0.0), LagrangeCalibratorConfig(), **EAGER)
    assert torch.equal(denoise(model), denoise(make()))


def test_the_region_is_all_that_follows_the_head():
    gm = capture(models.Toy(), *models.inputs()).gm
    for first in (0, 2):
        (region,) = planned(gm, first, 0, to_output=True).regions
        body = [node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
        assert region.end == len(body) and (region.start == 0) is (first == 0)
        assert not any(region.continued) and not region.hoisted and region.last == 0
        assert len(region.middle) == region.num_blocks - first
        (output,) = (node for node in gm.graph.nodes if node.op == "output")
        assert set(region.live_outs) == set(output.all_input_nodes)


def test_writes_to_what_was_made_outside_are_refused_with_the_reason():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make(Timeless)
            self.calls: torch.Tensor
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, hidden_states, encoder_hidden_states):
            self.calls += 1
            return self.inner(hidden_states, encoder_hidden_states)

    model = Counts().eval()
    enable_cache(model, MASK, LagrangeCalibratorConfig(), **EAGER)
    with torch.no_grad(), pytest.warns(cachedit_fx.CacheWarning, match="writes in place to|no region|calls"):
        for _ in range(3):
            model(noise(), noise(1, 3, seed=2))
    assert model.calls.item() == 3
