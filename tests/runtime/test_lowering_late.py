"""Pieces that inductor compiles at their first call, since lengths of their inputs come from data."""

import copy
import operator

import pytest
import torch
from lib import models
from lib.toys import Step
from torch import fx, nn
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

import cachedit_fx
from cachedit_fx import DBCacheConfig
from cachedit_fx.lowering import compile_late


class Trimmed(nn.Module):
    """Its blocks get a text without the padding. Only the mask knows how long that is."""

    def __init__(self, width=models.WIDTH):
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Step(width) for _ in range(3))

    def forward(self, hidden_states, timestep, text, mask):
        hidden = self.embed(hidden_states) + timestep.reshape(-1, 1, 1) / 1000
        hidden = torch.cat([text[:, mask], hidden], 1)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden[:, -hidden_states.shape[1] :]


def test_inductor_with_lengths_that_depend_on_data():
    module = Trimmed().eval()
    fast = cachedit_fx.compile(
        copy.deepcopy(module), cache=DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0)
    )
    hidden, timestep = models.inputs()
    with torch.no_grad():
        for length in (3, 5, 1, 3):
            given = hidden, timestep, torch.randn(hidden.shape[0], 6, models.WIDTH), torch.arange(6) < length
            torch.testing.assert_close(fast(*given), module(*given), rtol=1e-4, atol=1e-5)
    assert [stats.uncached_calls for stats in cachedit_fx.summary(fast)] == [0]


def test_what_dynamo_asserts_of_such_lengths_is_compiled():
    """It writes functions of symbols that it refuses on numbers. Code is written at the first call, as in pieces."""
    graph, aten = fx.Graph(), torch.ops.aten
    x = graph.placeholder("x")
    offset = graph.call_function(aten.sym_storage_offset.default, (x,))
    not_empty = graph.call_function(torch.sym_not, (graph.call_function(operator.eq, (offset, -1)),))
    total = graph.call_function(torch.sym_sum, ([graph.call_function(aten.sym_size.int, (x, 0)), 1],))
    bounded = graph.call_function(operator.le, (graph.call_function(torch.sym_max, (total, 2)), 9))
    for check in (not_empty, bounded):
        graph.call_function(aten._assert_scalar.default, (check, "out of range"))
    rows = graph.call_method("new_ones", (x, total))
    graph.output((graph.call_method("softmax", (rows,), {"dim": 0, "dtype": torch.float64}),))
    with _use_lazy_graph_module(True):
        piece = _make_graph_module(nn.Module(), graph)
    call = compile_late(piece, lambda gm, inputs: gm.forward)
    for length in (3, 5, 8):
        assert call(torch.ones(length, 2))[0].shape == (length + 1,)
    with pytest.raises(RuntimeError, match="out of range"):
        call(torch.ones(9, 2))
