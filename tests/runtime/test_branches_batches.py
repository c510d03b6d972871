"""`cfg_parallel` and several pictures at once: calls that are branches stay whole, other batches are cut."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from diffusers.models.cache_utils import CacheMixin
from lib import toys
from lib.ranks import on_ranks
from lib.toy_pipeline import ToyPipeline

import cachedit_fx
from cachedit_fx.runtime.branches import SHARED_CALLS
from cachedit_fx.runtime.listener import JOINED
from cachedit_fx.runtime.warning import CacheWarning

pytestmark = [pytest.mark.keep_compiled, pytest.mark.xdist_group("ulysses")]

DBCACHE: dict[str, Any] = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.9}
STEPS = 6
TEXTS = toys.noise(2, 6, seed=6), toys.noise(2, 6, seed=7)


class Named(CacheMixin, toys.Toy):
    """A toy whose calls may be named."""


class Names(ToyPipeline):
    """Names both branches, and says that it guides."""

    do_classifier_free_guidance = True

    def predict(self, latents, timestep, step):
        results = {}
        for name, text in zip(("cond", "uncond"), TEXTS, strict=True):
            with self.transformer.cache_context(name):
                results[name] = self.transformer(latents, timestep.expand(2) / 1.0, text)
        return results["cond"] + 2.0 * (results["cond"] - results["uncond"])


class SaysNothing(Names):
    """Names both branches."""

    do_classifier_free_guidance = False


class Joins(Names):
    """Makes one call of both branches."""

    def predict(self, latents, timestep, step):
        both = [torch.cat([value] * 2) for value in (latents, timestep.expand(2))]
        with self.transformer.cache_context(JOINED):
            first, other = self.transformer(*both, torch.cat(TEXTS)).chunk(2)
        return first + 2.0 * (first - other)


def drawn(kind, **options):
    """Two generations, the calls left to other ranks in the last one, the explanation's notes, and warnings."""
    module = toys.make(Named, blocks=4).requires_grad_(False)
    cachedit_fx.enable_cache(module, inner_backend="eager", **DBCACHE, **options)
    pipe = kind(module)
    with warnings.catch_warnings(record=True, action="always", category=CacheWarning) as warned:
        latents = [pipe(toys.noise(2, seed=seed), STEPS) for seed in range(2)]
    elsewhere = sum(cachedit_fx.summary(module)[0].elsewhere.values())
    return latents, elsewhere, cachedit_fx.explain(module).notes, [str(each.message) for each in warned]


WHOLE: dict[str, Any] = {"passes": {"insert_cfg_parallel": False}}
CASES: dict[str, tuple[Any, dict[str, Any], bool, bool]] = {
    "named": (Names, {}, True, False),
    "not said": (SaysNothing, {}, False, True),
    "not said, asked for": (SaysNothing, WHOLE, True, False),
    "joined": (Joins, {}, False, False),
}
"""Pipeline, options, whether calls stay whole, and whether a warning tells of a better way."""


@functools.cache
def together():
    """For each rank: case -> what it drew."""
    return on_ranks(
        lambda rank: {name: drawn(kind, cfg_parallel=True, **options) for name, (kind, options, _, _) in CASES.items()},
        seconds=60,
    )


@pytest.mark.budget(60, "models are captured on two ranks")
@pytest.mark.parametrize("name", CASES)
def test_batches_of_branches(name):
    kind, _, is_whole, is_advised = CASES[name]
    expected, *_ = drawn(kind)
    for found in together():
        latents, elsewhere, notes, warned = found[name]
        assert all(map(torch.equal, latents, expected))
        assert elsewhere == is_whole * STEPS
        assert (SHARED_CALLS in notes) == is_whole
        assert [message.startswith("cfg_parallel: the ranks cut the batch") for message in warned] == is_advised * [
            True
        ]
