"""A call that raises leaves no trace: after a retry, results, decisions and counts are those of a run without it."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from lib.toys import FALLING, as_tensor, make, noise
from torch import fx

from cachedit_fx import (
    CacheWarning,
    DBCacheConfig,
    DBPruneConfig,
    LagrangeCalibratorConfig,
    TaylorSeerCalibratorConfig,
    enable_cache,
    refresh_context,
    summary,
)
from cachedit_fx.runtime import guard, memory

pytestmark = [pytest.mark.keep_compiled, pytest.mark.filterwarnings("ignore:.*inert threshold")]
TEXTS = noise(1, 3, seed=2), noise(1, 3, seed=3)
TIMES = FALLING[:6]
ALWAYS = DBCacheConfig(1, max_warmup_steps=0, residual_diff_threshold=1e9)
STATIC = DBCacheConfig(1, steps_computation_mask=[int(digit) for digit in "110100"], steps_computation_policy="static")
SETTINGS: dict[str, dict[str, Any]] = {
    "threshold": {"cache_config": DBCacheConfig(1, max_warmup_steps=2, residual_diff_threshold=0.2)},
    "one difference": {
        "cache_config": DBCacheConfig(
            1, residual_diff_threshold=0.3, enable_separate_cfg=True, cfg_diff_compute_separate=False
        )
    },
    "new contexts": {
        "cache_config": DBCacheConfig(1, max_warmup_steps=1, residual_diff_threshold=1e9, force_refresh_step_hint=3)
    },
    "TaylorSeer": {
        "cache_config": DBCacheConfig(
            1, max_warmup_steps=3, residual_diff_threshold=1e9, max_continuous_cached_steps=1
        ),
        "calibrator_config": TaylorSeerCalibratorConfig(),
    },
    "predicted output": {
        "cache_config": STATIC.reset(Fn_compute_blocks=0),
        "calibrator_config": LagrangeCalibratorConfig(),
    },
    "DBPrune": {"cache_config": DBPruneConfig(1, max_warmup_steps=1, residual_diff_threshold=0.1)},
}


class OutOfMemory(Exception):
    pass


class Countdown:
    """An inner backend whose pieces raise at one node: after `left` further ones."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.nodes = 0

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        countdown = self

        class Raising(fx.Interpreter):
            def run_node(self, node: fx.Node) -> Any:
                result = super().run_node(node)
                if node.op not in ("placeholder", "output", "get_attr"):
                    countdown.tick()
                return result

        return Raising(gm).run

    def watch(self, gm: fx.GraphModule) -> Callable[..., Any]:
        """The graph, which raises before it runs."""

        def run(*inputs: Any) -> Any:
            self.tick()
            return gm.forward(*inputs)

        return run

    def tick(self) -> None:
        self.nodes += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise OutOfMemory


@pytest.fixture(scope="module")
def model():
    return make(blocks=4), Countdown()


def generation(model, countdown, fails_at=None):
    """Outputs, and the failures among the calls. Each call fails at its node `fails_at`, if it has one, and is retried.

    The state moves by a constant, so that each call has the inputs of its twin in another run.
    """
    outputs, failures = [], 0
    with torch.no_grad():
        for time in TIMES:
            for text in TEXTS:
                countdown.left = fails_at
                hidden = noise(seed=1) * time
                try:
                    outputs.append(model(hidden, as_tensor(time), text))
                except OutOfMemory:
                    failures += 1
                    outputs.append(model(hidden, as_tensor(time), text))
                countdown.left = None
    return outputs, failures


def counts(model):
    return [
        [branch.parts for branch in region.branches] + [region.uncached_causes, region.bytes_held]
        for region in summary(model)
    ]


def check(model: Any, countdown: Countdown, settings: dict[str, Any], nodes: Iterable[int]) -> None:
    enable_cache(model, **settings, inner_backend=countdown)
    refresh_context(model)
    for _ in range(2):  # the second generation has all its buffers
        expected, _ = generation(model, countdown)
    counted = counts(model)
    total = 0
    for node in nodes:
        outputs, failures = generation(model, countdown, node)
        assert all(map(torch.equal, outputs, expected)), node
        assert counts(model) == counted, node
        assert summary(model)[0].failed_calls == failures
        total += failures
    assert total > 0


def test_a_failure_anywhere_leaves_no_trace_by_default(model):
    transformer, countdown = model
    for settings in SETTINGS.values():
        check(transformer, countdown, settings, [0, 30, 55])


@pytest.mark.full("fuzz")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_failure_anywhere_leaves_no_trace(model, settings):
    """Every node in turn."""
    transformer, countdown = model
    enable_cache(transformer, **settings, inner_backend=countdown)
    refresh_context(transformer)
    countdown.nodes = 0
    transformer(noise(), as_tensor(900.0), TEXTS[0])
    check(transformer, countdown, settings, range(countdown.nodes))


@pytest.mark.parametrize("fails", ["residual_store", "residual_like"])
def test_a_failure_while_storing_forgets_what_is_stored(model, monkeypatch, fails):
    transformer, countdown = model
    enable_cache(
        transformer, DBCacheConfig(1, max_warmup_steps=0, residual_diff_threshold=1e9), inner_backend=countdown
    )
    refresh_context(transformer)
    inputs = noise(), as_tensor(900.0), TEXTS[0]

    def fail(*arguments, **keywords):
        raise OutOfMemory

    with torch.no_grad():
        expected = transformer(*inputs)
        transformer(*inputs[:1], as_tensor(800.0), *inputs[2:])
        assert summary(transformer)[0].cached_steps == [1]
        for buffers in transformer._compiled_call_impl.state.session().memories.values():
            buffers.stored = []
        refresh_context(transformer)
        with monkeypatch.context() as patch, pytest.raises(OutOfMemory):
            patch.setattr(memory, fails, fail)
            transformer(*inputs)
        assert torch.equal(transformer(*inputs), expected)
    assert summary(transformer)[0].cached_steps == [] and summary(transformer)[0].failed_calls == 1


def test_a_failure_while_measuring(model, monkeypatch):
    transformer, countdown = model
    enable_cache(transformer, ALWAYS.reset(residual_diff_threshold=0.2), inner_backend=countdown)
    refresh_context(transformer)
    expected, _ = generation(transformer, countdown)
    counted = counts(transformer)
    sums = guard.l1_sums

    def counted_sums(*arguments, **keywords):
        result = sums(*arguments, **keywords)
        countdown.tick()
        return result

    monkeypatch.setattr(guard, "l1_sums", counted_sums)
    for node in range(12, 40, 3):
        outputs, failures = generation(transformer, countdown, node)
        assert failures and all(map(torch.equal, outputs, expected)) and counts(transformer) == counted


def test_failed_calls_of_an_uncached_model_are_counted():
    countdown = Countdown()
    model = enable_cache(make(blocks=1), ALWAYS, inner_backend=lambda gm, inputs: countdown.watch(gm))
    inputs = noise(), as_tensor(900.0), TEXTS[0]
    with torch.no_grad(), pytest.warns(CacheWarning, match="no block loop"):
        model(*inputs)
        countdown.left = 0
        with pytest.raises(OutOfMemory):
            model(noise(), as_tensor(950.0), TEXTS[0])
        model(noise(), as_tensor(950.0), TEXTS[0])
    (entry,) = summary(model)
    assert entry.failed_calls == 1 and entry.uncached_calls >= 1
