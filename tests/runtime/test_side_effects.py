"""What blocks write beside their results is right after every call, whatever the policy."""

import copy
import math
from typing import Any

import pytest
import torch
from lib.causal_video import BLOCKS, CHUNKS, STORES, TIMESTEPS, build, empty_caches, plain_rollout, rollout
from lib.marks import only_in
from lib.zoo import videos_wan
from lib.zoo.base import patches, sides
from torch import nn

import cachedit_fx
from cachedit_fx import CacheWarning

REUSES: dict[str, Any] = {
    "Fn_compute_blocks": 1,
    "Bn_compute_blocks": 0,
    "residual_diff_threshold": 10.0,
    "max_warmup_steps": 0,
}
STATIC: dict[str, Any] = {"steps_computation_mask": [1, 0, 1, 0], "steps_computation_policy": "static"}
POLICIES: dict[str, dict[str, Any]] = {
    "DBCache": REUSES,
    "DBPrune": {"cache": cachedit_fx.DBPruneConfig(Fn_compute_blocks=1, residual_diff_threshold=10.0)},
    "TaylorSeer": REUSES | {"calibrator": cachedit_fx.TaylorSeerCalibratorConfig()},
    "whole outputs": REUSES | {"calibrator": cachedit_fx.TaylorSeerCalibratorConfig(calibrator_cache_type="output")},
    "static mask": REUSES | STATIC,
    "shortcuts": REUSES | {"guards": "generation"},
}


def compiled(module, **options):
    return cachedit_fx.compile(module, inner_backend="eager", **options)


@pytest.mark.parametrize("store", STORES)
def test_keys_and_values_are_those_of_the_present_call(store):
    """A bypassed block would leave out its write, or write what it wrote at another place."""
    model = compiled(build(store), **POLICIES["static mask"])
    with pytest.warns(CacheWarning, match="bypassed block would|share") as told:
        got = rollout(model, model)
    assert len([warning for warning in told if issubclass(warning.category, CacheWarning)]) == 1
    same(got, plain_rollout(store))
    calls = [stats.uncached_calls for stats in cachedit_fx.summary(model)]  # of the last chunk at least
    assert len(TIMESTEPS) < sum(calls) <= CHUNKS * (len(TIMESTEPS) + 1)


@pytest.mark.parametrize(
    "policy",
    only_in(
        "wrappings", [name for name in POLICIES if name != "static mask"], but=["DBPrune", "shortcuts", "TaylorSeer"]
    ),
)
def test_every_policy_leaves_blocks_alone_that_write_to_arguments(policy):
    model = compiled(build("arguments"), **POLICIES[policy])
    with pytest.warns(CacheWarning, match="its blocks write to .*, and a bypassed block would not"):
        got = rollout(model, model)
    same(got, plain_rollout("arguments"))


def test_explain_says_why():
    model = compiled(build("arguments"), **REUSES)
    inputs = torch.zeros(1, 3, 8), torch.tensor([1000.0]), torch.zeros(1, 2, 8), empty_caches("arguments"), 0
    explanation = cachedit_fx.explain(model, *inputs)
    assert explanation.regions == ()
    assert any("its blocks write to caches_1_k, and a bypassed block would not" in note for note in explanation.notes)


class Counting(nn.Module):
    """Blocks that count their calls, and keep a projection of the text for later calls."""

    calls: torch.Tensor
    keys: torch.Tensor

    def __init__(self):
        super().__init__()
        self.linear, self.text = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("keys", torch.zeros(1, 2, 8))

    def forward(self, hidden, temb, text, store):
        self.calls += 1
        self.keys.copy_(self.text(text))
        store["text"] = self.keys * 2
        return hidden + self.linear(hidden * temb).tanh() + self.keys.mean() + 0.01 * self.calls


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Counting() for _ in range(BLOCKS))

    def forward(self, hidden_states, timestep, text, stores):
        hidden = self.proj(hidden_states)
        for block, store in zip(self.blocks, stores, strict=True):
            hidden = block(hidden, (timestep / 1000)[:, None, None].cos(), text, store)
        return self.proj(hidden)


@pytest.mark.parametrize("options", [STATIC, {"guards": "generation"} | STATIC], ids=["guarded", "shortcuts"])
@torch.no_grad()
def test_writes_that_depend_on_no_hidden_states_are_made_by_every_call(options):
    """They are hoisted out of the region: bypassed steps count too, and keep the text of the present call."""
    torch.manual_seed(0)
    module = Counted().eval()
    model = compiled(module, **REUSES | options)
    for step in range(4):
        text = torch.randn(1, 2, 8)
        stores: list[dict[str, torch.Tensor]] = [{} for _ in range(BLOCKS)]
        model(torch.randn(1, 3, 8), torch.tensor([1000.0 - step]), text, stores)
        for block, store in zip(module.blocks, stores, strict=True):
            assert isinstance(block, Counting)
            assert block.calls == step + 1
            assert torch.equal(block.keys, block.text(text)) and torch.equal(store["text"], block.keys * 2)
    (stats,) = cachedit_fx.summary(model)
    assert stats.cached_steps == [1, 3] and stats.uncached_calls == 0


@torch.no_grad()
def far_rollout(model, chunks):
    """AnyFlow's loop: three steps for each chunk, then one call that writes the clean frames into the caches."""
    generator = torch.Generator().manual_seed(0)
    tokens = math.prod(patches(1))
    shapes = {"compressed_cache": (2, 1, 2, tokens, 12), "full_cache": (2, 1, 2, 6 * tokens, 12)}
    caches = [{name: torch.zeros(shape) for name, shape in shapes.items()} for _ in range(4)]
    text, frames = torch.randn(1, 6, 16, generator=generator), torch.zeros(1, 0, 4, *sides(1))
    samples, written = [], []
    for number, length in enumerate(chunks):
        chunk = torch.randn(1, length, 4, *sides(1), generator=generator)
        frames = torch.cat([frames, chunk], dim=1)
        for values, time in [(chunk, 900.0), (chunk, 600.0), (chunk, 300.0), (frames, 0.0)]:
            times = torch.full((1, values.shape[1]), time)
            result, _ = model(
                hidden_states=values,
                timestep=times,
                r_timestep=times * 0.5,
                encoder_hidden_states=text,
                chunk_partition=list(chunks[: number + 1]),
                kv_cache=caches,
                kv_cache_flag={"num_cached_chunks": number, "is_cache_step": time == 0.0},
                return_dict=False,
            )
            samples.append(result)
        written.append([tensor.clone() for cache in caches for tensor in cache.values()])
    return samples, written


@pytest.mark.full("zoo")
@pytest.mark.budget(60, "a graph for each length of the cache")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_anyflow_far_caches_its_steps_and_not_its_writes():
    module, _ = videos_wan.AnyFlowFARTransformer3DModel()
    samples, written = far_rollout(copy.deepcopy(module), (1, 2))
    model = compiled(module, Fn_compute_blocks=1, Bn_compute_blocks=0, **STATIC | {"steps_computation_mask": [1, 0, 1]})
    with pytest.warns(CacheWarning, match="its blocks write to kv_cache_1_compressed_cache"):
        got, got_written = far_rollout(model, (1, 2))
    same(got_written, written)
    equal = [torch.equal(a, b) for a, b in zip(got, samples, strict=True) if a is not None]
    assert equal == [True, False, True] * 2


def same(got: list[list[torch.Tensor]], wanted: list[list[torch.Tensor]]) -> None:
    for call, (tensors, others) in enumerate(zip(got, wanted, strict=True)):
        for index, (a, b) in enumerate(zip(tensors, others, strict=True)):
            assert torch.equal(a, b), f"call {call}, tensor {index}: off by {(a - b).abs().max()}"


class Accumulating(nn.Module):
    """A state that every block takes on, as it takes on the hidden states. The module's name for itself is `model`."""

    total: torch.Tensor

    def __init__(self, accumulate, reads):
        super().__init__()
        torch.manual_seed(0)
        self.accumulate, self.reads = accumulate, reads
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(5))
        self.register_buffer("total", torch.zeros(1, 4, 8))
        self.seen = nn.Module()
        self.seen.register_buffer("total", self.total)
        self.peak = torch.zeros(1, 4, 8)

    def forward(model, hidden_states, timestep, states):
        x = hidden_states * 2
        for block in model.blocks:
            change = block(x) * (1 + timestep / 1000)
            model.accumulate(model, states, change)
            x = x + change
        return x + model.peak + states["key"] + model.seen.total if model.reads else x * 2


def _peak(model, states, change):
    model.peak = torch.maximum(model.peak, change.abs())


def _key(model, states, change):
    states["key"] = states["key"] * 0.5 + change


def _buffer(model, states, change):
    model.total += change


def _rebound(model, states, change):
    model.total = model.total + change


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("accumulate", [_peak, _key, _buffer, _rebound])
@torch.no_grad()
def test_a_state_that_blocks_hand_on_is_never_predicted(accumulate, reads):
    runs = []
    for cached in (False, True):
        model, states = Accumulating(accumulate, reads).eval(), {"key": torch.zeros(1, 4, 8)}
        if cached:
            compiled(model, **POLICIES["TaylorSeer"])
        results = []
        for step, timestep in enumerate((900.0, 800.0, 700.0, 600.0)):
            start = torch.full((1, 4, 8), 1 + step / 10)
            results += [model(start, torch.tensor([timestep]), states), model.peak, states["key"], model.total.clone()]
        runs.append((results, model.total is model.seen.total))
        if cached:
            assert {region.uncached_calls for region in cachedit_fx.summary(model)} == {4}
    (wanted, is_one), (got, stays_one) = runs
    same(got, wanted)
    assert is_one == stays_one == (accumulate is not _rebound)
