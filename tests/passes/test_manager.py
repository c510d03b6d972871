"""The manager: order by contract, switches, reports, artifacts."""

import itertools
import logging

import pytest
import torch
from lib import models
from lib.helpers import Computes, capture, find, ops
from torch import fx, nn

from cachedit_fx.backend import pass_manager
from cachedit_fx.config.options import parse_options
from cachedit_fx.passes.base import Pass, PassResult, facts
from cachedit_fx.passes.detect_block_loops import DetectBlockLoops
from cachedit_fx.passes.insert_cache_branch import InsertCacheBranch
from cachedit_fx.passes.manager import PassManager, PassOrderError, order
from cachedit_fx.passes.normalize import Normalize
from cachedit_fx.passes.outline_blocks import OutlineBlocks
from cachedit_fx.passes.plan_regions import PlanRegions

ALL = (Normalize, DetectBlockLoops, lambda: PlanRegions(1, 0), OutlineBlocks, InsertCacheBranch)


class Doubles(Pass):
    """Multiplies every output by two."""

    name = "doubles"
    provides = frozenset({"doubled"})

    def run(self, gm):
        output = next(node for node in gm.graph.nodes if node.op == "output")
        with gm.graph.inserting_before(output):
            results = tuple(gm.graph.call_function(torch.mul, (item, 2)) for item in output.args[0])
        output.args = (results,)
        facts(gm)["doubled"] = len(results)
        return PassResult(gm, len(results))


class Breaks(Pass):
    """Leaves a graph that uses a value before it is made."""

    name = "breaks"

    def run(self, gm):
        first, second = [node for node in gm.graph.nodes if node.op == "call_function"][:2]
        second.append(first)
        return PassResult(gm, 1)


class Needs(Pass):
    name = "needs"
    requires = frozenset({"doubled", "normalized"})

    def run(self, gm):
        return PassResult(gm, 0)


class Uses(Pass):
    name = "uses"
    uses = frozenset({"doubled"})

    def run(self, gm):
        return PassResult(gm, 0)


class Chicken(Uses):
    name, uses, provides = "chicken", frozenset({"egg"}), frozenset({"chicken"})


class Egg(Uses):
    name, uses, provides = "egg", frozenset({"chicken"}), frozenset({"egg"})


class Clashes(Uses):
    name, conflicts = "clashes", frozenset({"doubles"})


def made(*classes):
    return [cls() for cls in classes]


def linear():
    return capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))


def names_of(passes):
    return [item.name for item in passes]


def test_facts_decide_the_order():
    in_order = names_of(PassManager(made(*ALL)).passes)
    assert in_order == [
        "normalize",
        "detect_block_loops",
        "plan_regions",
        "outline_blocks",
        "insert_cache_branch",
    ]
    for passes in itertools.permutations(made(*ALL)):
        assert names_of(PassManager(passes).passes) == in_order


def test_of_equals_the_given_order_stands():
    assert names_of(order(made(Doubles, Normalize))) == ["doubles", "normalize"]
    assert names_of(order(made(Normalize, Doubles))) == ["normalize", "doubles"]


def test_whoever_provides_what_another_uses_runs_first_but_may_be_absent():
    assert names_of(order(made(Uses, Doubles))) == ["doubles", "uses"]
    assert names_of(order(made(Uses))) == ["uses"]
    assert "regions" in OutlineBlocks.uses


@pytest.mark.parametrize(
    "passes, message",
    [
        ((DetectBlockLoops,), r"'detect_block_loops' requires \['normalized'\], which no pass provides"),
        ((Needs,), r"'needs' requires \['doubled', 'normalized'\]"),
        ((*ALL[:2], *ALL[3:]), r"'insert_cache_branch' requires \['regions'\]"),
        ((Chicken, Egg, Normalize), "wait for each other: chicken, egg"),
        ((Normalize, Doubles, Clashes), "pass 'clashes' cannot run beside 'doubles'"),
    ],
)
def test_what_cannot_be_ordered_is_refused_before_anything_runs(passes, message):
    with pytest.raises(PassOrderError, match=message):
        PassManager(made(*passes))


def test_what_is_switched_off_clashes_with_nothing():
    PassManager(made(Doubles, Clashes), {"doubles": False})
    PassManager(made(Doubles, Clashes), {"clashes": False})


def test_names_are_checked():
    with pytest.raises(PassOrderError, match="no pass is called 'double'; the passes are normalize, doubles"):
        PassManager(made(Normalize, Doubles), {"double": True})


def test_the_order_of_the_backend():
    assert names_of(pass_manager(parse_options({"Fn_compute_blocks": 1})).passes) == [
        "normalize",
        "find_timestep",
        "detect_block_loops",
        "plan_regions",
        "outline_blocks",
        "insert_cache_branch",
        "gather_inputs",
    ]
    uncached = pass_manager(parse_options({"cache": None})).enabled
    assert [name for name, on in uncached.items() if not on] == ["plan_regions", "insert_cache_branch"]


def test_runs_recompiles_and_reports():
    graph = linear()
    manager = PassManager(made(Normalize, Doubles, Needs))
    gm = manager.run(graph.gm)
    with torch.no_grad():
        assert torch.equal(gm(*graph.inputs)[0], 2 * graph.expected[0])
    assert [(r.name, r.matches, r.skipped) for r in manager.reports] == [
        ("normalize", 0, None),
        ("doubles", 1, None),
        ("needs", 0, None),
    ]
    assert all(0 < report.seconds < 10 for report in manager.reports)


def test_switched_off_and_what_stood_on_it():
    graph = linear()
    manager = PassManager(made(Normalize, Doubles, Needs), {"doubles": False})
    gm = manager.run(graph.gm)
    assert graph.same(gm)
    assert [(r.name, r.skipped) for r in manager.reports] == [
        ("normalize", None),
        ("doubles", "switched off"),
        ("needs", "nothing provided ['doubled']"),
    ]


@pytest.mark.parametrize("off", [item().name for item in ALL])
def test_each_pass_of_the_pipeline_can_be_switched_off(off):
    graph = capture(models.Toy(), *models.inputs())
    manager = PassManager(made(*ALL), {off: False})
    gm = manager.run(graph.gm)
    cached = bool(find(gm, "decide"))
    assert not cached and ops(gm)["linear"] == 4 * 5 + 2
    assert graph.same(gm)
    (report,) = (r for r in manager.reports if r.name == off)
    assert report.skipped == "switched off"
    later = manager.reports[manager.reports.index(report) + 1 :]
    assert all(r.skipped for r in later if r.name == "insert_cache_branch")


def test_all_passes_together():
    graph = capture(models.Toy(), *models.inputs())
    manager = PassManager(made(*ALL))
    gm = manager.run(graph.gm)
    assert {r.name: r.matches for r in manager.reports}["detect_block_loops"] == 1
    assert graph.same(gm, Computes())


def test_broken_graph_is_caught():
    with pytest.raises(RuntimeError, match="used before it has been defined|before it was defined"):
        PassManager(made(Breaks)).run(linear().gm)


def test_artifacts(caplog):
    """What TORCH_TRACE records: the graph before, and after each pass that changed it."""
    records = []

    class Handler(logging.Handler):
        def emit(self, record):
            if "artifact" in getattr(record, "metadata", {}):
                records.append((record.metadata["artifact"]["name"], record.payload))

    graph = linear()
    trace, handler = logging.getLogger("torch.__trace"), Handler()
    trace.addHandler(handler)
    try:
        PassManager(made(Normalize, Doubles)).run(graph.gm)
    finally:
        trace.removeHandler(handler)
    assert [name for name, _ in records] == ["cachedit_fx_before", "cachedit_fx_doubles"]
    assert "torch.mul" not in records[0][1] and "torch.mul" in records[1][1]


def test_reports_of_two_runs_are_kept_apart():
    manager = PassManager(made(Normalize, Doubles))
    for _ in range(2):
        manager.run(linear().gm)
        assert [report.name for report in manager.reports] == ["normalize", "doubles"]


def test_facts_belong_to_a_graph():
    first, second = fx.GraphModule({}, fx.Graph()), fx.GraphModule({}, fx.Graph())
    facts(first)["a"] = 1
    assert facts(first) == {"a": 1} and facts(second) == {}
