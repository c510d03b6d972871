"""FuseRotary: the turn of pairs becomes one node, to the bit, and nothing else does."""

import pytest
import torch
from lib import models
from lib.cases import graph_of
from lib.helpers import capture, find, ops, outcome_of, run_passes
from lib.marks import SHARES_GRAPHS

from cachedit_fx.backend import rewrite
from cachedit_fx.bench.kernels_fusion import FORMS, ROTARY, Fused, counted, inputs_of, table
from cachedit_fx.config.options import Options
from cachedit_fx.passes.fuse_rotary import FuseRotary, turned_pairs
from cachedit_fx.passes.normalize import Normalize

pytestmark = SHARES_GRAPHS


def turned(x):
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-imaginary, real], dim=-1).flatten(-2)


def rotary(x, cos, sin):
    """A norm, and the turn by an angle for each pair."""
    x = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)
    return x * cos + turned(x) * sin


def inputs(*shape):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def fused(function, *arguments, **options):
    graph = capture(function, *arguments, **options)
    outcome = outcome_of(graph.gm, Normalize(), FuseRotary())
    return outcome, graph


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_is_one_node_and_equal_to_the_bit(dynamic):
    outcome, graph = fused(rotary, *inputs(2, 5, 8), dynamic=dynamic)
    before, after = ops(graph.gm), ops(outcome.graph_module)
    assert after["turned_pairs"] == 1 and not after["stack"] and not after["neg"] and not after["unbind"]
    (node,) = find(outcome.graph_module, "turned_pairs")
    assert node.meta["example_value"].shape[-1] == 2
    assert torch.equal(outcome.graph_module(*graph.inputs)[0], graph.expected[0]), before


def test_special_numbers():
    x = torch.tensor([[0.0, -0.0, float("inf"), float("-inf"), 1.0, float("nan")]])
    other = turned_pairs(x.unflatten(-1, (-1, 2))).flatten(-2)
    assert torch.equal(turned(x).view(torch.int32)[..., :4], other.view(torch.int32)[..., :4])
    assert other[0, 4].isnan() and other[0, 5] == 1


def _order(x):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a, -b], -1)


def _axis(x):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-b, a], 0)


def _halves(x):
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.stack([-b, a], -1)


def _threes(x):
    a, b, _ = x.unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack([-b, a], -1)


def _two_sources(x):
    a, _ = x.unflatten(-1, (-1, 2)).unbind(-1)
    _, b = (2 * x).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-b, a], -1)


def _reversed(x):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-a, b], -1)


def _no_minus(x):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([b, a], -1)


@pytest.mark.parametrize("function", [_order, _axis, _halves, _threes, _two_sources, _reversed, _no_minus])
def test_near_misses_stay(function):
    outcome, graph = fused(function, torch.randn(2, 12))
    assert outcome.graph_module.graph is graph.gm.graph and ops(graph.gm)["stack"] == 1


def test_halves_that_others_read_stay():
    def function(x):
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-imaginary, real], dim=-1).flatten(-2), real * 2

    outcome, graph = fused(function, torch.randn(2, 12))
    assert ops(outcome.graph_module)["turned_pairs"] == ops(outcome.graph_module)["unbind"] == 1
    for result, expected in zip(outcome.graph_module(*graph.inputs), graph.expected, strict=True):
        assert torch.equal(result, expected)


def test_queries_and_keys_of_every_block():
    graph = graph_of(models.flux)
    after = ops(run_passes(graph.gm, Normalize(), FuseRotary()))
    assert after["turned_pairs"] == 2 * after["scaled_dot_product_attention"]


@pytest.mark.parametrize("backend, is_fused", [("eager", False), ("aot_eager", True)])
def test_only_what_is_compiled(backend, is_fused):
    """Eager code takes more launches for it."""
    outcome = rewrite(graph_of(models.flux).gm, Options(inner_backend=backend))
    assert ("turned_pairs" in ops(outcome.graph_module)) is is_fused


@pytest.mark.budget(60, "inductor compiles two functions")
@pytest.mark.keep_compiled
def test_a_compiler_makes_fewer_kernels_of_it():
    arguments = inputs_of(ROTARY, tokens=64, width=256, dtype=torch.bfloat16)
    plain, fused, _ = (counted(function, arguments) for name, _, function in FORMS if name == ROTARY)
    assert (plain.kernels, fused.kernels) == (3, 2) and fused.bytes < 0.75 * plain.bytes
    graph = capture(FORMS[0][2], *arguments)
    assert ops(run_passes(graph.gm, Normalize(), FuseRotary()))["turned_pairs"] == 1


def test_the_table():
    rows = [Fused(ROTARY, "a form", 3, 2**21, 2**20, 0.5)]
    assert table(rows).lines[0].cells == (ROTARY, "a form", "3", "2.0", "2.00", "500.0")
