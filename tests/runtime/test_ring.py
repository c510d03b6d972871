"""`ring_size` with the cache: two to four ranks of gloo against one, over generations of one model after another.

Each model is captured once, in this process. Ranks are forked once for each grid, and compile the captured graphs.
"""

from __future__ import annotations

import copy
import functools
import traceback
from typing import Any

import pytest
import torch
from lib import zoo
from lib.generations import DBCACHE, bundled, capture, check_pictures, generation, odd_flux, pictures
from lib.marks import only_in
from lib.ranks import close, on_ranks
from torch.distributed.device_mesh import init_device_mesh

import cachedit_fx
from cachedit_fx import AttentionConfig, DBPruneConfig, TaylorSeerCalibratorConfig
from cachedit_fx.passes.insert_ulysses import ContextParallel
from cachedit_fx.passes.replace_attention import ReplacedAttention

pytestmark = [pytest.mark.keep_compiled, pytest.mark.xdist_group("ulysses")]


def grid_by_mesh():
    """The ring's ranks are neighbours here: 0 1 and 2 3."""
    return {"ulysses_mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("ulysses", "ring"))}


GRIDS: dict[str, tuple[int, Any]] = {
    "ring": (2, lambda: {"ring_size": 2}),
    "grid": (4, lambda: {"ring_size": 2, "ulysses_size": 2}),
    "mesh": (4, grid_by_mesh),
}
"""Grid -> ranks, and what makes its options on each of them."""
SETTINGS: dict[str, dict[str, Any]] = {
    "uncached": {"cache": None},
    "dbcache": DBCACHE,
    "last block": DBCACHE | {"Bn_compute_blocks": 1, "granularity": "region"},
    "taylorseer": DBCACHE | {"calibrator": TaylorSeerCalibratorConfig()},
    "dbprune": {"cache": DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=0.9)},
}
OTHERS: dict[str, dict[str, Any]] = {
    "float8": DBCACHE | {"ulysses_float8": "with_keys"},
    "attention": DBCACHE | {"attention": AttentionConfig("math")},
}
MODELS: dict[str, Any] = {
    "odd lengths": functools.partial(odd_flux, heads=3),
    "one head": functools.partial(odd_flux, heads=1),
    "bfloat16": functools.partial(odd_flux, dtype=torch.bfloat16),
    "Wan": zoo.ZOO["WanTransformer3DModel"],
}
TOLERANCE = {"bfloat16": 0.05, "float8": 0.1}
CASES = [
    *(("ring", model, "dbcache") for model in MODELS),
    ("ring", "one head", "attention"),
    *(("ring", "odd lengths", setting) for setting in SETTINGS if setting != "dbcache"),
    *(("grid", model, "dbcache") for model in ("odd lengths", "bfloat16", "Wan")),
    *(("grid", "odd lengths", setting) for setting in ("dbprune", "float8")),
    ("mesh", "odd lengths", "dbcache"),
]
BY_DEFAULT = [
    ("ring", "one head", "dbcache"),
    ("ring", "one head", "attention"),
]
"""Cases of the default part. The part `parallel` has the other ones."""
SIZES = {("ring", "odd lengths"): (1, 3, 1)}
"""The sizes of a model's generations, as in `test_ulysses`."""


@functools.cache
def captured(model):
    return capture(MODELS[model], SIZES.get(("ring", model), (1,)))


def generations(grid, model, setting, **ranks):
    """The generations of a model under a setting, one for each size."""
    shared, inputs, facts = captured(model)
    shared.compile(**(SETTINGS | OTHERS)[setting], **ranks)
    runs = [generation(shared, inputs(size)) for size in SIZES.get((grid, model), (1,))]
    latest = facts[-len(shared.graphs) :]
    return runs, [(each.get(ContextParallel), each.get(ReplacedAttention)) for each in latest]


@functools.cache
def results(grid, is_default):
    """For each rank: case -> generations, or a traceback. Of the default part's cases, or of the other ones."""
    cases = [case for case in CASES if case[0] == grid and (case in BY_DEFAULT) == is_default]
    for _, model, _ in cases:
        captured(model)
    ranks, options = GRIDS[grid]

    def run(rank):
        found = {}
        for case in cases:
            try:
                found[case] = generations(*case, **options())
            except Exception:
                found[case] = traceback.format_exc()
        return found

    return on_ranks(run, ranks)


@pytest.mark.budget(240, "captures the models of a part, and up to four ranks run the cases of a grid")
@pytest.mark.parametrize(("grid", "model", "setting"), only_in("parallel", CASES, but=BY_DEFAULT))
def test_ranks_equal_one(grid, model, setting):
    case = grid, model, setting
    expected, _ = generations(*case)
    for found in results(grid, case in BY_DEFAULT):
        assert not isinstance(found[case], str), found[case]
        runs, facts = found[case]
        for parallel, attention in facts:
            assert parallel is not None and parallel.rings and not parallel.gathers
            assert bool(parallel.exchanges) == (grid != "ring")
            if setting == "attention":
                assert "it is a call of ring_attention" in attention.kept
        for (outputs, stats, _), (outputs_of_one, stats_of_one, _) in zip(runs, expected, strict=True):
            assert stats == stats_of_one
            tolerance = TOLERANCE.get(setting, TOLERANCE.get(model, 2e-5))
            assert all(close(a, b, tolerance) for a, b in zip(outputs, outputs_of_one, strict=True))
            assert any(steps for steps, _ in stats) or setting != "dbcache"


@pytest.mark.budget(120, "captures the bundled model, and two or four ranks compile it")
@pytest.mark.parametrize("grid", only_in("parallel", ["ring", "grid"]))
def test_the_bundled_model_under_guidance(grid):
    pipe, shared = bundled()
    expected = pictures(pipe, shared, 3.0)
    assert not any(expected[0][1]) and any(expected[1][1])
    ranks, options = GRIDS[grid]
    for found in on_ranks(lambda rank: pictures(pipe, shared, 3.0, **options()), ranks):
        check_pictures(found, expected)


@pytest.mark.full("parallel")
@pytest.mark.budget(400, "inductor compiles two graphs on each rank")
@pytest.mark.parametrize("grid", ["ring", "grid"])
def test_pieces_compiled_by_inductor_take_any_length(grid):
    module, make_inputs = odd_flux()
    sizes = (1, 3, 1) if grid == "ring" else (1,)
    inputs = {size: make_inputs(size) for size in sizes}
    ranks, options = GRIDS[grid]

    def runs(**options):
        compiled = cachedit_fx.compile(copy.deepcopy(module), **DBCACHE, **options)
        with torch.no_grad():
            return [[compiled(**inputs[size])[0].clone() for _ in range(3)] for size in sizes]

    expected = runs(inner_backend="eager")
    with torch._inductor.config.patch(compile_threads=1):
        both = on_ranks(lambda rank: runs(inner_backend="inductor", **options()), ranks, seconds=600)
    for found in both:
        for outputs, outputs_of_one in zip(found, expected, strict=True):
            assert all(close(a, b) for a, b in zip(outputs, outputs_of_one, strict=True))
