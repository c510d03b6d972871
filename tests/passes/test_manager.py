"""The manager: order by contract, facts that cannot go stale, switches, reports, artifacts."""

import itertools
import logging
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from lib.cases import ALL as TOYS
from lib.cases import graph_of
from lib.helpers import Computes, Restores, capture, find, ops, outcome_of
from lib.marks import SHARES_GRAPHS
from torch import nn

from cachedit_fx.config.cache import Cut
from cachedit_fx.config.options import parse_options
from cachedit_fx.pass_pipeline import pass_manager
from cachedit_fx.passes.base import Analysis, Facts, FlatGraph, Rewrite, Rewritten
from cachedit_fx.passes.block_loops import Detection
from cachedit_fx.passes.detect_block_loops import DetectBlockLoops
from cachedit_fx.passes.find_timestep import TimestepSource
from cachedit_fx.passes.insert_cache_branch import CacheBranch, InsertCacheBranch
from cachedit_fx.passes.manager import PassContractError, PassManager, PassOrderError, order
from cachedit_fx.passes.normalize import Normalize, Normalized
from cachedit_fx.passes.outline_blocks import OutlineBlocks
from cachedit_fx.passes.plan_regions import PlanRegions, RegionReport

pytestmark = SHARES_GRAPHS


def plan_regions():
    return PlanRegions([Cut(1, 0)])


ALL = (Normalize, DetectBlockLoops, plan_regions, OutlineBlocks, InsertCacheBranch)


@dataclass(frozen=True)
class Doubled:
    count: int


class Doubles(Rewrite):
    """Multiplies every output by two."""

    name = "doubles"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph,)
    provides: ClassVar[tuple[type, ...]] = (Doubled,)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized)

    def run(self, gm, facts):
        output = next(node for node in gm.graph.nodes if node.op == "output")
        with gm.graph.inserting_before(output):
            results = tuple(gm.graph.call_function(torch.mul, (value, 2)) for value in output.args[0])
        output.args = (results,)
        return Rewritten(gm, len(results), (Doubled(len(results)),))


class CloneQueries(Rewrite):
    """A legal pass between detection and regions: one node more before each attention."""

    name = "clone_queries"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized, Detection)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized, TimestepSource)

    def run(self, gm, facts):
        attentions = gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
        for node in attentions:
            with gm.graph.inserting_before(node):
                clone = gm.graph.call_method("clone", (node.args[0],))
            clone.meta = {**node.args[0].meta, "nn_module_stack": node.meta.get("nn_module_stack")}
            node.update_arg(0, clone)
        return Rewritten(gm, len(attentions))


class Breaks(Rewrite):
    """Leaves a graph that uses a value before it is made."""

    name = "breaks"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph,)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph,)

    def run(self, gm, facts):
        first, second = [node for node in gm.graph.nodes if node.op == "call_function"][:2]
        second.append(first)
        return Rewritten(gm, 1)


class Silent(Rewrite):
    """Hands back what `result` says, and changes nothing."""

    name = "silent"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph,)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph,)
    provides: ClassVar[tuple[type, ...]] = (Doubled,)
    result: tuple = (1, ())

    def run(self, gm, facts):
        matches, learned = self.result
        return Rewritten(gm, matches, learned)


class Needs(Analysis[TimestepSource]):
    name = "needs"
    requires: ClassVar[tuple[type, ...]] = (Doubled, Normalized)
    provides = TimestepSource

    def run(self, gm, facts):
        return TimestepSource("t", constant=float(facts[Doubled].count))


class Meddles(Needs):
    """An analysis that changes the graph."""

    requires: ClassVar[tuple[type, ...]] = (FlatGraph,)

    def run(self, gm, facts):
        gm.graph.find_nodes(op="output")[0].args = ((),)


class Uses(Rewrite):
    name = "uses"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph,)
    uses: ClassVar[tuple[type, ...]] = (Doubled,)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized)

    def run(self, gm, facts):
        return Rewritten(gm, 0)


class Chicken(Uses):
    name = "chicken"
    uses: ClassVar[tuple[type, ...]] = (TimestepSource,)
    provides: ClassVar[tuple[type, ...]] = (Detection,)


class Egg(Uses):
    name = "egg"
    uses: ClassVar[tuple[type, ...]] = (Detection,)
    provides: ClassVar[tuple[type, ...]] = (TimestepSource,)


class Anywhere(Rewrite):
    """Looks for the blocks' nodes, wherever it runs."""

    name = "anywhere"

    def run(self, gm, facts):
        return Rewritten(gm, 0)


class Nameless(Rewrite):
    requires: ClassVar[tuple[type, ...]] = (FlatGraph,)

    def run(self, gm, facts):
        return Rewritten(gm, 0)


class Factless(Analysis[Doubled]):
    name = "factless"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph,)

    def run(self, gm, facts):
        return None


class Forgets(Rewrite):
    """Drops the fact that in-place writes are pure."""

    name = "forgets"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph,)

    def run(self, gm, facts):
        return Rewritten(gm, 0)


class Careless(CloneQueries):
    """Preserves too little for the blocks to be detected again."""

    name = "careless"
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph,)


class Ends(CloneQueries):
    name = "ends"
    preserves: ClassVar[tuple[type, ...]] = (Normalized,)


def made(*classes):
    return [cls() for cls in classes]


def linear():
    return capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))


def names_of(passes):
    return [item.name for item in passes]


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------


def test_facts_decide_the_order():
    in_order = ["normalize", "detect_block_loops", "plan_regions", "outline_blocks", "insert_cache_branch"]
    for passes in itertools.permutations(made(*ALL)):
        assert names_of(PassManager(passes).passes) == in_order


def test_if_contracts_do_not_say_the_given_order_stands():
    assert names_of(order(made(Doubles, Normalize))) == ["doubles", "normalize"]
    assert names_of(order(made(Normalize, Doubles))) == ["normalize", "doubles"]


def test_whoever_provides_what_another_uses_runs_first_but_may_be_absent():
    assert names_of(order(made(Uses, Doubles))) == ["doubles", "uses"]
    assert names_of(order(made(Uses))) == ["uses"]
    assert RegionReport in OutlineBlocks.uses


@pytest.mark.parametrize("place", range(len(ALL) + 1))
def test_a_rewrite_of_the_flat_graph_may_stand_anywhere_in_the_list(place):
    passes = made(*ALL[:place], CloneQueries, *ALL[place:])
    names = names_of(PassManager(passes).passes)
    assert names.index("detect_block_loops") < names.index("clone_queries") < names.index("outline_blocks")


@pytest.mark.parametrize(
    "passes, message",
    [
        ((DetectBlockLoops,), r"'detect_block_loops' requires \['Normalized'\], which no pass provides"),
        ((Needs,), r"'needs' requires \['Doubled', 'Normalized'\]"),
        ((*ALL[:2], *ALL[3:]), r"'insert_cache_branch' requires \['RegionReport'\]"),
        ((Chicken, Egg, Normalize), "wait for each other: chicken, egg"),
        ((Normalize, Forgets, DetectBlockLoops), "requires Normalized, which pass 'forgets' drops before it"),
        ((Normalize, Normalize), "'normalize' names two passes"),
        ((*ALL, Careless), "requires Detection, hence Normalized, which pass 'careless' drops before it"),
        (
            (*ALL, Anywhere),
            r"'anywhere' requires no fact, .* FlatGraph, to see the nodes .* Outline, ",
        ),
        ((*ALL, Nameless), "Nameless has no name: give the class a `name`"),
        ((*ALL, Factless), "analysis 'factless' has no `provides`"),
        ((*ALL, Ends), "only one pass may end FlatGraph, and these do: outline_blocks, ends"),
    ],
)
def test_what_cannot_be_ordered_is_refused_before_anything_runs(passes, message):
    with pytest.raises(PassOrderError, match=message):
        PassManager(made(*passes))


def test_names_are_checked():
    with pytest.raises(PassOrderError, match="no pass is called 'double'; the passes are normalize, doubles"):
        PassManager(made(Normalize, Doubles), {"double": True})


def test_the_order_of_the_backend():
    assert names_of(pass_manager(parse_options({"Fn_compute_blocks": 1})).passes) == [
        "normalize",
        "fuse_rotary",
        "find_timestep",
        "infer_dependence",
        "detect_block_loops",
        "infer_batch_axis",
        "insert_cfg_parallel",
        "infer_sequence_axes",
        "insert_ulysses",
        "send_float8",
        "replace_attention",
        "overlap_collectives",
        "plan_regions",
        "outline_blocks",
        "hoist_invariants",
        "insert_cache_branch",
        "gather_inputs",
        "insert_low_precision",
        "insert_attention_forms",
    ]
    uncached = pass_manager(parse_options({"cache": None})).enabled
    assert {name for name, on in uncached.items() if not on} == {
        "infer_batch_axis",
        "insert_cfg_parallel",
        "infer_sequence_axes",
        "insert_ulysses",
        "send_float8",
        "replace_attention",
        "overlap_collectives",
        "plan_regions",
        "insert_cache_branch",
        "insert_low_precision",
        "insert_attention_forms",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Facts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TOYS)
@pytest.mark.parametrize("place", [3, 4])
def test_a_node_more_before_each_attention_leaves_no_fact_stale(case, place):
    """Before and after the regions are planned: what was detected at other positions is detected anew."""
    graph = graph_of(TOYS[case])
    attentions = len(find(graph.gm, "scaled_dot_product_attention"))
    plain = outcome_of(graph.copy(), *made(*ALL))
    outcome = outcome_of(graph.copy(), *made(*ALL[:place], CloneQueries, *ALL[place:]))
    assert attentions and ops(outcome.graph_module)["clone"] == ops(plain.graph_module)["clone"] + attentions
    detections = [report for report in outcome.reports if report.name == "detect_block_loops"]
    assert len(detections) == 2
    branches = [branch.regions for branch in (plain.facts[CacheBranch], outcome.facts[CacheBranch])]
    assert [[region.num_blocks for region in regions] for regions in branches[:1]] == [
        [region.num_blocks for region in regions] for regions in branches[1:]
    ]
    assert graph.same(outcome.graph_module, Computes())
    ours, theirs = Restores(), Restores()
    for _ in range(2):  # computed, then restored
        assert graph.same(outcome.graph_module, ours) and graph.same(plain.graph_module, theirs)
    assert ours.bypassed == theirs.bypassed == 1


def test_what_a_rewrite_preserves_is_not_analysed_again():
    graph = graph_of(TOYS["plain"])

    class Preserves(CloneQueries):
        preserves: ClassVar[tuple[type, ...]] = (*CloneQueries.preserves, Detection)

        def run(self, gm, facts):
            return Rewritten(gm, 1)

    reports = outcome_of(graph.gm, *made(*ALL[:2], Preserves, *ALL[2:])).reports
    assert names_of(reports).count("detect_block_loops") == 1


def test_what_is_lost_with_the_flat_graph_is_learned_in_time():
    """A fact that outlining preserves, and that nobody has asked for since a rewrite dropped it."""

    class Counts(Analysis[Doubled]):
        name = "counts"
        requires: ClassVar[tuple[type, ...]] = (FlatGraph,)
        provides = Doubled

        def run(self, gm, facts):
            return Doubled(len(gm.graph.nodes))

    class Outlines(OutlineBlocks):
        preserves: ClassVar[tuple[type, ...]] = (*OutlineBlocks.preserves, Doubled)

    graph = graph_of(TOYS["plain"])
    outcome = outcome_of(graph.gm, *made(Counts, *ALL[:2], CloneQueries, plan_regions, Outlines))
    assert names_of(outcome.reports).count("counts") == 2 and Doubled in outcome.facts


@pytest.mark.parametrize(
    "matches, learned, message",
    [
        (1, (), "'silent' must provide \\['Doubled'\\]; it provided \\[\\]"),
        (0, (Normalized(),), "it provided \\['Normalized'\\]"),
    ],
)
def test_what_a_pass_provides_is_verified(matches, learned, message):
    silent = Silent()
    silent.result = (matches, learned)
    with pytest.raises(PassContractError, match=message):
        PassManager([silent]).run(linear().gm)


def test_an_analysis_must_leave_the_graph_alone():
    with pytest.raises(PassContractError, match="analysis 'needs' changed the graph"):
        PassManager([Meddles()]).run(linear().gm)


def test_a_rewrite_must_not_hide_its_changes():
    class Hides(Doubles):
        def run(self, gm, facts):
            return Rewritten(super().run(gm, facts).graph_module, 0)

    with pytest.raises(PassContractError, match="'doubles' changed the graph and says that it matched nothing"):
        PassManager([Hides()]).run(linear().gm)


def test_facts_are_known_by_their_type():
    facts = Facts([Doubled(1), FlatGraph()])
    assert facts[Doubled] == Doubled(1) and facts.get(Normalized) is None and Normalized not in facts
    facts.put(Doubled(2))
    facts.keep([Doubled])
    assert facts.kinds == (Doubled,) and facts[Doubled].count == 2
    with pytest.raises(KeyError):
        facts[FlatGraph]


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def test_runs_recompiles_and_reports(caplog):
    graph = linear()
    with caplog.at_level(logging.INFO, "cachedit_fx"):
        outcome = outcome_of(graph.gm, *made(Normalize, Doubles, Needs))
    with torch.no_grad():
        assert torch.equal(outcome.graph_module(*graph.inputs)[0], 2 * graph.expected[0])
    assert [(r.name, r.matches, r.skipped) for r in outcome.reports] == [
        ("normalize", 0, None),
        ("doubles", 1, None),
        ("needs", 1, None),
    ]
    assert outcome.facts[TimestepSource].constant == 1.0
    assert all(0 < report.seconds < 10 for report in outcome.reports)
    assert outcome.reports[1].ops == {"mul": 1} and outcome.reports[0].ops == {}


def test_switched_off_and_what_stood_on_it():
    graph = linear()
    outcome = PassManager(made(Normalize, Doubles, Needs), {"doubles": False}).run(graph.gm)
    assert graph.same(outcome.graph_module)
    assert [(r.name, r.skipped) for r in outcome.reports] == [
        ("normalize", None),
        ("doubles", "switched off"),
        ("needs", "nothing provides Doubled"),
    ]


@pytest.mark.parametrize("off", [item().name for item in ALL])
def test_each_pass_of_the_pipeline_can_be_switched_off(off):
    graph = graph_of(TOYS["plain"])
    outcome = PassManager(made(*ALL), {off: False}).run(graph.gm)
    assert not find(outcome.graph_module, "decide") and ops(outcome.graph_module)["linear"] == 4 * 5 + 2
    assert graph.same(outcome.graph_module)
    (report,) = (r for r in outcome.reports if r.name == off)
    assert report.skipped == "switched off"
    assert all(r.skipped for r in outcome.reports if r.name == "insert_cache_branch")


def test_all_passes_together():
    graph = graph_of(TOYS["plain"])
    outcome = outcome_of(graph.gm, *made(*ALL))
    assert {r.name: r.matches for r in outcome.reports}["insert_cache_branch"] == 1
    assert graph.same(outcome.graph_module, Computes())


def test_broken_graph_is_caught():
    with pytest.raises(RuntimeError, match="used before it has been defined|before it was defined"):
        PassManager(made(Breaks)).run(linear().gm)


def test_artifacts():
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


def test_runs_of_a_manager_share_nothing():
    manager = PassManager(made(Normalize, Doubles))
    first, second = (manager.run(linear().gm) for _ in range(2))
    assert names_of(first.reports) == names_of(second.reports) == ["normalize", "doubles"]
    assert first.facts is not second.facts
