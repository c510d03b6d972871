"""In-place writes: through any alias, to activations, arguments and buffers, cached results and state are right."""

import contextlib
import copy
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from lib.shared import SharedCapture
from lib.written_models import ALIASES, WRITES, arguments, build, cases, every_pair

from cachedit_fx import CacheWarning

FEW = settings(
    max_examples=8, phases=(Phase.explicit, Phase.reuse, Phase.generate), suppress_health_check=list(HealthCheck)
)
STEPS = 3


class Unwritable(Exception):
    """The plain model refuses the case itself."""


@torch.no_grad()
def generation(model, module, steps):
    """For each step: results, arguments after the call, the buffer after the call."""
    seen = []
    for step in steps:
        inputs = arguments(module.case, step)
        results = model(**inputs)
        seen.append([x.clone() for x in (*results, *inputs.values(), module.buffer)])
    return seen


def same(wanted, got, what):
    for step, (before, after) in enumerate(zip(wanted, got, strict=True)):
        for index, (a, b) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(a, b), f"{what}, step {step}, tensor {index}: {(a - b).abs().max()}"


def check(case):
    """Threshold 0 equals the plain model; under reuse, computed steps and everything that is written do."""
    torch._dynamo.reset()
    module = build(case)
    plain = copy.deepcopy(module)
    try:
        wanted = generation(plain, plain, range(STEPS))
    except RuntimeError as error:
        raise Unwritable from error
    shared = SharedCapture(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shared.compile(Fn_compute_blocks=1, residual_diff_threshold=0.0)
        same(wanted, generation(shared, module, range(STEPS)), "threshold 0")
    told = [str(warning.message) for warning in caught if issubclass(warning.category, CacheWarning)]
    uncached = [stats for stats in shared.summary() if stats.uncached_calls]
    assert len(uncached) == len(told), told
    for mask in ([1, 0, 0], [1, 0, 1]):
        module.load_state_dict(plain.state_dict() | build(case).state_dict())
        again = copy.deepcopy(module)
        wanted = generation(again, again, [0, 0, 0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shared.compile(Fn_compute_blocks=1, steps_computation_mask=mask, steps_computation_policy="static")
            got = generation(shared, module, [0, 0, 0])
        for step, (before, after) in enumerate(zip(wanted, got, strict=True)):
            written = slice(3, None)
            computed = slice(None) if mask[step] and case.target != "buffer" else written
            same([before[computed]], [after[computed]], f"mask {mask}, step {step}")
    return told


def check_if_writable(case):
    with contextlib.suppress(Unwritable):
        check(case)


@FEW
@given(cases())
def test_random_writes_are_right(case):
    check_if_writable(case)


@pytest.mark.full("fuzz")
@pytest.mark.budget(120, "fifty models, each captured")
@pytest.mark.parametrize("first", range(0, len(ALIASES) * len(WRITES), 48))
def test_every_alias_with_every_write(first):
    for case in list(every_pair())[first : first + 48]:
        try:
            check_if_writable(case)
        except Exception as error:
            raise AssertionError(repr(case)) from error
