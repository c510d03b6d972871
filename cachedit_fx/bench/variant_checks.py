"""Puts every variant of a model through detection, threshold 0 and reuse.

    variant ──► plain module: what the class refuses is no fault of the cache
                compiled, threshold 0    ─► equal to the plain one, bit for bit
                compiled, always reuse   ─► equal on identical inputs; at another timestep finite, and of equal shapes

A variant is captured once, since the policies share one structure. Outcomes are those of `VariantResult`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from cachedit_fx.bench.coverage import ALWAYS, Covered, Zoo, error_text, has_counted
from cachedit_fx.bench.coverage_steps import FIRST, LATER, at_timestep, equal, tensors
from cachedit_fx.bench.coverage_subject import Subject
from cachedit_fx.bench.variants import (
    Change,
    Inputs,
    Variant,
    VariantResult,
    Vocabulary,
    changes_of,
    companions_of,
)
from cachedit_fx.runtime.verification import VerificationError
from cachedit_fx.runtime.warning import CacheWarning

SEED = 0
"""Of each forward: some models draw random numbers."""


class _Wrong(Exception):
    """A promise that a variant breaks."""


@torch.no_grad()
def variants_of(
    module: nn.Module, inputs: Inputs, vocabulary: Vocabulary
) -> Iterator[tuple[Variant, nn.Module, Inputs] | VariantResult]:
    """Each variant that the class runs, with its module and inputs; for each other one its result."""
    changes = changes_of(module, inputs, vocabulary)
    companions = companions_of(module, inputs, changes)
    for change in changes:
        yield _first_that_runs(change, companions, module, inputs)


def _first_that_runs(
    change: Change, companions: Sequence[Change], module: nn.Module, inputs: Inputs
) -> tuple[Variant, nn.Module, Inputs] | VariantResult:
    """The change alone if the class runs it so, else with the first companion with which it runs."""
    refusal: Exception | None = None
    for more in ((), *((other,) for other in companions if other.name != change.name)):
        variant = Variant((change, *more))
        try:
            changed, changed_inputs = variant.make(module, inputs)
            _plain(changed, changed_inputs, FIRST)
        except Exception as error:
            refusal = refusal or error
        else:
            return variant, changed, changed_inputs
    assert refusal is not None
    return VariantResult(change.label, "unknown" if change.is_guess else "refused", error_text(refusal))


def _plain(module: nn.Module, inputs: Inputs, scale: float) -> list[torch.Tensor]:
    torch.manual_seed(SEED)
    results = tensors(module(**at_timestep(inputs(1), scale)))
    if not results or not all(tensor.isfinite().all() for tensor in results):
        raise ValueError("the plain module's results are not finite")
    return results


@torch.no_grad()
def check_variant(label: str, module: nn.Module, inputs: Inputs) -> VariantResult:
    """Compile one variant and hold it to its promises. Never raises for what the model does."""
    compiled = Subject(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            plain = [_plain(module, inputs, scale) for scale in (FIRST, LATER)]
            _check(compiled, inputs, plain)
        except (_Wrong, VerificationError) as error:
            return VariantResult(label, "wrong", str(error))
        except Exception as error:
            return VariantResult(label, "wrong", error_text(error))
        finally:
            compiled.close()
    if compiled.middle:
        return VariantResult(label, "right")
    reasons = dict.fromkeys(str(warning.message) for warning in caught if issubclass(warning.category, CacheWarning))
    return VariantResult(label, "uncached" if reasons else "wrong", "; ".join(reasons) or "uncached without a warning")


def _check(compiled: Subject, inputs: Inputs, plain: Sequence[list[torch.Tensor]]) -> None:
    def call(scale: float) -> list[torch.Tensor]:
        torch.manual_seed(SEED)
        return compiled(at_timestep(inputs(1), scale))

    compiled.compile(ALWAYS.reset(residual_diff_threshold=0))
    if not all(equal(call(scale), values) for scale, values in zip((FIRST, LATER), plain, strict=True)):
        raise _Wrong("threshold 0 differs from the plain module")
    if not compiled.middle:
        return
    compiled.compile(ALWAYS)
    computed, reused, other = call(FIRST), call(FIRST), call(LATER)
    if not equal(computed, plain[0]) or not equal(reused, plain[0]):
        raise _Wrong("a step that reuses on identical inputs differs from the computed one")
    if not has_counted(compiled, executed=3, cached=[1, 2]):
        raise _Wrong("the statistics do not count one computed step and two that reuse")
    pairs = zip(other, plain[1], strict=True)
    if not all(a.shape == b.shape and a.dtype == b.dtype and a.isfinite().all() for a, b in pairs):
        raise _Wrong("a step that reuses at another timestep has other shapes, or values that are not finite")


def check_variants(module: nn.Module, inputs: Inputs, vocabulary: Vocabulary) -> Iterator[VariantResult]:
    """The result of every variant of a model."""
    for variant in variants_of(module, inputs, vocabulary):
        yield variant if isinstance(variant, VariantResult) else check_variant(variant[0].label, *variant[1:])


def vocabulary_of(zoo: Zoo) -> Vocabulary:
    """The vocabulary of all models of a zoo that can be made."""
    modules = []
    for make in zoo.models.values():
        try:
            modules.append(make()[0])
        except Exception:  # `check` says so
            continue
    return Vocabulary(modules)


def with_variants(rows: Iterable[Covered], zoo: Zoo, vocabulary: Vocabulary) -> Iterator[Covered]:
    """The rows of a zoo, each with the variants of its model if that could be checked."""
    for row in rows:
        if row.passed:
            row.variants = tuple(check_variants(*zoo.models[row.name](), vocabulary))
        yield row
