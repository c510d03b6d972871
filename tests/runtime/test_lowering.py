"""Lowering: what has one key and what has not, each distinct piece compiled once, inductor close to eager."""

import copy
import gc
import itertools
import operator
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from lib import models
from lib.helpers import Computes, Restores, capture, rewritten
from lib.marks import only_in
from lib.toys import Step
from torch import fx, nn
from torch._inductor import compile_fx, cpu_vec_isa

import cachedit_fx
from cachedit_fx import lowering
from cachedit_fx.backend import cachedit
from cachedit_fx.config.options import parse_options
from cachedit_fx.kernels import cpu
from cachedit_fx.lowering import Lowered, compile_whole, lower, structure_key
from cachedit_fx.passes.base import Facts
from cachedit_fx.passes.manager import Outcome
from cachedit_fx.runtime.warm_up import warm_up


def text(batch=1, tokens=5):
    return torch.randn(batch, tokens, models.WIDTH)


class Counting:
    """An inner compiler that remembers the pieces it was given, and runs them as they are."""

    def __init__(self):
        self.pieces, self.inputs = [], []

    def __call__(self, gm, inputs, **extra):
        self.pieces.append(gm)
        self.inputs.append(inputs)
        self.extra = extra
        return gm.forward


def lowered(graph, inner, first=1, last=0, **options):
    settings = parse_options({"inner_backend": inner, **options})
    gm = rewritten(graph.gm, first, last, canonical_layout=inner != "eager")
    assert lower(Outcome(gm, Facts(), ()), settings) is not None
    return gm, len(distinct_pieces(gm))


def distinct_pieces(gm):
    """What is called as a piece by the graph or by one of its regions."""
    holders = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return {holder._modules[node.target] for holder in holders for node in holder.graph.find_nodes(op="call_module")}


# ---------------------------------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------------------------------


def piece(*inputs, function=torch.add, args=(2,), **kwargs):
    """x -> function(x, *args, **kwargs), for an input (or several) like `inputs`."""
    graph = fx.Graph()
    nodes = []
    for index, value in enumerate(inputs):
        node = graph.placeholder(f"x{index}")
        node.meta["example_value"] = value
        nodes.append(node)
    graph.output((graph.call_function(function, (*nodes, *args), kwargs),))
    return fx.GraphModule({}, graph)


def key(*inputs, **given):
    return structure_key(piece(*inputs, **given))


X = torch.zeros(2, 3, 4)


def test_constants_are_told_apart():
    """By value and by type: 1 == 1.0 == True, and compile to three things."""
    constants = [1, 1.0, True, "1", None, (1,), [1], (1.0,), slice(1), slice(None, None, 1), {"n": 1}, torch.float32]
    for a, b in itertools.product(constants, constants):
        same = a is b
        assert (key(X, args=(a,)) == key(X, args=(b,))) == same, (a, b)
        assert (key(X, alpha=a) == key(X, alpha=b)) == same, (a, b)


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, 3, 5),
        torch.zeros(2, 3, 4, 1),
        torch.zeros(2, 3, 4, dtype=torch.bfloat16),
        torch.zeros(2, 3, 4, device="meta"),
        torch.zeros(2, 4, 3).transpose(1, 2),
        torch.zeros(2, 6, 4)[:, :3],
        nn.Parameter(torch.zeros(2, 3, 4)),
        torch.zeros(2, 3, 4, requires_grad=True),
        torch.zeros(2, 3, 4).to_sparse(),
        2,
        torch.nn.Buffer(torch.zeros(2, 3, 4)[None])[0].int(),
    ],
    ids=["shape", "rank", "dtype", "device", "strides", "outer stride", "parameter", "grad", "layout", "number", "int"],
)
def test_inputs_are_told_apart(other):
    assert key(X) == key(torch.ones(2, 3, 4))
    assert key(X) != key(other)


def test_strides_of_single_elements_mean_nothing():
    assert key(torch.zeros(1, 3, 4)) == key(torch.zeros(1, 6, 4)[:, :3])
    assert key(torch.zeros(1, 3, 4)) != key(torch.zeros(3, 1, 4).transpose(0, 1)[..., ::2])
    assert key(torch.zeros(2, 3, 4)) != key(torch.zeros(2, 6, 4)[:, :3])


def test_targets_and_wiring_are_told_apart():
    assert key(X, function=torch.add) != key(X, function=torch.sub)
    assert key(X, function=torch.add) != key(X, function=operator.add)
    assert key(X, alpha=2) != key(X, beta=2)
    assert key(X, X, args=()) != key(X)

    def wired(swap):
        module = piece(X, X, args=())
        call = next(node for node in module.graph.nodes if node.op == "call_function")
        call.args = call.args[::-1] if swap else call.args
        return structure_key(module)

    assert wired(False) == wired(False) != wired(True)


def closure(number, other=None, default=1, keyword=None):
    def function(x, factor=default, *, word=keyword):
        return x * number * factor if other is None else other(x)

    return function


def counter():
    count = 0

    def function(x):
        nonlocal count
        count += 1
        return x * count

    return function


def recursive():
    def function(x):
        return x if x.sum() > 0 else function(-x)

    return function


TENSOR = torch.ones(1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: closure(2),
        lambda: closure(2, closure(3)),
        lambda: closure(TENSOR, keyword=(1, None, "a")),
        lambda: closure([1, (2.0, TENSOR)]),
        recursive,
    ],
)
def test_functions_of_equal_contents_are_one(make):
    assert make() is not make()
    assert key(torch.ones(3), function=make(), args=()) == key(torch.ones(3), function=make(), args=())


def test_functions_of_other_contents_are_told_apart():
    marked = closure(2)
    marked.mark = 1
    functions = [
        closure(2),
        closure(3),
        closure(2.0),
        closure(True),
        closure(1),
        closure(2, default=2),
        closure(2, keyword=2),
        closure(2, closure(2)),
        closure(2, closure(3)),
        closure(torch.ones(1)),
        closure(torch.ones(1)),
        closure([2]),
        closure((2,)),
        marked,
        recursive(),
        counter(),
        counter(),
    ]
    keys = [key(torch.ones(3), function=function, args=()) for function in functions]
    assert len(set(keys)) == len(keys)


def test_a_key_holds_what_it_tells_apart_and_nothing_outlives_it(quick_collection):
    tensor = torch.ones(1)
    alive = weakref.ref(tensor)
    value = key(torch.ones(3), function=closure(tensor), args=())
    del tensor
    gc.collect()
    assert alive() is not None and hash(value)  # else another tensor could get its address
    del value
    gc.collect()
    assert alive() is None


class Assigns(nn.Linear):
    """As a linear layer of bitsandbytes: each call gives the weight its data anew."""

    def __init__(self, features):
        super().__init__(features, features)
        self.data = self.weight.data

    def forward(self, x):
        result = super().forward(x)
        self.weight.data = self.data
        return result


class Assigning(nn.Module):
    def __init__(self, blocks=4):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(Assigns(8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(blocks))

    def forward(self, hidden_states):
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
        return hidden_states


@torch.no_grad()
def test_blocks_that_assign_data_are_compiled_once():
    module, inner = Assigning(), Counting()
    model = cachedit_fx.compile(module, inner_backend=inner, Fn_compute_blocks=1, residual_diff_threshold=0.0)
    x = torch.randn(2, 8)
    assert torch.equal(model(x), copy.deepcopy(module)(x))
    assert len(inner.pieces) == 1
    for assigns in (part for part in module.modules() if isinstance(part, Assigns)):
        assert assigns.weight.data_ptr() == assigns.data.data_ptr()


class Calling(nn.Module):
    def __init__(self, numbers):
        super().__init__()
        self.functions = [torch._dynamo.allow_in_graph(closure(number)) for number in numbers]
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in numbers)

    def forward(self, hidden_states):
        for block, function in zip(self.blocks, self.functions, strict=True):
            hidden_states = hidden_states + function(block(hidden_states))
        return hidden_states


@pytest.mark.parametrize(("numbers", "distinct"), [((2, 2, 2, 2), 1), ((2, 2, 3, 2), 2)])
@torch.no_grad()
def test_blocks_that_call_closures_are_compiled_once_for_equal_contents(numbers, distinct):
    module, inner = Calling(numbers), Counting()
    model = cachedit_fx.compile(module, inner_backend=inner, Fn_compute_blocks=1, residual_diff_threshold=0.0)
    x = torch.randn(2, 8)
    assert torch.equal(model(x), module.forward(x))
    assert len(inner.pieces) == distinct


def test_names_do_not_matter():
    first, second = piece(X), piece(X)
    for node in second.graph.nodes:
        node.name = f"other_{node.name}"
    assert structure_key(first) == structure_key(second)


def test_tensor_subclasses_are_told_apart():
    torchao = pytest.importorskip("torchao.quantization")

    def quantized(config):
        linear = nn.Linear(32, 32, bias=False)
        torchao.quantize_(linear, config)
        return linear.weight

    int8 = quantized(torchao.Int8WeightOnlyConfig())
    assert key(int8) == key(quantized(torchao.Int8WeightOnlyConfig()))
    assert key(int8) != key(nn.Parameter(torch.zeros(32, 32)))
    assert key(int8) != key(quantized(torchao.Int8DynamicActivationInt8WeightConfig()))


def test_submodules_are_never_shared():
    def holding():
        graph = fx.Graph()
        graph.output((graph.get_attr("weight"),))
        module = fx.GraphModule({"weight": nn.Parameter(torch.zeros(2))}, graph)
        return module

    assert structure_key(holding()) != structure_key(holding())


# ---------------------------------------------------------------------------------------------------------------------
# One compilation for twins
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, extra, blocks, distinct",
    [
        (models.Toy, (), 1, 3),
        (lambda: models.Toy(9), (), 1, 3),
        (models.TwoLoops, (text(),), 2, 4),
        (models.LastDiffers, (text(),), 2, 3),
    ],
)
@pytest.mark.parametrize("pieces", ["blocks", "all"])
def test_twins_are_compiled_once(module, extra, blocks, distinct, pieces):
    """And of what is no block, nothing is compiled that was not asked for."""
    graph, inner = capture(module(), *models.inputs(), *extra), Counting()
    gm, count = lowered(graph, inner, compiled_pieces=pieces)
    expected = distinct if pieces == "all" else blocks
    assert count == distinct and len(inner.pieces) == expected
    assert graph.same(gm, Computes())
    cache = Restores()
    assert graph.same(gm, cache) and graph.same(gm, cache)
    held = [m for m in gm.modules() if isinstance(m, Lowered)]
    assert len({id(m) for m in held}) == expected


def test_a_different_constant_is_compiled_by_itself():
    class Scaled(models.Toy):
        """Blocks that differ in a number only: alike, one loop, but not twins."""

        def make_block(self, index, width):
            block = models.Block(width)
            block.norm.eps = 1e-5 if index < 2 else 1e-3
            return block

    graph, inner = capture(Scaled(), *models.inputs()), Counting()
    gm, count = lowered(graph, inner)
    assert count == 4
    assert graph.same(gm, Computes())


def test_the_inner_compiler_gets_fake_inputs_and_the_options():
    graph, inner = capture(models.Toy(), *models.inputs()), Counting()
    lowered(graph, inner, inner_options={"level": 3})
    assert inner.extra == {"level": 3}
    for gm, inputs in zip(inner.pieces, inner.inputs, strict=True):
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        assert [node.meta["example_value"] for node in placeholders] == inputs
        assert all(hasattr(value, "fake_mode") for value in inputs)


def test_graphs_that_write_to_inputs_which_share_memory_stay_as_they_are():
    """torch's cache on disk takes such a graph for one whose inputs share none."""

    class Writes(nn.Module):
        def forward(self, x, rows):
            rows.mul_(2.0)
            return x.sum()

    x, compiled = torch.ones(4, 6), object()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "inner_compiler", lambda options: lambda gm, inputs: compiled)
        for rows, is_compiled in ((x[1:], False), (torch.ones(3, 6), True)):
            graph = capture(Writes(), x, rows).gm
            assert (compile_whole(graph, [x, rows], parse_options({})) is compiled) == is_compiled


def test_eager_shares_the_pieces_themselves():
    graph = capture(models.Toy(), *models.inputs())
    gm, count = lowered(graph, "eager")
    assert count == 3
    region = gm._modules["region_0_compute"]
    assert region is not None and region._modules["blocks_1"] is region._modules["blocks_3"]
    assert graph.same(gm, Computes())


def test_flux_has_five_pieces_at_batch_1():
    """The streams that a single block hands on are slices of batch 1, contiguous whatever they were cut from."""
    model, inputs = models.flux()
    graph, inner = capture(model, **inputs), Counting()
    gm, count = lowered(graph, inner)
    assert count == 5
    assert graph.same(gm, Computes())


def compiled(module, inner, **options):
    return torch.compile(module, backend=cachedit, fullgraph=True, options={"inner_backend": inner, **options})


def test_flux_has_as_many_pieces_at_any_length():
    model, _ = models.flux(double=2, single=3)
    inner = Counting()
    fast = compiled(model, inner, Fn_compute_blocks=1)
    counts = []
    with torch.no_grad():
        for shape in ((2, 24, 5), (3, 20, 9), (2, 30, 7), (4, 12, 6)):
            inputs = models.flux_inputs(*shape)
            assert torch.equal(fast(**inputs)[0], model(**inputs)[0])
            counts.append(len(inner.pieces))
    assert counts == [5, 10, 10, 10]  # two kinds of blocks, their modulations, a layer between


# ---------------------------------------------------------------------------------------------------------------------
# Inner compilers
# ---------------------------------------------------------------------------------------------------------------------


def test_aot_eager():
    graph = capture(models.TwoLoops(2, 3), *models.inputs(), text())
    gm, count = lowered(graph, "aot_eager")
    assert count == 4
    assert graph.same(gm, Computes())


@pytest.mark.parametrize(("inner", "expected"), [("eager", ["loops"]), ("inductor", ["processor", "loops"])])
def test_warming_up_is_silent_about_what_fails(monkeypatch, inner, expected):
    """Whoever needs it later says so."""
    begun = []

    def failing():
        begun.append("loops")
        raise OSError("no compiler")

    monkeypatch.setattr(cpu, "library", failing)
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: begun.append("processor"))
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    warm_up(parse_options({"inner_backend": inner}))
    for thread in threading.enumerate():
        if thread.name == "cachedit_fx.warm_up":
            thread.join()
    assert begun == expected and not raised


class TwoKinds(nn.Module):
    """Loops of two and of three blocks, of which inductor makes a kernel each."""

    def __init__(self, width=models.WIDTH):
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.first = nn.ModuleList(Step(width) for _ in range(2))
        self.second = nn.ModuleList(Step(width, torch.sigmoid) for _ in range(3))

    def forward(self, hidden_states, timestep, text):
        hidden = self.embed(hidden_states) + timestep.reshape(-1, 1, 1) / 1000 + text.mean(1, keepdim=True)
        for block in (*self.first, *self.second):
            hidden = block(hidden)
        return hidden


WITH_INDUCTOR: dict[str, Callable[[], nn.Module]] = {
    "a kernel each": TwoKinds,
    "attention": lambda: models.TwoLoops(2, 3),
}


@pytest.mark.parametrize("kind", only_in("elsewhere", WITH_INDUCTOR, but=["a kernel each"]))
def test_inductor_at_three_resolutions(kind, monkeypatch):
    """Two and three blocks: two kinds of block, once for all sizes."""
    module = WITH_INDUCTOR[kind]().eval()
    found, original = [], compile_fx.compile_fx

    def counting(gm, inputs, **given):
        found.append(gm)
        return original(gm, inputs, **given)

    monkeypatch.setattr(compile_fx, "compile_fx", counting)
    fast = compiled(module, "inductor", Fn_compute_blocks=1)
    counts = []
    with torch.no_grad():
        for batch, tokens, length in ((2, 6, 5), (3, 10, 7), (2, 8, 9)):
            inputs = (*models.inputs(batch, tokens), text(batch, length))
            for tensor, dims in zip(inputs, ((0, 1), 0, (0, 1)), strict=True):
                torch._dynamo.mark_dynamic(tensor, dims)
            torch.testing.assert_close(fast(*inputs), module(*inputs), rtol=1e-4, atol=1e-5)
            counts.append(len(found))
    assert counts == [2, 2, 2]
