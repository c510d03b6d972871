"""Some cases of the fuzzing that `tests/fuzz.py` does at length, and the machinery of it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from lib.fuzz_models import arguments, build
from lib.fuzz_specs import Loop, Spec, spec_of, specs
from lib.fuzzing import check, expected, simpler

from cachedit_fx.passes import normalize
from cachedit_fx.runtime import memory

FEW = settings(
    max_examples=6, phases=(Phase.explicit, Phase.reuse, Phase.generate), suppress_health_check=list(HealthCheck)
)


@FEW
@given(specs())
def test_random_models_are_exact_repeat_themselves_and_are_counted(spec):
    check(spec)


@pytest.mark.full("fuzz")
@pytest.mark.budget(120, "five models, each through many captures")
@pytest.mark.parametrize("first", range(0, 500, 5))
def test_500_random_models(first):
    """Those of `python tests/fuzz.py`, which makes a failure simpler too."""
    for case in range(first, first + 5):
        try:
            check(spec_of(0, case))
        except Exception as error:
            raise AssertionError(f"see python tests/fuzz.py --seed 0 --first {case} --cases 1") from error


@pytest.mark.parametrize(
    "spec",
    [
        Spec(loops=(Loop(blocks=2, write="iadd"),), embed=False),
        Spec(loops=(Loop(write="clone"), Loop(write="mul_add_", glue="slice")), dtype="bfloat16", batch=3),
        Spec(loops=(Loop(), Loop(glue="linear")), streams=2, result="tuple", resize="tokens", dynamic=True),
    ],
    ids=["writes to graph inputs", "strided results", "another shape"],
)
def test_cases_that_once_failed(spec):
    assert check(spec).regions == (spec.num_blocks,)


def test_streams_of_the_caller_that_blocks_change_are_never_predicted():
    spec = Spec(loops=(Loop(blocks=2, write="iadd", last_drops_text=True),), streams=3, result="tuple")
    assert expected(spec) is None
    outcome = check(spec)
    assert outcome.regions == () and "its blocks write to extra" in outcome.warnings[0]


def test_where_nothing_continues_the_larger_loop_is_the_region():
    """Other tokens are made between the loops, so that residuals over both would be whole values."""
    assert check(Spec(loops=(Loop(blocks=2), Loop(blocks=6, glue="merge")))).regions == (6,)


@settings(max_examples=100)
@given(specs())
def test_a_spec_is_its_repr(spec):
    assert eval(repr(spec)) == spec
    assert all(other != spec for other in simpler(spec))


def test_a_case_is_its_number():
    drawn = [spec_of(0, case) for case in range(60)]
    assert drawn == [spec_of(0, case) for case in range(60)]
    assert len(set(map(repr, drawn))) == 60 and drawn[0] != spec_of(1, 0)
    assert sum(expected(spec) is not None for spec in drawn) >= 20


def test_uncached_models_must_say_so():
    spec = Spec(first=3)
    assert expected(spec) is None
    outcome = check(spec)
    assert outcome.regions == () and "leaves nothing to bypass" in outcome.warnings[0]


def test_a_wrong_bypass_is_caught(monkeypatch):
    right = memory.residual_apply

    def wrong(bases, stored, weights, outs):
        right(bases, stored, weights, outs)
        for out in outs:
            out.add_(1e-3)

    monkeypatch.setattr(memory, "residual_apply", wrong)
    with pytest.raises(AssertionError, match="reused on identical inputs"):
        check(Spec())


def test_a_chain_that_is_not_found_is_caught(monkeypatch):
    monkeypatch.setattr(normalize._Purifier, "_purify", lambda self, write: False)
    with pytest.raises(AssertionError, match="regions of"):
        check(Spec(loops=(Loop(write="iadd"),)))


@torch.no_grad()
def test_what_is_written_to_an_input_is_compared():
    spec = Spec(loops=(Loop(write="iadd"),), embed=False)
    given = arguments(spec)
    before = given["hidden_states"].clone()
    build(spec)(**given)
    assert not torch.equal(given["hidden_states"], before)
    assert check(replace(spec, batch=2)).regions == (3,)
