"""diffusers' transformer classes: found, exact where computed, exact where reused on identical inputs, and cached."""

import re
from pathlib import Path

import pytest
import torch
import zoo
from torch.utils._pytree import tree_leaves

import cachedit_fx

pytestmark = pytest.mark.slow
TIMESTEPS = ("timestep", "timesteps", "t")


def tensors(result):
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def equal(left, right):
    return len(left) == len(right) > 0 and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def later(arguments):
    """The arguments of the next step: a timestep a little smaller."""
    (name,) = (name for name in TIMESTEPS if name in arguments)
    return arguments | {name: (arguments[name] * 0.98).to(arguments[name].dtype)}


def test_every_entry_is_a_class_that_is_expected_to_pass_or_named_with_a_reason():
    assert set(zoo.BLOCKS).isdisjoint(zoo.SHORT)
    assert set(zoo.BLOCKS) | set(zoo.SHORT) == set(zoo.ZOO)
    assert all(hasattr(zoo.transformers, name) for name in zoo.ZOO)


def test_no_class_is_named_in_the_passes():
    root = Path(cachedit_fx.__file__).parent.parent
    text = "\n".join(path.read_text() for folder in ("passes", "kernels") for path in (root / folder).glob("*.py"))
    assert not [name for name in zoo.ZOO if re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize("name", zoo.BLOCKS)
@torch.no_grad()
def test_class(name):
    model, arguments = zoo.ZOO[name]()
    expected, next_expected = tensors(model(**arguments)), tensors(model(**later(arguments)))
    assert all(item.isfinite().all() for item in expected) and not equal(expected, next_expected)
    cachedit_fx.compile(
        model,
        inner_backend="eager",
        Fn_compute_blocks=1,
        max_warmup_steps=1,
        residual_diff_threshold=1e9,
        enable_separate_cfg=False,  # so that a call with the same timestep is the next step, not another branch
    )
    assert equal(tensors(model(**arguments)), expected), "computed"
    assert equal(tensors(model(**arguments)), expected), "reused on identical inputs"
    reused = tensors(model(**later(arguments)))
    assert not equal(reused, next_expected) and not equal(reused, expected)
    (region,) = cachedit_fx.summary(model)
    assert region.num_blocks == zoo.BLOCKS[name]
    assert (region.executed_steps, region.cached_steps, region.uncached_calls) == (3, [1, 2], 0)
