"""In-place writes: through any alias, to activations, arguments and buffers, cached results and state are right."""

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from lib.shared import SharedCapture
from lib.toys import Toy, denoise, make
from lib.written_models import ALIASES, WRITES, Case, arguments, build, cases, every_pair
from lib.zoo import videos
from torch import nn

import cachedit_fx
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


def same(wanted, got, what, exact=True):
    for step, (before, after) in enumerate(zip(wanted, got, strict=True)):
        for index, (a, b) in enumerate(zip(before, after, strict=True)):
            equal = torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-6)
            assert equal, f"{what}, step {step}, tensor {index}: {(a - b).abs().max()}"


def check(case, exact=True, **options):
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
        shared.compile(**options, Fn_compute_blocks=1, residual_diff_threshold=0.0)
        same(wanted, generation(shared, module, range(STEPS)), "threshold 0", exact)
    told = [str(warning.message) for warning in caught if issubclass(warning.category, CacheWarning)]
    uncached = [stats for stats in shared.summary() if stats.uncached_calls]
    assert len(uncached) == len(told), told
    for mask in ([1, 0, 0], [1, 0, 1]):
        module.load_state_dict(plain.state_dict() | build(case).state_dict())
        again = copy.deepcopy(module)
        wanted = generation(again, again, [0, 0, 0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shared.compile(
                **options, Fn_compute_blocks=1, steps_computation_mask=mask, steps_computation_policy="static"
            )
            got = generation(shared, module, [0, 0, 0])
        for step, (before, after) in enumerate(zip(wanted, got, strict=True)):
            written = slice(3, None)
            computed = slice(None) if mask[step] and case.target != "buffer" else written
            same([before[computed]], [after[computed]], f"mask {mask}, step {step}", exact)
    return told


def check_if_writable(case):
    with contextlib.suppress(Unwritable):
        check(case)


@FEW
@given(cases())
def test_random_writes_are_right(case):
    check_if_writable(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(("data",), "copy_", "activation", "before"),
        Case(("view_as", "slice"), "foreach", "buffer", "in blocks"),
        Case(("dropout", "contiguous"), "fill_", "buffer", "across", depends=False),
        Case(("T",), "out of another", "stream", "across"),
        Case(("slice",), "add_", "shared arguments", "before"),
        Case(("itself",), "data =", "argument", "after", depends=False),
        Case(("unfold",), "unsqueeze_", "activation", "across"),
        Case(("slice",), "custom op", "activation", "across"),
        Case(("slice",), "custom op", "argument", "in blocks"),
        Case(("narrow",), "checkpoint", "activation", "across"),
        Case(("narrow",), "checkpoint", "argument", "in blocks"),
    ],
    ids=lambda case: " ".join([*case.aliases, case.write, case.target, case.place]),
)
def test_cases_that_once_failed(case):
    check(case)


@pytest.mark.parametrize("target", ["activation", "stream", "argument"])
def test_compiled_pieces_write_as_the_plain_model(target):
    """Ahead-of-time autograd goes by the storages of a piece's inputs. Its sums round in another order."""
    case = Case(("detach", "narrow"), "chained", target, "across", depends=False)
    check(case, exact=False, inner_backend="aot_eager", compiled_pieces="all")


@torch.no_grad()
def test_arguments_that_share_memory_at_a_later_call_are_captured_anew():
    """The first capture would write to its copy of one argument, and read the other one's old numbers."""
    shared, separate = (Case(target=target, place="before") for target in ("shared arguments", "argument"))
    module, plain = build(shared), build(shared)
    model = cachedit_fx.compile(module, inner_backend="eager", Fn_compute_blocks=1, residual_diff_threshold=0.0)
    for kind, message in ((separate, None), (shared, "memory that another and extra share"), (separate, None)):
        wanted, got = arguments(kind, 0), arguments(kind, 0)
        with pytest.warns(CacheWarning, match=message) if message else contextlib.nullcontext():
            result = model(**got)[0]
        assert torch.equal(result, plain(**wanted)[0])
        assert all(torch.equal(got[name], wanted[name]) for name in got)


class Reads(nn.Module):
    """Writes to a part of an argument, and takes the argument's mean."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))

    def forward(self, hidden_states, timestep, extra):
        extra[0].add_(1.0)
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states + extra) * timestep
        return hidden_states + extra.mean()


@torch.no_grad()
@pytest.mark.parametrize(("layout", "warns"), [("gaps", None), ("one row for all", "whose elements share memory")])
def test_arguments_of_other_layouts(layout, warns):
    """A copy without gaps may be summed up in another order. A copy of a row that is there twice is written to once."""
    torch.manual_seed(0)
    plain = Reads().eval()
    model = cachedit_fx.compile(
        copy.deepcopy(plain), inner_backend="eager", Fn_compute_blocks=1, residual_diff_threshold=0.0
    )
    noise = torch.randn(2, 5, 8)
    extras = [noise.clone()[:, 1:] if layout == "gaps" else noise[:1, 1:].clone().expand(2, 4, 8) for _ in range(2)]
    with pytest.warns(CacheWarning, match=warns) if warns else contextlib.nullcontext():
        results = [
            call(hidden_states=noise[:, 1:], timestep=torch.tensor([0.5]), extra=extra)
            for call, extra in zip((plain, model), extras, strict=True)
        ]
    assert torch.equal(*results) and torch.equal(*extras)


class Scaled(Reads):
    """Writes to an argument, and takes numbers."""

    def forward(self, hidden_states, timestep, scale):
        hidden_states += 1
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states) * scale * timestep
        return hidden_states


@torch.no_grad()
def test_numbers_that_the_graph_has_as_tensors_share_no_memory():
    """From the second call on, dynamo makes them inputs of the graph, which its guards see as numbers."""
    module = Scaled()
    model = cachedit_fx.compile(module, inner_backend="eager", Fn_compute_blocks=1, residual_diff_threshold=0.0)
    for step in range(3):
        x, y = torch.ones(2, 8), torch.ones(2, 8)
        assert torch.equal(model(x, 900.0 - step, 0.5 + step), module.forward(y, 900.0 - step, 0.5 + step))
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"])
@torch.no_grad()
def test_embeddings_that_are_filled_through_data(name):
    """Without rotary positions both fill zeros by `x.data[:, n:].copy_(y)`."""
    module, inputs = getattr(videos, name)()
    module = type(module).from_config(dict(module.config) | {"use_rotary_positional_embeddings": False}).eval()
    calls = [{**inputs(1), "image_rotary_emb": None} for _ in range(2)]
    wanted = [module(**call)[0] for call in calls]
    shared = SharedCapture(module)
    shared.compile(Fn_compute_blocks=1, residual_diff_threshold=0.0)
    for call, result in zip(calls, wanted, strict=True):
        assert torch.equal(shared(**call)[0], result)
    assert [stats.uncached_calls for stats in shared.summary()] == [0]


@pytest.mark.full("fuzz")
@pytest.mark.budget(120, "fifty models, each captured")
@pytest.mark.parametrize("first", range(0, len(ALIASES) * len(WRITES), 48))
def test_every_alias_with_every_write(first):
    for case in list(every_pair())[first : first + 48]:
        try:
            check_if_writable(case)
        except Exception as error:
            raise AssertionError(repr(case)) from error


def test_a_buffer_that_is_added_to_stays_the_buffer():
    """`self.c += 1` assigns what wrote to the buffer: the buffer itself, which may have other names."""

    class Counts(Toy):
        c: Any

        def __init__(self):
            super().__init__(blocks=3)
            self.register_buffer("c", torch.zeros(()))
            self.blocks[0].register_buffer("count", self.c)

        def forward(self, hidden_states, timestep, encoder_hidden_states):
            self.c += 1
            return super().forward(hidden_states, timestep, encoder_hidden_states) + self.blocks[0].count

    results = []
    for options in (None, {"cache": None}, {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.0}):
        model = make(Counts)
        if options is not None:
            cachedit_fx.compile(model, inner_backend="eager", **options)
        results.append(torch.stack([denoise(model, [time]) for time in (900.0, 800.0, 700.0)]))
        assert model.c is model.blocks[0].count and model.c == 3
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
