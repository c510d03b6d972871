"""Hoisted values: right whatever changes between two calls, kept as long as they are right, and no longer."""

import gc
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lib.conditioned import Conditioned, StorageWatch, conditions, sample, times
from lib.hoisting import STATIC, Cached, generation, of_time

import cachedit_fx

pytestmark = pytest.mark.keep_compiled


@pytest.fixture
def model(pooled):
    pooled.compile()
    return pooled


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


def test_room_is_made_once_a_generation(timed_model, monkeypatch):
    class Tables(list):
        def __iter__(self):
            sweeps.append(self)
            return super().__iter__()

    prompt, sweeps = conditions(), list[Tables]()
    generation(timed_model, prompt)
    memory = timed_model.memory
    memory.limit = memory.bytes_held
    monkeypatch.setattr(memory, "_kept", Tables(memory._kept))
    for step in range(6):
        timed_model.assert_right(sample(), times()[0] - step, **prompt)
    assert len(sweeps) == 1
    assert memory.bytes_held <= memory.limit


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


def test_calls_outside_of_the_open_sessions_keep_nothing(timed_model):
    prompt = conditions()
    generation(timed_model, prompt)

    def denoise():
        generation(timed_model, prompt, 2)
        timed_model.model.blocks[1].modulation.weight.data.mul_(1.5)
        generation(timed_model, prompt, 2)

    with cachedit_fx.session("open"), ThreadPoolExecutor(1) as thread:
        thread.submit(denoise).result()
    generation(timed_model, prompt)


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
