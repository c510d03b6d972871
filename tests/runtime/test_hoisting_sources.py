"""Hoisted values and what they are made from: weights and conditions that change, a clock in place of the timestep,
batches."""

import tempfile

import numpy as np
import pytest
import torch
import torch.distributed
from lib.conditioned import Conditioned, conditions, sample, times
from lib.helpers import on_a_device
from lib.hoisting import ALWAYS, Cached, Pipeline, generation, of_time
from lib.models import WIDTH

from cachedit_fx import CacheWarning
from cachedit_fx.runtime import hoisted_memory

pytestmark = pytest.mark.keep_compiled


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


@pytest.mark.parametrize("fails", ["samples_of", "differ"])
def test_a_generation_whose_comparison_failed_is_compared_at_the_retry(timed_model, monkeypatch, fails):
    prompt = conditions()
    generation(timed_model, prompt)
    timed_model.model.blocks[1].modulation.weight.data.mul_(1.5)
    with monkeypatch.context() as patch:
        patch.setattr(hoisted_memory, fails, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            timed_model(sample(), times()[0], **prompt)
    generation(timed_model, prompt)


# ---------------------------------------------------------------------------------------------------------------------
# Writes to conditions that change no version


def unversioned_writes():
    """Ways to write to a tensor of which its version tells nothing."""

    def through_data(tensor):
        tensor.data.copy_(tensor + 1)

    def through_numpy(tensor):
        np.add(tensor.numpy(), 1, out=tensor.numpy())

    def by_another_view(tensor):
        torch.from_dlpack(tensor).add_(1)

    def to_the_storage(tensor):
        tensor.untyped_storage().copy_((tensor + 1).untyped_storage())

    def by_a_collective(tensor):
        with tempfile.TemporaryDirectory() as folder:
            torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
            torch.distributed.scatter(tensor, [tensor + 1], 0)
            torch.distributed.destroy_process_group()

    return [through_data, through_numpy, by_another_view, to_the_storage, by_a_collective]


@pytest.mark.parametrize("write", unversioned_writes(), ids=lambda write: write.__name__)
@pytest.mark.parametrize("name", ["encoder_hidden_states", "pooled", "ids"])
def test_a_buffer_for_prompts_is_filled_anew_for_the_next_generation(pooled, write, name):
    pooled.compile()
    prompt = conditions()
    generation(pooled, prompt)
    version = prompt[name]._version
    for _ in range(2):
        write(prompt[name])
        assert prompt[name]._version == version
        generation(pooled, prompt)
    generation(pooled, prompt)
    assert generation(pooled, prompt) == [[]] * 4  # and is believed again


def test_buffers_of_two_prompts_are_filled_anew_for_the_next_generation(pooled):
    pooled.compile()
    prompts = [conditions(0), conditions(1)]
    for _ in range(3):
        for step, time in enumerate(times()):
            for prompt in prompts:
                pooled.assert_right(sample(step), time, **prompt)
        prompts[1]["encoder_hidden_states"].data.mul_(1.5)  # not that of the call that begins a generation


# ---------------------------------------------------------------------------------------------------------------------
# A clock, and all steps at once


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
    assert pooled.memory.bytes_held > 8 * 4 * 3 * WIDTH * 4  # eight steps, four blocks' modulations, float32


class WeightFirst(torch.nn.Linear):
    """The weight times a vector: `vmap` puts the batch last."""

    def forward(self, vectors):
        return torch.matmul(self.weight, vectors[0])[None]


def test_a_batch_has_the_layout_that_pieces_are_compiled_for():
    torch.manual_seed(4)
    module = Conditioned()
    for block in module.blocks:
        block.modulation = WeightFirst(WIDTH, 3 * WIDTH, bias=False)
    strides: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def inner(gm, examples):
        def checked(*inputs):
            pairs = [pair for pair in zip(inputs, examples, strict=True) if isinstance(pair[0], torch.Tensor)]
            strides.extend((value.stride(), example.stride()) for value, example in pairs)
            return gm(*inputs)

        return checked

    model = Cached(module)
    model.compile(motion="batched", inner_backend=inner, **ALWAYS)
    pipe = Pipeline(model, rounds=True)
    pipe(sample())
    pipe.prompt = conditions(1)
    with model.noting() as names:
        pipe(sample())
    assert of_time(names) == []
    assert all(value == example for value, example in strides)


@pytest.mark.parametrize("kind", ["conditions", "timesteps"])
def test_batches_that_are_of_no_use_are_said_and_end(pooled, monkeypatch, kind):
    pooled.compile(motion="batched", **ALWAYS)
    pipe, batches, vmap = Pipeline(pooled, rounds=True), [], torch.vmap

    def noting(*args, **kwargs):
        batches.append(args)
        return vmap(*args, **kwargs)

    def renewing(latents, timestep, step):
        pipe.prompt = {name: value.clone() for name, value in pipe.prompt.items()}
        return predict(latents, timestep, step)

    monkeypatch.setattr(torch, "vmap", noting)
    if kind == "timesteps":
        pipe.offsets = [0.0, 25.0]  # two calls of one step come with two timesteps
    else:
        predict = pipe.predict
        monkeypatch.setattr(pipe, "predict", renewing)
    pipe(sample())
    pipe.prompt = conditions(1)
    with pytest.warns(CacheWarning, match="since steps came with other timesteps or conditions than"):
        pipe(sample())
    assert len(batches) <= 3 * 2 * 6  # three of eight steps, each with two calls at most


def test_two_threads_at_one_place_of_a_clock_with_two_timesteps(pooled, monkeypatch):
    pooled.compile(motion="batched", **ALWAYS)
    pipe = Pipeline(pooled, rounds=True)
    pipe(sample())
    note = pooled.memory.note

    def interrupted(place, timestep):
        result = note(place, timestep)
        note(place, timestep + 25)  # the other thread
        return result

    monkeypatch.setattr(pooled.memory, "note", interrupted)
    pipe.prompt = conditions(1)
    pipe(sample())


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("no batching rule\nhint"), "no batching rule"), (AssertionError(), "AssertionError")],
)
def test_a_piece_that_no_batch_computes_is_said(pooled, monkeypatch, error, reason):
    pooled.compile(motion="batched", **ALWAYS)
    pipe = Pipeline(pooled)
    pipe(sample())

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "vmap", refuse)
    pipe.prompt = conditions(1)
    with pytest.warns(CacheWarning) as warnings:
        pipe(sample())
    assert [str(each.message).partition("is computed")[2] for each in warnings] == [f" at each step: {reason}"]


def test_a_batch_that_there_is_no_room_for_is_computed_once_and_said(pooled, monkeypatch):
    pooled.compile(motion="batched", hoisted_mib=0, **ALWAYS)
    pipe, batches, vmap = Pipeline(pooled, rounds=True), [], torch.vmap

    def noting(*args, **kwargs):
        batches.append(args)
        return vmap(*args, **kwargs)

    monkeypatch.setattr(torch, "vmap", noting)
    pipe(sample())
    with pytest.warns(CacheWarning, match="those of 8 steps exceed hoisted_mib=0"):
        pipe(sample())
    assert len(batches) == 3  # the first block's modulation, and the values that it is made from
