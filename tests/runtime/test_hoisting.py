"""Hoisted values: right whatever changes between two calls, kept as long as they are right, and no longer."""

import functools
import gc
import itertools
import threading
from contextlib import contextmanager

import pytest
import torch
from lib.conditioned import Conditioned, StorageWatch, conditions, sample, times
from lib.helpers import on_a_device
from lib.models import WIDTH
from lib.shared import SharedCapture
from lib.toy_pipeline import ToyPipeline

import cachedit_fx
from cachedit_fx import CacheWarning
from cachedit_fx.passes.hoist_invariants import Hoisted
from cachedit_fx.runtime.graph import CachedGraph

pytestmark = pytest.mark.keep_compiled


class Cached:
    """A model behind the cache at threshold 0, so that each result equals the plain model's; its hoisted memory."""

    def __init__(self, model):
        self.model, self.shared = model, SharedCapture(model)
        self.compile()
        self(sample(), times()[0], **conditions())

    def compile(self, **options):
        self.shared.compile_anew(**({"residual_diff_threshold": 0.0, "Fn_compute_blocks": 1} | options))

    def __call__(self, *args, **kwargs):
        return self.shared(*args, **kwargs)

    @property
    def memory(self):
        (memory,) = self.shared._state.hoisted
        return memory

    @property
    def hoisted(self):
        (outcome,) = (graph.outcome for graph in self.shared._state.latest_graphs)
        assert outcome is not None
        return outcome.facts[Hoisted]

    def computed(self, *args, **kwargs):
        """Names of the hoisted pieces that a right call computes; the rest come from memory."""
        with self.noting() as names:
            self.assert_right(*args, **kwargs)
        return names

    @contextmanager
    def noting(self):
        """Context manager for the names of the hoisted pieces that are computed inside."""
        names: list[str] = []
        graphs = [graph for graph in self.shared._compiled if isinstance(graph, CachedGraph)]
        codes = [graph.hoisted for graph in graphs if graph.hoisted is not None]
        functions = [code.functions for code in codes]

        def noted(name, function):
            def note(*arguments):
                names.append(name)
                return function(*arguments)

            return note

        for code in codes:
            pairs = zip(code.pieces, code.functions, strict=True)
            code.functions = [noted(piece.name, function) for piece, function in pairs]
        yield names
        for code, before in zip(codes, functions, strict=True):
            code.functions = before

    @torch.no_grad()
    def assert_right(self, *args, **kwargs):
        """Call, and compare with the plain model, bit for bit."""
        assert torch.equal(self(*args, **kwargs), self.model(*args, **kwargs))


@pytest.fixture(scope="module")
def pooled():
    """The timestep and the pooled text modulate."""
    torch.manual_seed(0)
    return Cached(Conditioned())


@pytest.fixture(scope="module")
def timed():
    """The timestep alone modulates."""
    torch.manual_seed(1)
    return Cached(Conditioned(pooled=False))


@pytest.fixture
def model(pooled):
    pooled.compile()
    return pooled


@pytest.fixture
def timed_model(timed):
    timed.compile()
    return timed


def generation(model, prompt, steps=4, batch=1):
    """The hoisted pieces that each step computes."""
    return [model.computed(sample(step, batch), time, **prompt) for step, time in enumerate(times(steps, batch))]


STATIC = {"steps_computation_policy": "static", "residual_diff_threshold": 0.08}


def of_time(names):
    return [name for name in names if "time" in name]


# ---------------------------------------------------------------------------------------------------------------------
# What is hoisted, and how often it is computed


def test_what_is_hoisted(model):
    generation(model, conditions(), 1)
    values: dict[tuple[str, ...], int] = {}
    for piece in model.hoisted.pieces:
        key = tuple(sorted(model.hoisted.names[index] for index in piece.inputs))
        values[key] = values.get(key, 0) + len(piece.results)
    assert values == {
        ("pooled",): 1,  # its projection
        ("timestep",): 1,  # the projection of the sinusoids
        ("pooled", "timestep"): 6,  # their sum, four blocks' modulations, the last scale and shift
        ("ids",): 1,  # the rotary table
        ("encoder_hidden_states",): 9,  # the projected text, keys and values of four blocks
    }


def test_conditions_are_computed_once_and_modulations_at_each_step(model):
    first, *others = generation(model, conditions())
    assert len(first) == len(model.hoisted.pieces)
    for names in others:
        assert names == of_time(names)
        assert len(names) == 7


def test_values_of_the_timestep_alone_serve_every_later_generation(timed_model):
    generation(timed_model, conditions())
    held = timed_model.memory.bytes_held
    assert [of_time(names) for names in generation(timed_model, conditions(1))] == [[]] * 4
    assert timed_model.memory.bytes_held <= held  # the first prompt's values are gone


def test_values_of_a_prompt_are_kept_once_the_prompt_returns(model):
    prompt = conditions()
    assert all(of_time(names) for names in generation(model, prompt))
    assert all(of_time(names) for names in generation(model, prompt))  # kept from here on
    assert generation(model, prompt) == [[]] * 4


def test_a_bypassed_block_asks_for_nothing(timed_model):
    timed_model.compile(steps_computation_mask="1001", **STATIC)
    prompt, asked = conditions(), []
    for step, time in enumerate(times(4)):
        with timed_model.noting() as names:
            timed_model(sample(step), time, **prompt)
        asked.append(names)
    assert timed_model.shared.summary()[0].cached_steps == [1, 2]
    assert asked[1] == ["prologue_time", "blocks_0_time", "epilogue_time"]
    assert len(of_time(asked[3])) == 6


def test_a_warm_step_reads_no_weight_behind_time(timed_model):
    timed_model.compile(steps_computation_mask="1101", **STATIC)
    prompt = conditions()
    for step, time in enumerate(times(4)):
        timed_model(sample(step), time, **prompt)
    module = timed_model.model
    behind = [module.time.weight, module.norm_out.weight, *(block.modulation.weight for block in module.blocks)]
    behind += [module.text.weight, *(block.cross.to_k.weight for block in module.blocks)]
    rest = [block.ff.weight for block in module.blocks]
    timed_model(sample(0), times()[0], **prompt)  # reads samples of the weights
    for step, time in enumerate(times(4)[1:], 1):
        with StorageWatch() as watch:
            timed_model(sample(step), time, **prompt)
        assert not any(watch.has_read(behind))
        assert watch.has_read(rest) == [True, *[step != 2] * 3]


def test_the_pass_can_be_switched_off(model):
    model.compile(passes={"hoist_invariants": False})
    model.assert_right(sample(), times()[0], **conditions())
    assert not model.shared._state.hoisted


@pytest.mark.parametrize("others", [{"gather_inputs": False}, {"insert_cache_branch": False}])
def test_without_other_passes(model, others):
    model.compile(passes=others)
    for step, time in enumerate(times()):
        model.assert_right(sample(step), time, **conditions())


# ---------------------------------------------------------------------------------------------------------------------
# What changes between two calls


def test_a_changed_prompt(model):
    for seed in (0, 1, 0):
        generation(model, conditions(seed))


@pytest.mark.parametrize("name", ["encoder_hidden_states", "pooled", "ids"])
def test_a_condition_edited_in_place_between_two_steps(model, name):
    prompt = conditions()
    generation(model, prompt, 2)
    prompt[name].mul_(2)
    names = model.computed(sample(2), times()[2], **prompt)
    assert names
    generation(model, prompt)


@pytest.mark.parametrize("name", ["encoder_hidden_states", "pooled", "ids"])
def test_a_condition_exchanged_between_two_steps(model, name):
    prompt = conditions()
    generation(model, prompt, 2)
    prompt[name] = prompt[name] * 2
    generation(model, prompt, 2)


def test_a_condition_made_anew_at_each_step_is_named(model):
    prompt = conditions()
    for step, time in enumerate(times(5)):
        names = model.computed(sample(step), time, **prompt | {"ids": prompt["ids"].clone()})
        assert step == 0 or len(names) == len(of_time(names)) + 1
    assert model.memory.renewed_inputs == ["ids"]
    stats = model.shared.summary()
    assert stats


def test_two_prompts_by_turns_as_guidance_has_them(model):
    prompts = [conditions(0), conditions(1)]
    for step, time in enumerate(times()):
        for prompt in prompts:
            names = model.computed(sample(step), time, **prompt)
            assert step == 0 or names == of_time(names)
    assert model.memory.renewed_inputs == []


def test_batch_and_size_change(model):
    model.compile()
    for batch, tokens in ((1, 6), (2, 6), (1, 8), (1, 6)):
        prompt = conditions(0, batch, tokens)
        for step, time in enumerate(times(2, batch)):
            model.assert_right(sample(step, batch, tokens), time, **prompt)


def test_other_dtypes_of_the_timestep_are_other_values(timed_model):
    prompt = conditions()
    for dtype in (torch.float32, torch.float64, torch.int64, torch.float32):
        timed_model.assert_right(sample(), torch.full((1,), 900.0).to(dtype), **prompt)


def test_the_smallest_difference_of_a_timestep_counts(timed_model):
    prompt, time = conditions(), torch.full((1,), 900.0)
    for value in (time, torch.nextafter(time, time + 1), time, -time * 0, time * 0, torch.full((1,), torch.nan)):
        with torch.no_grad():
            ours, plain = timed_model(sample(), value, **prompt), timed_model.model(sample(), value, **prompt)
        torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_conditions_made_under_inference_mode_are_never_kept(model, mode):
    with torch.inference_mode():
        prompt = conditions()
    for _ in range(3):
        with mode():
            for step, time in enumerate(times(2)):
                ours = model.shared._call(sample(step), time, **prompt)
                assert torch.equal(ours, model.model(sample(step), time, **prompt))
        with torch.inference_mode():
            prompt["encoder_hidden_states"].mul_(1.5)


def test_values_kept_under_inference_mode_serve_outside(timed_model):
    prompt = conditions()
    with torch.inference_mode():
        timed_model.shared._call(sample(), times()[0], **prompt)
    for step, time in enumerate(times()):
        timed_model.assert_right(sample(step), time, **prompt)


def test_autocast_has_values_of_its_own(model):
    prompt = conditions()
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for step, time in enumerate(times(2)):
                model.assert_right(sample(step), time, **prompt)


def test_gradients_pass_the_memory_by(model):
    prompt = conditions()
    generation(model, prompt, 2)
    hidden = sample().requires_grad_()
    result = model.shared._call(hidden, times()[0], **prompt)
    (gradient,) = torch.autograd.grad(result.sum(), hidden)
    (expected,) = torch.autograd.grad(model.model(hidden, times()[0], **prompt).sum(), hidden)
    torch.testing.assert_close(gradient, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def changes():
    """Ways to change a weight that is behind the timestep, and one that is behind the text."""

    def in_place(linear):
        linear.weight.mul_(1.5)

    def through_data(linear):
        linear.weight.data.mul_(1.5)

    def other_data(linear):
        linear.weight.data = linear.weight.data * 1.5

    def other_parameter(linear):
        linear.weight = torch.nn.Parameter(linear.weight * 1.5)

    def loaded(linear):
        linear.load_state_dict({name: value * 1.5 for name, value in linear.state_dict().items()})

    def assigned(linear):
        linear.load_state_dict({name: value * 1.5 for name, value in linear.state_dict().items()}, assign=True)

    def bias(linear):
        linear.bias.data.add_(1.0)

    return [in_place, through_data, other_data, other_parameter, loaded, assigned, bias]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
@pytest.mark.parametrize("place", ["time", "text", "modulation", "key"])
def test_a_weight_changed_between_two_generations(timed, change, place):
    torch.manual_seed(1)
    module = Conditioned(pooled=False)
    timed.model.load_state_dict(module.state_dict())
    timed.compile()
    linear = {
        "time": timed.model.time,
        "text": timed.model.text,
        "modulation": timed.model.blocks[2].modulation,
        "key": timed.model.blocks[2].cross.to_k,
    }[place]
    prompt = conditions()
    generation(timed, prompt)
    with torch.no_grad():
        change(linear)
    generation(timed, prompt)
    generation(timed, conditions(1))


@pytest.mark.parametrize("change", ["in_place", "loaded"])
def test_a_weight_changed_between_two_steps(timed_model, change):
    by_name = {each.__name__: each for each in changes()}
    prompt = conditions()
    generation(timed_model, prompt)
    generation(timed_model, prompt, 2)
    with torch.no_grad():
        by_name[change](timed_model.model.blocks[1].modulation)
    timed_model.assert_right(sample(2), times()[2], **prompt)
    timed_model.assert_right(sample(3), times()[3], **prompt)


def test_the_call_that_finds_changed_weights_is_counted_once(timed_model):
    prompt = conditions()
    generation(timed_model, prompt)
    timed_model.model.time.weight.data.add_(0.5)  # the prologue's values were taken before a generation was seen
    names = timed_model.computed(sample(), times()[0], **prompt)
    assert len(names) == len(timed_model.hoisted.pieces)
    (stats,) = timed_model.shared.summary()
    assert (stats.executed_steps, stats.failed_calls) == (1, 0)


# ---------------------------------------------------------------------------------------------------------------------
# How much is kept, and how long


def test_the_limit_holds(timed_model):
    generation(timed_model, conditions())
    whole = timed_model.memory.bytes_held
    assert whole > 0
    timed_model.compile(hoisted_mib=0)
    generation(timed_model, conditions())
    generation(timed_model, conditions())
    assert timed_model.memory.bytes_held == 0


def test_what_was_not_used_for_two_generations_makes_room(timed_model):
    prompt = conditions()
    timed_model(sample(), times()[0], **prompt)
    memory = timed_model.memory
    generation(timed_model, prompt)
    memory.limit = memory.bytes_held
    others = [time + 1 for time in times()]
    for _ in range(4):
        for step, time in enumerate(others):
            timed_model.assert_right(sample(step), time, **prompt)
        assert memory.bytes_held <= memory.limit
    names = [timed_model.computed(sample(step), time, **prompt) for step, time in enumerate(others)]
    assert names == [[]] * 4


def test_values_die_with_their_conditions(model):
    generation(model, conditions())
    gc.collect()
    with_prompt = model.memory.bytes_held
    prompt = conditions()
    generation(model, prompt)
    assert model.memory.bytes_held > with_prompt
    del prompt
    gc.collect()
    assert model.memory.bytes_held == with_prompt


def test_statistics_name_the_bytes(timed):
    torch.manual_seed(2)
    model = Conditioned(pooled=False)
    cachedit_fx.compile(model, inner_backend="eager", Fn_compute_blocks=1)
    prompt = conditions()
    with torch.no_grad():
        for step, time in enumerate(times(5)):
            model(sample(step), time, **prompt | {"ids": prompt["ids"].clone()})
    (stats,) = cachedit_fx.summary(model)
    assert stats.hoisted_bytes > 0
    assert stats.renewed_inputs == ("ids",)
    assert "MiB of hoisted values; new at every step: ids" in str(stats)


# ---------------------------------------------------------------------------------------------------------------------
# Sessions and threads


def test_sessions_and_threads_share_the_values_of_the_timestep(timed_model):
    prompts = [conditions(seed) for seed in range(3)]
    errors = []

    def denoise(prompt):
        try:
            for _ in range(3):
                for step, time in enumerate(times()):
                    ours = timed_model(sample(step), time, **prompt)
                    with torch.no_grad():
                        assert torch.equal(ours, timed_model.model(sample(step), time, **prompt))
        except Exception as error:
            errors.append(error)

    timed_model.assert_right(sample(), times()[0], **prompts[0])
    threads = [threading.Thread(target=denoise, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    with cachedit_fx.session("other"):
        assert [of_time(names) for names in generation(timed_model, conditions(9))] == [[]] * 4


# ---------------------------------------------------------------------------------------------------------------------
# All steps at once


class Pipeline(ToyPipeline):
    """Denoises for a prompt, and compares each step with the plain model."""

    def __init__(self, model, rounds=False):
        super().__init__(model.shared)
        self.model, self.prompt, self.offsets = model, conditions(), [0.0]
        self.compare = functools.partial(torch.allclose, rtol=1e-4, atol=1e-5) if rounds else torch.equal

    def predict(self, latents, timestep, step):
        for offset in self.offsets:  # a call for each
            time = (timestep + offset).expand(1)
            result = self.transformer(latents, time, **self.prompt)
            assert self.compare(result, self.model.model(latents, time, **self.prompt))
        return result


ALWAYS = STATIC | {"steps_computation_mask": "1" * 8}


def test_a_clock_stands_for_the_timestep_on_a_device(timed_model, monkeypatch):
    on_a_device(monkeypatch)
    timed_model.compile(**ALWAYS)
    pipe = Pipeline(timed_model)
    pipe(sample())
    computed = []
    for _ in range(3):
        with timed_model.noting() as names:
            pipe(sample())
        computed.append(len(of_time(names)))
    assert computed == [8 * 6] * 3  # nobody has read the schedule, so no place has a number
    timed_model.compile(**ALWAYS, calibrator="lagrange")
    reads_schedule(pipe)
    computed = []
    for _ in range(3):
        with timed_model.noting() as names:
            pipe(sample())
        computed.append(len(of_time(names)))
    assert computed[0] == 8 * 6
    assert computed[2] <= 6  # but for the first step


def reads_schedule(pipe):
    """Let the schedule be read at each generation's first call, as calibrators do."""
    predict = pipe.predict

    def reading(latents, timestep, step):
        result = predict(latents, timestep, step)
        session = pipe.transformer._state.session()
        if session.tick is not None:
            session.schedule_time(session.tick)
        return result

    pipe.predict = reading


def test_a_clock_that_misleads_is_said_and_not_believed_again(timed_model, monkeypatch):
    on_a_device(monkeypatch)
    timed_model.compile(**ALWAYS)
    pipe = Pipeline(timed_model)
    reads_schedule(pipe)
    for _ in range(2):
        pipe(sample())
    compare, pipe.compare = pipe.compare, lambda *_: True
    pipe.offsets = [25.0]
    pipe(sample())
    pipe.compare = compare
    with pytest.warns(CacheWarning, match="came to one step of a scheduler with two timesteps"):
        pipe(sample())
    for offset in (0.0, 50.0):
        pipe.offsets = [offset]
        pipe(sample())


def test_batched_motion_computes_all_steps_at_once(pooled, monkeypatch):
    pooled.compile(motion="batched", **ALWAYS)
    pipe, batches = Pipeline(pooled, rounds=True), []
    vmap = torch.vmap

    def noting(*args, **kwargs):
        batches.append(args)
        return vmap(*args, **kwargs)

    monkeypatch.setattr(torch, "vmap", noting)
    pipe(sample())  # shows the timesteps
    assert not batches
    for seed in (1, 2):
        pipe.prompt, batches[:] = conditions(seed), []
        with pooled.noting() as names:
            pipe(sample())
        assert of_time(names) == []
        assert len(batches) == 6  # the projection of the timestep is kept
    assert pooled.memory.bytes_held > 8 * 4 * 3 * WIDTH * 4


def test_a_piece_that_no_batch_computes_is_said(pooled, monkeypatch):
    pooled.compile(motion="batched", **ALWAYS)
    pipe = Pipeline(pooled)
    pipe(sample())

    def refuse(*args, **kwargs):
        raise RuntimeError("no batching rule")

    monkeypatch.setattr(torch, "vmap", refuse)
    pipe.prompt = conditions(1)
    with pytest.warns(CacheWarning, match="is computed at each step: no batching rule"):
        pipe(sample())


def test_random_dependence():
    """See `tests/lib/conditioned.py`: what a call's inputs were before never shows in its result."""
    torch.manual_seed(3)
    model = Cached(Conditioned(scales=True))
    generator = torch.Generator().manual_seed(5)
    prompt, time = conditions(), times()[0]
    changes = itertools.count()

    def choose(count):
        return int(torch.randint(count, (), generator=generator))

    for _ in range(60):
        change = choose(8)
        name = ["encoder_hidden_states", "pooled", "ids"][choose(3)]
        if change == 0:
            prompt = conditions(next(changes))
        elif change == 1:
            prompt[name] = prompt[name] + 1
        elif change == 2:
            prompt[name].add_(1)
        elif change == 3:
            with torch.no_grad():
                list(model.model.parameters())[choose(30)].mul_(1.01)
        elif change <= 6:
            time = times()[choose(4)]
        model.assert_right(sample(choose(3)), time, **prompt)
