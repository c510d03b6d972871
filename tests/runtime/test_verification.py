"""`verify="first"`: the first computed call of every graph is compared with the plain module."""

import itertools
from typing import ClassVar

import pytest
import torch
from lib import models
from lib.cases import ALL, Chain, Halves
from lib.toys import Toy, make, noise
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import cachedit_fx.pass_pipeline
from cachedit_fx import CacheWarning, DBCacheConfig, OptionError, VerificationError, compile, explain, summary
from cachedit_fx.passes.base import FlatGraph, Rewrite, Rewritten
from cachedit_fx.passes.block_loops import Detection
from cachedit_fx.passes.find_timestep import TimestepSource
from cachedit_fx.passes.outline_blocks import Outline
from cachedit_fx.passes.plan_regions import RegionReport

ALWAYS = DBCacheConfig(1, max_warmup_steps=1, residual_diff_threshold=1e9, enable_separate_cfg=False)
STEP = (noise(), torch.tensor([900.0]), noise(tokens=3, seed=2))
pytestmark = [pytest.mark.filterwarnings("ignore:.*inert threshold"), pytest.mark.usefixtures("no_grad")]


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """Graphs are kept below the test's own folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def verified(module, **options):
    return compile(module, verify="first", cache=ALWAYS, **({"inner_backend": "eager"} | options))


class Counts(Toy):
    """Counts how often its forward runs in Python, captures left out."""

    runs = 0

    def forward(self, hidden_states, timestep, encoder_hidden_states, scale=1):
        if not torch.compiler.is_compiling():
            type(self).runs += 1
        return super().forward(hidden_states, timestep, encoder_hidden_states) * scale


class WrongPiece(Rewrite):
    """One piece doubles what its first activation gives."""

    name: ClassVar[str] = "wrong_piece"
    requires: ClassVar[tuple[type, ...]] = (Outline,)
    preserves: ClassVar[tuple[type, ...]] = (Outline, TimestepSource, Detection, RegionReport)

    def __init__(self, piece):
        self.piece = piece

    def run(self, gm, facts):
        graph = getattr(gm, self.piece).graph
        node = graph.find_nodes(op="call_function", target=nn.functional.gelu)[0]
        with graph.inserting_after(node):
            double = graph.call_function(torch.mul, (node, 2.0))
        double.meta = dict(node.meta)
        node.replace_all_uses_with(double, delete_user_cb=lambda user: user is not double)
        return Rewritten(gm, 1)


class WrongActivations(Rewrite):
    """Every block has another activation, before the graph is cut."""

    name: ClassVar[str] = "wrong_activations"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph,)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph,)

    def run(self, gm, facts):
        nodes = gm.graph.find_nodes(op="call_function", target=nn.functional.gelu)
        for node in nodes:
            node.target = nn.functional.silu
        return Rewritten(gm, len(nodes))


class LosesWrites(Rewrite):
    """What the model writes to its inputs does not reach the caller."""

    name: ClassVar[str] = "loses_writes"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, Detection)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph, Detection)

    def run(self, gm, facts):
        nodes = [node for node in gm.graph.nodes if node.target == "copy_" and node.args[0].op == "placeholder"]
        for node in nodes:
            gm.graph.erase_node(node)
        return Rewritten(gm, len(nodes))


@pytest.fixture
def wrong(monkeypatch):
    """Adds a pass to the pipeline."""
    pipeline = cachedit_fx.pass_pipeline.pipeline

    def add(pass_, before=None):
        def more(options, traced):
            passes = pipeline(options, traced)
            place = next((index for index, other in enumerate(passes) if other.name == before), 0)
            return [*passes[:place], pass_, *passes[place:]]

        monkeypatch.setattr(cachedit_fx.pass_pipeline, "pipeline", more)

    return add


@pytest.mark.parametrize("name", ["two loops", "skips", "in place", "stored whole"])
def test_right_graphs_pass_and_results_are_the_compiled_ones(name):
    model, inputs = ALL[name]()
    expected = model.eval()(*inputs)
    verified(model)
    for _ in range(2):
        torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=0)
    assert all(stats.cached_steps == [1] for stats in summary(model))


def test_only_the_first_computed_call_of_a_graph_is_compared():
    model = make(Counts)
    Counts.runs = 0
    verified(model)

    def runs_of(*inputs, **more):
        before = Counts.runs
        model(*inputs, **more)
        return Counts.runs - before

    assert [runs_of(*STEP) for _ in range(3)] == [1, 0, 0]
    assert runs_of(*STEP, scale=2) == 0  # another graph, and its region is bypassed: nothing computed to compare
    assert [stats.cached_steps for stats in summary(model)] == [[1, 2, 3]]
    cachedit_fx.refresh_context(model)
    assert [runs_of(*STEP, scale=2) for _ in range(2)] == [1, 0]
    larger = (noise(tokens=7), STEP[1], STEP[2])
    assert [runs_of(*larger) for _ in range(2)] == [1, 0]


@pytest.mark.parametrize(
    ("piece", "options"),
    [
        ("blocks_0", {}),
        ("blocks_3", {}),
        ("blocks_3", {"guards": "generation"}),
        ("middle_0", {"granularity": "region"}),
        ("blocks_3", {"cache": None}),
    ],
    ids=str,
)
def test_a_wrong_piece_is_named(wrong, folders, piece, options):
    wrong(WrongPiece(piece), before="insert_cache_branch")
    model = make()
    compile(model, **{"verify": "first", "inner_backend": "eager", "cache": ALWAYS} | options)
    for _ in range(2):  # the error is not forgotten, and nothing wrong is reused
        with pytest.raises(VerificationError, match=rf"Toy: .* differs is {piece}:.*toys\.py") as caught:
            model(*STEP)
    error = caught.value
    assert error.piece == piece and error.error > 1e-3
    assert error.folder.parent == folders and str(error.folder) in str(error)
    captured, rewritten = (error.folder / f"{name}_0.py" for name in ("captured", "rewritten"))
    assert "gelu" in captured.read_text() and piece not in captured.read_text()
    assert f"class {piece}" in rewritten.read_text() and "torch.mul" in rewritten.read_text()


@torch.inference_mode()
def test_a_pass_over_the_flat_graph_is_found_too(wrong):
    wrong(WrongActivations())
    with pytest.raises(VerificationError) as caught:
        verified(make())(*STEP)
    assert caught.value.piece == "blocks_0"


def test_lost_writes_are_found_and_the_inputs_are_as_before(wrong):
    wrong(LosesWrites(), before="plan_regions")

    class Writes(Chain):
        def prepare(self, x, timestep):
            x += torch.rand_like(x)
            return x * 1

    model, (x, timestep) = verified(make(Writes)), models.inputs()
    before, random_numbers = x.clone(), torch.get_rng_state()
    with pytest.raises(VerificationError, match="No piece differs"):
        model(x, timestep)
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), random_numbers)


def test_inputs_and_random_numbers_are_those_of_one_call():
    class Writes(Chain):
        def prepare(self, x, timestep):
            x += torch.rand_like(x)
            return x * 1

    results = []
    for compiled in (False, True):
        torch.manual_seed(5)
        model, (x, timestep) = make(Writes), models.inputs()
        if compiled:
            verified(model)
        torch.manual_seed(7)
        results.append((model(x, timestep), x, torch.get_rng_state()))
    for plain, ours in zip(*results, strict=True):
        assert torch.equal(plain, ours)


def test_the_state_in_attributes_is_that_of_one_call():
    class Remembers(Chain):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.calls, self.times, self.steps = 0, [], {}
            self.table = torch.zeros(3)

        def prepare(self, x, timestep):
            self.calls += 1
            self.times.append(timestep.shape[0])
            self.steps["last"] = self.calls
            self.latest = x * 2
            self.table[:1] += 1
            return x * 1

    states = []
    for compiled in (False, True):
        model, (x, timestep) = make(Remembers), models.inputs()
        if compiled:
            verified(model)
        for _ in range(2):
            model(x, timestep)
        states.append((model.calls, model.times, model.steps, model.latest.tolist(), model.table.tolist()))
    assert states[0] == states[1] and states[0][0] == 2


class Sums(Chain):
    """Adds to a buffer, by an augmented assignment or by an assignment, or to a parameter."""

    total: torch.Tensor
    weight: torch.Tensor

    def __init__(self, *args, write="augmented", **kwargs):
        super().__init__(*args, **kwargs)
        self.write = write
        self.register_buffer("total", torch.zeros(8))
        self.weight = nn.Parameter(torch.zeros(8))

    def prepare(self, x, timestep):
        if self.write == "augmented":
            self.total += x.mean()
        elif self.write == "assigned":
            self.total = self.total + x.mean()
        else:
            self.weight += x.mean()
        return x * 1


@pytest.mark.parametrize("write", ["augmented", "assigned"])
def test_buffers_are_those_of_one_call(write):
    totals = []
    for compiled in (False, True):
        model, (x, timestep) = make(Sums), models.inputs()
        model.write, held = write, model.total
        if compiled:
            verified(model)
        for _ in range(2):
            model(x, timestep)
        totals.append((model.total.tolist(), held.tolist(), model.total is held))
    assert totals[0] == totals[1] and totals[0][2] is (write == "augmented")


def test_a_parameter_that_is_written_to_is_not_verified_and_counts_once():
    models_run = []
    for compiled in (False, True):
        model, (x, timestep) = make(Sums), models.inputs()
        model.write = "parameter"
        if compiled:
            verified(model)
            with pytest.warns(CacheWarning, match="forward writes to the parameter weight"):
                model(x, timestep)
        else:
            model(x, timestep)
        models_run.append(model.weight.tolist())
    assert models_run[0] == models_run[1]


def off_by(error):
    """An inner backend whose pieces are off by so much."""

    def backend(gm, inputs):
        return lambda *values: tuple(value * (1 + error) for value in gm(*values))

    return backend


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_compiled_pieces_may_round_differently(dtype, rounding):
    inputs = [value.to(dtype) if value is not STEP[1] else value for value in STEP]
    verified(make().to(dtype), inner_backend=off_by(rounding))(*inputs)
    with pytest.raises(VerificationError) as caught:
        verified(make().to(dtype), inner_backend=off_by(0.5))(*inputs)
    assert caught.value.piece == "blocks_0"


def test_a_module_that_never_repeats_itself_is_no_error():
    counter = itertools.count()

    class Drifts(Chain):
        def prepare(self, x, timestep):
            return x + next_number()

    next_number = torch.compiler.disable(lambda: torch.tensor(next(counter)))
    verified(make(Drifts))(*models.inputs())
    assert next(counter) > 2


def test_graphs_of_one_call_are_compared_together(wrong):
    verified(make(Halves))(*models.inputs())
    wrong(WrongPiece("blocks_1"), before="insert_cache_branch")
    with pytest.raises(VerificationError) as caught:
        verified(make(Halves))(*models.inputs())
    assert caught.value.piece == "blocks_1" and len(list(caught.value.folder.iterdir())) == 4


def test_explain_verifies_and_leaves_the_module_as_it_is(wrong):
    model = compile(make(blocks=4), inner_backend="eager", cache=ALWAYS)
    model(*STEP)
    before = model._compiled_call_impl
    assert "verified: equal to the plain module" in explain(model, *STEP, verify="first").notes
    wrong(WrongPiece("blocks_3"), before="insert_cache_branch")
    with pytest.raises(VerificationError, match="blocks_3"):
        explain(model, *STEP, verify="first")
    assert model._compiled_call_impl is before and summary(model)[0].executed_steps == 1


def test_torch_compile_refuses_it():
    model = torch.compile(make(), backend="cachedit", options={"verify": "first"})
    with pytest.raises(BackendCompilerFailed, match="use enable_cache") as caught:
        model(*STEP)
    assert isinstance(caught.value.inner_exception, OptionError)
