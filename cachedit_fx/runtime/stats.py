"""Counts the policies' decisions: one `CacheStats` for each region of a generation.

Nothing is counted twice: each branch stores the decisions, and every number is computed from them. Steps are denoising
steps of the generation, from 0. Differences that are not finite are counted, but never enter a list of differences.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.passes.region_forms import ATTENTION, LOW
from cachedit_fx.runtime.policies.base import Action, Decision, Reason

_FORMS = {LOW: "low precision", ATTENTION: "replaced attention"}


def step_decision(blocks: Collection[Decision]) -> Decision:
    """One decision that sums up a step: reuse if any block was bypassed, the most common reason, the mean difference.

    Differences that are not finite are left out. A single decision is its own summary.

    Args:
        blocks: the decisions about the step's blocks; not empty.
    """
    if len(blocks) == 1:
        return next(iter(blocks))
    reused = [decision for decision in blocks if decision.action is Action.REUSE]
    ((reason, _),) = Counter(decision.reason for decision in reused or blocks).most_common(1)
    values = [d.difference for d in blocks if d.difference is not None and math.isfinite(d.difference)]
    return Decision(reason.action, reason, statistics.fmean(values) if values else None)


@dataclass
class BranchStats:
    """One CFG branch."""

    parts: dict[int, dict[int | None, Decision]] = field(default_factory=dict)
    """Step -> block -> decision with DBPrune. Otherwise step -> None -> the decision about the middle as a whole."""

    form_steps: dict[str, list[int]] = field(default_factory=dict)
    """What a form of the middle differs in ("low", "attention") -> the computed steps that took such a form, in
    order."""

    def copy(self) -> BranchStats:
        """The present state, which later calls do not change."""
        parts = {step: dict(decisions) for step, decisions in self.parts.items()}
        return BranchStats(parts, {name: list(steps) for name, steps in self.form_steps.items()})

    @property
    def low_steps(self) -> list[int]:
        """Computed steps that took quantized copies of weights; empty without the option `precision`."""
        return self.form_steps.get(LOW, [])

    @property
    def attention_steps(self) -> list[int]:
        """Computed steps that ran in replaced attention, if that is chosen by step; empty otherwise."""
        return self.form_steps.get(ATTENTION, [])

    @property
    def decisions(self) -> dict[int, Decision]:
        """Step -> its decision; with DBPrune `step_decision` of the decisions about the step's blocks."""
        return {step: step_decision(blocks.values()) for step, blocks in self.parts.items()}

    @property
    def every_decision(self) -> list[Decision]:
        return [decision for blocks in self.parts.values() for decision in blocks.values()]

    @property
    def differences(self) -> list[float]:
        """Every finite difference; with DBPrune one for each block that was compared."""
        values = (decision.difference for decision in self.every_decision)
        return [value for value in values if value is not None and math.isfinite(value)]

    @property
    def reused(self) -> list[int]:
        """For each step, the number of its decisions to reuse."""
        return [sum(d.action is Action.REUSE for d in blocks.values()) for blocks in self.parts.values()]

    @property
    def executed_steps(self) -> int:
        return len(self.parts)

    @property
    def cached_steps(self) -> list[int]:
        return [step for step, decision in self.decisions.items() if decision.action is Action.REUSE]

    @property
    def residual_diffs(self) -> dict[int, float]:
        """Step -> its finite difference; with DBPrune the mean of the step's finite differences."""
        return {
            step: decision.difference
            for step, decision in self.decisions.items()
            if decision.difference is not None and math.isfinite(decision.difference)
        }

    @property
    def reasons(self) -> dict[int, Reason]:
        return {step: decision.reason for step, decision in self.decisions.items()}


@dataclass(repr=False)
class CacheStats:
    """Statistics of one region in one generation.

    Names without a prefix are about branch 0, names with `cfg_` about branch 1. `work`, counts of calls and times are
    about all branches.
    """

    name: str
    num_blocks: int
    """Blocks of the chain that the region was cut from: first, bypassed and last ones."""
    first: int
    """First blocks, computed at every step (F)."""
    last: int
    """Last blocks, computed at every step (B)."""
    branches: list[BranchStats] = field(default_factory=list)
    bytes_held: int = 0
    """Size of the values stored for reuse, all branches, in bytes."""
    uncached_causes: Counter[str] = field(default_factory=Counter)
    """Cause -> number of calls that ran uncached, without a decision of the policy."""
    elsewhere: Counter[int] = field(default_factory=Counter)
    """Branch -> number of its calls that other ranks computed (`cfg_parallel`)."""
    failed_calls: int = 0
    """Calls of the generation that raised. They left no other trace."""
    session: str = ""
    """Whose generation it is: the key of a `session(key)`, or the name of a thread."""
    bytes_of_all_sessions: int = 0
    """Size of the values that the model's sessions store for reuse, all together, in bytes."""
    hoisted_bytes: int = 0
    """Size of the hoisted values that the model keeps for all its sessions, in bytes."""
    renewed_inputs: tuple[str, ...] = ()
    """Inputs of which other tensors came in at most steps, so that the values made from them were computed anew."""
    compute_seconds: list[float] = field(default_factory=list)
    """Measured times of computing the middle (with DBPrune, a block), without storing."""
    reuse_seconds: list[float] = field(default_factory=list)
    """Measured times of bypassing the middle (with DBPrune, a block)."""
    prunes_blocks: bool = False
    """Whether the policy decides about every block of the middle separately (DBPrune)."""
    loop: int | None = None
    """The index of its block loop in the chain, if every loop decides separately."""

    def copy(self) -> CacheStats:
        """The present state, which later calls do not change."""
        return replace(
            self,
            branches=[branch.copy() for branch in self.branches],
            uncached_causes=Counter(self.uncached_causes),
            elsewhere=Counter(self.elsewhere),
            compute_seconds=list(self.compute_seconds),
            reuse_seconds=list(self.reuse_seconds),
        )

    def record(
        self, branch: int, step: int, decision: Decision, block: int | None = None, form: Collection[str] = ()
    ) -> None:
        """Record a decision about the middle, or about one block of it, and what the form that ran differs in."""
        while len(self.branches) <= branch:
            self.branches.append(BranchStats())
        self.branches[branch].parts.setdefault(step, {})[block] = decision
        for name in form:
            steps = self.branches[branch].form_steps.setdefault(name, [])
            if step not in steps[-1:]:
                steps.append(step)

    def record_seconds(self, action: Action, seconds: float) -> None:
        """Record the time that computing or bypassing the region took."""
        (self.reuse_seconds if action is Action.REUSE else self.compute_seconds).append(seconds)

    def record_uncached(self, cause: str) -> None:
        """Record a call about which no policy decided (gradients wanted, ...)."""
        self.uncached_causes[cause] += 1

    def branch(self, index: int) -> BranchStats:
        """The branch's statistics; empty if the branch was never called."""
        return self.branches[index] if index < len(self.branches) else BranchStats()

    @property
    def executed_steps(self) -> int:
        return self.branch(0).executed_steps

    @property
    def cached_steps(self) -> list[int]:
        return self.branch(0).cached_steps

    @property
    def low_steps(self) -> list[int]:
        return self.branch(0).low_steps

    @property
    def attention_steps(self) -> list[int]:
        return self.branch(0).attention_steps

    @property
    def residual_diffs(self) -> dict[int, float]:
        return self.branch(0).residual_diffs

    @property
    def reasons(self) -> dict[int, Reason]:
        return self.branch(0).reasons

    @property
    def cfg_cached_steps(self) -> list[int]:
        return self.branch(1).cached_steps

    @property
    def cfg_residual_diffs(self) -> dict[int, float]:
        return self.branch(1).residual_diffs

    @property
    def pruned_steps(self) -> list[int]:
        """Steps in which at least one block was pruned; empty without DBPrune, as are the next two."""
        return self._pruned_steps(0)

    @property
    def pruned_blocks(self) -> list[int]:
        """How many blocks each step pruned."""
        return self._pruned_blocks(0)

    @property
    def actual_blocks(self) -> list[int]:
        """For each step, all blocks of the chain, first and last ones included."""
        return self._actual_blocks(0)

    @property
    def pruned_ratio(self) -> float | None:
        """All pruned blocks over all actual ones; None without DBPrune and before the first call."""
        return self._pruned_ratio(0)

    @property
    def cfg_pruned_steps(self) -> list[int]:
        return self._pruned_steps(1)

    @property
    def cfg_pruned_blocks(self) -> list[int]:
        return self._pruned_blocks(1)

    @property
    def cfg_actual_blocks(self) -> list[int]:
        return self._actual_blocks(1)

    @property
    def cfg_pruned_ratio(self) -> float | None:
        return self._pruned_ratio(1)

    def _pruned_steps(self, branch: int) -> list[int]:
        return self.branch(branch).cached_steps if self.prunes_blocks else []

    def _pruned_blocks(self, branch: int) -> list[int]:
        return self.branch(branch).reused if self.prunes_blocks else []

    def _actual_blocks(self, branch: int) -> list[int]:
        return [self.num_blocks] * self.branch(branch).executed_steps if self.prunes_blocks else []

    def _pruned_ratio(self, branch: int) -> float | None:
        actual = sum(self._actual_blocks(branch))
        return sum(self._pruned_blocks(branch)) / actual if actual else None

    @property
    def uncached_calls(self) -> int:
        return self.uncached_causes.total()

    @property
    def non_finite(self) -> int:
        """Differences that were infinite or not a number."""
        return sum(decision.reason is Reason.NOT_FINITE for decision in self._every_decision)

    @property
    def _every_decision(self) -> list[Decision]:
        return [decision for branch in self.branches for decision in branch.every_decision]

    @property
    def _reused(self) -> int:
        """How often the middle (with DBPrune, a block) was bypassed."""
        return sum(sum(branch.reused) for branch in self.branches)

    @property
    def work(self) -> float:
        """Block executions over the uncached run's, uncached calls included; 1.0 before the first call."""
        calls = sum(branch.executed_steps for branch in self.branches) + self.uncached_calls
        bypassed = self._reused * (1 if self.prunes_blocks else self.num_blocks - self.first - self.last)
        return 1.0 - bypassed / (calls * self.num_blocks) if calls and self.num_blocks else 1.0

    @property
    def expected_seconds_saved(self) -> float | None:
        """An estimate: bypasses times the median time of computing, in seconds. The median leaves out compiling."""
        return self._reused * statistics.median(self.compute_seconds) if self.compute_seconds else None

    @property
    def measured_seconds_saved(self) -> float | None:
        """An estimate: bypasses times the difference of both median times. None if either was not measured."""
        if not self.compute_seconds or not self.reuse_seconds:
            return None
        return self._reused * (statistics.median(self.compute_seconds) - statistics.median(self.reuse_seconds))

    def inert_threshold_message(self, config: DBCacheConfig) -> str | None:
        """A message if differences were compared with the threshold, and never were below it; otherwise None."""
        every = self._every_decision
        above = [d.difference for d in every if d.reason is Reason.ABOVE_THRESHOLD and d.difference is not None]
        if not above or any(d.action is Action.REUSE and d.difference is not None for d in every):
            return None
        return f"inert threshold: smallest difference {min(above):.3g}, threshold {config.residual_diff_threshold:.3g}"

    def __str__(self) -> str:
        return f"{self.name}: {self._summary}"

    def __repr__(self) -> str:
        return f"<{self}>"

    @property
    def _summary(self) -> str:
        cached = " + ".join(f"{len(branch.cached_steps)} of {branch.executed_steps}" for branch in self.branches)
        if self.prunes_blocks:
            pruned = " + ".join(str(sum(branch.reused)) for branch in self.branches)
            counts = f"{cached} steps pruned, {pruned} blocks in all"
        else:
            counts = f"{cached or 'no'} steps cached"
        return f"{counts}, work {self.work:.0%}{''.join(self._remarks())}"

    def _remarks(self) -> Iterable[str]:
        if self.expected_seconds_saved is not None:
            yield f"; by median times {self.expected_seconds_saved:.3g} s left out"
        if self.measured_seconds_saved is not None:
            yield f", {self.measured_seconds_saved:.3g} s saved"
        for name, words in _FORMS.items():
            counts = [len(branch.form_steps.get(name, [])) for branch in self.branches]
            if any(counts):
                yield f"; {' + '.join(map(str, counts))} computed in {words}"
        if self.bytes_held:
            yield f"; {self.bytes_held / 2**20:.3g} MiB held"
        if self.hoisted_bytes:
            yield f", {self.hoisted_bytes / 2**20:.3g} MiB of hoisted values"
        if self.renewed_inputs:
            yield f"; new at every step: {', '.join(self.renewed_inputs)}"
        if self.failed_calls:
            yield f"; {self.failed_calls} calls failed"
        if self.non_finite:
            yield f"; differences not finite: {self.non_finite}"
        for branch, calls in self.elsewhere.items():
            yield f"; {calls} calls of branch {branch} computed by other ranks"
        for cause, calls in self.uncached_causes.items():
            yield f"; uncached calls: {calls} ({cause})"
