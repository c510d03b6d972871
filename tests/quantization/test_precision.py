"""Precision by step: which steps take quantized copies of which weights."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from lib.low_precision import ALTERNATE, NEVER, TEXT, TIMES, are_equal, enabled, quantized, steps, wide
from lib.toy_pipeline import ToyPipeline
from lib.toys import CountingBackend, denoise, noise
from torch import nn

import cachedit_fx
from cachedit_fx import (
    CacheWarning,
    DBPruneConfig,
    OptionError,
    PrecisionConfig,
    StepFacts,
    explain,
    quantize,
    summary,
)
from cachedit_fx.config.options import parse_options
from cachedit_fx.runtime.policies.preset import PresetConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*gains no time", "ignore:.*is a stand-in", "ignore:.*lru_cache")


def test_full_steps_are_the_plain_module_and_others_the_quantized_one_to_the_bit():
    model = wide()
    full, low = steps(model), steps(quantized(model))
    enabled(model)
    for _ in range(2):
        results = steps(model)
        assert are_equal(results, full) == [True, False, True, False]
        assert are_equal(results, low) == [False, True, False, True]
        (stats,) = summary(model)
        assert stats.low_steps == [1, 3] and "2 computed in low precision" in str(stats)
    assert {type(weight) for weight in model.parameters()} == {nn.Parameter}
    assert are_equal(steps(cachedit_fx.disable_cache(model)), full) == [True] * 4


def test_a_kind_for_a_pattern_and_kept_layers_are_those_of_quantize():
    choice: dict[str, Any] = {
        "exclude": ["blocks.2.up"],
        "include": ["blocks.1.scale"],
        "per_layer": {"text": "int8_weight_only"},
    }
    model = wide()
    plain = copy.deepcopy(model)
    enabled(model, PrecisionConfig("int8", **choice), passes={"hoist_invariants": False})
    twin = copy.deepcopy(plain)
    quantize(twin, "int8", **choice | {"exclude": ["blocks.0", *choice["exclude"]]})
    assert are_equal(steps(model), steps(twin)) == [True] * 4


def test_pieces_are_at_most_twice_as_many_and_steps_compile_none():
    counts = []
    for precision in (None, ALTERNATE):
        backend = CountingBackend()
        model = enabled(wide(blocks=6), precision, inner_backend=backend)
        steps(model)
        counts.append(backend.pieces)
    assert counts[0] < counts[1] <= 2 * counts[0]
    enabled(model, PrecisionConfig("int8", full_first_steps=3), inner_backend=backend)
    steps(model)
    assert backend.pieces == counts[1] and summary(model)[0].low_steps == [3]
    enabled(model, PrecisionConfig("int8_weight_only"), inner_backend=backend)
    steps(model)
    assert backend.pieces == 2 * counts[1] and summary(model)[0].low_steps == [0, 1, 2, 3]


def test_steps_are_chosen_from_both_ends_and_by_a_mask():
    def low(facts: list[StepFacts], **settings: Any) -> list[int]:
        return [each.step for each in facts if not PrecisionConfig(**settings).is_full(each)]

    known, unknown = ([StepFacts(step, steps) for step in range(6)] for steps in (6, None))
    assert low(known) == [0, 1, 2, 3, 4, 5]
    assert low(known, full_first_steps=2, full_last_steps=1) == [2, 3, 4]
    assert low(unknown, full_first_steps=2, full_last_steps=1) == [2, 3, 4, 5]
    assert low(known, full_steps_mask=[0, 1]) == [0]
    assert low(known, full_steps_mask="10") == [1, 2, 3, 4, 5]


def test_a_name_and_a_mapping_stand_for_a_config():
    assert parse_options({"precision": "int8"}).precision == PrecisionConfig("int8")
    config = PrecisionConfig("int8_weight_only", full_first_steps=2, per_layer={"up": None})
    mapping = {"quant_type": "int8_weight_only", "full_first_steps": 2, "per_layer": {"up": None}}
    options = parse_options({"precision": mapping})
    assert options.precision == config and hash(options) == hash(parse_options({"precision": config}))


def test_the_last_steps_are_those_of_the_scheduler():
    model = enabled(wide(), PrecisionConfig("int8", full_last_steps=2))
    ToyPipeline(model, texts=[TEXT])(noise(width=32), steps=5)
    assert summary(model)[0].low_steps == [0, 1, 2]
    with pytest.warns(CacheWarning, match="full_last_steps has no effect here: no scheduler"):
        steps(model)
    assert summary(model)[0].low_steps == [0, 1, 2, 3]


@pytest.mark.parametrize("cache", [NEVER.reset(num_inference_steps=4), PresetConfig(preset="balanced", steps=4)])
def test_the_last_steps_are_those_of_the_config(cache):
    model = enabled(wide(), PrecisionConfig("int8", full_last_steps=2), cache)
    steps(model)
    assert summary(model)[0].low_steps == [0, 1]


@pytest.mark.parametrize(
    ("mask", "refresh", "reuses"),
    [
        ("100", "repeat", {0: 2, 3: 2, 6: 1}),
        ("1000000", "repeat", {0: 2, 3: 2, 6: 1}),
        ("1100", "once", {0: 0, 1: 1, 3: 0, 4: 2, 7: 0}),
        ("1001", None, {0: 2, 3: 0, 4: 0, 5: 0, 6: 0, 7: 0}),
    ],
)
def test_reuses_are_counted_up_to_a_refresh_and_to_the_end(mask, refresh, reuses):
    FACTS.clear()
    cache = NEVER.reset(steps_computation_mask=mask, steps_computation_policy="static")
    if refresh is not None:
        cache = cache.reset(force_refresh_step_hint=3, force_refresh_step_policy=refresh)
    model = enabled(wide(), Noted("int8"), cache)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="steps_computation_mask has")
        ToyPipeline(model, texts=[TEXT])(noise(width=32), steps=8)
    assert {facts.step: facts.reuses for facts in FACTS} == reuses
    assert len(summary(model)[0].cached_steps) == sum(reuses.values())


class Noted(PrecisionConfig):
    """A rule of its own: the computed steps that more than one later step reuses."""

    def is_full(self, facts: StepFacts) -> bool:
        FACTS.append(facts)
        return facts.reuses is not None and facts.reuses > 1


FACTS: list[StepFacts] = []


def test_a_subclass_chooses_by_mask_and_history():
    FACTS.clear()
    mask = NEVER.reset(steps_computation_mask="1010011", steps_computation_policy="static")
    model = enabled(wide(), Noted("int8"), mask)
    ToyPipeline(model, texts=[TEXT])(noise(width=32), steps=7)
    assert [StepFacts(0, 7, 0, 1), StepFacts(2, 7, 1, 2), StepFacts(5, 7, 2, 0), StepFacts(6, 7, 3, 0)] == FACTS
    (stats,) = summary(model)
    assert stats.low_steps == [0, 5, 6] and stats.cached_steps == [1, 3, 4]


def test_single_blocks_are_pruned_and_computed_in_low_precision():
    model = wide(blocks=4)
    low = steps(quantized(model))
    prune = DBPruneConfig(Fn_compute_blocks=1, residual_diff_threshold=0)
    enabled(model, PrecisionConfig("int8"), prune)
    assert are_equal(steps(model), low) == [True] * 4
    enabled(
        model, PrecisionConfig("int8", full_first_steps=2), prune.reset(residual_diff_threshold=0.5, max_warmup_steps=1)
    )
    steps(model)
    (stats,) = summary(model)
    assert stats.pruned_steps and set(stats.low_steps) <= {2, 3}


@pytest.mark.budget(60, "inductor compiles both forms")
def test_inductor_compiles_both_forms():
    model = wide()
    full, low = steps(model), steps(quantized(model))
    enabled(model, inner_backend="inductor")
    results = steps(model)
    for step, (one, other) in enumerate(zip(full, low, strict=True)):
        near, far = (one, other) if step in (0, 2) else (other, one)
        assert (results[step] - near).abs().max() < 0.1 * (results[step] - far).abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# sessions, threads, autocast, gradients


def test_sessions_have_steps_of_their_own():
    model = wide()
    twin = enabled(copy.deepcopy(model))
    alone = steps(twin)
    enabled(model)
    results: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    with torch.no_grad():
        for time in TIMES:
            for name, rows in results.items():
                with cachedit_fx.session(name):
                    rows.append(model(noise(width=32), torch.tensor([time]), TEXT))
    assert all(are_equal(rows, alone) == [True] * 4 for rows in results.values())


def test_threads_share_copies():
    model = enabled(wide())
    alone, results = steps(model), []
    threads = [threading.Thread(target=lambda: results.append(steps(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(are_equal(rows, alone) == [True] * 4 for rows in results)


def test_gradients_run_in_full_precision():
    model = wide()
    full = [x.detach() for x in steps(model)]
    enabled(model)
    sample = noise(width=32).requires_grad_()
    result = model(sample, torch.tensor([TIMES[0]]), TEXT)
    result.sum().backward()
    assert torch.allclose(result, full[0], atol=1e-6) and sample.grad is not None


def test_a_copy_of_the_module_is_plain():
    model = wide()
    full = steps(model)
    enabled(model)
    steps(model)
    assert are_equal(steps(copy.deepcopy(model)), full) == [True] * 4


# ---------------------------------------------------------------------------------------------------------------------
# words


def test_the_explanation_has_the_bytes_of_both():
    model = enabled(wide(), PrecisionConfig("int8"))
    inputs = noise(width=32), torch.tensor([500.0]), TEXT
    before = explain(model, *inputs)
    steps(model)
    for explanation in (before, explain(model)):
        count, size, full = explanation.copies
        assert count == 6 and full == 4 * 2 * (32 * 64 + 64 * 32 + 32 * 32) and full / 4 < size < full / 3
        assert f"Precision by step keeps copies of 6 weights: {size / 2**20:.3g} MiB beside their" in str(explanation)


def test_every_step_is_shown(capsys):
    model = enabled(wide())
    steps(model)
    summary(model, details=True)
    shown = capsys.readouterr().out
    assert shown.count("compute (low)") == 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"precision": 8},
        "precision=8 is not allowed: it must be a PrecisionConfig, a mapping of its settings, the",
    ),
    ({"precision": "int9"}, "quant_type='int9' is not allowed.*did you mean 'int8'"),
    ({"precision": {"full_steps": 2}}, "unknown option 'full_steps'; the nearest known one is 'full_steps_mask'"),
    ({"precision": "int8", "cache": None}, "precision chooses the weights of the middle blocks, and cache=None leaves"),
    ({"precision": "int8", "passes": {"gather_inputs": False}}, r"passes=\{'gather_inputs': False\} leaves no middle"),
    ({"precision": "int8", "verify": "first"}, "verify compares with the plain module, and precision rounds"),
    ({"precision": "float8"}, "quant_type='float8' does not run here: it needs an NVIDIA GPU.*on 'cpu' run"),
    ({"precision": PrecisionConfig("int8", exclude="blokcs")}, "exclude: 'blokcs' matches none.*did you mean 'blocks'"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_cannot_be_is_refused_before_anything_changes(options, words):
    model = wide()
    with pytest.raises(OptionError, match=words):
        cachedit_fx.compile(model, inner_backend="eager", **options)
    assert model._compiled_call_impl is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"full_first_steps": -1}, "full_first_steps=-1 is not allowed: it must be an integer >= 0"),
        ({"full_steps_mask": "12"}, "full_steps_mask=.* is not allowed: it must be a non-empty list, tuple or string"),
        ({"per_layer": {"up": "int7"}}, "per_layer='int7' is not allowed"),
        ({"exclude": 3}, "exclude=3 is not allowed: it must be a name or a list of names"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(OptionError, match=words):
        PrecisionConfig("int8", **settings)


def test_torch_compile_has_no_module_to_copy_weights_of():
    compiled = torch.compile(wide(), backend="cachedit", options={"precision": "int8"})
    with pytest.raises(Exception, match="precision keeps copies of a module's weights.*use enable_cache"):
        denoise(compiled, TIMES, [TEXT], noise(width=32))


def test_a_quantized_model_has_nothing_left_to_copy():
    model = wide()
    quantize(model, "int8")
    with pytest.raises(OptionError, match="Toy: 9 layers are quantized already, and no other is to be quantized"):
        enabled(model)
