"""DBPrune: each block of the middle is bypassed separately, if its input has hardly moved.

The rules of dbcache.py hold for each block. Rules that count steps (warm-up, mask, limits on cached steps) use the
chain's history at the start of the step: a step treats all blocks equally. Rules about stored values (nothing stored,
shapes, the accumulated difference) use the block's history, since blocks were last computed at different steps.

cache-dit 1.5.3 counts a step as soon as one of its blocks is pruned. Its `max_cached_steps` then takes effect in the
middle of a step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar

from cachedit_fx.config.cache import Cut, DBCacheConfig, Unit
from cachedit_fx.config.rules import FLAG, OptionError, Rule, integer, is_number, optional, setting
from cachedit_fx.runtime.policies import dbcache
from cachedit_fx.runtime.policies.base import Action, Decision, Measure, Policy, Reason, Situation, register

SAMPLE = 5
"""A dynamic threshold is the mean of this many differences, the first positive ones of a step."""
BELOW_DYNAMIC = Reason("below dynamic", Action.REUSE, "the difference is below the step's dynamic prune threshold")


@dataclass(frozen=True)
class DBPruneConfig(DBCacheConfig):
    """When each block of the middle is pruned: DBPrune decides about every block separately.

    A block is pruned if its input has hardly moved since the block was last computed. Its output is then the input plus
    the block's residual at that time. All fields of `DBCacheConfig` hold. The difference is that of a block's input, so
    F may be 0, and each block accumulates its own differences. A step that prunes a block is a cached step. The limits
    on cached steps are checked when a step begins, never in its middle.
    """

    unit: ClassVar[Unit] = "block"

    enable_dynamic_prune_threshold: bool = setting(False, FLAG)
    """Raise the threshold to the mean of the step's first five positive differences before the block, times
    `dynamic_prune_threshold_relax_ratio`. The raised threshold is used only if it is above `residual_diff_threshold`
    and below `max_dynamic_prune_threshold`."""
    max_dynamic_prune_threshold: float | None = setting(
        None, optional(Rule(lambda value: is_number(value) and value > 0, "a number > 0 (a ratio)"))
    )
    """A raised threshold is used only if it is below this one. A ratio; None = 2 x `residual_diff_threshold`."""
    dynamic_prune_threshold_relax_ratio: float = setting(
        1.25, Rule(lambda value: is_number(value) and value > 0, "a number > 0 (a factor)")
    )
    """Factor of the mean difference."""
    non_prune_block_ids: Sequence[int] = setting(
        (),
        Rule(
            lambda value: isinstance(value, tuple) and all(integer(0).allows(block) for block in value),
            "a list, tuple, set or range of block numbers >= 0",
        ),
    )
    """Blocks that are never pruned, numbered from 0 over the whole chain, or in each loop with `scope="loop"`. Numbers
    beyond the last block are ignored. Structural, as F and B are."""

    def __post_init__(self) -> None:
        blocks: Any = self.non_prune_block_ids
        if isinstance(blocks, (list, tuple, set, frozenset, range)):
            object.__setattr__(self, "non_prune_block_ids", tuple(dict.fromkeys(blocks)))
        super().__post_init__()
        highest = self.max_dynamic_prune_threshold
        if self.enable_dynamic_prune_threshold and highest is not None and highest <= self.residual_diff_threshold:
            raise OptionError(
                f"max_dynamic_prune_threshold={highest} is not above residual_diff_threshold="
                f"{self.residual_diff_threshold}, so that the threshold could never be raised: choose a larger one, or "
                "None for twice residual_diff_threshold"
            )

    def cut(self) -> Cut:
        """The settings that shape the graph: F, B, and the blocks that are never pruned."""
        return super().cut()._replace(exclusions=tuple(sorted(self.non_prune_block_ids)))


@dataclass(frozen=True)
class PruneHistory:
    """DBPrune's history of one chain of blocks in one CFG branch."""

    pruned_steps: int = 0
    """Number of steps before the present one in which a block was pruned."""
    run: int = 0
    """Number of pruned steps after the last step that computed every block."""
    step: int = -1
    """The present step."""
    prunes: bool = False
    """Whether a block of the present step was pruned."""
    differences: tuple[float, ...] = ()
    """The first positive differences of the present step, at most `SAMPLE`."""
    accumulated: Mapping[int | None, float] = field(default_factory=lambda: MappingProxyType({}))
    """Block -> sum of the differences at which the block was pruned since it was last computed. Zeros are left out."""

    def at(self, step: int) -> PruneHistory:
        """The history at `step`. A finished step is counted when another one begins."""
        if step == self.step:
            return self
        if self.prunes:
            return PruneHistory(self.pruned_steps + 1, self.run + 1, step, accumulated=self.accumulated)
        return PruneHistory(self.pruned_steps, 0, step, accumulated=self.accumulated)


@register("dbprune")
class DBPrune(Policy[DBPruneConfig, PruneHistory]):
    """Decides about each block of the middle separately."""

    config_class: ClassVar[type[DBCacheConfig]] = DBPruneConfig

    def start(self) -> PruneHistory:
        return PruneHistory()

    def decide(self, situation: Situation, history: PruneHistory, measure: Measure) -> Decision:
        chain = history.at(situation.step)
        counts = dbcache.History(chain.pruned_steps, chain.run, chain.accumulated.get(situation.block, 0.0))
        decision = dbcache.decide(self.config, situation, counts, measure)
        if decision.reason is not Reason.ABOVE_THRESHOLD or decision.difference is None:
            return decision
        if decision.difference >= dynamic_threshold(self.config, chain.differences):
            return decision
        return replace(decision, action=Action.REUSE, reason=BELOW_DYNAMIC)

    def advance(self, history: PruneHistory, situation: Situation, decision: Decision) -> PruneHistory:
        chain, difference = history.at(situation.step), decision.difference
        differences, accumulated, block = chain.differences, chain.accumulated, situation.block
        if difference is not None and 0 < difference < math.inf and len(differences) < SAMPLE:
            differences = (*differences, difference)
        if decision.action is Action.REUSE:
            accumulated = {**accumulated, block: accumulated.get(block, 0.0) + (difference or 0.0)}
        elif block in accumulated:
            accumulated = {other: total for other, total in accumulated.items() if other != block}
        prunes = chain.prunes or decision.action is Action.REUSE
        return replace(chain, prunes=prunes, differences=differences, accumulated=accumulated)

    def warning(self, decision: Decision) -> str | None:
        return dbcache.warning(self.config, decision)


def dynamic_threshold(config: DBPruneConfig, differences: Sequence[float]) -> float:
    """The threshold after these positive differences of a step.

    It is mean(differences) x relax ratio if this number lies between `residual_diff_threshold` and the highest allowed
    threshold, both excluded. Otherwise it is `residual_diff_threshold`. A block's own difference is not in the mean.
    """
    lowest, highest = config.residual_diff_threshold, config.max_dynamic_prune_threshold
    if not config.enable_dynamic_prune_threshold or not differences:
        return lowest
    relaxed = statistics.fmean(differences) * config.dynamic_prune_threshold_relax_ratio
    return relaxed if lowest < relaxed < (2 * lowest if highest is None else highest) else lowest
