"""The decision about one block: on top of `test_policy`, what is new with DBPrune, by tables and properties."""

import math
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachedit_fx.runtime.policies import dbcache
from cachedit_fx.runtime.policies.base import Action, Decision, Reason, Situation, Stored
from cachedit_fx.runtime.policies.dbprune import (
    BELOW_DYNAMIC,
    DBPrune,
    DBPruneConfig,
    PruneHistory,
    dynamic_threshold,
)
from cachedit_fx.runtime.stats import step_decision

R = Reason
STORED, NOTHING, OTHER_SHAPES = (0.0, Stored.FITS), (0.0, Stored.NOTHING), (0.0, Stored.OTHER_SHAPES)
"""Differences that a block has accumulated, and what there is to reuse of it."""
BLOCK = 3


def after(history: PruneHistory, decision: Decision, block: int = BLOCK) -> PruneHistory:
    return DBPrune(config()).advance(history, Situation(history.step, block=block), decision)


def config(**fields: Any) -> DBPruneConfig:
    return DBPruneConfig(**{"max_warmup_steps": 0, "residual_diff_threshold": 0.1} | fields)


def dynamic(**fields: Any) -> DBPruneConfig:
    return config(enable_dynamic_prune_threshold=True, **fields)


def unasked() -> float:
    raise AssertionError("the difference was asked for")


def at(step=9, pruned_steps=0, run=0, **more):
    return PruneHistory(pruned_steps, run, step, **more)


@pytest.mark.parametrize(
    ("settings", "chain", "block", "difference", "reason"),
    [
        (config(), at(), STORED, 0.05, R.BELOW_THRESHOLD),
        (config(), at(), STORED, 0.1, R.ABOVE_THRESHOLD),
        (config(), at(), STORED, math.nan, R.NOT_FINITE),
        (config(), at(), NOTHING, None, R.NOTHING_STORED),
        (config(), at(), OTHER_SHAPES, None, R.SHAPES_DIFFER),
        (config(residual_diff_threshold=0), at(), STORED, None, R.THRESHOLD_OFF),
        (config(max_warmup_steps=10), at(), STORED, None, R.WARMUP),
        (config(steps_computation_mask="1"), at(), STORED, None, R.MASK_ENDED),
        (config(steps_computation_mask="01", steps_computation_policy="static"), at(0), STORED, None, R.MASK_REUSES),
        # what counts steps goes by the chain, not by the block, and not by the present step
        (config(max_cached_steps=2), at(pruned_steps=2), STORED, None, R.MAX_CACHED),
        (config(max_cached_steps=2), at(pruned_steps=1, prunes=True), STORED, 0.05, R.BELOW_THRESHOLD),
        (config(max_continuous_cached_steps=2), at(pruned_steps=2, run=2), STORED, None, R.MAX_CONTINUOUS),
        (config(max_continuous_cached_steps=2), at(pruned_steps=5, run=1, prunes=True), STORED, 0.05,
         R.BELOW_THRESHOLD),
        # what is about stored values goes by the block
        (config(max_accumulated_residual_diff_threshold=0.2), at(), (0.2, Stored.FITS), None, R.ACCUMULATED),
        (config(max_accumulated_residual_diff_threshold=0.2), at(), (0.1, Stored.FITS), 0.05, R.BELOW_THRESHOLD),
        # the dynamic threshold
        (dynamic(), at(), STORED, 0.12, R.ABOVE_THRESHOLD),
        (dynamic(), at(differences=(0.12,)), STORED, 0.14, BELOW_DYNAMIC),
        (dynamic(), at(differences=(0.12,)), STORED, 0.09, R.BELOW_THRESHOLD),
        (dynamic(), at(differences=(0.12,)), STORED, math.inf, R.NOT_FINITE),
        (dynamic(), at(differences=(0.12,)), STORED, 0.15, R.ABOVE_THRESHOLD),
        (config(), at(differences=(0.12,)), STORED, 0.14, R.ABOVE_THRESHOLD),
        (dynamic(max_cached_steps=0), at(differences=(0.12,)), STORED, None, R.MAX_CACHED),
    ],
)  # fmt: skip
def test_rules(settings, chain, block, difference, reason):
    accumulated, stored = block
    chain = replace(chain, accumulated={BLOCK: accumulated, BLOCK + 1: 1.0})
    situation = Situation(chain.step, stored, BLOCK)
    decision = DBPrune(settings).decide(situation, chain, unasked if difference is None else lambda: difference)
    assert decision == Decision(reason.action, reason, decision.difference)
    assert decision.difference is difference


@pytest.mark.parametrize(
    ("settings", "differences", "threshold"),
    [
        (config(), (0.12,), 0.1),  # switched off
        (dynamic(), (), 0.1),
        (dynamic(), (0.12,), 0.15),
        (dynamic(), (0.08, 0.12, 0.16), 0.15),
        (dynamic(), (0.08,), 0.1),  # 0.08 x 1.25 is not above the threshold
        (dynamic(), (0.04,), 0.1),
        (dynamic(), (0.16,), 0.1),  # 0.2 is not below twice the threshold
        (dynamic(max_dynamic_prune_threshold=0.3), (0.16,), 0.2),
        (dynamic(max_dynamic_prune_threshold=0.14), (0.12,), 0.1),
        (dynamic(dynamic_prune_threshold_relax_ratio=1.5), (0.12,), 0.18),
    ],
)
def test_dynamic_threshold(settings, differences, threshold):
    assert dynamic_threshold(settings, differences) == pytest.approx(threshold)


def test_a_step_keeps_its_first_five_positive_differences():
    chain = at()
    for value in (None, 0.0, 0.1, math.nan, math.inf, 0.2, 0.3, 0.0, 0.4, 0.5, 0.6):
        chain = after(chain, Decision(Action.COMPUTE, R.ABOVE_THRESHOLD, value))
    assert chain.differences == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert chain.at(9) is chain
    assert chain.at(10) == at(10)


def test_a_pruned_step_counts_once_it_is_over():
    prune, compute = Decision(Action.REUSE, R.BELOW_THRESHOLD, 0.1), Decision(Action.COMPUTE, R.WARMUP)
    chain = PruneHistory().at(0)
    assert chain == PruneHistory(step=0)
    chain = after(after(after(chain, prune, 0), compute, 1), prune, 2)
    assert (chain.pruned_steps, chain.run) == (0, 0)
    chain = after(after(chain.at(1), compute, 0), prune, 1)
    assert (chain.pruned_steps, chain.run) == (1, 1)
    assert chain.accumulated == {1: 0.1, 2: 0.1}
    chain = after(chain.at(4), compute, 1)  # a branch may be left out of steps
    assert (chain.pruned_steps, chain.run) == (2, 2)
    assert chain.at(5) == PruneHistory(2, 0, 5, accumulated={2: 0.1})


def test_a_step_in_short():
    below, above, warmup = (
        Decision(reason.action, reason, value)
        for reason, value in ((R.BELOW_THRESHOLD, 0.1), (R.ABOVE_THRESHOLD, 0.3), (R.WARMUP, None))
    )
    broken = Decision(Action.COMPUTE, R.NOT_FINITE, math.nan)
    assert step_decision([below]) is below and step_decision([broken]) is broken
    mixed = step_decision([above, above, below])
    assert (mixed.action, mixed.reason) == (Action.REUSE, R.BELOW_THRESHOLD)
    assert mixed.difference == pytest.approx(0.7 / 3)
    assert step_decision([above, above, broken]) == Decision(Action.COMPUTE, R.ABOVE_THRESHOLD, 0.3)
    assert step_decision([warmup, warmup]) == warmup


configs = st.builds(
    DBPruneConfig,
    residual_diff_threshold=st.sampled_from([0.0, 0.1, 0.3]),
    max_accumulated_residual_diff_threshold=st.none() | st.floats(0, 1),
    max_warmup_steps=st.integers(0, 4),
    warmup_interval=st.integers(1, 3),
    max_cached_steps=st.integers(-1, 5),
    max_continuous_cached_steps=st.integers(-1, 3),
    steps_computation_mask=st.none() | st.lists(st.integers(0, 1), min_size=1, max_size=10),
    steps_computation_policy=st.sampled_from(["dynamic", "static"]),
    enable_dynamic_prune_threshold=st.booleans(),
    dynamic_prune_threshold_relax_ratio=st.floats(0.5, 2),
)
generations = st.integers(1, 7).flatmap(
    lambda blocks: st.lists(
        st.lists(st.floats(0, 0.7) | st.sampled_from([math.nan, math.inf]), min_size=blocks, max_size=blocks),
        min_size=1,
        max_size=12,
    )
)


def run(settings, values):
    """The decisions of a generation, [step][block], for these differences."""
    policy, history = DBPrune(settings), DBPrune(settings).start()
    decided: list[list[Decision]] = []
    for step, row in enumerate(values):
        decided.append([])
        for block, value in enumerate(row):
            situation = Situation(step, Stored.FITS if step else Stored.NOTHING, block)
            decision = policy.decide(situation, history, Mock(return_value=value))
            history = policy.advance(history, situation, decision)
            decided[-1].append(decision)
    return decided


@given(configs, generations)
def test_a_generation_keeps_its_promises(settings, values):
    decided = run(settings, values)
    prunes = [any(d.action is Action.REUSE for d in row) for row in decided]
    assert not prunes[0]
    of_steps = {R.WARMUP, R.MASK_COMPUTES, R.MASK_ENDED, R.MASK_REUSES, R.MAX_CACHED, R.MAX_CONTINUOUS, R.THRESHOLD_OFF}
    for row in decided:  # all blocks of a step are allowed to be pruned, or none is
        common = {d.reason for d in row} & of_steps
        assert not common or len({d.reason for d in row}) == 1 or common == {R.MASK_REUSES}
    if settings.static:
        return
    if settings.max_cached_steps >= 0:
        assert sum(prunes) <= settings.max_cached_steps
    if settings.max_continuous_cached_steps >= 0:
        runs = "".join("p" if pruned else " " for pruned in prunes).split()
        assert max(map(len, runs), default=0) <= settings.max_continuous_cached_steps
    threshold = settings.residual_diff_threshold
    for step, row in enumerate(decided):
        for index, decision in enumerate(row):
            pruned, value = decision.action is Action.REUSE, decision.difference
            if decision.reason is BELOW_DYNAMIC:
                assert settings.enable_dynamic_prune_threshold and threshold <= value < 2 * threshold
            elif value is not None and math.isfinite(value) and not settings.enable_dynamic_prune_threshold:
                assert pruned == (value < threshold)
            if settings.max_accumulated_residual_diff_threshold is not None and pruned:
                since = [row[index] for row in decided[:step]][::-1]
                latest = next(n for n, d in enumerate(since) if d.action is Action.COMPUTE)
                assert sum(d.difference for d in since[:latest]) < settings.max_accumulated_residual_diff_threshold


@given(configs.filter(lambda settings: not settings.enable_dynamic_prune_threshold), generations)
def test_a_chain_of_one_block_is_decided_as_a_region_is(settings, values):
    values = [row[:1] for row in values]
    policy, history, expected = dbcache.DBCache(settings), dbcache.History(), []
    for step, (value,) in enumerate(values):
        situation = Situation(step, Stored.FITS if step else Stored.NOTHING)
        decision = policy.decide(situation, history, Mock(return_value=value))
        history = policy.advance(history, situation, decision)
        expected.append([decision])
    assert repr(run(settings, values)) == repr(expected)  # by their words: nan is not equal to itself
