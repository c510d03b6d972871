"""Ranks whose inputs drift apart within a generation: an error on all of them, a call later."""

import functools
import gc
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from lib import toys
from lib.ranks import on_ranks, ranks_of
from lib.shared import SharedCapture
from lib.toy_pipeline import TEXTS, ToyPipeline

import cachedit_fx
from cachedit_fx import RanksDisagree
from cachedit_fx.runtime.drift import Drift

pytestmark = [pytest.mark.keep_compiled, pytest.mark.xdist_group("ulysses")]

STEPS, AT_THE_END = 5, -1
CACHE: dict[str, Any] = {"Fn_compute_blocks": 1, "max_warmup_steps": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "no cache": {"cache": None},
    "computes": CACHE | {"residual_diff_threshold": 0.0},
    "reuses": CACHE | {"residual_diff_threshold": 0.9},
}


class Guided(ToyPipeline):
    """Guidance by two calls a step, with a scale, and noise that the scheduler adds at every step."""

    scale = 2.0

    def __init__(self, transformer: Any) -> None:
        scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        super().__init__(transformer, TEXTS, scheduler)

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, step: int) -> torch.Tensor:
        first, other = [self.transformer(latents, timestep.expand(1), text) for text in self.texts]
        return other + self.scale * (first - other)


def guidance(pipe, step):
    pipe.scale = 2.2


def noise(pipe, step):
    torch.manual_seed(5)


def embeddings(pipe, step):
    pipe.texts = (TEXTS[0], TEXTS[1] * 0.9)


def embeddings_in_place(pipe, step):
    pipe.texts[1].mul_(0.9)


FAULTS: dict[str, tuple[Any, int, int, str]] = {
    "guidance": (guidance, 0, 5, "hidden_states"),
    "noise": (noise, 1, 7, "hidden_states"),
    "embeddings": (embeddings, 2, 8, "encoder_hidden_states"),
    "embeddings in place": (embeddings_in_place, 2, 8, "encoder_hidden_states"),
    "the last call": (embeddings, 3, 10, "encoder_hidden_states"),
}
"""What a callback of rank 1 does -> the callback, the step after which it is called, the first call whose inputs differ
(there are two a step), and the input that differs."""


@functools.cache
def captured():
    shared = SharedCapture(toys.make_small().requires_grad_(False))
    shared.compile(cache=None)
    for tokens in (5, 7):
        shared(toys.noise(tokens=tokens), torch.tensor([900.0]), TEXTS[0])
    return shared


def generation(shared, fault=None, tokens=5):
    """The error of a generation, and the call in which it came; an empty text without an error."""
    pipe, calls, start = Guided(shared), [0], toys.noise(tokens=tokens)
    pipe.texts = tuple(text.clone() for text in TEXTS)
    torch.manual_seed(0)
    call, at = FAULTS[fault][:2] if fault else (guidance, None)

    def counted(*args):
        calls[0] += 1
        return shared(*args)

    pipe.transformer = counted
    try:
        pipe(start, STEPS, callback=lambda step: call(pipe, step) if step == at else None)
        calls[0] = AT_THE_END
        shared._state.end_generation()  # as at the end of diffusers' pipelines
    except RanksDisagree as error:
        return str(error), calls[0]
    return "", None


def outcomes(rank):
    """For each setting: errors with each fault, and then errors without a fault."""
    shared, found = captured(), {}
    for name, options in SETTINGS.items():
        shared.compile(**options, ulysses_size=2)
        faults = [(fault, *generation(shared, fault if rank else None)) for fault in FAULTS]
        found[name] = faults, peace(shared)
    return found


def peace(shared):
    """Errors of generations one after the other, of two sizes, and of such as are interleaved in sessions."""
    errors = [generation(shared, tokens=tokens)[0] for tokens in (5, 7, 7, 5)]
    for step in range(2 * STEPS):
        for key, tokens in (("a", 5), ("b", 7)):
            with cachedit_fx.session(key):
                shared(toys.noise(tokens=tokens) * (1 + 0.1 * step), torch.tensor([900.0 - 50 * step]), TEXTS[step % 2])
    sample = toys.noise()
    with torch.inference_mode():  # its tensors count no writes
        for step in range(3):
            shared(sample.mul(1.1**step), torch.tensor([900.0 - step]), TEXTS[0])
    return errors


@functools.cache
def results():
    captured()
    return on_ranks(outcomes)


@pytest.mark.parametrize("setting", SETTINGS)
def test_all_ranks_raise_in_the_call_after_and_name_the_input(setting):
    (first, _), (second, _) = (found[setting] for found in results())
    assert first == second
    compared = 1 if setting == "no cache" else 2  # the first call of each branch, to the bit
    for fault, error, call in first:
        *_, differing, name = FAULTS[fault]
        assert call == (differing + 1 if differing < 2 * STEPS else AT_THE_END)
        assert error.startswith(
            f"ulysses_size=2: the ranks have drifted apart: {name} had other values on each of them in the latest "
            f"call, which is call {differing - compared} after the ranks compared all inputs. Use one guidance"
        )


def test_no_alarm_without_a_fault():
    for found in results():
        assert all(peaceful == [""] * 4 for _, peaceful in found.values())


def sent_by_first(rank):
    shared = captured()
    shared.compile_anew(**SETTINGS["reuses"], ulysses_size=2, ulysses_inputs="first_rank")
    return [generation(shared, fault if rank else None)[0] for fault in ("guidance", "noise")]


def test_inputs_of_the_first_rank_cannot_drift():
    captured()
    assert on_ranks(sent_by_first) == [["", ""]] * 2


def values(rank, case):
    """An input of a rank."""
    one = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    other = torch.randn(4, 100, generator=torch.Generator().manual_seed(1))
    differing = {
        "another": other,
        "a little": one + 0.05 * other,
        "one part": torch.cat([one[:1] * 0.5, one[1:]]),
        "not a number": one.clone().index_fill_(0, torch.tensor([1]), float("nan")),
        "number": 0.5,
        "integers": (one * 100).to(torch.int64) + 3,
        "complex": torch.view_as_complex(other.view(4, 50, 2)),
        "rounding": one * (1 + 2**-9 * other.sign()),
        "the same": one,
        "not a number anywhere": one * float("nan"),
        "nothing": one[:0],
        "an object": {"rank": rank},
    }
    equal = {
        "number": 0.6,
        "integers": (one * 100).to(torch.int64),
        "complex": torch.view_as_complex(one.view(4, 50, 2)),
        **{name: differing[name] for name in ("not a number anywhere", "nothing", "an object")},
    }
    return differing[case] if rank else equal.get(case, one)


DIFFERING = ("another", "a little", "one part", "not a number", "number", "integers", "complex")
EQUAL = ("rounding", "the same", "not a number anywhere", "nothing", "an object")


def compared(rank):
    names = [*DIFFERING, *EQUAL]
    ranks: Any = ranks_of(2)
    drift = Drift(ranks, names)
    session: Any = captured()._state.session()
    inputs = [values(rank, name) for name in names]
    drift.send(inputs, session)
    found = [drift.differing(), drift.differing()]
    halved = [each.to(torch.bfloat16) for each in (values(0, "the same"), values(rank, "rounding"))]
    drift.send(halved, session)
    found.append(drift.differing())
    kept = len(drift.sketches)
    del inputs, halved
    gc.collect()
    drift.send([], session)
    return [*found, drift.differing()], kept > 0 and not len(drift.sketches)


def test_differences_beyond_rounding_are_told_once():
    captured()
    for found, is_freed in on_ranks(compared):
        assert found == [list(DIFFERING), [], [], []] and is_freed


def test_only_the_session_that_made_the_latest_call_is_told():
    def told(rank):
        ranks: Any = ranks_of(2)
        drift = Drift(ranks, ["x"])
        mine, other = (SharedCapture(toys.make_small())._state.session() for _ in range(2))
        drift.send([torch.full((3,), float(rank))], mine)
        return drift.differing(other), drift.differing(mine)

    assert on_ranks(told) == [([], ["x"])] * 2
