"""What a generation keeps: memory that does not grow, and one read-back a call where the timestep is on a device."""

import gc
import math

import pytest
import torch
from lib import models
from lib.helpers import on_a_device
from lib.toys import FALLING, Timeless, denoise, make, noise

from cachedit_fx import DBCacheConfig, Reason, enable_cache, refresh_context, summary
from cachedit_fx.runtime import clock, guard, session
from cachedit_fx.runtime import memory as memories
from cachedit_fx.runtime.calibrators import Moment
from cachedit_fx.runtime.guard import read_back
from cachedit_fx.runtime.memory import BranchMemory
from cachedit_fx.runtime.policies.base import Action, Decision, policy_of
from cachedit_fx.runtime.stopwatch import Stopwatch

pytestmark = pytest.mark.filterwarnings("ignore:.*inert threshold")
BASE = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.1)
TEXTS = noise(1, 3, seed=2), noise(1, 3, seed=3)


def enabled(config=BASE, model=None, **options):
    return enable_cache(make() if model is None else model, config, inner_backend="eager", **options)


# ---------------------------------------------------------------------------------------------------------------------
# what is stored


def test_results_come_back_with_and_without_a_base():
    memory = BranchMemory()
    results = torch.randn(2, 3), torch.randn(4).bfloat16(), torch.arange(3)
    bases = torch.randn(2, 3), None, None
    memory.store(results, bases, now=Moment(0), count=1)
    found = memory.restore(bases, (1.0,))
    assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(results, found, strict=True))
    assert memory.bytes_held == 6 * 8 + 4 * 4 + 3 * 8


def test_buffers_are_written_again_and_made_anew_only_for_another_shape_or_dtype():
    memory = BranchMemory()
    memory.store((torch.ones(2, 3),), (None,), now=Moment(0), count=1)
    ((first,),) = memory.stored
    memory.forget()
    memory.store((torch.zeros(2, 3),), (None,), now=Moment(0), count=1)
    assert memory.stored[0][0] is first and first.sum() == 0
    for other in (torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bfloat16)):
        memory.store((other,), (None,), now=Moment(1), count=1)
        assert torch.equal(memory.restore((None,), (1.0,))[0], other)
    memory.store((torch.ones(1), torch.ones(1)), (None, None), now=Moment(2), count=1)
    assert len(memory.stored) == 2


def test_a_new_generation_forgets_the_meaning_of_what_is_stored():
    """The first step of the second generation must not be compared with the last one of the first."""
    config = BASE.reset(max_warmup_steps=0, residual_diff_threshold=1e9)
    model = enabled(config)
    for _ in range(2):
        denoise(model, FALLING)
        reasons = summary(model)[0].reasons
        assert reasons[0] is Reason.NOTHING_STORED and reasons[1] is Reason.BELOW_THRESHOLD


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"residual_diff_threshold": 0}, False),
        ({"steps_computation_mask": "11", "steps_computation_policy": "static"}, False),
        ({"steps_computation_mask": "10", "steps_computation_policy": "static", "residual_diff_threshold": 0}, True),
    ],
)
def test_nothing_is_stored_where_nothing_may_be_reused(changes, expected):
    config = BASE.reset(**changes)
    assert policy_of(config).reuses is expected
    model = enabled(config)
    denoise(model, FALLING[:2])
    assert (summary(model)[0].bytes_held > 0) is expected


def test_the_stopwatch_measures():
    watch = Stopwatch(torch.device("cpu"))
    math.factorial(3000)
    seconds = watch.stop().seconds()
    assert seconds > 0 and watch.seconds() == seconds


# ---------------------------------------------------------------------------------------------------------------------
# many generations


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


def test_forty_generations_hold_no_more_than_one(quick_collection):
    model = enabled()
    shapes = [noise(), noise(batch=2), noise(tokens=9)]
    for start in shapes:
        denoise(model, FALLING, TEXTS, start)
    denoise(model, FALLING, TEXTS)
    held, tensors, objects = summary(model)[0].bytes_held, live_tensors(), len(gc.get_objects())
    for number in range(40):
        if number % 10 == 0:
            refresh_context(model)
        denoise(model, FALLING, TEXTS, shapes[number % 3])
    denoise(model, FALLING, TEXTS)
    assert live_tensors() <= tensors
    assert len(gc.get_objects()) < objects + 400, "one for each call would be 800"
    assert summary(model)[0].bytes_held == held


# ---------------------------------------------------------------------------------------------------------------------
# the device path, on the CPU


class Readings:
    """Counts read-backs by call."""

    def __init__(self, monkeypatch):
        self.sizes: list[int] = []

        def counting(values):
            self.sizes.append(len(values))
            return read_back(values)

        for module in (guard, clock, session, memories):
            monkeypatch.setattr(module, "read_back", counting)

    def take(self):
        sizes, self.sizes = self.sizes, []
        return sizes


CONFIGS = {
    "plain": BASE,
    "separate": BASE.reset(enable_separate_cfg=True),
    "fused": BASE.reset(enable_separate_cfg=False),
    "limits": BASE.reset(max_continuous_cached_steps=1, max_accumulated_residual_diff_threshold=0.05),
    "one difference": BASE.reset(enable_separate_cfg=True, cfg_diff_compute_separate=False),
    "mask": BASE.reset(steps_computation_mask="1101001000"),
    "static": BASE.reset(steps_computation_mask="1101001000", steps_computation_policy="static"),
    "off": BASE.reset(residual_diff_threshold=0),
    "known length": BASE.reset(num_inference_steps=10),
}


@pytest.fixture(scope="module")
def model():
    return enabled()


@pytest.mark.keep_compiled
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS, TEXTS * 2], ids=["one", "cfg", "four"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_one_read_back_a_call_and_the_same_decisions(model, monkeypatch, config, texts):
    enabled(config, model)
    for _ in range(2):
        denoise(model, FALLING, texts)
    expected = [branch.decisions for branch in summary(model)[0].branches]
    refresh_context(model)
    on_a_device(monkeypatch)
    readings = Readings(monkeypatch)
    sizes: list[int] = []

    def counted(*inputs):
        result = model(*inputs)
        taken = readings.take()
        assert len(taken) <= 1
        sizes.extend(taken)
        return result

    for _ in range(2):
        denoise(counted, FALLING, texts)
    assert [branch.decisions for branch in summary(model)[0].branches] == expected
    measures = config.residual_diff_threshold > 0 and not config.static
    assert max(sizes) > 1 if measures else max(sizes) == 1
    assert max(sizes) <= 3  # the timestep, and two branches that the call may be


def test_one_read_back_in_a_real_model(monkeypatch):
    on_a_device(monkeypatch)
    transformer, inputs = models.flux()
    enabled(model=transformer)
    readings = Readings(monkeypatch)
    with torch.no_grad():
        for timestep in (0.9, 0.8, 0.7, 0.6):
            transformer(**inputs | {"timestep": torch.tensor([timestep])})
            assert len(readings.take()) == 1
    assert len(summary(transformer)[0].residual_diffs) == 2


@pytest.mark.parametrize("convert", [float, int], ids=["float", "int"])
def test_a_number_for_a_timestep_is_known_without_reading(monkeypatch, convert):
    """Warm-up steps then read nothing; the others the difference alone. A dynamic number arrives on the host."""
    readings, model = Readings(monkeypatch), enabled(BASE.reset(max_warmup_steps=4))
    monkeypatch.setattr(clock, "on_host", lambda tensor: tensor.device.type == "cpu")
    denoise(model, [float(int(t)) for t in FALLING], convert=convert)
    assert max(readings.take()) == 1


def test_without_a_timestep_only_the_difference_is_read(monkeypatch):
    readings, model = Readings(monkeypatch), enabled(BASE.reset(max_warmup_steps=3), make(Timeless))
    with torch.no_grad():
        for _ in range(5):
            model(noise(), TEXTS[0])
    assert readings.take() == [1, 1]


def test_read_back_keeps_the_order_and_float64s_digits():
    values = [torch.tensor(0.5), torch.tensor(999, dtype=torch.int64), torch.tensor(0.1, dtype=torch.bfloat16)]
    assert read_back(values) == [0.5, 999.0, 0.10009765625]
    assert math.isnan(read_back([torch.tensor(math.nan)])[0])


def test_decisions_are_values():
    assert Decision(Action.REUSE, Reason.BELOW_THRESHOLD, 0.1) == Decision(Action.REUSE, Reason.BELOW_THRESHOLD, 0.1)
