"""Models from outside diffusers: one set of properties for all of them, then what is particular to each shape.

Everything is exact: blocks computed give the plain module's bits, blocks bypassed on identical inputs give them too,
and the FLOPs of a bypass are those of the plain module less those of the blocks in the middle. One capture a model
serves every layout and test; the part `elsewhere` has another layout, and the second resolutions, which dynamo captures
anew with symbols.
"""

import functools
import itertools
import warnings
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from lib import elsewhere, elsewhere_streams
from lib.elsewhere import MODELS, WIDTH
from lib.helpers import copied, detected
from lib.marks import only_in
from lib.shared import SharedCapture

import cachedit_fx
from cachedit_fx import CacheWarning, Options
from cachedit_fx.backend import compile_graph
from cachedit_fx.capture import copy_of
from cachedit_fx.metrics.flops import FlopCounter
from cachedit_fx.runtime.model_state import ModelState

pytestmark = pytest.mark.xdist_group("elsewhere")  # they share what is captured
LAYOUTS: dict[str, dict[str, Any]] = {
    "F1B0": {"Fn_compute_blocks": 1},
    "F2B1": {"Fn_compute_blocks": 2, "Bn_compute_blocks": 1},
    "loops": {"Fn_compute_blocks": 1, "Bn_compute_blocks": 1, "scope": "loop", "granularity": "region"},
}
REUSE: dict[str, Any] = {"residual_diff_threshold": 1e9, "max_warmup_steps": 1, "enable_separate_cfg": False}


def compiled(model, **options):
    return cachedit_fx.compile(model, inner_backend="eager", **options)


@torch.no_grad()
def run(model, inputs):
    return model(*torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, inputs))


def flops_of(model, inputs):
    with FlopCounter() as work:
        run(model, inputs)
    return work.flops


def block_flops(model, inputs, loops):
    """FLOPs of the plain `model`, in all and of each block of `loops`."""
    parts = {part for loop in loops for turn in loop for part in (turn if isinstance(turn, tuple) else (turn,))}
    seen: dict[Any, deque[int]] = defaultdict(deque)
    work = FlopCounter()
    starts = []

    def counted(*args, **kwargs):
        before = work.flops
        result = function(*args, **kwargs)
        seen[function].append(work.flops - before)
        return result

    function = elsewhere_streams.functional_block
    hooks = [
        hook
        for part in parts
        if isinstance(part, torch.nn.Module)
        for hook in (
            part.register_forward_pre_hook(lambda *_: starts.append(work.flops)),
            part.register_forward_hook(lambda module, *_: seen[module].append(work.flops - starts.pop())),
        )
    ]
    with work, mock.patch.object(elsewhere_streams, "functional_block", counted):
        run(model, inputs)
    for hook in hooks:
        hook.remove()
    turns = [[turn if isinstance(turn, tuple) else (turn,) for turn in loop] for loop in loops]
    return work.flops, [[sum(seen[part].popleft() for part in turn) for turn in loop] for loop in turns]


def expected_flops(name, inputs, first, last, scope="model", bare=False):
    """(least, most) FLOPs of a call that bypasses the blocks in the middle."""
    row, model = MODELS[name], elsewhere.make(name)
    repeats = row.bare if bare else None
    total, loops = block_flops(model, inputs, (repeats or row.loops)(model))
    assert repeats or sum(map(len, loops)) == row.blocks
    segments = loops if scope == "loop" else [list(itertools.chain(*loops))]
    middle = sum(sum(segment[first : len(segment) - last]) for segment in segments)
    assert 0 < middle < total
    beside = () if repeats else row.beside(model)
    spared = sum(sum(loop) for loop in block_flops(model, inputs, [beside])[1]) if beside else 0
    return total - middle - spared, total - middle


def assert_counts(summary, name, steps, cached, scope="model"):
    """Of every region: blocks, steps, cached steps, and that no call ran uncached."""
    assert sum(region.num_blocks for region in summary) == MODELS[name].blocks
    assert len(summary) == 1 or scope == "loop"
    counted = [(region.executed_steps, region.cached_steps, region.uncached_calls) for region in summary]
    assert counted == [(steps, cached, 0)] * len(summary)


# ---------------------------------------------------------------------------------------------------------------------
# All models


@dataclass
class Case:
    """A model of `MODELS`, plain, and its shared capture."""

    name: str
    plain: torch.nn.Module
    shared: SharedCapture


@functools.cache
def case_of(name):
    return Case(name, elsewhere.make(name), SharedCapture(elsewhere.make(name)))


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    yield case_of(request.param)
    torch._dynamo.reset()


@pytest.mark.keep_compiled
@pytest.mark.parametrize("layout", only_in("elsewhere", LAYOUTS, but=["F1B0", "loops"]))
def test_a_step_is_exact_where_computed_and_where_reused_on_identical_inputs(case, layout):
    options, name, shared = LAYOUTS[layout], case.name, case.shared
    now, later = elsewhere.arguments(name, 500.0), elsewhere.arguments(name, 400.0)
    expected, expected_later = run(case.plain, now), run(case.plain, later)
    assert expected.isfinite().all() and not torch.equal(expected, expected_later)
    scope = options.get("scope", "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)

        shared.compile(**options, residual_diff_threshold=0)
        assert torch.equal(run(shared, now), expected) and torch.equal(run(shared, later), expected_later)
        assert_counts(shared.summary(), name, 2, [], scope)

        shared.compile(**options, **REUSE)  # a change of policy: nothing is compiled again
        assert torch.equal(run(shared, now), expected)
        with FlopCounter() as warm:
            assert torch.equal(run(shared, now), expected)
        least, most = expected_flops(
            name, now, options["Fn_compute_blocks"], options.get("Bn_compute_blocks", 0), scope
        )
        assert 0 < warm.flops <= most
        reused = run(shared, later)
        assert not torch.equal(reused, expected) and not torch.equal(reused, expected_later)
        assert_counts(shared.summary(), name, 3, [1, 2], scope)

        shared.compile(**options, **REUSE, passes={"hoist_invariants": False})
        run(shared, now)
        with FlopCounter() as work:
            run(shared, now)
        assert least <= work.flops <= most
    assert len(shared.graphs) == 1


@pytest.mark.keep_compiled
def test_without_a_cache_the_cut_graph_is_the_plain_module(case):
    inputs = elsewhere.arguments(case.name)
    case.shared.compile(cache=None)
    assert torch.equal(run(case.shared, inputs), run(case.plain, inputs))
    assert case.shared.summary() == []


@pytest.mark.keep_compiled
def test_another_generation_starts_anew(case):
    case.shared.compile(Fn_compute_blocks=1, **REUSE)
    first = elsewhere.arguments(case.name, 900.0)
    expected = run(case.plain, first)
    for _ in range(2):
        assert torch.equal(run(case.shared, first), expected) and torch.equal(run(case.shared, first), expected)
        run(case.shared, elsewhere.arguments(case.name, 700.0))
        assert_counts(case.shared.summary(), case.name, 3, [1, 2])


# The second resolution makes dynamo trace with symbols by itself; from the start it takes seconds a model.
RESIZED = [(name, None) for name in MODELS] + [
    (name, True) for name in ("flux", "u_vit", "spatial_temporal", "in_place_part")
]
RESIZED_BY_DEFAULT = [("u_vit", None), ("in_place_part", True)]


@pytest.mark.parametrize(("name", "dynamic"), only_in("elsewhere", RESIZED, but=RESIZED_BY_DEFAULT))
def test_another_generation_and_another_resolution_start_anew(name, dynamic):
    """As a user compiles it."""
    plain = elsewhere.make(name)
    model = compiled(elsewhere.make(name), Fn_compute_blocks=1, dynamic=dynamic, **REUSE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        for generation, larger in enumerate((False, False, True, False)):
            first = elsewhere.arguments(name, 900.0, larger)
            assert torch.equal(run(model, first), run(plain, first)), generation
            assert torch.equal(run(model, first), run(plain, first)), generation
            run(model, elsewhere.arguments(name, 700.0, larger))
            run(model, elsewhere.arguments(name, 500.0, larger))
            assert_counts(cachedit_fx.summary(model), name, 4, [1, 2, 3])


# ---------------------------------------------------------------------------------------------------------------------
# What is particular


def detection_of(name):
    shared = case_of(name).shared
    if not shared.graphs:
        run(shared, elsewhere.arguments(name))
    ((graph, _),) = shared.graphs
    return detected(copy_of(graph))


def test_flux_carries_both_streams_then_one():
    double, single = detection_of("flux").chain_loops
    assert sorted(carried.shape[1] for carried in double.carried) == [5, 6]
    assert [carried.shape[1] for carried in single.carried] == [11]


@pytest.mark.parametrize(
    ("name", "skips"),
    [("hunyuan_dit", [(0, 7), (1, 6), (2, 5)]), ("u_vit", None)],
)
def test_skips_are_told_from_carried_values(name, skips):
    loops = detection_of(name).chain_loops
    assert all(len(loop.carried) == 1 for loop in loops)
    if skips is not None:
        assert sorted((made, taken) for _, made, taken in loops[0].skips) == skips


@pytest.mark.parametrize("name", ["text_refiner", "two_refiners"])
def test_refiners_are_found_but_left_to_the_prologue(name):
    detection = detection_of(name)
    refiners = [loop for index, loop in enumerate(detection.loops) if index not in detection.chain]
    assert refiners and all("refiner" in loop.name and loop.num_blocks == 2 for loop in refiners)


def test_hints_computed_ahead_are_a_loop_of_their_own():
    detection = detection_of("vace_ahead")
    assert [(loop.name, loop.num_blocks) for loop in detection.loops] == [("vace_blocks", 4), ("blocks", 8)]
    assert detection.chain == (1,)


def test_the_encoder_of_a_condition_is_a_loop_but_not_of_the_chain():
    detection = detection_of("conditioned")
    assert [(loop.name, loop.num_blocks) for loop in detection.loops] == [("encoder", 6), ("blocks", 5)]
    assert detection.chain == (1,)


@pytest.mark.parametrize("name", ["in_place_operator", "in_place_method", "in_place_part", "in_place_residuals"])
def test_what_is_written_in_place_reaches_the_caller(name):
    """The sample itself is embedded first, so nothing of the caller's may change."""
    inputs = elsewhere.arguments(name)
    before = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
    model = compiled(elsewhere.make(name), Fn_compute_blocks=1, **REUSE)
    with torch.no_grad():
        for _ in range(2):
            model(*inputs)
    leaves = zip(torch.utils._pytree.tree_leaves(inputs), torch.utils._pytree.tree_leaves(before), strict=True)
    assert all(torch.equal(now, then) for now, then in leaves)


# ---------------------------------------------------------------------------------------------------------------------
# Graphs that carry no names


def traced(name):
    """The model as `make_fx` sees it: ATen operations, weights as inputs, no names."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model, inputs = elsewhere.make(name), elsewhere.arguments(name)
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    flat, spec = torch.utils._pytree.tree_flatten((weights, inputs))

    def call(*values):
        own, arguments = torch.utils._pytree.tree_unflatten(values, spec)
        return (torch.func.functional_call(model, own, arguments),)

    with torch.no_grad():
        return make_fx(call, tracing_mode="fake")(*flat), flat


def exported(name):
    """The model as `torch.export` sees it, with the names of its modules taken off."""
    model, inputs = elsewhere.make(name), elsewhere.arguments(name)
    with torch.no_grad():
        program = torch.export.export(model, inputs)
    for node in program.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    held = dict(program.state_dict) | dict(program.constants)
    weights = [held[spec.target] for spec in program.graph_signature.input_specs if spec.target is not None]
    return program.graph_module, [*weights, *torch.utils._pytree.tree_leaves(inputs)]


# make_fx has no number for a size that depends on data, and takes no weight that its caller does not name.
EXPORTED_ONLY = ("experts_routed", "list_unregistered")
EXPORTED_BY_DEFAULT = (*EXPORTED_ONLY, "in_place_part")
TRACEABLE = [name for name in MODELS if name not in EXPORTED_ONLY]
TRACED = only_in("elsewhere", [(traced, name) for name in TRACEABLE], but=[(traced, name) for name in TRACEABLE[::3]])
EXPORTED = only_in("elsewhere", [(exported, name) for name in MODELS], but=[(exported, n) for n in EXPORTED_BY_DEFAULT])


@pytest.mark.parametrize(("tracer", "name"), TRACED + EXPORTED)
def test_graphs_without_names_are_cut_and_reused_exactly(name, tracer):
    gm, inputs = tracer(name)
    with torch.no_grad():
        expected = gm(*copied(inputs))
        options = Options(inner_backend="eager", cache=cachedit_fx.DBCacheConfig(Fn_compute_blocks=1, **REUSE))
        cache = ModelState(options)
        call = compile_graph(gm, copied(inputs), options, cache)
        with FlopCounter() as computed:
            assert all(map(torch.equal, call(*copied(inputs)), expected))
        with FlopCounter() as reused:
            assert all(map(torch.equal, call(*copied(inputs)), expected))
    assert cache.latest is not None
    (region,) = cache.latest.summary()
    row = MODELS[name]
    blocks = row.blocks if row.bare is None else sum(map(len, row.bare(elsewhere.make(name))))
    assert (region.num_blocks, region.cached_steps, region.uncached_calls) == (blocks, [1], 0)
    least, most = expected_flops(name, elsewhere.arguments(name), 1, 0, bare=True)
    assert least <= reused.flops <= most
    assert computed.flops == flops_of(elsewhere.make(name), elsewhere.arguments(name))


# ---------------------------------------------------------------------------------------------------------------------
# Near misses


@pytest.mark.parametrize("kind", [elsewhere.ParallelExperts, elsewhere.AccumulatingExperts])
def test_parallel_experts_run_uncached_and_right_with_one_warning(kind):
    torch.manual_seed(0)
    model, inputs = kind().eval(), (torch.randn(1, 6, WIDTH), torch.tensor([500.0]))
    expected, work = run(model, inputs), flops_of(model, inputs)
    compiled(model, Fn_compute_blocks=1, **REUSE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(run(model, inputs), expected)
        assert flops_of(model, inputs) == work
    (told,) = (item for item in caught if issubclass(item.category, CacheWarning))
    assert "no block loop was found" in str(told.message)
    assert [(region.uncached_calls, region.cached_steps) for region in cachedit_fx.summary(model)] == [(4, [])]


@pytest.mark.parametrize(("first", "last"), [(4, 1), (5, 0), (8, 2)])
def test_first_and_last_blocks_that_leave_nothing_run_uncached_and_right_with_one_warning(first, last):
    model, inputs = elsewhere.make("numbered"), elsewhere.arguments("numbered")
    expected = run(elsewhere.make("numbered"), inputs)
    compiled(model, Fn_compute_blocks=first, Bn_compute_blocks=last, **REUSE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(run(model, inputs), expected)
    (told,) = (item for item in caught if issubclass(item.category, CacheWarning))
    assert f"{first} + {last} leaves nothing to bypass of 5 blocks" in str(told.message)
    assert [(region.uncached_calls, region.cached_steps) for region in cachedit_fx.summary(model)] == [(3, [])]
