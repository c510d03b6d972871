"""Random block models for fuzzing: plain data (`Spec`), the model that it describes (`build`), and what must hold
for every one of them (`check`).

    draw_spec(choose) ──► Spec(loops=(Loop(blocks=3, body="conv"),), ...) ──► build(spec) ──► check(spec) -> Outcome

One drawing function serves two masters: hypothesis, which shrinks (`specs`), and a seeded generator, which can start
at any case (`spec_of`; `tests/fuzz.py`). A Spec's repr names what is not default and can be pasted back.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from lib.fuzz_models import arguments, build
from lib.fuzz_specs import STEPS, Loop, Spec
from lib.fuzz_writes import IN_PLACE, PARTLY_IN_PLACE
from torch import Tensor
from torch.utils._pytree import tree_leaves

import cachedit_fx

# ---------------------------------------------------------------------------------------------------------------------
# What must hold
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What was seen of a case that passed: blocks of each region (none: it ran uncached), and the warnings."""

    regions: tuple[int, ...]
    reused: int
    """Steps that reused in the phase of the drawn policy."""
    warnings: tuple[str, ...]


def expected(spec: Spec) -> tuple[int, ...] | None:
    """Blocks of each region, where all must be found: every loop a container that names its blocks, blocks left over
    by F and B, and nothing that is known to forbid a region. None where a graph may be read otherwise."""
    named = all(loop.container not in ("stacked", "parameters") for loop in spec.loops)
    plain = all(loop.autocast != "loop" and loop.write != "view" for loop in spec.loops)
    writes_to_a_slice = any(
        loop.glue == "slice" and spec.batch > 1 and loop.write in ("iadd", "add_", "mul_add_", "slice")
        for loop in spec.loops
    )
    # Else the text, or a control residual, may be taken for the sample: it may look more like the output.
    resembles = spec.text_tokens == spec.tokens or any(loop.glue in ("slice", "merge", "fold") for loop in spec.loops)
    told_apart = not spec.refiners or not resembles
    regions = (spec.num_blocks,) if spec.scope == "model" else tuple(loop.blocks for loop in spec.loops)
    # Behind a layer that makes other tokens the hidden states continue nothing, and loops may differ in work so much
    # that one is a refiner to the other: the bulk alone may be the region.
    ends = any(loop.glue in ("merge", "fold") for loop in spec.loops)
    lost = _shown_by_argument(spec)
    clear = named and plain and told_apart and not writes_to_a_slice and not ends and not lost
    return regions if clear and spec.first + spec.last < min(regions) else None


def _shown_by_argument(spec: Spec) -> bool:
    """Whether an argument of the caller may end with a value that only bypassed blocks give.

    Blocks that write in place to an argument leave there the value of the last one that does. It is safe if its block
    is always computed, or if it is the sample and the model goes on with it after a region.
    """
    last, end = _last_to_write(spec), spec.num_blocks - 1
    if last is None:
        return False
    counts = [loop.blocks for loop in spec.loops[:-1]] if spec.scope == "loop" else []
    borders = [number - 1 for number in itertools.accumulate(counts)]
    hidden = text = extra = last
    if spec.skips != "none":  # a skip makes other hidden states, from the middle on
        hidden = min(hidden, (spec.num_blocks + 1) // 2 - 1)
    if any(loop.glue != "none" for loop in spec.loops[1:]):
        hidden = min(hidden, spec.loops[0].blocks - 1)
    if spec.loops[-1].last_drops_text:
        text = min(text, end - 1)
    others = (text, extra)[: spec.streams - 1]
    is_lost = hidden >= spec.first and hidden not in (*borders, end)
    return (is_lost and not spec.embed) or any(index >= spec.first for index in others)


def _last_to_write(spec: Spec) -> int | None:
    """Index of the last block that writes to the tensors that the first was given; None if none does."""
    writes = [loop.write for loop in spec.loops for _ in range(loop.blocks)]
    for index, write in enumerate(writes):
        if write not in IN_PLACE:
            return index - 1 if index else None
        if write in PARTLY_IN_PLACE:
            return index
    return len(writes) - 1


@torch.no_grad()
def check(spec: Spec) -> Outcome:
    """Build the model and hold it to every property. Raises AssertionError where one fails, or whatever the model
    raises; what is raised is a bug, here or there."""
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        regions, reused = _Case(spec).run()
    told = tuple(
        dict.fromkeys(str(item.message) for item in caught if issubclass(item.category, cachedit_fx.CacheWarning))
    )
    assert regions or told, "uncached, and nothing was said"
    assert regions == (expected(spec) or regions), f"regions of {regions} blocks, not {expected(spec)}: {told}"
    return Outcome(regions, reused, told)


class _Case:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.model = build(spec)
        self.calls = 0

    def run(self) -> tuple[tuple[int, ...], int]:
        spec = self.spec
        sizes = (False,) if spec.resize == "none" else (False, True, False)
        plain = {size: self.generation(range(3), size) for size in sizes}
        if spec.lowered:
            self.compile(cache=None)
            self.compare("cache=None", plain[False][:1], self.generation(range(1), False))
        self.calls = 0
        self.compile(**self.never())
        for size in sizes:
            cachedit_fx.refresh_context(self.model)
            self.compare(f"threshold 0, resized={size}", plain[size], self.generation(range(3), size))
            self.counted(3)
        self.compile(**self.always())
        computed, *repeated = self.generation((0, 0, 0), False)
        self.compare("computed", plain[False][:1], [computed])
        self.compare("reused on identical inputs", [computed, computed], repeated, exact=spec.dtype != "float64")
        for stats in self.counted(3):
            assert stats.cached_steps == [1, 2], f"identical inputs: cached {stats.cached_steps}"
            assert spec.branches == 1 or stats.cfg_cached_steps == [1, 2], f"{stats.cfg_cached_steps}, branch 1"
        if spec.resize != "none":  # in the midst of a generation: what is stored does not fit
            self.compare("another shape", plain[True][:1], self.generation((0,), True), exact=spec.dtype != "float64")
        self.compile(**dict(spec.policy), enable_separate_cfg={"none": False, "separate": True}.get(spec.cfg))
        first = self.generation(range(STEPS), False)
        before = [stats.cached_steps for stats in self.counted(STEPS)]
        cachedit_fx.refresh_context(self.model)
        self.compare("second generation", first, self.generation(range(STEPS), False))
        after = self.counted(STEPS)
        assert [stats.cached_steps for stats in after] == before, f"cached {before}, then {after}"
        return tuple(stats.num_blocks for stats in after), sum(map(len, before))

    def compile(self, **policy: Any) -> None:
        spec = self.spec
        options: dict[str, Any] = {"inner_backend": "eager", "granularity": spec.granularity, "scope": spec.scope}
        options["verify"] = "first"
        if policy.get("cache", "") is not None:
            options |= {"Fn_compute_blocks": spec.first, "Bn_compute_blocks": spec.last}
            if spec.order is not None:
                settings: dict[str, Any] = {"taylorseer_order": spec.order, "calibrator_cache_type": spec.predicts}
                options["calibrator"] = cachedit_fx.TaylorSeerCalibratorConfig(**settings)
        cachedit_fx.compile(self.model, dynamic=spec.dynamic, fullgraph=True, **options, **policy)

    def never(self) -> dict[str, Any]:
        """A policy under which nothing is reused."""
        return self.separate() | (self.mask(1, 1, 1) if self.spec.first == 0 else {"residual_diff_threshold": 0.0})

    def always(self) -> dict[str, Any]:
        """One under which every step but the first is reused on identical inputs."""
        alike = {"residual_diff_threshold": 1e-3, "max_warmup_steps": 0}
        return self.separate() | (self.mask(1, 0, 0, 0) if self.spec.first == 0 else alike)

    def separate(self) -> dict[str, Any]:
        """Branches by turns, so that a timestep seen again is the next step."""
        return {"enable_separate_cfg": self.spec.branches == 2}

    def mask(self, *digits: int) -> dict[str, Any]:
        return {"steps_computation_mask": digits, "steps_computation_policy": "static"}

    def generation(self, steps: Sequence[int], resized: bool) -> list[list[Tensor]]:
        """For each step: the results of its branches, and what the call left in its inputs."""
        seen = []
        for step in steps:
            leaves: list[Tensor] = []
            for branch in range(self.spec.branches):
                given = arguments(self.spec, step, branch, resized)
                result = self.model(**given)
                self.calls += 1
                leaves += [x.clone() for x in tree_leaves((result, given)) if isinstance(x, Tensor)]
            seen.append(leaves)
        return seen

    def compare(
        self, what: str, expected: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]], exact: bool = True
    ) -> None:
        """Bit for bit. float64 has no wider type to keep residuals in: what is restored there is close."""
        for step, (wanted, got) in enumerate(zip(expected, found, strict=True)):
            assert len(wanted) == len(got), f"{what}, step {step}: {len(got)} tensors, not {len(wanted)}"
            for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
                where = f"{what}, step {step}, tensor {index}"
                assert a.shape == b.shape and a.dtype == b.dtype, f"{where}: {b.dtype} {b.shape}"
                assert a.isfinite().all(), f"{where}: not finite"
                same = torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-12, atol=1e-12)
                assert same, f"{where}: off by {(a.double() - b.double()).abs().max():.3g}"

    def counted(self, steps: int) -> list[cachedit_fx.CacheStats]:
        """The statistics of the regions, checked: every step of every branch was decided about, or nothing was."""
        found = cachedit_fx.summary(self.model)
        regions = [stats for stats in found if stats.num_blocks]
        if not regions:  # where no graph has the timestep, uncached calls begin no generation
            (uncached,) = [stats.uncached_calls for stats in found]
            assert uncached in (steps * self.spec.branches, self.calls), f"{self.calls} calls: {found}"
        for stats in regions:
            executed = [branch.executed_steps for branch in stats.branches]
            assert executed == [steps] * self.spec.branches, f"executed {executed}, not {steps}: {stats}"
            assert stats.uncached_calls == 0, f"uncached: {stats}"
        return regions


def simpler(spec: Spec) -> list[Spec]:
    """Specs one change simpler: a loop less, a field back at its default."""
    found = [
        replace(spec, loops=spec.loops[:index] + spec.loops[index + 1 :])
        for index in range(len(spec.loops))
        if len(spec.loops) > 1
    ]
    found += [
        replace(spec, **dict[str, Any]({item.name: item.default}))
        for item in fields(Spec)
        if item.name != "loops" and getattr(spec, item.name) != item.default
    ]
    for index, loop in enumerate(spec.loops):
        for item in fields(Loop):
            if getattr(loop, item.name) != item.default:
                changed = replace(loop, **dict[str, Any]({item.name: item.default}))
                found.append(replace(spec, loops=(*spec.loops[:index], changed, *spec.loops[index + 1 :])))
    return found
