"""Inputs in one sequence: the same results, and a bypassed region whose weights nobody touches."""

import operator
import re

import pytest
import torch
from lib.cases import ALL, graph_of, rewrites
from lib.helpers import Computes, Restores, rewritten
from lib.marks import SHARES_GRAPHS
from lib.toys import denoise, make
from torch import fx

from cachedit_fx import DBCacheConfig, enable_cache, summary
from cachedit_fx.passes.base import Facts
from cachedit_fx.passes.gather_inputs import GatheredInputs, GatherInputs

pytestmark = SHARES_GRAPHS


class Inputs(list):
    """Remembers which of its members were asked for."""

    def __init__(self, given):
        super().__init__(given)
        self.taken: list[int] = []

    def __getitem__(self, place):
        self.taken.append(place)
        return super().__getitem__(place)


def placeholders(graph):
    return [node.name for node in graph.find_nodes(op="placeholder")]


@pytest.mark.parametrize("case", ["two loops", "skips", "stored whole", "hoisted", "shared"])
def test_computed_is_bit_identical_and_so_is_restored(case):
    for graph, gm in rewrites(case):
        number = len(placeholders(gm.graph)) - 1
        result = GatherInputs().run(gm, Facts())
        assert result.graph_module is gm and result.matches == number and result.facts == (GatheredInputs(number),)
        assert placeholders(gm.graph) == ["region_call", "inputs"]
        gm.graph.lint()
        gm.recompile()
        for cache, passes in ((Computes(), 1), (Restores(), 2)):
            for _ in range(passes):
                assert graph.same(lambda *given, gm=gm, cache=cache: gm(cache, given))


def test_a_bypassed_region_touches_none_of_its_weights():
    graph = graph_of(ALL["plain"])
    gm = rewritten(graph.gm, 1, 1)
    names = placeholders(gm.graph)[1:]
    in_region = [place for place, name in enumerate(names) if re.search(r"blocks_modules_[12]_", name)]
    assert in_region
    GatherInputs().run(gm, Facts())
    gm.recompile()
    cache = Restores()
    computed, bypassed = Inputs(graph.inputs), Inputs(graph.inputs)
    gm(cache, computed)
    gm(cache, bypassed)
    assert sorted(computed.taken) == list(range(len(names)))  # each once, and none that is not used
    assert sorted(bypassed.taken) == [place for place in range(len(names)) if place not in in_region]


def test_the_code_names_inputs_as_before():
    gm = rewritten(graph_of(ALL["plain"]).gm, 1, 0)
    names = placeholders(gm.graph)[1:]
    GatherInputs().run(gm, Facts())
    modules = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    taken = [
        node.name for module in modules for node in module.graph.find_nodes(op="call_function", target=operator.getitem)
    ]
    assert set(names) <= set(taken)


def test_switched_off_a_model_is_cached_all_the_same():
    config, found = DBCacheConfig(1, max_warmup_steps=1, residual_diff_threshold=0.5), []
    for passes in ({}, {"gather_inputs": False}):
        model = enable_cache(make(blocks=3), config, inner_backend="eager", passes=passes)
        found.append(denoise(model))
        (region,) = summary(model)
        assert region.cached_steps
    assert torch.equal(*found)
