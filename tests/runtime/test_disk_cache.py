"""Inductor's caches on disk know a piece by its graph: what leaves it the same hits, what changes it misses."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lib.toys import FALLING, Steps, denoise, make
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import compile_fx, config
from torch._inductor.utils import fresh_cache

from cachedit_fx import compile
from cachedit_fx.passes import outline_blocks

STATIC: dict[str, Any] = {"steps_computation_mask": "10", "steps_computation_policy": "static"}


def look_up(**options: Any) -> None:
    """Compile a model, as a new process would."""
    torch._dynamo.reset()
    counters.clear()
    model = compile(make(Steps, blocks=3), **{"Fn_compute_blocks": 1, **STATIC, **options})
    denoise(model, FALLING[:2])


def hits() -> int:
    """Of the two graph caches, in the latest look-up."""
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def misses() -> int:
    """Likewise."""
    return counters["inductor"]["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"]


@pytest.fixture(scope="module", autouse=True)
def empty_cache() -> Iterator[None]:
    """With one model's pieces in it."""
    with fresh_cache(), config.patch(cpp_cache_precompile_headers=False):  # for two pieces they are no gain
        look_up()
        assert hits() == 0 and misses() > 0
        yield


@pytest.fixture
def compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a miss takes seconds and is of no interest here."""

    def stop(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a miss")

    monkeypatch.setattr(compile_fx, "fx_codegen_and_compile", stop)


def test_the_same_again_hits():
    look_up()
    assert hits() > 0 and misses() == 0


def test_a_policy_is_in_no_piece():
    look_up(residual_diff_threshold=0.5, calibrator="taylorseer")
    assert hits() > 0 and misses() == 0


@pytest.mark.parametrize(
    "options",
    [
        {"inner_options": {"fallback_random": True}},
        {"granularity": "region"},
        {"compiled_pieces": "all"},
    ],
    ids=str,
)
def test_an_option_that_reaches_the_pieces_misses(options, compiles_nothing):
    with pytest.raises(BackendCompilerFailed, match="a miss"):
        look_up(**options)
    assert misses() > 0


def test_a_pass_that_makes_other_pieces_misses(monkeypatch, compiles_nothing):
    """As an edit of its source would."""
    right = outline_blocks._Outliner._canonical

    def doubled(self, inner, node, local):
        result = right(self, inner, node, local)
        twice = inner.call_function(torch.mul, (result, 2.0))
        twice.meta = dict(result.meta)
        return twice

    monkeypatch.setattr(outline_blocks._Outliner, "_canonical", doubled)
    with pytest.raises(BackendCompilerFailed, match="a miss"):
        look_up()
    assert misses() > 0
