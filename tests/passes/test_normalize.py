"""Normalize: in-place writes that cross a cut become pure, buffers filled in one place stay as they are."""

import copy
import inspect
import operator
from typing import Any

import pytest
import torch
from lib.cases import SumsLengths, WithLinear
from lib.helpers import capture, copied, detected, find, ops, run_passes
from torch import nn

from cachedit_fx.capture import capturing
from cachedit_fx.passes.base import Facts
from cachedit_fx.passes.graph_aliases import is_assignment, memory_of, written_by
from cachedit_fx.passes.normalize import Normalize


class AddsInPlace(WithLinear):
    def forward(self, x):
        y = self.linear(x)
        z = y * 2
        y += x
        return y + z


class MethodInPlace(WithLinear):
    def forward(self, x):
        y = self.linear(x)
        y.mul_(x).add_(x, alpha=2).sub_(1).div_(3)
        return y


class WritesSlice(WithLinear):
    def forward(self, x):
        y = self.linear(x)
        z = y.sum()
        y[:, :2] = x[:, 2:]
        return y + z


class Activates(WithLinear):
    def forward(self, x):
        y = self.linear(x)
        z = y + 1
        nn.functional.silu(y, inplace=True)
        nn.functional.relu(z, True)
        return y * z


class ThroughView(WithLinear):
    come = {"clone": 1}

    def forward(self, x):
        y = self.linear(x)
        y[:, :2].add_(1)
        return y


class LiveView(WithLinear):
    come = {"clone": 1}

    def forward(self, x):
        y = self.linear(x)
        view = y.transpose(0, 1)
        y += 1
        return view * 2


class ThroughDropout(WithLinear):
    gone = {"dropout": 1, "iadd": 1}
    come = {"add": 1}

    def forward(self, x):
        y = self.linear(x)
        z = nn.functional.dropout(y, 0.5, training=False)  # not a copy: y itself
        z += 1
        return y * 2


class ThroughData(WithLinear):
    come = {"clone": 1}

    def forward(self, x):
        y = self.linear(x)
        y.data[:, 1:].copy_(x[:, 1:])
        return y


class SeveralAtOnce(WithLinear):
    come = {"clone": 2}

    def forward(self, x):
        y, z = self.linear(x), x * 2
        view = z.T
        torch._foreach_mul_([y, view], 0.5)
        return y @ view + z.sum()


class InTurn(WithLinear):
    """Written, read and written again: the copy that took the first write is a buffer no longer."""

    come = {"clone": 2, "chunk": 1, "getitem": 1}

    def forward(self, x):
        y = self.linear(x)
        left, right = y.chunk(2, dim=-1)
        left += 1
        z = y.sum()
        right.mul_(z)
        return y * left.sum()


class Scatters(WithLinear):
    def forward(self, x):
        out = torch.zeros_like(x)
        for row in range(2):
            out.index_add_(0, torch.tensor([row]), self.linear(x[row : row + 1]))
        return out + x


class Rotary(WithLinear):
    def forward(self, x):
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 1::2]
        out[..., 1::2] = -x[..., 0::2]
        return self.linear(out)


class Pure(WithLinear):
    def forward(self, x):
        a, b = self.linear(x).chunk(2, dim=-1)
        return a * b


class Promotes(nn.Module):
    """half + float is float out of place, half in place."""

    def forward(self, x):
        y = x.to(torch.bfloat16) * 1
        y += x
        return y


class Integers(nn.Module):
    def forward(self, x):
        y = (x * 3).long() + 1
        y += 2
        return y


class WritesInput(WithLinear):
    """What it adds to its input is seen by the caller."""

    def forward(self, x):
        x += 1
        y = self.linear(x)
        x.mul_(2)
        return y + x


class UpdatesStatistics(WithLinear):
    """Batch norm in training writes to two buffers, and no in-place name says so."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.linear(x)) + self.norm.running_mean


class Renormalizes(nn.Module):
    """An embedding with a largest norm writes to its weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 4, max_norm=0.5)

    def forward(self, x):
        return self.embedding.weight.sum() + self.embedding(x.argmax(dim=1) % 3) + self.embedding.weight.sum()


class AssignsData(WithLinear):
    def forward(self, x):
        self.linear.weight.data = self.linear.weight * 2
        return self.linear(x)


class WritesBuffer(WithLinear):
    calls: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(2, dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return self.linear(x) + self.calls[0]


def normalized(module, x=None):
    graph = capture(module, torch.randn(3, 4) if x is None else x)
    before = ops(graph.gm)
    gm = run_passes(graph.gm, Normalize())
    return graph, before, ops(gm)


@pytest.mark.parametrize(
    "module, gone, come",
    [
        (AddsInPlace, {"iadd": 1}, {"add": 1}),
        (MethodInPlace, {"mul_": 1, "add_": 1, "sub_": 1, "div_": 1}, {"mul": 1, "add": 1, "sub": 1, "div": 1}),
        (WritesSlice, {}, {"clone": 1}),
        (Activates, {}, {"clone": 2}),
        (Integers, {}, {"clone": 1}),
        (Promotes, {}, {"clone": 1}),
    ],
)
def test_fires(module, gone, come):
    graph, before, after = normalized(module())
    assert before - after == gone and after - before == come
    assert graph.same(graph.gm)


@pytest.mark.parametrize("module", [ThroughView, LiveView, ThroughDropout, ThroughData, SeveralAtOnce, InTurn])
def test_writes_that_a_view_shows_go_to_a_copy(module):
    """Of the views that are still in use each is made again, and none is left over."""
    graph, before, after = normalized(module())
    assert before - after == getattr(module, "gone", {}) and after - before == module.come
    assert graph.same(graph.gm)
    (linear,) = find(graph.gm, "linear")
    assert not any(written_by(user) for user in linear.users)


@pytest.mark.parametrize("module", [Rotary, Pure, Scatters])
def test_near_miss_is_left_alone(module):
    graph, before, after = normalized(module())
    assert before == after
    assert graph.same(graph.gm)


class WritesMasked(WithLinear):
    def forward(self, x):
        y = self.linear(x)[x[:, 0] > -1]
        z = y.sum()
        y[:, :2] = 1
        return y + z


def test_a_copy_binds_no_symbol():
    """Inductor refuses a length from data that two nodes claim to bring."""
    with capturing():
        graph, before, after = normalized(WritesMasked(), torch.ones(3, 4))
        assert after - before == {"clone": 1}
        symbols = [symbol for node in graph.gm.graph.nodes for symbol in node.meta.get("unbacked_bindings") or {}]
        assert len(symbols) == len(set(symbols)) == 1
    assert graph.same(graph.gm)


def test_every_later_use_takes_the_new_value_and_earlier_ones_the_old():
    graph, _, _ = normalized(AddsInPlace())
    (linear,) = find(graph.gm, "linear")
    first, last = find(graph.gm, "add")
    (doubled,) = find(graph.gm, "mul")
    assert doubled.args[0] is linear and first.args[0] is linear
    assert last.args == (first, doubled)


@pytest.mark.parametrize("module", [WritesInput, WritesBuffer])
def test_writes_to_graph_inputs_reach_the_caller(module):
    graph, _, after = normalized(module())
    unchanged, changed = copied(graph.inputs), copied(graph.inputs)
    with torch.no_grad():
        results = graph.gm(*changed)
    assert graph.equals(results)
    written = [not torch.equal(a, b) for a, b in zip(unchanged, changed, strict=True)]
    assert sum(written) == 1
    if module is WritesInput:
        assert after["copy_"] == 1 and after["iadd"] == after["mul_"] == 0
        assert torch.equal(changed[written.index(True)], (unchanged[written.index(True)] + 1) * 2)
    else:
        assert changed[written.index(True)].tolist() == [1, 1]


@pytest.mark.parametrize("kind", [UpdatesStatistics, Renormalizes])
@torch.no_grad()
def test_writes_that_no_name_tells_reach_the_graph_inputs(kind):
    module, x = kind(), torch.randn(3, 4)
    plain, before = copy.deepcopy(module), copy.deepcopy(module.state_dict())
    graph = capture(module, x)
    module.load_state_dict(before)  # the captured call has written to it
    gm = run_passes(graph.gm, Normalize())
    written = find(gm, "copy_")
    assert 0 < len(written) == ops(gm)["clone"] and all(
        node.next.op == "output" or node.next in written for node in written
    )
    inputs = copied(graph.inputs)
    assert torch.equal(gm(*inputs)[0], plain(x))
    state = [tensor for name, tensor in plain.state_dict().items() if not torch.equal(tensor, before[name])]
    assert all(any(torch.equal(tensor, value) for value in inputs if value.shape == tensor.shape) for tensor in state)


@torch.no_grad()
def test_assigned_data_replaces_the_input_and_is_assigned_at_the_end():
    module, x = AssignsData(), torch.randn(3, 4)
    plain, graphs = copy.deepcopy(module), []

    def backend(gm, _):
        graphs.append(run_passes(gm, Normalize()))
        return graphs[-1]

    assert torch.equal(torch.compile(module, backend=backend, fullgraph=True)(x), plain(x))
    assert torch.equal(module.linear.weight, plain.linear.weight)
    (graph,) = graphs
    (assignment,) = filter(is_assignment, graph.graph.nodes)
    ((linear,), (product,)) = (find(graph, name) for name in ("linear", "mul"))
    assert assignment.next.op == "output" and assignment.args[1] is linear.args[1] is product
    assert find(graph, "_lower_version_count_by_1") == []


def _named(function, name):
    """A call of `function` that sets its parameter `inplace` by position."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.ones(2)
    parameters = list(inspect.signature(function).parameters.values())
    index = [parameter.name for parameter in parameters].index(name)
    args = [x if each.default is each.empty else each.default for each in parameters[:index]]
    return x, graph.call_function(function, (*args, True)), graph.call_function(function, (*args, False))


INPLACE = [
    f for f in vars(nn.functional).values() if inspect.isfunction(f) and "inplace" in inspect.signature(f).parameters
]


@pytest.mark.parametrize("function", INPLACE, ids=lambda function: function.__name__)
def test_inplace_by_position(function):
    x, writes, reads = _named(function, "inplace")
    assert written_by(writes) == (x,) and written_by(reads) == ()


METHODS = [name for name in dir(torch.Tensor) if name.endswith("_") and not name.startswith("_")]


@pytest.mark.parametrize("function", [False, True])
def test_every_method_with_an_underscore_writes(function):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.ones(2)
    calls = [
        graph.call_function(getattr(torch.Tensor, name), (x,)) if function else graph.call_method(name, (x,))
        for name in METHODS
    ]
    silent = {name for name, call in zip(METHODS, calls, strict=True) if written_by(call) != (x,)}
    assert silent == {"requires_grad_", "detach_", "share_memory_"} and len(METHODS) > 150


def test_new_nodes_have_values():
    graph, _, _ = normalized(WritesSlice())
    (clone,) = find(graph.gm, "clone")
    assert clone.meta["example_value"].shape == (3, 4)


def test_getitems_move_beside_their_producer():
    graph = capture(Pure(), torch.randn(3, 4))
    (chunk,) = find(graph.gm, "chunk")
    getitems = find(graph.gm, "getitem")
    (product,) = find(graph.gm, "mul")
    with graph.gm.graph.inserting_before(product):
        late = graph.gm.graph.node_copy(getitems[1])
    late.meta = dict(getitems[1].meta) | {"nn_module_stack": {"later": ("L['self'].blocks.7", nn.Linear)}}
    getitems[1].replace_all_uses_with(late)
    other = graph.gm.graph.call_function(operator.neg, (getitems[0],))
    product.prepend(other)
    late.prepend(other)
    other.meta = dict(getitems[0].meta)
    product.replace_input_with(getitems[0], other)
    graph.gm.graph.erase_node(getitems[1])
    gm = run_passes(graph.gm, Normalize())
    assert chunk.next is getitems[0] and getitems[0].next is late
    # A node that stands in the prologue and says that it belongs to block 7 would make that block begin here.
    assert late.meta.get("nn_module_stack") == chunk.meta.get("nn_module_stack")
    assert ops(gm)["getitem"] == 2


def test_sums_of_lengths_move_to_the_front():
    graph = capture(SumsLengths(), torch.randn(2, 5, 4), torch.randn(2, 3, 4), dynamic=True)
    inputs = [node for node in graph.gm.graph.nodes if node.op == "placeholder"]
    (total,) = find(graph.gm, "sym_sum")
    assert inputs[-1].next is not total and total.meta["nn_module_stack"]
    gm = run_passes(graph.gm, Normalize())
    assert inputs[-1].next is total and "nn_module_stack" not in total.meta
    assert graph.same(gm)
    (loop,) = detected(gm).loops
    assert loop.num_blocks == 3 and total in loop.invariant


def test_dynamic_shapes():
    graph = capture(AddsInPlace(), torch.randn(3, 4), dynamic=True)
    gm = run_passes(graph.gm, Normalize())
    assert ops(gm)["iadd"] == 0
    assert graph.same(gm)


def test_untouched_graph_is_not_recompiled():
    graph = capture(Pure(), torch.randn(3, 4))
    assert Normalize().run(graph.gm, Facts()).matches == 0


@pytest.mark.filterwarnings("ignore")
def test_a_triton_kernel_writes_through_a_view():
    """Without a GPU torch cannot read the kernel, and takes every argument to be written."""
    triton: Any = pytest.importorskip("triton", reason="the kernel is Triton's")
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation

    @triton.jit
    def zero(x_ptr, n: triton.language.constexpr):
        triton.language.store(x_ptr, 0.0)

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.zeros(8)
    view = graph.call_method("view", (x, -1))
    view.meta["example_value"] = x.meta["example_value"].view(-1)
    settings: dict[str, Any] = {
        "kernel_idx": kernel_side_table.add_kernel(zero),
        "constant_args_idx": kernel_side_table.add_constant_args({"n": 8}),
        "grid": [(1, 1, 1)],
        "tma_descriptor_metadata": {},
        "kwargs": {"x_ptr": view},
    }
    call = graph.call_function(triton_kernel_wrapper_mutation, (), settings)
    graph.output((x,))
    torch.fx.GraphModule({}, graph)
    assert written_by(call) == (view,) and memory_of(view) == memory_of(x)
