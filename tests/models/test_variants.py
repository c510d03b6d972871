"""Variants of diffusers' transformer classes: each argument of their constructors and forwards, changed alone.

The part `variants` tries all of every class. By default a few are tried, each a change of another kind.
"""

import functools
import re
from collections import Counter

import pytest
from lib import zoo
from lib.marks import only_in

from cachedit_fx.bench.coverage import Zoo
from cachedit_fx.bench.variant_checks import check_variant, check_variants, variants_of, vocabulary_of
from cachedit_fx.bench.variants import RUN, VariantResult, Vocabulary

UNCACHED = {
    ("NucleusMoEImageTransformer2DModel", "use_grouped_mm=True"): r"_run_experts_grouped_mm, .*grouped_mm",
}
"""Variants of captured classes that run uncached, and the line upstream that is the reason."""

CACHED = {
    ("HunyuanImageTransformer2DModel", "text_embed_2_dim=None"),
    ("HunyuanImageTransformer2DModel", "encoder_hidden_states_2=None"),
}
"""Variants of classes that break the capture, without the part that breaks it."""

SAMPLE = {
    ("DiTTransformer2DModel", "activation_fn='geglu'"): "right",
    ("NucleusMoEImageTransformer2DModel", "use_grouped_mm=True"): "uncached",
    ("SanaTransformer2DModel", "encoder_attention_mask=None"): "right",
}


@functools.cache
def vocabulary() -> Vocabulary:
    """Not a fixture: every worker may have one."""
    return vocabulary_of(Zoo(zoo.ZOO))


@pytest.mark.parametrize(("name", "label"), SAMPLE)
def test_variant(name, label):
    module, inputs = zoo.ZOO[name]()
    tried = variants_of(module, inputs, vocabulary())
    changed = next(variant for variant in tried if not isinstance(variant, VariantResult) and variant[0].label == label)
    result = check_variant(label, *changed[1:])
    assert result.outcome == SAMPLE[name, label], result.reason


@pytest.mark.budget(600, "a capture for each variant")
@pytest.mark.parametrize("name", only_in("variants", sorted(zoo.ZOO)))
def test_variants_of_class(name):
    results = list(check_variants(*zoo.ZOO[name](), vocabulary()))
    assert not labels(results, "wrong"), [str(result) for result in results]
    cached = {label for owner, label in CACHED if owner == name}
    expected = (
        labels(results, *RUN) - cached if name in zoo.SHORT else {label for owner, label in UNCACHED if owner == name}
    )
    assert labels(results, "uncached") == expected and labels(results, "right") >= cached
    for result in results:
        if result.outcome == "uncached":
            assert re.search(zoo.SHORT.get(name) or UNCACHED[name, result.label], result.reason)


def labels(results, *outcomes):
    return {result.label for result in results if result.outcome in outcomes}


@pytest.mark.full("variants")
@pytest.mark.budget(120, "every variant of every class runs once")
def test_nine_in_ten_variants_run_in_the_class_itself():
    counts: Counter[str] = Counter()
    for make in zoo.ZOO.values():
        for variant in variants_of(*make(), vocabulary()):
            counts[variant.outcome if isinstance(variant, VariantResult) else "run"] += 1
    assert counts["run"] > 400 and counts["run"] >= 0.9 * (counts["run"] + counts["refused"]), counts
