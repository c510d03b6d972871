"""Generations, steps and branches of calls by a pipeline, whose scheduler is the clock."""

import threading
import types
import warnings
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from lib.helpers import on_a_device
from lib.toy_pipeline import (
    TEXTS,
    CallsOnceMore,
    Cancelled,
    HalvesTheBatch,
    HasALoopOfItsOwn,
    Inverts,
    TellsTheTimestep,
    ToyPipeline,
    UsesACopy,
    WantsGradients,
)
from lib.toys import make, noise

from cachedit_fx import (
    CacheWarning,
    DBCacheConfig,
    LagrangeCalibratorConfig,
    Reason,
    enable_cache,
    refresh_context,
    summary,
)
from cachedit_fx.runtime import clock, guard, session

pytestmark = pytest.mark.filterwarnings("ignore:.*inert threshold")
STEPS = 8
ALWAYS = DBCacheConfig(1, max_warmup_steps=0, residual_diff_threshold=1e9)
"""Reuses wherever anything is stored."""
MASK = [int(digit) for digit in "11010101"]
STATIC = DBCacheConfig(1, steps_computation_mask=MASK, steps_computation_policy="static")
IMAGE, OTHER = noise(seed=1), noise(seed=5)


@pytest.fixture(scope="module")
def transformer():
    return make()


@pytest.fixture
def pipeline(transformer):
    """Makes pipelines around one compiled transformer, whose next call begins a generation."""

    def build(kind=ToyPipeline, config=ALWAYS, calibrator=None, **arguments):
        enable_cache(transformer, config, calibrator, inner_backend="eager")
        refresh_context(transformer)
        return kind(transformer, **arguments)

    return build


def cancel_at(step):
    def cancel(present):
        if present == step:
            raise Cancelled

    return cancel


def fresh(pipe, *arguments, **keywords):
    """The result, and the decisions, of a generation that nothing came before."""
    refresh_context(pipe.transformer)
    result = pipe(*arguments, **keywords)
    refresh_context(pipe.transformer)
    return result, decisions(pipe)


def decisions(pipe):
    return [branch.decisions for branch in summary(pipe.transformer)[0].branches]


def patterns(pipe):
    """For each branch the step's letters: c for computed, r for reused."""
    return ["".join(decision.action.value[0] for decision in branch.values()) for branch in decisions(pipe)]


def assert_fresh(pipe, before, *arguments, **keywords):
    """After `before`, the generation is to the bit what it is when nothing came before."""
    expected, decided = fresh(pipe, *arguments, **keywords)
    before()
    assert torch.equal(pipe(*arguments, **keywords), expected)
    assert decisions(pipe) == decided


@pytest.mark.keep_compiled
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one branch", "two"])
def test_a_picture_of_one_step_then_image_to_image(pipeline, texts):
    pipe = pipeline(texts=texts)
    assert_fresh(pipe, lambda: pipe(IMAGE, steps=1), OTHER, skip=2)
    assert patterns(pipe) == ["crrrrr"] * len(texts)
    assert_fresh(pipe, lambda: pipe(IMAGE, steps=1), OTHER)


@pytest.mark.keep_compiled
@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one branch", "two"])
def test_a_cancelled_generation(pipeline, texts, step):
    """Cancelled by a callback after a step, or between a step's two calls."""
    pipe = pipeline(texts=texts)

    def cancel(present):
        if present == step:
            raise Cancelled

    def cancelled():
        with pytest.raises(Cancelled):
            pipe(IMAGE, callback=cancel)

    assert_fresh(pipe, cancelled, OTHER)
    assert len(patterns(pipe)) == len(texts)


@pytest.mark.keep_compiled
def test_guidance_that_ends_midway_restarts_nothing(pipeline):
    pipe = pipeline(HalvesTheBatch, STATIC)
    pipe(IMAGE)
    (region,) = summary(pipe.transformer)
    assert region.executed_steps == STEPS and region.branch(1).executed_steps == 0
    assert region.reasons[4] is Reason.SHAPES_DIFFER
    assert patterns(pipe) == ["ccrcccrc"]


def test_frames_of_torch_do_not_hide_the_pipeline():
    """A compilation, or a wrapper of each layer, puts many between the pipeline and who asks."""
    seen = []

    class Asks(torch.nn.Module):
        def forward(self, latents, timestep, text):
            seen.append((clock.clock(), clock.guidance()[1]))
            return latents

    class Guides(ToyPipeline):
        do_classifier_free_guidance = True

    asks: Any = Asks()
    for _ in range(clock.MAX_DEPTH):
        inner, asks = asks, torch.nn.Module()
        asks.forward = inner.__call__  # a module's call alone, without code of its own
    Guides(asks)(IMAGE, 1)
    ((tick, guides),) = seen
    assert tick is not None and guides


@pytest.mark.keep_compiled
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one branch", "two"])
def test_equal_timesteps_are_two_steps(pipeline, texts):
    scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(80)
    assert len(set(scheduler.timesteps.tolist())) < 80
    pipe = pipeline(texts=texts, scheduler=scheduler)
    pipe(IMAGE, steps=80)
    assert patterns(pipe) == ["c" + "r" * 79] * len(texts)


@pytest.mark.keep_compiled
def test_both_evaluations_of_a_second_order_step_are_steps(pipeline):
    pipe = pipeline(texts=TEXTS, scheduler=FlowMatchHeunDiscreteScheduler())
    pipe(IMAGE, steps=4)
    assert patterns(pipe) == ["crrrrrr"] * 2


@pytest.mark.keep_compiled
def test_denoising_after_an_inversion(pipeline):
    pipe = pipeline(
        Inverts, STATIC, inverse=DPMSolverMultistepInverseScheduler(), scheduler=DPMSolverMultistepScheduler()
    )
    assert_fresh(pipe, lambda: pipe.invert(IMAGE), OTHER)
    assert patterns(pipe) == ["ccrcrcrc"]
    pipe.invert(IMAGE)
    assert patterns(pipe) == ["ccrcrcrc"]


@pytest.mark.keep_compiled
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("config", [ALWAYS, STATIC], ids=["threshold", "static"])
def test_a_call_for_side_effects_is_computed_and_no_step(pipeline, place, config):
    pipe = pipeline(CallsOnceMore, config)
    expected, decided = fresh(pipe, IMAGE)
    setattr(pipe, place, True)
    for _ in range(2):
        assert torch.equal(pipe(IMAGE), expected)
        assert decisions(pipe) == decided
        assert summary(pipe.transformer)[0].uncached_causes == ({"after the last step": 1} if place == "after" else {})


@pytest.mark.keep_compiled
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one branch", "two"])
def test_a_scheduler_that_stands_still_is_no_clock(pipeline, texts):
    pipe = pipeline(UsesACopy, texts=texts)
    pipe.scheduler.set_timesteps(STEPS)
    for _ in range(3):
        pipe(IMAGE)
    assert patterns(pipe) == ["crrrrrrr"] * len(texts)


class Scheduler:
    """A scheduler as users write them."""

    timesteps: Any = None
    num_inference_steps: Any = None
    number = 0

    def set_timesteps(self, steps):
        self.num_inference_steps, self.number = steps, 0
        self.timesteps = torch.linspace(1000, 1000 / steps, steps)

    def step(self, prediction, timestep, sample):
        self.number += 1
        return types.SimpleNamespace(prev_sample=sample - prediction / self.num_inference_steps)


class WithAMethod(Scheduler):
    """Its index is a method."""

    def step_index(self):
        return self.number


class WithAWord(Scheduler):
    """Its index is no number."""

    step_index = "first"


class RaisesWhenAsked(Scheduler):
    """Its index cannot be read."""

    @property
    def step_index(self):
        raise RuntimeError("not set")


class CountsDown(Scheduler):
    """Its index is the number of steps to go, less one."""

    @property
    def step_index(self):
        return self.num_inference_steps - 1 - self.number


class MakesTimesteps(Scheduler):
    """Its timesteps are another tensor each time."""

    @property
    def step_index(self):
        return self.number

    @property
    def timesteps(self):
        return torch.linspace(1000, 1000 / (self.num_inference_steps or 1), self.num_inference_steps or 1)

    @timesteps.setter
    def timesteps(self, value):
        """Are made anew."""


@pytest.mark.keep_compiled
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one branch", "two"])
@pytest.mark.parametrize("kind", [WithAMethod, WithAWord, RaisesWhenAsked])
def test_what_is_no_integer_is_no_index(pipeline, kind, texts):
    pipe = pipeline(config=STATIC, texts=texts, scheduler=kind())
    assert_fresh(pipe, lambda: pipe(IMAGE), OTHER)
    assert patterns(pipe) == ["ccrcrcrc"] * len(texts)


@pytest.mark.keep_compiled
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one branch", "two"])
@pytest.mark.parametrize("kind", [CountsDown, MakesTimesteps])
def test_a_scheduler_that_begins_anew_at_every_step_is_no_clock(kind, texts):
    transformer = enable_cache(make(), STATIC, inner_backend="eager")
    pipe = ToyPipeline(transformer, texts, kind())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe(IMAGE, steps=12)
        for _ in range(2):
            pipe(IMAGE)
            assert patterns(pipe) == ["ccrcrcrc"] * len(texts)
    (message,) = [str(w.message) for w in caught if "is not believed" in str(w.message)]
    assert kind.__name__ in message


@pytest.mark.keep_compiled
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one branch", "two"])
def test_generations_of_one_step_keep_their_clock(pipeline, texts):
    pipe = pipeline(texts=texts)
    for _ in range(6):
        pipe(IMAGE, steps=1)
    assert_fresh(pipe, lambda: pipe(IMAGE, steps=1), OTHER)


@pytest.mark.keep_compiled
@pytest.mark.parametrize("kind", [ToyPipeline, TellsTheTimestep])
def test_a_scheduler_without_an_index(pipeline, kind):
    pipe = pipeline(kind, STATIC, texts=TEXTS, scheduler=DDIMScheduler())
    assert_fresh(pipe, lambda: pipe(IMAGE, steps=1), OTHER)
    assert patterns(pipe) == ["ccrcrcrc"] * 2


@pytest.mark.keep_compiled
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one branch", "two"])
@pytest.mark.parametrize("config", [ALWAYS, STATIC], ids=["threshold", "static"])
def test_another_method_than_the_one_that_was_cancelled(pipeline, texts, config):
    pipe = pipeline(HasALoopOfItsOwn, config, texts=texts)
    plain = HasALoopOfItsOwn(make(), texts=texts)
    for _ in range(3):
        with pytest.raises(Cancelled):
            pipe(IMAGE, callback=cancel_at(2))
        assert torch.equal(pipe.refine(OTHER, steps=1), plain.refine(OTHER, steps=1))
        assert summary(pipe.transformer)[0].cached_steps == []


class HasNoClock:
    """FLUX's scheduler without `set_timesteps` in its class: the timestep alone tells the steps."""

    def __init__(self):
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    def __getattr__(self, name):
        return getattr(self.scheduler, "set_timesteps" if name == "begin" else name)


class SetsNoClock(WantsGradients):
    """Its scheduler is none that a clock can read."""

    def timesteps(self, steps, skip):
        self.scheduler.begin(steps)
        return self.scheduler.timesteps[skip:]


@pytest.mark.keep_compiled
@pytest.mark.parametrize(("kind", "scheduler"), [(WantsGradients, None), (SetsNoClock, HasNoClock())])
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one branch", "two"])
@pytest.mark.parametrize("config", [ALWAYS, STATIC], ids=["threshold", "static"])
def test_calls_that_want_gradients_leave_no_trace_among_the_steps(pipeline, kind, scheduler, texts, config):
    pipe = pipeline(kind, config, scheduler=scheduler, texts=texts)
    expected, decided = fresh(pipe, IMAGE)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "steps_computation_mask")
        for pipe.before, pipe.after in [({0, 3, 4}, ()), ((), {0, 2, 7}), ({0, 5}, {0, 5, 6})]:
            for _ in range(2):
                assert torch.equal(pipe(IMAGE), expected)
                (region,) = summary(pipe.transformer)
                assert decisions(pipe) == decided and region.executed_steps == STEPS
                assert region.uncached_causes == {"gradients wanted": len(pipe.before) + len(pipe.after)}


@pytest.mark.keep_compiled
def test_pipelines_that_share_a_transformer(pipeline):
    """Calls of two pipelines by turns, each with a scheduler of its own: each has its generation."""
    one = pipeline(texts=TEXTS)
    two = ToyPipeline(one.transformer, TEXTS)
    assert_fresh(one, lambda: two(OTHER, steps=3), IMAGE)
    assert_fresh(two, lambda: one(IMAGE), OTHER, steps=3)


@pytest.mark.keep_compiled
def test_pipelines_in_two_threads(pipeline):
    one = pipeline(texts=TEXTS)
    pipes = [one, ToyPipeline(one.transformer, TEXTS)]
    images = [IMAGE, OTHER]
    expected = [fresh(pipe, image)[0] for pipe, image in zip(pipes, images, strict=True)]
    results = [IMAGE, OTHER]
    turns = threading.Barrier(2)

    def run(number):
        results[number] = pipes[number](images[number], callback=lambda step: turns.wait(60) and None)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


@pytest.mark.keep_compiled
@pytest.mark.parametrize(
    ("config", "calibrator", "reads"),
    [
        (STATIC, None, [0] * STEPS),
        (STATIC, LagrangeCalibratorConfig(), [1] + [0] * (STEPS - 1)),
        (ALWAYS, None, [0] + [1] * (STEPS - 1)),
    ],
    ids=["static", "static and a calibrator", "threshold"],
)
def test_read_backs_of_a_step(pipeline, monkeypatch, config, calibrator, reads):
    """A calibrator reads the schedule once in a generation."""
    pipe = pipeline(config=config, calibrator=calibrator)
    pipe(IMAGE)
    counts = [0]
    read_back = guard.read_back

    def counting(values):
        counts[-1] += 1
        return read_back(values)

    for module in (guard, clock, session):
        monkeypatch.setattr(module, "read_back", counting)
    on_a_device(monkeypatch)
    pipe(IMAGE, callback=lambda step: counts.append(0))
    assert counts[:-1] == reads


@pytest.mark.keep_compiled
def test_a_mask_for_more_steps_is_named_after_the_generation(pipeline):
    pipe = pipeline(config=STATIC)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(IMAGE, steps=5, callback=lambda step: step < 4 and summary(pipe.transformer))
    with pytest.warns(CacheWarning, match="has 8 digits, and a generation had 5 steps"):
        summary(pipe.transformer)


@pytest.mark.keep_compiled
def test_a_cancelled_generation_says_nothing_of_the_mask(pipeline):
    pipe = pipeline(config=STATIC.reset(steps_computation_mask=[*MASK, 1, 1]))

    def cancel(step):
        if step == 3:
            raise Cancelled

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(Cancelled):
                pipe(IMAGE, steps=10, callback=cancel)
            summary(pipe.transformer)
        pipe(IMAGE, steps=10)


def test_the_number_of_steps():
    class Pipe:
        def __init__(self):
            self.scheduler = FlowMatchEulerDiscreteScheduler()

        def tick(self):
            return clock.clock()

    pipe = Pipe()
    assert pipe.tick() is None
    pipe.scheduler.set_timesteps(20)
    assert pipe.tick().steps == 20 and pipe.tick().indices == (0,)
    pipe.scheduler.set_begin_index(5)
    assert pipe.tick().steps == 15 and pipe.tick().indices == (5,)
    for timestep in pipe.scheduler.timesteps[5:]:
        assert pipe.tick().schedules[0] is pipe.scheduler.timesteps
        pipe.scheduler.step(noise(), timestep, noise())
    assert pipe.tick().is_over
