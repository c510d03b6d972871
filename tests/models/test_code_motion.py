"""Code motion changes no bit: every transformer class of diffusers, by inductor and eagerly, in both precisions.

The default part compares every class with its plain module in float32, eagerly and with the pass on: test_zoo.py.
"""

from typing import Any

import pytest
import torch
from lib import zoo
from lib.marks import only_in
from lib.shared import SharedCapture
from torch.utils._pytree import tree_map

from cachedit_fx.bench.coverage import ALWAYS
from cachedit_fx.bench.coverage_steps import FIRST, LATER, at_timestep, equal, tensors

pytestmark = pytest.mark.keep_compiled

CLASSES = sorted(set(zoo.ZOO) - set(zoo.SHORT))
ONLY_FLOAT32 = {
    "Kandinsky5Transformer3DModel": "mixes its dtypes if autocast is not on a GPU",
    "SanaWMTransformer3DModel": "takes an inverse that a CPU has for float32 only",
}
"""Classes whose plain module raises in bfloat16 on a CPU."""
NOT_BY_INDUCTOR = {
    "Kandinsky6SRTransformer3DModel": "g++ refuses what inductor writes of its flex attention",
}
"""Classes that inductor does not compile on a CPU, with torch 2.13. `torch.compile` fails on them too."""
CASES = [
    (name, dtype, inner)
    for name in CLASSES
    for dtype in ("float32", "bfloat16")
    for inner in ("eager", "inductor")
    if (dtype == "float32" or name not in ONLY_FLOAT32) and (inner == "eager" or name not in NOT_BY_INDUCTOR)
]
CAPTURED_ANEW = {"Lumina2Transformer2DModel", "QwenImage21Transformer2DModel"}
"""Classes with a graph that inductor compiles only once, while dynamo captures it: lengths come from data."""
STEPS = (FIRST, LATER, FIRST, LATER)
"""Timesteps of two generations. The second one finds the hoisted values of the first."""


@pytest.fixture(scope="module")
def captures() -> dict[tuple[str, str], SharedCapture]:
    """One for each class and dtype, of which the latest is kept."""
    return {}


def capture_of(captures: dict[tuple[str, str], SharedCapture], name: str, dtype: str) -> SharedCapture:
    if (name, dtype) not in captures:
        captures.clear()
        torch.compiler.reset()
        captures[name, dtype] = SharedCapture(zoo.ZOO[name]()[0].to(getattr(torch, dtype)))
    return captures[name, dtype]


def results_of(
    captures: dict[tuple[str, str], SharedCapture], name: str, dtype: str, inner: str, hoists: bool
) -> list[list[torch.Tensor]]:
    """The results of every step, all of them computed."""

    def cast(value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.dtype is torch.float32
        return value.to(getattr(torch, dtype)) if is_float else value

    arguments = zoo.ZOO[name]()[1](1)
    cache = ALWAYS.reset(residual_diff_threshold=0)
    if name in CAPTURED_ANEW:
        captures.clear()
    shared = capture_of(captures, name, dtype)
    shared.compile_anew(cache=cache, inner_backend=inner, passes={"hoist_invariants": hoists})
    steps = [tensors(shared(**tree_map(cast, at_timestep(arguments, scale)))) for scale in STEPS]
    assert not any(stats.uncached_calls for stats in shared.summary())
    return steps


@pytest.mark.budget(300, "two builds by inductor of up to twenty pieces each")
@pytest.mark.parametrize(("name", "dtype", "inner"), only_in("motion", CASES))
def test_the_pass_changes_no_bit(captures, name, dtype, inner):
    moved, plain = (results_of(captures, name, dtype, inner, hoists) for hoists in (True, False))
    assert all(equal(one, other) for one, other in zip(moved, plain, strict=True))
    assert not equal(plain[0], plain[1])
