"""Ranks that share a sample and call the model in other ways: an error on all of them, which names the cause."""

import functools
from typing import Any

import pytest
import torch
from lib import toys
from lib.ranks import on_ranks
from lib.shared import SharedCapture

from cachedit_fx import RanksDisagree, backend
from cachedit_fx.runtime.clock import Timestep

pytestmark = [pytest.mark.keep_compiled, pytest.mark.xdist_group("ulysses")]

OPTIONS = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.9, "ulysses_size": 2}
CASES = {
    "nothing": None,
    "noise": "hidden_states has other values",
    "prompt": "encoder_hidden_states has other values",
    "one element": "encoder_hidden_states has other values",
    "order": "hidden_states has other values",
    "two tokens": "hidden_states has other values",
    "timestep": "timestep has other values",
    "length": "the input encoder_hidden_states is float32[1, 6, 8] on cpu on rank 0, float32[1, 5, 8]",
    "dtype": "the input timestep is float32[1] on cpu on rank 0, float64[1] on cpu on rank 1",
    "weights": "the weights have other values",
    "one element of a weight": "the weights have other values",
    "options": "the option",
    "plan": "the plan of region_0 is",
    "nothing again": None,
}
"""What rank 1 does in another way -> what the error says; None for no error."""


@functools.cache
def captured():
    """A small model, captured for all cases, and the arguments of a call."""
    shared = SharedCapture(toys.make_small().requires_grad_(False))
    text = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(2))
    arguments = {"hidden_states": toys.noise(), "timestep": torch.tensor([900.0]), "encoder_hidden_states": text}
    shared.compile(cache=None)
    for case in ("nothing", "length", "dtype"):
        shared(**_changed(arguments, case))
    return shared, arguments


def _changed(arguments, case):
    """The arguments of a rank that does one thing in another way."""
    image, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    one = text.clone()
    one[0, -1, -1] += 1e-3
    changes = {
        "noise": {"hidden_states": torch.randn(image.shape, generator=torch.Generator().manual_seed(5))},
        "prompt": {"encoder_hidden_states": text.flip(1) * 0.5},
        "one element": {"encoder_hidden_states": one},
        "order": {"hidden_states": image.flip(1)},
        "two tokens": {"hidden_states": torch.cat([image[:, 1:2], image[:, :1], image[:, 2:]], dim=1)},
        "timestep": {"timestep": arguments["timestep"] * 0.9},
        "length": {"encoder_hidden_states": text[:, 1:]},
        "dtype": {"timestep": arguments["timestep"].double()},
    }
    return arguments | changes.get(case, {})


def called(shared, arguments):
    """What a call raises, as text."""
    try:
        shared(**arguments)
    except RanksDisagree as error:
        return str(error)
    return ""


def outcomes(rank):
    """For each case, what the first call of a generation raises; and then what later steps raise."""
    shared, arguments = captured()
    weight = next(shared.module.parameters())
    found, steps = {}, {}
    shared.compile_anew(**OPTIONS)
    for case in CASES:
        before, element = weight.clone(), shared.module.blocks[0].up.weight[0, 1]  # no sample
        if case in ("length", "dtype"):  # without a clock, a rank that keeps the form would not compare
            shared.compile_anew(**OPTIONS)
        if case == "plan":
            with pytest.MonkeyPatch.context() as patch:
                if rank:
                    patch.setattr(backend, "_plan", lambda facts: {"region_0": "2 of 9 blocks"})
                shared.compile_anew(**OPTIONS)
        if case == "weights" and rank:
            weight.data.mul_(1.5)
        if case == "one element of a weight" and rank:
            element += 1e-3
        if case == "options" and rank:
            shared.compile(**OPTIONS | {"residual_diff_threshold": 0.8})
        given = _changed(arguments, case) if rank else arguments
        found[case] = called(shared, given)
        steps[case] = [called(shared, given | {"timestep": given["timestep"] * scale}) for scale in (0.8, 0.6)]
        weight.data.copy_(before)
        if case == "one element of a weight" and rank:
            element -= 1e-3
        shared.compile(**OPTIONS)
        if case == "plan":
            shared.compile_anew(**OPTIONS)
    shared.compile_anew(cache=None, ulysses_size=2)
    found["uncached"] = called(shared, _changed(arguments, "noise") if rank else arguments)
    return found, steps


@functools.cache
def results():
    captured()
    return on_ranks(outcomes)


@pytest.mark.parametrize("case", [*CASES, "uncached"])
def test_all_ranks_raise_and_say_what_differs(case):
    errors = [found[case] for found, _ in results()]
    assert errors[0] == errors[1]
    expected = CASES.get(case, CASES["noise"])
    if expected is None:
        assert errors[0] == ""
    else:
        assert errors[0].startswith("ulysses_size=2: ranks 0 and 1 differ in their calls") and expected in errors[0]


def test_a_generation_goes_on_after_ranks_disagreed():
    for _, steps in results():
        assert steps["nothing"] == steps["nothing again"] == ["", ""]


def by_shortcuts(rank):
    """Errors of two generations whose calls pass by dynamo's guards, and whose timesteps a device would hold."""
    shared, arguments = captured()
    shared.compile_anew(**OPTIONS)
    errors = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared._call, "guards", "generation")
        patch.setattr(Timestep, "waits", property(lambda self: self.unread is not None))
        for case in ("nothing", "noise"):
            given = _changed(arguments, case) if rank else arguments
            steps = [given | {"timestep": given["timestep"] * scale} for scale in (1.0, 0.8, 0.6, 0.4)]
            errors.append([called(shared, step) for step in steps])
    return errors


def test_a_generation_that_a_shortcut_begins_is_compared():
    captured()
    for first, second in on_ranks(by_shortcuts):
        assert first == [""] * 4
        assert CASES["noise"] in second[0]


def with_guidance(rank):
    """Errors of two generations of two steps, each a call with the prompt and one with the negative prompt."""
    shared, arguments = captured()
    shared.compile_anew(**OPTIONS)
    text = arguments["encoder_hidden_states"]
    errors = []
    for has_fault in (False, True):
        prompts = [text, text * (0.5 + 0.1 * rank * has_fault)]
        calls = [(scale, prompt) for scale in (1.0, 0.8) for prompt in prompts]
        changes = [
            {"timestep": arguments["timestep"] * scale, "encoder_hidden_states": prompt} for scale, prompt in calls
        ]
        errors.append([called(shared, arguments | change) for change in changes])
    return errors


def test_the_first_call_of_each_branch_is_compared():
    captured()
    for first, second in on_ranks(with_guidance):
        assert first == [""] * 4
        assert second[0] == "" and CASES["prompt"] in second[1]


SCHEDULES = {
    "lengths that change at each call": [[0, 1], [0, 1], [0, 1]],
    "a branch that begins late": [[0], [0, 2], [0, 2]],
    "another length from a step on": [[0], [1], [1]],
}
"""Step -> the prompt of each of its calls: the second one is shorter than the others."""


def within_generations(rank):
    """For each schedule, errors if the samples of later steps differ by rounding; then if they differ by more."""
    shared, arguments = captured()
    text, found = arguments["encoder_hidden_states"], {}
    prompts = [text, text[:, 1:], text * 0.5]
    settings: dict[str, dict[str, Any]] = {"cached": OPTIONS, "uncached": {"cache": None, "ulysses_size": 2}}
    for name, options in settings.items():
        for schedule, steps in SCHEDULES.items():
            for factor in (1 + 1e-6, 1.1):
                shared.compile_anew(**options)
                errors = []
                for step, indices in enumerate(steps):
                    moved = {
                        "hidden_states": arguments["hidden_states"] * (factor if rank and step else 1),
                        "timestep": arguments["timestep"] * (1 - 0.1 * step),
                    }
                    for index in indices:
                        errors.append(called(shared, arguments | moved | {"encoder_hidden_states": prompts[index]}))
                found[name, schedule, factor > 1.01] = errors
    return found


@functools.cache
def found_within():
    captured()
    return on_ranks(within_generations, seconds=20)


@pytest.mark.budget(40, "two ranks run all schedules")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("setting", ["cached", "uncached"])
def test_samples_may_differ_by_rounding_within_a_generation(setting, schedule):
    for found in found_within():
        assert not any(found[setting, schedule, False])
        errors = found[setting, schedule, True]
        first = next(error for error in errors if error)
        assert not errors[0] and "hidden_states ha" in first
