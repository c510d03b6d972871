"""The decision: each rule by table, their order and the bookkeeping by properties."""

import math
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.runtime.policies.base import Action, Decision, Reason, Situation, Stored
from cachedit_fx.runtime.policies.dbcache import DBCache, History

R = Reason


def known(cached=0, run=0, accumulated=0.0, stored=Stored.FITS):
    """What the policy remembers, and what there is to reuse."""
    return History(cached, run, accumulated), stored


STORED, NOTHING, OTHER_SHAPES = known(), known(stored=Stored.NOTHING), known(stored=Stored.OTHER_SHAPES)


def decide(settings, step, remembered, measure):
    history, stored = remembered
    return DBCache(settings).decide(Situation(step, stored), history, measure)


def advance(history, decision):
    return DBCache(config()).advance(history, Situation(0), decision)


def config(**fields):
    return DBCacheConfig(**{"max_warmup_steps": 0, "residual_diff_threshold": 0.1} | fields)


def unasked():
    raise AssertionError("the difference was asked for")


def static(mask, **fields):
    return config(steps_computation_mask=mask, steps_computation_policy="static", **fields)


@pytest.mark.parametrize(
    ("settings", "step", "history", "difference", "reason"),
    [
        # 1: warm-up; with an interval the steps between fall through
        (config(max_warmup_steps=4), 0, STORED, None, R.WARMUP),
        (config(max_warmup_steps=4), 3, STORED, None, R.WARMUP),
        (config(max_warmup_steps=4), 4, STORED, 0.05, R.BELOW_THRESHOLD),
        (config(max_warmup_steps=4, warmup_interval=2), 1, STORED, 0.05, R.BELOW_THRESHOLD),
        (config(max_warmup_steps=4, warmup_interval=2), 2, STORED, None, R.WARMUP),
        (config(max_warmup_steps=4, warmup_interval=3), 2, STORED, 0.05, R.BELOW_THRESHOLD),
        (config(max_warmup_steps=4, warmup_interval=2), 1, NOTHING, None, R.NOTHING_STORED),
        # 2: mask
        (config(steps_computation_mask="10"), 0, STORED, None, R.MASK_COMPUTES),
        (config(steps_computation_mask="10"), 1, STORED, 0.05, R.BELOW_THRESHOLD),
        (config(steps_computation_mask="10"), 1, STORED, 0.2, R.ABOVE_THRESHOLD),
        (config(steps_computation_mask="10"), 2, STORED, None, R.MASK_ENDED),
        (config(steps_computation_mask="10", max_warmup_steps=8), 1, STORED, 0.05, R.BELOW_THRESHOLD),
        (static("10"), 1, STORED, None, R.MASK_REUSES),
        (static("10"), 1, NOTHING, None, R.NOTHING_STORED),
        (static("10"), 1, OTHER_SHAPES, None, R.SHAPES_DIFFER),
        (static("10"), 2, STORED, None, R.MASK_ENDED),
        (static("10", Fn_compute_blocks=0), 1, STORED, None, R.MASK_REUSES),
        (static("10", max_cached_steps=0), 1, STORED, None, R.MASK_REUSES),
        (static("10", residual_diff_threshold=0.0), 1, STORED, None, R.MASK_REUSES),
        # 3, 4: budgets
        (config(max_cached_steps=2), 9, known(cached=1), 0.05, R.BELOW_THRESHOLD),
        (config(max_cached_steps=2), 9, known(cached=2), None, R.MAX_CACHED),
        (config(max_cached_steps=0), 9, STORED, None, R.MAX_CACHED),
        (config(max_continuous_cached_steps=2), 9, known(cached=5, run=1), 0.05, R.BELOW_THRESHOLD),
        (config(max_continuous_cached_steps=2), 9, known(cached=5, run=2), None, R.MAX_CONTINUOUS),
        # 5: what has accumulated, this step's difference not included
        (config(max_accumulated_residual_diff_threshold=0.2), 9, known(2, 2, 0.19), 0.09, R.BELOW_THRESHOLD),
        (config(max_accumulated_residual_diff_threshold=0.2), 9, known(2, 2, 0.2), None, R.ACCUMULATED),
        # 6: nothing to compare
        (config(residual_diff_threshold=0), 9, STORED, None, R.THRESHOLD_OFF),
        (config(residual_diff_threshold=-1), 9, NOTHING, None, R.THRESHOLD_OFF),
        (config(), 9, NOTHING, None, R.NOTHING_STORED),
        (config(), 9, OTHER_SHAPES, None, R.SHAPES_DIFFER),
        (config(residual_diff_threshold=2.0), 9, OTHER_SHAPES, None, R.SHAPES_DIFFER),
        # 7: the threshold itself is not below
        (config(), 9, STORED, 0.0999, R.BELOW_THRESHOLD),
        (config(), 9, STORED, 0.1, R.ABOVE_THRESHOLD),
        (config(residual_diff_threshold=math.inf), 9, STORED, 1e30, R.BELOW_THRESHOLD),
        (config(residual_diff_threshold=math.inf), 9, STORED, math.inf, R.NOT_FINITE),
        (config(), 9, STORED, math.nan, R.NOT_FINITE),
        (config(), 9, STORED, -math.inf, R.NOT_FINITE),
    ],
)  # fmt: skip
def test_rules(settings, step, history, difference, reason):
    decision = decide(settings, step, history, unasked if difference is None else lambda: difference)
    assert decision.reason is reason
    assert decision.action is reason.action
    assert decision.difference is difference


def test_two_reasons_reuse_and_all_explain_themselves():
    reasons = [value for value in vars(R).values() if isinstance(value, R)]
    assert {reason for reason in reasons if reason.action is Action.REUSE} == {R.MASK_REUSES, R.BELOW_THRESHOLD}
    assert len({reason.explanation for reason in reasons}) == len({reason.value for reason in reasons}) == 13
    assert len(reasons) == 13


ORDER: list[tuple[dict[str, Any], dict[str, Any], Reason]] = [
    ({"max_warmup_steps": 10}, {}, R.WARMUP),
    ({"max_cached_steps": 1}, {"cached": 1}, R.MAX_CACHED),
    ({"max_continuous_cached_steps": 1}, {"run": 1}, R.MAX_CONTINUOUS),
    ({"max_accumulated_residual_diff_threshold": 1.0}, {"accumulated": 1.0}, R.ACCUMULATED),
    ({"residual_diff_threshold": 0.0}, {}, R.THRESHOLD_OFF),
    ({}, {"stored": Stored.NOTHING}, R.NOTHING_STORED),
    ({}, {"stored": Stored.OTHER_SHAPES}, R.SHAPES_DIFFER),
    ({}, {}, R.BELOW_THRESHOLD),
]


@given(st.sets(st.integers(0, len(ORDER) - 2)))
def test_the_first_rule_that_matches_wins(active):
    settings: dict[str, Any] = {}
    history: dict[str, Any] = {}
    for index in sorted(active, reverse=True):
        settings |= ORDER[index][0]
        history |= ORDER[index][1]
    expected = ORDER[min(active, default=-1)][2]
    assert decide(config(**settings), 5, known(**history), lambda: 0.05).reason is expected


def test_a_mask_comes_before_the_budgets():
    settings = config(steps_computation_mask="01", max_cached_steps=0)
    assert decide(settings, 0, STORED, unasked).reason is R.MAX_CACHED
    assert decide(settings, 1, STORED, unasked).reason is R.MASK_COMPUTES


def test_advance():
    below, measured_nothing = Decision(Action.REUSE, R.BELOW_THRESHOLD, 0.25), Decision(Action.REUSE, R.MASK_REUSES)
    once = advance(History(), below)
    assert once == History(cached=1, run=1, accumulated=0.25)
    assert advance(advance(once, below), measured_nothing) == History(3, 3, 0.5)
    computed = Decision(Action.COMPUTE, R.ABOVE_THRESHOLD, 0.75)
    assert advance(once, computed) == History(cached=1)
    assert advance(History(), computed) == DBCache(config()).start()


def stored_at(step):
    """The first step of a generation has nothing to reuse, and is computed."""
    return Stored.FITS if step else Stored.NOTHING


def test_accumulated_differences_trip_again_after_a_reset():
    """cache-dit's reading (no reset) would compute every step from the first trip on."""
    settings, history, actions = config(max_accumulated_residual_diff_threshold=0.1), History(), ""
    for step in range(9):
        decision = decide(settings, step, (history, stored_at(step)), lambda: 0.0625)
        history = advance(history, decision)
        actions += decision.action.value[0]
    assert actions == "crrcrrcrr"


masks = st.none() | st.lists(st.integers(0, 1), min_size=1, max_size=12)
configs = st.builds(
    DBCacheConfig,
    residual_diff_threshold=st.sampled_from([0.0, 0.1, 0.3, 2.0]),
    max_accumulated_residual_diff_threshold=st.none() | st.floats(0, 1),
    max_warmup_steps=st.integers(0, 6),
    warmup_interval=st.integers(1, 3),
    max_cached_steps=st.integers(-1, 6),
    max_continuous_cached_steps=st.integers(-1, 3),
    steps_computation_mask=masks,
    steps_computation_policy=st.sampled_from(["dynamic", "static"]),
)
differences = st.lists(st.floats(0, 0.4) | st.sampled_from([math.nan, math.inf]), min_size=1, max_size=20)


@given(configs, differences)
def test_a_generation_keeps_its_promises(settings, values):
    """Run a whole generation and check each promise of the settings against the list of decisions alone."""
    history, decisions = History(), []
    for step, value in enumerate(values):
        difference = Mock(return_value=value)
        decision = decide(settings, step, (history, stored_at(step)), difference)
        assert difference.call_count == (decision.difference is not None)
        history = advance(history, decision)
        decisions.append(decision)

    reused = [decision.action is Action.REUSE for decision in decisions]
    assert not reused[0]
    assert history.cached == sum(reused)
    runs = [len(run) for run in "".join("r" if reuse else "c" for reuse in reused).split("c")]
    assert history.run == runs[-1]
    if settings.static:
        assert settings.steps_computation_mask is not None
        assert reused[1:] == [bit == 0 for bit in settings.steps_computation_mask[1 : len(values)]] + [False] * (
            len(values) - max(1, len(settings.steps_computation_mask))
        )
        assert all(decision.difference is None for decision in decisions)
        return
    if settings.max_cached_steps >= 0:
        assert sum(reused) <= settings.max_cached_steps
    if settings.max_continuous_cached_steps >= 0:
        assert max(runs) <= settings.max_continuous_cached_steps
    for step, (decision, value) in enumerate(zip(decisions, values, strict=True)):
        if reused[step]:
            assert value < settings.residual_diff_threshold
            mask = settings.steps_computation_mask
            if mask is None:
                assert step not in range(0, settings.max_warmup_steps, settings.warmup_interval)
            else:
                assert mask[step] == 0
        elif decision.difference is not None:
            assert not value < settings.residual_diff_threshold
