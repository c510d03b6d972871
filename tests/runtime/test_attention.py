"""Attention as an option: against the same model with its attention replaced by hand; by step; what is refused."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from lib.attending import attending, exact, replaced
from lib.low_precision import NEVER, TEXT, TIMES, are_equal, quantized, steps
from lib.toy_pipeline import ToyPipeline
from lib.toys import CountingBackend, noise
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import cachedit_fx
from cachedit_fx import (
    AttentionConfig,
    CacheWarning,
    DBPruneConfig,
    OptionError,
    PrecisionConfig,
    StepFacts,
    enable_cache,
    explain,
    summary,
)
from cachedit_fx.attention import functions
from cachedit_fx.attention.functions import replacement
from cachedit_fx.config.options import parse_options

pytestmark = pytest.mark.filterwarnings("ignore:.*gains no time", "ignore:.*lru_cache")

MATH = replacement("math", functions.math, True)
ALTERNATE = AttentionConfig("math", own_steps_mask=(1, 0, 1, 0))


def enabled(model: Any, attention: Any = ALTERNATE, cache: Any = NEVER, **options: Any) -> Any:
    return enable_cache(model, cache, attention=attention, **{"inner_backend": "eager"} | options)


def steps_in(model: Any, function: Any = MATH, first: int = 0) -> list[torch.Tensor]:
    """The steps of a plain copy, whose blocks from `first` on attend by a function."""
    twin = copy.deepcopy(model)
    with replaced(list(twin.blocks)[first:], function):
        return steps(twin)


# ---------------------------------------------------------------------------------------------------------------------
# All steps


@pytest.mark.parametrize("attention", ["math", "flex"])
def test_threshold_0_is_the_same_model_with_the_same_attention_uncached(attention):
    model = attending()
    plain = steps(model)
    cached = steps(enabled(model, attention))
    cachedit_fx.compile(model, cache=None, inner_backend="eager", attention=attention)
    assert are_equal(steps(model), cached) == [True] * 4 and are_equal(cached, plain) == [False] * 4
    if attention == "math":
        assert are_equal(cached, steps_in(model)) == [True] * 4
    assert are_equal(steps(cachedit_fx.disable_cache(model)), plain) == [True] * 4


def test_a_mask_reaches_the_back_end():
    model, mask = attending(), torch.tensor([[[[True, False, True]]]])
    inputs = noise(width=32), torch.tensor([TIMES[0]]), TEXT, mask
    with torch.no_grad(), replaced(list(model.blocks), MATH):
        expected = model(*inputs)
    enabled(model, "math")
    with torch.no_grad():
        assert torch.equal(model(*inputs), expected)
    assert explain(model).attention == {"math": 6}


def test_the_middle_is_reused_as_without():
    model = attending()
    cache = NEVER.reset(residual_diff_threshold=10.0, max_warmup_steps=1)
    computed = steps(enabled(model, "math"))
    reused = steps(enabled(model, "math", cache))
    assert torch.equal(reused[0], computed[0]) and summary(model)[0].cached_steps == [1, 2, 3]


def test_the_region_as_one_piece():
    model = attending()
    results = steps(enabled(model, granularity="region"))
    assert are_equal(results, steps(enabled(model))) == [True] * 4


def test_other_lengths_take_the_same_graph():
    model, backend = attending(), CountingBackend()
    enabled(model, dynamic=True, inner_backend=backend)
    pieces = []
    for tokens in (5, 9):
        inputs = noise(1, tokens, width=32), torch.tensor([TIMES[0]]), TEXT
        with torch.no_grad():
            results = [model(*inputs), model(*inputs[:1], torch.tensor([TIMES[1]]), TEXT)]
            twin = copy.deepcopy(model)
            expected = [twin(*inputs)]
            with replaced(list(twin.blocks)[1:], MATH):
                expected.append(twin(*inputs[:1], torch.tensor([TIMES[1]]), TEXT))
        assert are_equal(results, expected) == [True, True]
        pieces.append(backend.pieces)
    assert pieces[0] == pieces[1]


@pytest.mark.parametrize("attention", ["math", ALTERNATE])
def test_gradients_run_in_the_models_own_attention(attention):
    model = attending()
    own = steps(model)
    enabled(model, attention)
    sample = noise(width=32).requires_grad_()
    result = model(sample, torch.tensor([TIMES[0]]), TEXT)
    result.sum().backward()
    torch.testing.assert_close(result, own[0])
    assert sample.grad is not None


def test_torch_compile_takes_it():
    model = attending()
    options: dict[str, Any] = {
        "attention": "math",
        "inner_backend": "eager",
        "residual_diff_threshold": 0,
        "Fn_compute_blocks": 1,
    }
    compiled = torch.compile(model, backend="cachedit", options=options)
    assert are_equal(steps(compiled), steps_in(model)) == [True] * 4


# ---------------------------------------------------------------------------------------------------------------------
# By step


def test_own_steps_are_the_plain_module_and_others_the_replaced_one_to_the_bit():
    model = attending()
    own, other = steps(model), steps_in(model, first=1)
    enabled(model)
    for _ in range(2):
        results = steps(model)
        assert are_equal(results, own) == [True, False, True, False]
        assert are_equal(results, other) == [False, True, False, True]
        (stats,) = summary(model)
        assert stats.attention_steps == [1, 3] and stats.low_steps == []
        assert "2 computed in replaced attention" in str(stats)


def test_four_forms_are_two_models_with_two_attentions_each(capsys):
    model = attending()
    low = quantized(model)
    expected = [steps(model)[0], steps(low)[1], steps_in(model, first=1)[2], steps_in(low, first=1)[3]]
    precision = PrecisionConfig("int8", full_steps_mask=(1, 0, 1, 0))
    attention = AttentionConfig("math", own_steps_mask=(1, 1, 0, 0))
    enabled(model, attention, precision=precision, passes={"hoist_invariants": False})
    assert are_equal(steps(model), expected) == [True] * 4
    (stats,) = summary(model)
    assert stats.low_steps == [1, 3] and stats.attention_steps == [2, 3]
    assert stats.branch(0).copy() == stats.branch(0)
    summary(model, details=True)
    shown = capsys.readouterr().out
    assert [shown.count(f"compute ({form})") for form in ("low", "attention", "attention, low")] == [1, 1, 1]


def test_pieces_are_at_most_twice_as_many_and_steps_compile_none():
    counts = []
    for attention in (None, ALTERNATE):
        backend = CountingBackend()
        model = enabled(attending(4), attention, inner_backend=backend)
        steps(model)
        counts.append(backend.pieces)
    assert counts[0] < counts[1] <= 2 * counts[0]
    enabled(model, AttentionConfig("math", own_first_steps=3), inner_backend=backend)
    steps(model)
    assert backend.pieces == counts[1] and summary(model)[0].attention_steps == [3]
    enabled(model, "math", inner_backend=backend)
    steps(model)
    assert backend.pieces > counts[1] and summary(model)[0].attention_steps == []


def test_the_last_steps_are_those_of_the_scheduler():
    model = enabled(attending(), AttentionConfig("math", own_last_steps=2))
    ToyPipeline(model, texts=[TEXT])(noise(width=32), steps=5)
    assert summary(model)[0].attention_steps == [0, 1, 2]
    with pytest.warns(CacheWarning, match="own_last_steps has no effect here: no scheduler.*own_steps_mask in place"):
        steps(model)
    assert summary(model)[0].attention_steps == [0, 1, 2, 3]


class Odd(AttentionConfig):
    """A rule of its own."""

    def is_own(self, facts: StepFacts) -> bool:
        return facts.step % 2 == 0


def test_a_subclass_chooses_by_a_rule_of_its_own():
    model = enabled(attending(), Odd("math"))
    steps(model)
    assert summary(model)[0].attention_steps == [1, 3]


def test_single_blocks_are_pruned_and_attend_otherwise():
    model = attending(4)
    other = steps_in(model, first=1)
    prune = DBPruneConfig(Fn_compute_blocks=1, residual_diff_threshold=0)
    enabled(model, AttentionConfig("math", own_steps_mask=(1, 0, 0)), prune)
    assert are_equal(steps(model), other) == [False, True, True, True]
    enabled(model, ALTERNATE, prune.reset(residual_diff_threshold=0.5, max_warmup_steps=1))
    steps(model)
    (stats,) = summary(model)
    assert stats.pruned_steps and set(stats.attention_steps) <= {1, 3}


@pytest.mark.parametrize(
    "inner_backend",
    [
        "aot_eager",
        pytest.param(
            "inductor", marks=[pytest.mark.full("zoo"), pytest.mark.budget(60, "inductor compiles both forms")]
        ),
    ],
)
def test_a_compiler_compiles_both_forms(inner_backend):
    model = attending()
    far = lambda query, key, value, **_: value.mean(2, keepdim=True).expand_as(query).contiguous()  # noqa: E731
    own, other = steps(model), steps_in(model, replacement("far", functions.of_callable(far), True), first=1)
    enabled(model, AttentionConfig(far, own_steps_mask=(1, 0, 1, 0)), inner_backend=inner_backend)
    for step, result in enumerate(steps(model)):
        torch.testing.assert_close(result, (own, other)[step % 2][step], rtol=1e-4, atol=1e-5)
        assert (result - (other, own)[step % 2][step]).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Words


def test_the_explanation_says_which_calls_are_replaced_and_why_others_are_kept():
    model = enabled(attending(), AttentionConfig("math", cross_backend="sdpa", own_first_steps=1))
    inputs = noise(width=32), torch.tensor([500.0]), TEXT
    before = explain(model, *inputs)
    steps(model)
    for explanation in (before, explain(model)):
        assert explanation.attention == {"math": 2}
        assert explanation.own_attention == {
            "cross_backend is 'sdpa'": 3,
            "it is outside the middle blocks, and attention is chosen by step": 1,
        }
        assert "Calls of attention that back ends take: math 2\n  3 kept: cross_backend" in str(explanation)


def test_a_back_end_that_takes_no_call_says_so_once():
    model = attending()
    enabled(model, AttentionConfig("math", exclude="attn*"))
    with pytest.warns(CacheWarning, match=r"all calls keep the model's own attention: excluded by 'attn\*' \(6\)"):
        assert are_equal(steps(model), steps(copy.deepcopy(model))) == [True] * 4


def test_a_name_a_function_and_a_mapping_stand_for_a_config():
    assert parse_options({"attention": "math"}).attention == AttentionConfig("math")
    assert parse_options({"attention": exact}).attention == AttentionConfig(exact)
    config = AttentionConfig("math", own_first_steps=2, per_layer={"attn2": None})
    mapping = {"backend": "math", "own_first_steps": 2, "per_layer": {"attn2": None}}
    options = parse_options({"attention": mapping})
    assert options.attention == config and hash(options) == hash(parse_options({"attention": config}))


def test_a_function_of_another_result_is_told():
    model = enabled(attending(), lambda query, key, value, **_: query[:, :1])
    with pytest.raises(OptionError, match=r"returned torch.float32 \[1, 1, 5, 16\], and sdpa returns torch.float32"):
        steps(model)


def test_a_function_that_returns_no_tensor_is_told():
    model = enabled(attending(), lambda query, key, value, **_: None)
    with pytest.raises(OptionError, match="returned NoneType, and sdpa returns torch.float32"):
        steps(model)


def test_a_function_under_autocast_returns_its_dtype():
    def function(query, key, value, attn_mask=None, **options):
        return sdpa(query, key, value, attn_mask=attn_mask, **options)

    query = torch.randn(1, 2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        result = functions.of_callable(function)(query, query, query, None, False, None, False)
        assert torch.equal(result, sdpa(query, query, query)) and result.dtype is torch.bfloat16


class Scaled(nn.Module):
    """Attention with a tensor of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, query, key, value, **options):
        return sdpa(query, key, value, **options) * self.scale


def _closure():
    scale = torch.ones(())
    return lambda query, key, value, **options: sdpa(query, key, value, **options) * scale


@pytest.mark.parametrize(
    "function",
    [Scaled(), Scaled().forward, _closure(), partial(sdpa, torch.ones(1))],
    ids=["module", "method", "closure", "partial"],
)
def test_a_function_with_tensors_of_its_own_runs_eagerly_alone(function):
    with pytest.raises(OptionError, match="reads tensors of its own.*custom_op.*inner_backend='eager'"):
        parse_options({"attention": function, "inner_backend": "aot_eager"})
    parse_options({"attention": function, "inner_backend": "eager"})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"attention": 8}, "attention=8 is not allowed: it must be an AttentionConfig, a mapping of its settings, the"),
    ({"attention": lambda query, key, value: query}, "<lambda> cannot be called as scaled_dot_product_attention is"),
    ({"attention": "saeg"}, "attention backend='saeg' is not allowed: it must be one of 'sdpa'.*did you mean 'sage'"),
    ({"attention": {"backnd": "math"}}, "unknown option 'backnd'; the nearest known one is 'backend'"),
    ({"attention": "sage"}, "attention backend='sage' does not run here: it needs an NVIDIA GPU.*; here run sdpa, fl"),
    ({"attention": "cudnn"}, "attention backend='cudnn' does not run here: it needs an NVIDIA GPU"),
    (
        {"attention": {"backend": "math", "per_layer": {"attn1": "sage"}}},
        r"attention per_layer\['attn1'\]='sage' does not run here",
    ),
    ({"attention": {"backend": "math", "exclude": "atn1"}}, "exclude: 'atn1' matches none.*did you mean 'attn1'"),
    ({"attention": "math", "verify": "first"}, "verify compares with the plain module, and attention replaces"),
    ({"attention": "math", "passes": {"replace_attention": False}}, "attention chooses back ends, and passes="),
    (
        {"attention": ALTERNATE, "cache": None},
        "attention by step chooses the attention of the middle blocks, and cache=None leaves no middle",
    ),
    (
        {"attention": ALTERNATE, "passes": {"insert_attention_forms": False}},
        r"passes=\{'insert_attention_forms': False\} leaves no middle",
    ),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_cannot_be_is_refused_before_anything_changes(options, words):
    model = attending()
    with pytest.raises(OptionError, match=words):
        cachedit_fx.compile(model, inner_backend="eager", **options)
    assert model._compiled_call_impl is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"own_first_steps": -1}, "own_first_steps=-1 is not allowed: it must be an integer >= 0"),
        ({"own_steps_mask": "12"}, "own_steps_mask=.* is not allowed: it must be a non-empty list, tuple or string"),
        ({"backend": 3}, "attention backend=3 is not allowed: it must be one of 'sdpa', 'flash'"),
        ({"cross_backend": "maht"}, "attention cross_backend='maht' is not allowed.*did you mean 'math'"),
        ({"per_layer": {"up": "int7"}}, r"attention per_layer\['up'\]='int7' is not allowed"),
        ({"per_layer": ["up"]}, "per_layer=.* is not allowed: it must be a dict of patterns and back ends"),
        ({"exclude": 3}, "exclude=3 is not allowed: it must be a name or a list of names"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(OptionError, match=words):
        AttentionConfig(**{"backend": "math"} | settings)


def test_torch_compile_refuses_what_does_not_run_here():
    compiled = torch.compile(attending(), backend="cachedit", options={"attention": "sage"})
    with pytest.raises(Exception, match="attention backend='sage' does not run here"):
        steps(compiled)
