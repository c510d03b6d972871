"""What cannot work: a clear error, or one warning and the plain module's result. Never a wrong picture in silence."""

import os
import warnings

import pytest
import torch
from lib import models
from torch._dynamo.exc import BackendCompilerFailed

import cachedit_fx
from cachedit_fx import CacheWarning, OptionError, Reason

REUSE = {
    "inner_backend": "eager",
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 1,
    "residual_diff_threshold": 1e9,
    "enable_separate_cfg": False,
}


class BreaksInEveryBlock(models.Toy):
    """Each block breaks the graph, so that each becomes graphs of its own."""

    def make_block(self, index, width):
        return _Breaking(width)


class _Breaking(models.Block):
    def forward(self, x, temb):
        torch._dynamo.graph_break()
        return super().forward(x, temb)


class AsksTheSystem(models.Toy):
    """Each block calls a function of the system that dynamo does not trace, and its result depends on it."""

    def make_block(self, index, width):
        return _Asking(width)


class _Asking(models.Block):
    def forward(self, x, temb):
        return super().forward(x, temb) + float(len(os.listdir("/")) > 0)


class ReadsBack(models.Toy):
    """Each block branches on a number that it reads back."""

    def make_block(self, index, width):
        return _Reading(width)


class _Reading(models.Block):
    def forward(self, x, temb):
        if x.mean() > 100:
            return x
        return super().forward(x, temb)


class IsNotTraced(models.Toy):
    """Taken out of dynamo's hands altogether."""

    @torch.compiler.disable
    def forward(self, hidden_states, timestep):
        return super().forward(hidden_states, timestep)


class BreaksAhead(models.Toy):
    """Two graphs, of which the second holds all blocks."""

    def forward(self, hidden_states, timestep):
        hidden_states = self.project(hidden_states)
        torch._dynamo.graph_break()
        return super().forward(hidden_states, timestep)


def pair(kind, **arguments):
    """(a plain model, its twin, a step's inputs for each of 500, 400, 300)"""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(kind(**arguments).eval())
    sample, _ = models.inputs()
    return *made, [(sample, torch.tensor([timestep])) for timestep in (500.0, 400.0, 300.0)]


@torch.no_grad()
def call(model, inputs):
    return model(*inputs)


def told(caught):
    return [str(item.message) for item in caught if issubclass(item.category, CacheWarning)]


# ---------------------------------------------------------------------------------------------------------------------
# Models that are not captured in one piece


@pytest.mark.parametrize("kind", [BreaksInEveryBlock, AsksTheSystem, ReadsBack, IsNotTraced])
def test_a_model_that_cannot_be_traced_runs_uncached_and_right_and_one_warning_says_so(kind):
    plain, model, steps = pair(kind, num_blocks=5)
    cachedit_fx.compile(model, **REUSE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for inputs in (*steps, *steps):
            assert torch.equal(call(model, inputs), call(plain, inputs))
    assert len(told(caught)) == 1 and "no caching" in told(caught)[0]
    ((calls, work, cached),) = [(r.uncached_calls, r.work, r.cached_steps) for r in cachedit_fx.summary(model)]
    assert (work, cached) == (1.0, [])
    assert calls in (3, 6)  # of both generations, if the timestep is in no graph


@pytest.mark.parametrize(
    ("kind", "line"),
    [(BreaksInEveryBlock, "torch._dynamo.graph_break()"), (AsksTheSystem, "os.listdir"), (ReadsBack, "x.mean() > 100")],
)
def test_the_warning_names_the_line_that_breaks_the_graph(kind, line):
    _, model, steps = pair(kind)
    cachedit_fx.compile(model, **REUSE)
    with pytest.warns(CacheWarning) as caught:
        call(model, steps[0])
    (message,) = told(caught)
    assert __file__.rsplit("/", 1)[-1] in message and line in message


def test_with_fullgraph_a_break_is_the_users_error():
    _, model, steps = pair(BreaksInEveryBlock)
    cachedit_fx.compile(model, fullgraph=True, **REUSE)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        call(model, steps[0])


# ---------------------------------------------------------------------------------------------------------------------
# Loops that do not exist


def test_a_loop_that_does_not_exist_is_an_error_that_names_those_that_do():
    plain, model, steps = pair(models.Toy)
    cachedit_fx.compile(model, loops=("nonexistent",), **REUSE)
    with pytest.raises((OptionError, BackendCompilerFailed)) as caught:
        call(model, steps[0])
    assert "'nonexistent'" in str(caught.value) and "['blocks']" in str(caught.value)
    cachedit_fx.disable_cache(model)
    assert torch.equal(call(model, steps[0]), call(plain, steps[0]))


def test_the_error_comes_again_at_the_next_call():
    _, model, steps = pair(models.Toy)
    cachedit_fx.compile(model, loops=("nonexistent",), **REUSE)
    for _ in range(2):
        with pytest.raises((OptionError, BackendCompilerFailed), match="'nonexistent'"):
            call(model, steps[0])


def test_a_loop_that_one_of_several_graphs_has_is_found():
    plain, model, steps = pair(BreaksAhead)
    cachedit_fx.compile(model, loops=("blocks",), **REUSE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        assert torch.equal(call(model, steps[0]), call(plain, steps[0]))
        call(model, steps[1])
    (region,) = cachedit_fx.summary(model)
    assert (region.num_blocks, region.cached_steps, region.uncached_calls) == (4, [1], 0)


def test_a_loop_that_none_of_several_graphs_has_is_an_error():
    _, model, steps = pair(BreaksAhead)
    cachedit_fx.compile(model, loops=("nonexistent",), **REUSE)
    with pytest.raises((OptionError, BackendCompilerFailed)) as caught:
        call(model, steps[0])
    assert "'nonexistent'" in str(caught.value) and "blocks" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# More first and last blocks than there are


def test_the_default_of_eight_first_blocks_on_a_short_model_is_told_once():
    plain, model, steps = pair(models.Toy, num_blocks=5)
    cachedit_fx.enable_cache(model, inner_backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for inputs in (*steps, *steps):
            assert torch.equal(call(model, inputs), call(plain, inputs))
    (message,) = told(caught)
    assert "8 + 0 leaves nothing to bypass of 5 blocks" in message and "below 5" in message
    ((calls, cached),) = [(r.uncached_calls, r.cached_steps) for r in cachedit_fx.summary(model)]
    assert (calls, cached) == (3, [])


# ---------------------------------------------------------------------------------------------------------------------
# Masks of another length


@pytest.mark.parametrize("policy", ["static", "dynamic"])
def test_steps_past_the_masks_end_compute_and_one_warning_says_so(policy):
    plain, model, steps = pair(models.Toy, num_blocks=5)
    mask = {"steps_computation_mask": "10", "steps_computation_policy": policy}
    cachedit_fx.compile(model, **REUSE | mask)
    sample = steps[0][0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for timestep in (900.0, 800.0, 700.0, 600.0, 900.0, 800.0, 700.0, 600.0):
            inputs = sample, torch.tensor([timestep])
            equal = torch.equal(call(model, inputs), call(plain, inputs))
            assert equal is (timestep != 800.0)
    (message,) = told(caught)
    assert "2 digits" in message
    (region,) = cachedit_fx.summary(model)
    assert (region.executed_steps, region.cached_steps) == (4, [1])
    assert [region.reasons[step] for step in (2, 3)] == [Reason.MASK_ENDED] * 2


def test_a_mask_that_is_too_long_is_followed_and_told_once_by_the_next_generation():
    plain, model, steps = pair(models.Toy, num_blocks=5)
    cachedit_fx.compile(model, **REUSE | {"steps_computation_mask": "100000", "steps_computation_policy": "static"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CacheWarning)
        for inputs in (*steps, *steps, *steps):
            equal = torch.equal(call(model, inputs), call(plain, inputs))
            assert equal is (inputs is steps[0])
    assert ["has 6 digits, and a generation had 3 steps" in str(item.message) for item in caught] == [True]
    (region,) = cachedit_fx.summary(model)
    assert (region.executed_steps, region.cached_steps) == (3, [1, 2])


# ---------------------------------------------------------------------------------------------------------------------
# Inputs that are no inputs


def test_what_the_plain_module_refuses_is_refused_alike():
    """A wrong shape is the module's error, not ours; the next right call is right."""
    plain, model, steps = pair(models.Toy)
    cachedit_fx.compile(model, **REUSE)
    assert torch.equal(call(model, steps[0]), call(plain, steps[0]))
    with pytest.raises(Exception, match="shape|size"):
        call(model, (torch.randn(1, 6, models.WIDTH + 1), steps[0][1]))
    with pytest.raises(TypeError):
        call(model, steps[0][:1])
    assert torch.equal(call(model, steps[0]), call(plain, steps[0]))


def test_values_that_are_not_finite_are_computed_and_told_once():
    plain, model, steps = pair(models.Toy, num_blocks=5)
    cachedit_fx.compile(model, **REUSE)
    bad = torch.full_like(steps[0][0], float("nan"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _, timestep in steps:
            assert call(model, (bad, timestep)).isnan().all() and call(plain, (bad, timestep)).isnan().all()
    (message,) = told(caught)
    assert "not a number" in message
    (region,) = cachedit_fx.summary(model)
    assert (region.cached_steps, region.non_finite) == ([], 2)


class Timeless(models.InSequential):
    def forward(self, x):  # type: ignore[override]
        return self.blocks(x)


def test_a_model_without_a_timestep_is_no_bad_input():
    """A call with no timestep is a step of its own."""
    plain, model, steps = pair(Timeless, num_blocks=5)
    cachedit_fx.compile(model, **REUSE)
    x = steps[0][0]
    assert all(torch.equal(call(model, (x,)), call(plain, (x,))) for _ in range(3))
    (region,) = cachedit_fx.summary(model)
    assert (region.executed_steps, region.cached_steps, region.uncached_calls) == (3, [1, 2], 0)
