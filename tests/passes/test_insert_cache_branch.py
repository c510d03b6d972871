"""The guarded branch: where it stands, what the run time is asked, that both ways give the same."""

import functools

import pytest
import torch
from lib import models
from lib.cases import ALL, graph_of, rewrites, text
from lib.helpers import Computes, Restores, capture, find, ops, rewritten
from lib.marks import SHARES_GRAPHS
from torch import fx
from torch.testing import FileCheck

from cachedit_fx.passes.base import Facts
from cachedit_fx.passes.insert_cache_branch import InsertCacheBranch
from cachedit_fx.passes.plan_regions import RegionReport

pytestmark = SHARES_GRAPHS


@pytest.mark.parametrize("case", ALL)
def test_computed_is_bit_identical_and_so_is_restored(case):
    for graph, gm in rewrites(case):
        cache = Computes()
        assert graph.same(gm, cache)
        assert cache.ran == [0] and [number for number, *_ in cache.decided] == [0]
        cache = Restores()
        assert graph.same(gm, cache) and cache.bypassed == 0
        assert graph.same(gm, cache) and cache.bypassed == 1


def test_order_in_the_code():
    graph = capture(models.TwoLoops(2, 3), *models.inputs(), text())
    gm = rewritten(graph.gm, 1, 1)
    code = gm.print_readable(print_output=False)
    (
        FileCheck()
        .check("class CachedTransformer")
        .check("def forward(self, region_call")
        .check("self.prologue(")
        .check("self.double_blocks_0(")
        .check_not("self.double_blocks_1(")
        .check("entry_0 = region_call.decide(0, ")
        .check("region_0_compute")
        .check("region_0_bases")
        .check("region_0 = region_call.run(entry_0, ")
        .check("self.single_blocks_2(")
        .check("self.epilogue(")
        .check("class region_0_compute")
        .check("self.double_blocks_1(")
        .check("torch.cat(")
        .check("self.single_blocks_0(")
        .check("self.single_blocks_1(")
        .check("class region_0_bases")
        .check("torch.cat(")
        .run(code)
    )


def test_fires():
    graph = graph_of(ALL["plain"])
    before = ops(graph.gm)
    gm = rewritten(graph.gm, 1, 0)
    outer = {node.target for node in gm.graph.nodes if node.op == "call_module"}
    assert outer == {"prologue", "blocks_0", "epilogue"}
    compute = gm.get_submodule("region_0_compute")
    assert isinstance(compute, fx.GraphModule)
    inside = [node.target for node in compute.graph.nodes if node.op == "call_module"]
    assert inside == ["blocks_1", "blocks_2", "blocks_3"]
    after = ops(gm)
    assert after["decide"] == after["run"] == 1
    assert {name: after[name] for name in ("linear", "layer_norm", "gelu")} == {
        name: before[name] for name in ("linear", "layer_norm", "gelu")
    }
    assert next(iter(gm.graph.nodes)).name == "region_call"


def test_what_is_compared():
    """`reference` is what entered the first block, `hidden` what left the F-th: r is their difference."""
    module, inputs = models.Toy(), models.inputs()
    graph = capture(module, *inputs)
    cache = Computes()
    graph.same(rewritten(graph.gm, 2, 0), cache)
    ((_, reference, hidden, streams),) = cache.decided
    with torch.no_grad():
        temb, x = models.time_embedding(inputs[1]), module.embed(inputs[0])
        entered = x
        for block in module.blocks[:2]:
            x = block(x, temb)
    assert torch.equal(reference, entered) and torch.equal(hidden, x)
    assert len(streams) == 1 and torch.equal(streams[0], x)


def test_what_is_stored_whole_has_no_base():
    graph = graph_of(ALL["stored whole"])
    gm, given = rewritten(graph.gm, 1, 1), []

    class Asks(Computes):
        def run(self, region, compute, inputs, *bypassed):
            bases, continued = bypassed
            given.append((compute(*inputs), bases(*continued)))
            return given[0][0]

    assert graph.same(gm, Asks())
    ((results, bases),) = given
    assert [(r.dim(), None if b is None else b.dim()) for r, b in zip(results, bases, strict=True)] == [
        (2, None),
        (3, 3),
        (2, None),
    ]


def test_nothing_is_compared_without_first_blocks():
    graph = graph_of(ALL["plain"])
    cache = Computes()
    assert graph.same(rewritten(graph.gm, 0, 0), cache)
    ((_, reference, hidden, streams),) = cache.decided
    assert reference is None and hidden is None and len(streams) == 1


def test_a_region_for_each_loop():
    graph = graph_of(ALL["two loops"])
    gm = rewritten(graph.gm, 1, 0, scope="loop")
    code = gm.print_readable(print_output=False)
    checks = ("region_call.decide(0", "region_call.run(entry_0", "region_call.decide(1", "region_call.run(entry_1")
    functools.reduce(FileCheck.check, checks, FileCheck()).run(code)
    cache = Restores()
    assert graph.same(gm, cache) and graph.same(gm, cache)
    assert (cache.ran, cache.bypassed) == ([0, 1], 2)


def test_bypassed_region_follows_the_streams():
    """With other inputs the result is base + residual, not the old result."""
    module, (x, t) = models.Toy(), models.inputs()
    graph = capture(module, x, t)
    gm, cache = rewritten(graph.gm, 1, 0), Restores()
    assert graph.same(gm, cache)
    with torch.no_grad():
        other = [
            value + 0.5 if value is graph.inputs[index] and value.shape == x.shape else value
            for index, value in enumerate(graph.inputs)
        ]
        (result,) = gm(cache, *other)
        temb = models.time_embedding(t)
        old, new = (module.blocks[0](module.embed(value), temb) for value in (x, x + 0.5))
        end = old
        for block in module.blocks[1:]:
            end = block(end, temb)
        expected = module.project(new + (end - old))
    torch.testing.assert_close(result, expected)
    assert not torch.allclose(result, graph.expected[0])


@pytest.mark.parametrize("first, last", [(4, 0), (2, 2)])
def test_no_region_leaves_the_graph_without_a_cache(first, last):
    graph = graph_of(ALL["plain"])
    gm = rewritten(graph.gm, first, last)
    assert not find(gm, "decide") and graph.same(gm)
    assert InsertCacheBranch().run(gm, Facts([RegionReport((), ())])).matches == 0


@pytest.mark.parametrize("case", [models.flux, models.sd3, models.qwen_image, models.hunyuan_dit])
def test_diffusers(case):
    graph = graph_of(case)
    gm, cache = rewritten(graph.gm, 1, 1), Restores()
    assert graph.same(gm, cache) and graph.same(gm, cache) and cache.bypassed == 1


def test_dynamic_shapes():
    graph = capture(models.TwoLoops(), *models.inputs(batch=2), text(2), dynamic=True)
    gm, cache = rewritten(graph.gm, 1, 0), Restores()
    assert graph.same(gm, cache) and graph.same(gm, cache) and cache.bypassed == 1
