"""Whole pipelines of diffusers' families: exact where everything is computed, cached where a mask says so, undone."""

from dataclasses import dataclass

import pytest
import torch
from lib.families import FAMILIES, STEPS, Family, Pipeline
from lib.marks import only_in

from cachedit_fx import CacheWarning, DBCacheConfig, disable_cache, enable_cache, summary

pytestmark = pytest.mark.keep_compiled
ONES = "1" * STEPS
MASK = "101001"
CAPTURED = [name for name, family in FAMILIES.items() if family.blocks]
UNCAPTURED = [name for name in FAMILIES if name not in CAPTURED]
BY_DEFAULT = {
    "Flux": "two loops, guidance by two calls",
    "Mochi": "a timestep that rises",
    "PixArtSigma": "guidance by a doubled batch",
}
"""Families that the default run has; the others are in the part of that name."""


def static(mask):
    return DBCacheConfig(1, steps_computation_mask=mask, steps_computation_policy="static")


@dataclass
class Case:
    """A family's pipeline, to be enabled, and its twin, which never is."""

    family: Family
    pipe: Pipeline
    plain: Pipeline

    def enable(self, mask):
        """Compiles at the first time only; then it is a new policy."""
        enable_cache(self.pipe, static(mask), inner_backend="eager")

    def latents(self, size=0):
        return self.family.latents(self.pipe, size)

    def expected(self, size=0):
        return self.family.latents(self.plain, size)

    def assert_follows_the_mask(self, size):
        """In two generations, of which the second repeats the first to the bit."""
        self.enable(MASK)
        first = self.latents(size)
        self.assert_cached(MASK)
        assert first.isfinite().all() and not torch.equal(first, self.expected(size))
        assert torch.equal(self.latents(size), first)
        self.assert_cached(MASK)

    def assert_cached(self, mask):
        """Each transformer's own steps go by the mask from its start, in every branch alike."""
        for region, steps in zip(summary(self.pipe), self.family.steps, strict=True):
            zeros = [step for step in range(steps) if mask[step] == "0"]
            assert (region.num_blocks, region.uncached_calls) == (self.family.blocks, 0)
            assert [branch.executed_steps for branch in region.branches] == [steps] * self.family.branches
            assert [branch.cached_steps for branch in region.branches] == [zeros] * self.family.branches


@pytest.fixture(scope="module", params=only_in("families", CAPTURED, but=BY_DEFAULT))
def case(request):
    family = FAMILIES[request.param]
    yield Case(family, family.build(), family.build())
    torch._dynamo.reset()


def test_everything_computed_is_the_plain_pipeline_to_the_bit(case):
    case.enable(ONES)
    assert torch.equal(case.latents(), case.expected())
    case.assert_cached(ONES)


# A second resolution makes dynamo trace with symbols, which takes as long again as all the rest.
RESIZED = only_in("families", CAPTURED, but=["Flux"])


@pytest.mark.parametrize("case", RESIZED, indirect=True)
def test_another_resolution_is_the_plain_pipeline_to_the_bit(case):
    case.enable(ONES)
    for size in (0, 1, 0):
        assert torch.equal(case.latents(size), case.expected(size))
        case.assert_cached(ONES)


def test_a_mask_is_followed_in_every_branch_and_anew_in_every_generation(case):
    case.assert_follows_the_mask(size=0)


@pytest.mark.parametrize("case", RESIZED, indirect=True)
def test_a_mask_is_followed_at_another_resolution(case):
    case.assert_follows_the_mask(size=1)


def test_disabled_the_pipeline_is_plain_again(case):
    case.enable(MASK)
    cached = case.latents()
    disable_cache(case.pipe)
    assert torch.equal(case.latents(), case.expected()) and not torch.equal(cached, case.expected())
    assert summary(case.pipe) == []


def test_two_transformers_may_have_a_mask_each():
    """The pipeline's own mask is cut where the second transformer takes over: masks count a transformer's own steps."""
    family = FAMILIES["Wan22"]
    pipe, (early, _) = family.build(), family.steps
    for transformer, mask in ((pipe.transformer, MASK[:early]), (pipe.transformer_2, MASK[early:])):
        enable_cache(transformer, static(mask), inner_backend="eager")
    first = family.latents(pipe)
    assert torch.equal(family.latents(pipe), first) and not torch.equal(first, family.latents(family.build()))
    cached = [[branch.cached_steps for branch in region.branches] for region in summary(pipe)]
    assert cached == [[[1]] * 2, [[1, 2]] * 2]


@pytest.mark.budget(60, "every frame of a model that breaks is a capture")
@pytest.mark.parametrize("name", only_in("families", UNCAPTURED))
def test_blocks_that_cannot_be_captured_run_uncached_and_say_so(name):
    family = FAMILIES[name]
    pipe = enable_cache(family.build(), static(MASK), inner_backend="eager")
    with pytest.warns(CacheWarning):
        latents = family.latents(pipe)
    assert torch.equal(latents, family.latents(family.build()))
    (region,) = summary(pipe)
    assert (region.uncached_calls, region.branches) == (STEPS * family.branches, [])
