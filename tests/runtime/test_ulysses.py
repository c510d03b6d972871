"""`ulysses_size=2` with the cache: two ranks of gloo against one, over generations of one model after another.

Each model is captured once, in this process. Ranks are forked once for all models, and compile the captured graphs.
"""

from __future__ import annotations

import copy
import functools
import math
import traceback
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lib import models
from lib.generations import DBCACHE, STEPS, bundled, capture, check_pictures, generation, odd_flux, pictures
from lib.marks import only_in
from lib.ranks import close, on_ranks, ranks_of
from lib.shared import SharedCapture
from lib.zoo import ZOO
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import cachedit_fx
from cachedit_fx import AttentionConfig, DBPruneConfig, DMDCalibratorConfig, TaylorSeerCalibratorConfig
from cachedit_fx.config.options import parse_options
from cachedit_fx.config.rules import OptionError
from cachedit_fx.metrics.image import psnr
from cachedit_fx.passes.insert_ulysses import ContextParallel
from cachedit_fx.runtime.guard import Residual, relative_difference
from cachedit_fx.runtime.policies.preset import PresetConfig
from cachedit_fx.shapes import generate, held_out_prompts, load_pipeline

pytestmark = [pytest.mark.keep_compiled, pytest.mark.xdist_group("ulysses")]

SETTINGS: dict[str, dict[str, Any]] = {
    "uncached": {"cache": None},
    "dbcache": DBCACHE,
    "last block": DBCACHE | {"Bn_compute_blocks": 1, "granularity": "region"},
    "taylorseer": DBCACHE | {"calibrator": TaylorSeerCalibratorConfig()},
    "dmd": DBCACHE | {"calibrator": DMDCalibratorConfig()},
    "dbprune": {"cache": DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=0.9)},
    "preset": {"cache": PresetConfig(preset="fast", steps=STEPS)},
    "no motion": DBCACHE | {"passes": {"hoist_invariants": False}},
    "float8": DBCACHE | {"ulysses_float8": "with_keys"},
    "attention": DBCACHE | {"attention": AttentionConfig("math", own_first_steps=1)},
}


MODELS: dict[str, Any] = {
    "FLUX": ZOO["FluxTransformer2DModel"],
    "SD3": ZOO["SD3Transformer2DModel"],
    "Wan": ZOO["WanTransformer3DModel"],
    "PixArt": ZOO["PixArtTransformer2DModel"],
    "odd lengths": functools.partial(odd_flux, heads=3),
    "two heads": odd_flux,
    "bfloat16": functools.partial(odd_flux, dtype=torch.bfloat16),
}
ALL_SETTINGS = {"odd lengths"}
"""Models that are run under every setting; the others with DBCache, which computes some steps and reuses others."""
SIZES = {"odd lengths": (1, 3, 1)}
"""The sizes of a model's generations, one after the other; size 1 for others. `SharedCapture` compiles after dynamo has
its guards, so no size of several may ask for more: each rank has two tokens of a text at least."""
FORMS: tuple[Any, ...] = (False, True, "with_keys")
"""Of the exchange: in full precision, in float8, keys in float8 too."""
TOLERANCE = {"bfloat16": 0.05, "float8": 0.1}
CASES = [(model, setting) for model in MODELS for setting in SETTINGS if model in ALL_SETTINGS or setting == "dbcache"]
BY_DEFAULT = [
    ("FLUX", "dbcache"),
    ("bfloat16", "dbcache"),
    *(("odd lengths", setting) for setting in ("dbcache", "taylorseer", "dbprune", "last block")),
]
"""Cases of the default part. The part `parallel` has the other ones."""


def generations(model, setting, ranks):
    """The generations of a model under a setting, one for each size."""
    shared, inputs, facts = captured(model)
    shared.compile(**SETTINGS[setting], ulysses_size=ranks)
    runs = [generation(shared, inputs(size)) for size in SIZES.get(model, (1,))]
    return runs, [each.get(ContextParallel) for each in facts[-len(shared.graphs) :]]


@functools.cache
def captured(model):
    return capture(MODELS[model], SIZES.get(model, (1,)))


@functools.cache
def results(is_default):
    """For each rank: case -> generations, or a traceback. Of the default part's cases, or of the other ones."""
    cases = [case for case in CASES if (case in BY_DEFAULT) == is_default]
    for model, _ in cases:
        captured(model)

    def run(rank):
        found = {}
        for case in cases:
            try:
                found[case] = generations(*case, 2)
            except Exception:
                found[case] = traceback.format_exc()
        return found

    return on_ranks(run)


@pytest.mark.budget(120, "captures three models, and two ranks run all cases")
def test_all_cases_run_on_both_ranks():
    for found in results(True):
        errors = {case: error for case, error in found.items() if isinstance(error, str)}
        assert not errors, "\n".join(f"{case}: {error}" for case, error in errors.items())


@pytest.mark.budget(120, "the first of the part `parallel` captures four models, and two ranks run all cases")
@pytest.mark.parametrize(("model", "setting"), only_in("parallel", CASES, but=BY_DEFAULT))
def test_two_ranks_equal_one(model, setting):
    expected, _ = generations(model, setting, 1)
    for found in results((model, setting) in BY_DEFAULT):
        runs, facts = found[model, setting]
        assert facts and all(fact is not None and not fact.gathers for fact in facts)
        for (outputs, stats, held), (outputs_of_one, stats_of_one, held_of_one) in zip(runs, expected, strict=True):
            assert stats == stats_of_one
            tolerance = TOLERANCE.get(setting, TOLERANCE.get(model, 2e-5))
            assert all(close(a, b, tolerance) for a, b in zip(outputs, outputs_of_one, strict=True))
            if setting == "dbcache":
                assert any(steps for steps, _ in stats) and 0.4 * held_of_one <= held <= 0.62 * held_of_one


def test_ranks_differ_by_no_bit():
    first, second = results(True)
    for case in first:
        for (outputs, *_), (others, *_) in zip(first[case][0], second[case][0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(outputs, others, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Inductor


class Compiled:
    """A model compiled as users do, so that dynamo captures it anew when a length becomes a number."""

    def __init__(self, module, **options):
        self.module = cachedit_fx.compile(module, **options)

    @torch.no_grad()
    def __call__(self, **inputs):
        return self.module(**inputs)

    def summary(self):
        return cachedit_fx.summary(self.module)


@pytest.mark.full("parallel")
@pytest.mark.budget(400, "inductor compiles two graphs on each of two ranks")
@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float32, (1, 3, 2, 3)), (torch.bfloat16, (1, 3, 1))])
def test_pieces_compiled_by_inductor_take_any_length(dtype, sizes):
    """The first two sizes share symbolic lengths. At the third a rank has one token of the text, which is a number."""
    module, make_inputs = odd_flux(dtype=dtype)
    inputs = {size: make_inputs(size) for size in sizes}

    def runs(**options):
        compiled = Compiled(copy.deepcopy(module), **DBCACHE, **options)
        return [generation(compiled, inputs[size]) for size in sizes]

    expected = runs(inner_backend="eager")
    with torch._inductor.config.patch(compile_threads=1):
        both = on_ranks(lambda rank: runs(inner_backend="inductor", ulysses_size=2), seconds=600)
    tolerance = 2e-5 if dtype is torch.float32 else 0.05
    for found in both:
        for (outputs, stats, _), (outputs_of_one, stats_of_one, _) in zip(found, expected, strict=True):
            assert stats == stats_of_one and any(steps for steps, _ in stats)
            assert all(close(a, b, tolerance) for a, b in zip(outputs, outputs_of_one, strict=True))
    for ours, others in zip(*both, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[0], others[0], strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Decisions


class Uneven(models.Toy):
    """Its samples are those of `moving`: the first half of the tokens moves, the second half hardly does."""


def moving(step, scale=1.0, tokens=8):
    torch.manual_seed(0)
    x, change = torch.randn(2, 1, tokens, models.WIDTH)
    change[:, tokens // 2 :] *= 0.01
    return x + scale * step**2 * 0.05 * change, torch.tensor([500.0 - step])


def decisions(shared, threshold, scale=1.0, **ranks):
    """Cached steps of a generation, and the differences that this rank would have found alone."""
    alone: list[float] = []
    whole = Residual.sums

    def sums(self, previous):
        result = whole(self, previous)
        alone.extend(relative_difference(*row) for row in result.tolist())
        return result

    shared.compile_anew(**DBCACHE | {"residual_diff_threshold": threshold}, **ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Residual, "sums", sums)
        for step in range(STEPS):
            shared(*moving(step, scale))
    (stats,) = shared.summary()
    return stats.cached_steps, stats.residual_diffs, alone


def test_ranks_decide_alike_where_their_own_differences_straddle_the_threshold():
    shared = SharedCapture(Uneven())
    shared.compile(cache=None)
    shared(*moving(0))
    _, differences, _ = decisions(shared, 10.0)
    threshold = sorted(differences.values())[len(differences) // 2]
    expected, *_ = decisions(shared, threshold)
    (first, _, moves), (second, _, rests) = on_ranks(lambda rank: decisions(shared, threshold, ulysses_size=2))
    assert first == second == expected and 0 < len(expected) < STEPS - 1
    assert any(a > threshold > b for a, b in zip(moves, rests, strict=False))


def neighbours():
    return {"ulysses_size": 2}


def column():
    return {"ulysses_mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("ulysses", "data"))["ulysses"]}


@pytest.mark.parametrize(("ranks", "samples"), [(neighbours, (0, 0, 1, 1)), (column, (0, 1, 0, 1))])
def test_other_samples_are_not_coupled(ranks, samples):
    """Four ranks, two for each sample: the samples' decisions are their own."""
    shared = SharedCapture(Uneven())
    shared.compile(cache=None)
    shared(*moving(0))
    expected = [decisions(shared, 0.3, scale)[0] for scale in (1.0, 2.0)]
    assert expected[0] != expected[1]
    found = on_ranks(lambda rank: decisions(shared, 0.3, 1.0 + samples[rank], **ranks())[0], ranks=4)
    assert found == [expected[sample] for sample in samples]


# ---------------------------------------------------------------------------------------------------------------------
# Groups and pipelines


def test_groups_are_consecutive_ranks_and_made_once():
    def groups(rank):
        first, again, world = ranks_of(2), ranks_of(2), ranks_of(4)
        with pytest.raises(OptionError, match="must divide the number of ranks, 4"):
            ranks_of(3)
        assert first is not None and first == again and world is not None and world.group is dist.group.WORLD
        return first.total(torch.tensor([float(rank)])).item()

    assert on_ranks(groups, 4) == [1.0, 1.0, 5.0, 5.0]
    assert ranks_of(1) is None


def test_a_mesh_says_which_ranks_share():
    def messages(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ulysses"))
        rows, pair, whole = mesh["ulysses"], DeviceMesh("cpu", [0, 1]), dist.group.WORLD
        others = [dist.new_group(members) for members in ([0, 1], [2, 3])]
        for each, size in ((rows, 2), (rows.get_group(), 2), (whole, 4)):
            options = parse_options({"ulysses_mesh": each})
            assert options.ulysses_size == size and parse_options({"ulysses_mesh": each}) == options
        shared = ranks_of(2, rows)
        assert shared is not None and shared.group is rows.get_group() and ranks_of(1, rows) is None
        assert shared.total(torch.tensor([float(rank)])).item() == (1.0 if rank < 2 else 5.0)
        wrong: dict[str, dict[str, Any]] = {
            "several": {"ulysses_mesh": mesh},
            "without names": {"ulysses_mesh": DeviceMesh("cpu", [[0, 1], [2, 3]])},
            "both": {"ulysses_mesh": rows, "ulysses_size": 4},
            "outside": {"ulysses_mesh": pair} if rank > 1 else {"ulysses_mesh": "ulysses"},
            "no group": {"ulysses_mesh": others[rank < 2]},
            "no group of this size": {"ulysses_mesh": others[rank < 2], "ulysses_size": 2},
        }
        errors = {}
        for name, settings in wrong.items():
            with pytest.raises(OptionError) as error:
                parse_options(settings)
            errors[name] = str(error.value)
        dist.barrier()
        dist.destroy_process_group(rows.get_group())
        with pytest.raises(OptionError, match="make the mesh anew"):
            ranks_of(2, rows)
        return errors

    first, *_, last = on_ranks(messages, 4)
    assert "'data' (2), 'ulysses' (2): pass the one" in first["several"] and "mesh['ulysses']" in first["several"]
    assert "of 2 and 2 ranks: name them by mesh_dim_names" in first["without names"]
    assert first["both"] == (
        "ulysses_mesh makes ulysses_size=2, and with the other options it is ulysses_size=4: leave those out. "
        "Dimensions of the mesh that are named 'cfg', 'ring' and 'ulysses' say which is which"
    )
    assert "a DeviceMesh of one dimension, or of the dimensions" in first["outside"]
    assert "has the ranks 0, 1, and this process is rank 3" in last["outside"]
    for each in (first, last):
        assert each["no group"] == each["no group of this size"]
        assert "ulysses_mesh: this process is not in that group" in each["no group"]


def test_without_a_process_group_nothing_is_compiled(monkeypatch):
    with pytest.raises(OptionError, match="torchrun --nproc_per_node=2"):
        cachedit_fx.compile(models.Toy(), ulysses_size=2)
    with pytest.raises(OptionError, match="ulysses_size"):
        parse_options({"ulysses_size": 0})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(OptionError, match=r"know of each other: call torch.distributed.init_process_group\(\) before"):
        cachedit_fx.compile(models.Toy(), ulysses_mesh=dist.ProcessGroup(dist.HashStore(), 0, 2))


@pytest.mark.budget(90, "captures the bundled model, and two ranks compile it")
def test_the_bundled_model_in_its_pipeline():
    pipe, shared = bundled()
    expected = pictures(pipe, shared)
    assert expected[0][1] == [[]] and any(expected[1][1])
    for found in on_ranks(lambda rank: pictures(pipe, shared, ulysses_size=2)):
        check_pictures(found, expected)


@pytest.mark.full("parallel")
@pytest.mark.budget(90, "four ranks capture the bundled model")
def test_the_bundled_model_on_four_ranks_that_capture_for_themselves():
    pipe, shared = bundled()
    expected = pictures(pipe, shared)
    for found in on_ranks(lambda rank: pictures(load_pipeline(), None, ulysses_size=4), 4):
        check_pictures(found, expected)


@pytest.mark.full("parallel")
@pytest.mark.budget(300, "two ranks draw eight pictures three times")
def test_pictures_with_exchanges_in_float8():
    """Against the exchange in full precision: 40 dB, and the cache decides the same."""
    (pipe, shared), prompts = bundled(), held_out_prompts(8, seed=0)

    def drawn(rank):
        results = []
        for form in FORMS:
            shared.compile(**DBCACHE | {"residual_diff_threshold": 0.3}, ulysses_size=2, ulysses_float8=form)
            for prompt in prompts:  # ranks share the samples of a batch without an exchange
                images = generate(pipe, [prompt], num_inference_steps=12, seed=0)
                results.append((form, images, [each.cached_steps for each in shared.summary()]))
        return results

    for results in on_ranks(drawn):
        pictures = {form: [(image, steps) for each, image, steps in results if each == form] for form in FORMS}
        assert all(any(steps) for _, steps in pictures[False])
        for form in FORMS[1:]:
            pairs = list(zip(pictures[form], pictures[False], strict=True))
            quality = [psnr(image, reference)[0] for (image, _), (reference, _) in pairs]
            assert 40 <= sum(quality) / len(quality) < math.inf
            assert all(steps == expected for (_, steps), (_, expected) in pairs)
