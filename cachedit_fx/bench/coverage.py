"""Does it work with this model? One model put through everything that the cache promises, with no help from outside.

    make() ──► plain module: outputs, FLOPs of each block
               compiled, uncached  ┐
               compiled, threshold 0 ├─► equal to the plain one, bit for bit
               compiled, always reuse  ─► equal on identical inputs, for the FLOPs of prologue + F + B + epilogue

`cachedit coverage` makes a table of it, over diffusers' classes or over models of your own.
"""

from __future__ import annotations

import importlib
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cachedit_fx.bench.coverage_attention import ATTENTION, AttentionCounts, check_attention, counts_table
from cachedit_fx.bench.coverage_counts import RankCounts, count_tables, counts_of
from cachedit_fx.bench.coverage_quantized import INT8, check_quantized
from cachedit_fx.bench.coverage_steps import FIRST, LATER, Inputs, Make, at_timestep, equal, tensors, timesteps_of
from cachedit_fx.bench.coverage_subject import Subject
from cachedit_fx.bench.errors import RequestError
from cachedit_fx.bench.motion import Reads
from cachedit_fx.bench.progress import Tell
from cachedit_fx.bench.variants import RUN, VariantOutcome, VariantResult
from cachedit_fx.capture import uncompiled
from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.metrics.flops import FlopCounter
from cachedit_fx.passes.hoist_invariants import HoistInvariants
from cachedit_fx.report.tables import Heading, Table, page, titled_list
from cachedit_fx.runtime.verification import VerificationError
from cachedit_fx.runtime.warning import CacheWarning

CHECKS = {
    "blocks": "the chain of block loops has the number of blocks that was stated",
    "exact": "with threshold 0, and compiled with no cache at all, results equal the plain module's bit for bit",
    "reuse": "a second call on identical inputs reuses, and its result is the computed one bit for bit",
    "work": "such a call costs the FLOPs of prologue, first and last blocks and epilogue, no more",
    "size": "a second resolution is computed and reused as exactly as the first, and the first still is",
    "restart": "a second generation starts by itself and repeats the first bit for bit",
    "statistics": "executed and cached steps and uncached calls are counted right, bytes are held",
}
"""The columns, in order, and what each means."""

ALWAYS = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=1e9, enable_separate_cfg=False)
"""Reuses from the second step on. Every call is a step: identical inputs would look like another CFG branch."""


@dataclass
class Covered:
    """What was seen of one model.

    Attributes:
        name: the model's.
        passed: check -> whether it held; a check that could not be made is missing.
        loops: the chain, as `name x blocks`.
        work: FLOPs of a reused step over a computed one's, without code motion.
        reason: why the model falls short, for people; empty if it does not.
        variants: what was seen of each variant; None if none was tried.
        reads: the weights that code motion takes out of a step; None if they were not counted.
        ranks: what one of two ranks does in a step; None if that was not counted.
        int8: whether the model in int8 is cached as exactly; None if that was not tried.
        int8_note: why not, for people; empty if it is.
        attention: whether the model with another attention is cached as exactly; None if that was not tried.
        attention_note: why not, for people; empty if it is.
        calls: its calls of attention; None if they were not counted, or there are none.
    """

    name: str
    passed: dict[str, bool] = field(default_factory=dict)
    loops: tuple[str, ...] = ()
    work: float | None = None
    reason: str = ""
    variants: tuple[VariantResult, ...] | None = None
    reads: Reads | None = None
    ranks: RankCounts | None = None
    int8: bool | None = None
    int8_note: str = ""
    attention: bool | None = None
    attention_note: str = ""
    calls: AttentionCounts | None = None

    @property
    def is_full(self) -> bool:
        """Whether every check was made and held, and no variant is wrong."""
        held = all(self.passed.get(name, False) for name in CHECKS)
        return held and not self.variants_that("wrong")

    def variants_that(self, *outcomes: VariantOutcome) -> list[VariantResult]:
        """The variants with one of these outcomes."""
        return [variant for variant in self.variants or () if variant.outcome in outcomes]


@torch.no_grad()
def check(
    name: str,
    make: Make,
    blocks: int | None = None,
    *,
    subject: Callable[[nn.Module], Subject] = Subject,
    resizes: bool = True,
) -> Covered:
    """Put one model through every check.

    Args:
        name: the model's, for the result.
        make: gives a module in eval mode and its inputs; the module is compiled and given back plain.
        blocks: how many blocks its chain has; None accepts any number.
        subject: compiles and calls the module.
        resizes: whether to check a second resolution, which costs another capture.

    Never raises for what the model does: an exception becomes the result's reason.
    """
    row = Covered(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            module, inputs = make()
            compiled = subject(module)
            try:
                _check(row, compiled, inputs, blocks)
                if resizes:
                    _check_size(row, compiled, inputs)
            finally:
                compiled.close()
        except VerificationError as error:
            row.passed["exact"], row.reason = False, str(error)
        except Exception as error:
            row.reason = error_text(error)
    if not row.is_full and not row.reason:
        said = [str(item.message) for item in caught if issubclass(item.category, CacheWarning)]
        row.reason = "; ".join(dict.fromkeys(said)) or f"fails: {', '.join(c for c in CHECKS if not row.passed.get(c))}"
    return row


def _check(row: Covered, compiled: Subject, inputs: Inputs, blocks: int | None) -> None:
    module, small = compiled.module, inputs(1)
    if not timesteps_of(small):
        raise ValueError(f"none of the inputs is a timestep by its name: {', '.join(small)}")
    plain, plain_later = tensors(module(**small)), tensors(module(**at_timestep(small, LATER)))
    if not plain or not all(item.isfinite().all() for item in plain) or equal(plain, plain_later):
        raise ValueError("the plain module must return finite tensors that depend on the timestep")

    exact = []
    for cache in (None, ALWAYS.reset(residual_diff_threshold=0)):
        compiled.compile(cache)
        exact += [equal(compiled(small), plain), equal(compiled(at_timestep(small, LATER)), plain_later)]
    row.passed["exact"] = all(exact)

    row.loops = tuple(f"{name} x {number}" for name, number in compiled.chain.items())
    row.passed["blocks"] = bool(compiled.chain) and blocks in (None, sum(compiled.chain.values()))

    compiled.compile(ALWAYS)
    computed = compiled(small)
    with FlopCounter() as warm:
        reused = compiled(small)
    other = compiled(at_timestep(small, LATER))
    row.passed["reuse"] = equal(computed, plain) and equal(reused, plain) and not equal(other, plain_later)
    row.passed["statistics"] = has_counted(compiled, executed=3, cached=[1, 2])
    row.passed["statistics"] &= all(stats.bytes_held > 0 for stats in compiled.summary())

    compiled.compile(ALWAYS.reset(enable_separate_cfg=None))
    generations = []
    for _ in range(2):
        generations.append([compiled(at_timestep(small, scale)) for scale in (FIRST, LATER, LATER**2)])
        row.passed["statistics"] &= has_counted(compiled, executed=3, cached=[1, 2])
    first, second = generations
    row.passed["restart"] = all(equal(a, b) for a, b in zip(first, second, strict=True)) and equal(first[0], plain)

    for _ in range(2):  # the first call is verified, which costs the plain module's work too
        compiled.compile(ALWAYS, passes={HoistInvariants.name: False})
        with FlopCounter() as full:
            compiled(small)
    with FlopCounter() as less:
        compiled(small)
    whole, middle = _flops(module, compiled.middle, small)
    row.work = less.flops / full.flops
    row.passed["work"] = full.flops == whole and warm.flops <= less.flops and 0 < less.flops <= whole - middle < whole


def _check_size(row: Covered, compiled: Subject, inputs: Inputs) -> None:
    small, large = inputs(1), inputs(2)
    with uncompiled(compiled.module):
        plain, plain_large = tensors(compiled.module(**small)), tensors(compiled.module(**large))
    compiled.compile(ALWAYS)
    sizes = []
    for arguments, expected in ((large, plain_large), (small, plain)):
        sizes += [equal(compiled(arguments), expected) for _ in range(2)] + [has_counted(compiled, 2, [1])]
        compiled(at_timestep(arguments, LATER))  # from which the next one rises: another generation
    row.passed["size"] = all(sizes)


def error_text(error: Exception) -> str:
    """Type, place and first line of an error."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__} at {at.filename}:{at.lineno}: {message}"


def _flops(module: nn.Module, middle: Collection[str], arguments: Mapping[str, Any]) -> tuple[int, int]:
    """FLOPs of the plain module, and of its blocks in the middle."""
    counted = 0
    started: list[int] = []
    calls: Counter[str] = Counter()

    with FlopCounter() as counter:

        def stop(path: str) -> None:
            nonlocal counted
            spent, number = counter.flops - started.pop(), calls[path]
            calls[path] += 1
            counted += spent if (f"{path}@{number}" if number else path) in middle else 0

        paths = {name.partition("@")[0] for name in middle}  # behind the @: which call of the module it is
        blocks = {path: module.get_submodule(path) for path in paths}
        handles = [b.register_forward_pre_hook(lambda *_: started.append(counter.flops)) for b in blocks.values()]
        handles += [b.register_forward_hook(lambda *_, path=path: stop(path)) for path, b in blocks.items()]
        try:
            with uncompiled(module):
                module(**arguments)
        finally:
            for handle in handles:
                handle.remove()
    return counter.flops, counted


def has_counted(compiled: Subject, executed: int, cached: list[int]) -> bool:
    """Whether every region says so; several graphs have a region each."""
    expected = (executed, cached, 0)
    found = [(stats.executed_steps, stats.cached_steps, stats.uncached_calls) for stats in compiled.summary()]
    return bool(found) and all(item == expected for item in found)


@dataclass(frozen=True)
class Zoo:
    """Models to check, as a module holds them in `ZOO`, `BLOCKS`, `EXCLUDED` and `MISSING`."""

    models: Mapping[str, Make]
    blocks: Mapping[str, int] = field(default_factory=dict)
    """Of the chain, for some models."""
    excluded: Mapping[str, str] = field(default_factory=dict)
    """Names that are left out on purpose, and why."""
    missing: Sequence[str] = ()
    """Names that should be among the models."""

    def only(self, texts: Sequence[str]) -> Zoo:
        """The models whose name contains one of `texts`; all if there are none."""
        if not texts:
            return self
        chosen = {name: make for name, make in self.models.items() if any(t.lower() in name.lower() for t in texts)}
        return Zoo(chosen, self.blocks, self.excluded)

    def without(self, names: Collection[str]) -> Zoo:
        """The other models."""
        models = {name: make for name, make in self.models.items() if name not in names}
        return replace(self, models=models)


def load_zoo(models: str) -> Zoo:
    """The zoo in a Python file, a package's folder or an importable module.

    Raises:
        RequestError: if it cannot be imported, or holds no `ZOO`.
    """
    path = Path(models)
    file = path / "__init__.py" if path.is_dir() else path
    try:
        with _importable(file):
            name = (path.name if path.is_dir() else path.stem) if file.is_file() else models
            module = importlib.import_module(name)
    except ImportError as error:
        raise RequestError(
            f"{models} cannot be imported ({error}). Give a Python file, a package's folder or a module; "
            "the zoo of diffusers' classes is tests/lib/zoo in a clone of the project"
        ) from None
    zoo = getattr(module, "ZOO", None)
    if not isinstance(zoo, dict) or not zoo:
        raise RequestError(
            f"{models} has no ZOO, a dict from names to functions that return (module, inputs); see "
            "cachedit coverage --help"
        )
    more = {name.lower(): getattr(module, name) for name in ("BLOCKS", "EXCLUDED", "MISSING") if hasattr(module, name)}
    return Zoo(zoo, **more)


@contextmanager
def _importable(file: Path) -> Iterator[None]:
    """With `file`, or the package that it begins, first on the path of imports."""
    folder = file.parent.parent if file.name == "__init__.py" else file.parent
    before = list(sys.path)
    if file.is_file():
        sys.path.insert(0, str(folder.absolute()))
    try:
        yield
    finally:
        sys.path[:] = before


NO_ENTRY = "no entry in the zoo: nobody has written a configuration and inputs for it"


def check_all(zoo: Zoo, tell: Tell) -> Iterator[Covered]:
    """Check every model, and count the weights of those that pass, on one thread; those that are missing fall short."""
    torch.set_num_threads(1)
    tell(more=len(zoo.models))
    for name, make in zoo.models.items():
        tell(name)
        row = check(name, make, zoo.blocks.get(name))
        if row.is_full:
            row.reads, row.ranks, row.calls = counts_of(name, make)
            row.int8, row.int8_note = check_quantized(make)
            row.attention, row.attention_note = check_attention(make)
        yield row
        tell(done=1)
    yield from (Covered(name, reason=NO_ENTRY) for name in zoo.missing)


def table(rows: Sequence[Covered], is_narrow: bool = False) -> Table:
    """A line for each model, a mark for each check: held, did not hold, could not be made.

    Args:
        is_narrow: one column for all checks, in place of one for each; `LEGEND` names them.
    """
    has_variants = any(row.variants is not None for row in rows)
    checks = ("checks",) if is_narrow else tuple(CHECKS)
    headings = ("model", "chain", *checks, "FLOPs", "int8", "attn", *(["variants"] if has_variants else []))
    result = Table(headings, texts=range(2 if is_narrow else len(CHECKS) + 2))
    signs = {True: "✓", False: "✗", None: "-"}
    for row in rows:
        marks = [signs[row.passed.get(name)] for name in CHECKS]
        work = "" if row.work is None else f"{row.work:.0%}"
        figures = [work, signs[row.int8], signs[row.attention], *([_variants_cell(row)] if has_variants else [])]
        cells = ["".join(marks)] if is_narrow else marks
        result.add(row.name, " + ".join(row.loops), *cells, *figures, style="" if row.is_full else "bold")
    return result


LEGEND = f"checks, in this order: {', '.join(CHECKS)}. ✓ held, ✗ did not hold, - could not be made."


def _variants_cell(row: Covered) -> str:
    """How many variants run, of how many, and how many are wrong."""
    if row.variants is None:
        return ""
    run, refused, wrong = (len(row.variants_that(*kinds)) for kinds in (RUN, ("refused",), ("wrong",)))
    return f"{run} of {run + refused}" + (f", {wrong} wrong" if wrong else "")


def summary(rows: Sequence[Covered]) -> str:
    """How many models pass."""
    text = f"{sum(row.is_full for row in rows)} of {len(rows)} models pass every check."
    if all(row.variants is None for row in rows):
        return text
    run, cached, wrong, refused = (
        sum(len(row.variants_that(*kinds)) for row in rows) for kinds in (RUN, ("right",), ("wrong",), ("refused",))
    )
    return (
        f"{text} {run} of {run + refused} variants run; {cached} of these are cached and right, "
        f"{run - cached - wrong} uncached and right, {wrong} wrong."
    )


def markdown(rows: Sequence[Covered], made_by: str, excluded: Mapping[str, str]) -> str:
    """The table as a file: the meaning of the columns, models that fall short and why, those left out."""
    short = [f"**{row.name}**: {_short_paths(row.reason)}" for row in rows if not row.is_full]
    left_out = [f"**{name}**: {reason}" for name, reason in excluded.items()]
    notes = [f"**{row.name}**: {row.attention_note}" for row in rows if row.attention_note]
    return page(
        Heading("Which models it works with"),
        f"{made_by}: tiny configurations, random weights, float32, inner backend eager, F1B0, everything reused from "
        "the second step on.",
        summary(rows),
        [
            *(f"**{name}**: {meaning}." for name, meaning in CHECKS.items()),
            "**FLOPs**: of a reused step, over a computed one's.",
            f"**int8**: {INT8}.",
            f"**attn**: {ATTENTION}.",
            *([f"**variants**: {VARIANTS}."] if any(row.variants for row in rows) else []),
        ],
        table(rows),
        *count_tables([row.reads for row in rows], [row.ranks for row in rows]),
        *counts_table([row.calls for row in rows]),
        *titled_list("Rows that fall short", short),
        *titled_list("Not in int8", [f"**{row.name}**: {row.int8_note}" for row in rows if row.int8_note]),
        *titled_list("Not with another attention", notes),
        *titled_list("Left out", left_out),
        *titled_list("Variants that are wrong", _variant_lines(rows, "wrong")),
        *titled_list("Variants that run uncached", _variant_lines(rows, "uncached")),
        *titled_list("Variants that the class refuses", _variant_lines(rows, "refused")),
        *titled_list("Guessed values that the class does not know", _variant_lines(rows, "unknown")),
    )


VARIANTS = (
    "the model with one argument of its constructor or forward changed, and how many of them the class runs; each of "
    "these is exact, and reuses to the bit on identical inputs"
)
"""What the column means."""


def _variant_lines(rows: Sequence[Covered], outcome: VariantOutcome) -> list[str]:
    return [
        f"**{row.name}**, `{variant.label}`: {_short_paths(variant.reason)}"
        for row in rows
        for variant in row.variants_that(outcome)
    ]


def _short_paths(text: str) -> str:
    """Without the folder that packages are installed in, which says nothing to others."""
    for folder in sorted(sys.path, key=len, reverse=True):
        if folder:
            text = text.replace(folder.rstrip("/") + "/", "")
    return text
