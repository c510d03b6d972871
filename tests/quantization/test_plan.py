"""Plans of quantization: the order of groups, the mixture of kinds, and what a plan leaves out."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachedit_fx.quantization.plan import Candidate, Plan, greedy_plans, plan_in_order

KINDS = "int8", "int4"


def candidate(group: str, error: float, saved: int, kind: str = "int8") -> Candidate:
    return Candidate(group, kind, (f"{group}.up", f"{group}.down"), error, saved)


def test_groups_are_taken_by_their_error_for_a_byte():
    cheap, dear, large = candidate("cheap", 1.0, 100), candidate("dear", 5.0, 100), candidate("large", 8.0, 400)
    plans = greedy_plans([dear, large, cheap])
    assert [plan.candidates for plan in plans] == [(), (cheap,), (cheap, large), (cheap, large, dear)]
    assert [(plan.error, plan.saved) for plan in plans] == [(0, 0), (1, 100), (9, 500), (14, 600)]


def test_a_group_gets_a_kind_of_fewer_bits_when_that_is_the_cheapest_step():
    careful, coarse = candidate("a", 1.0, 100), candidate("a", 4.0, 200, "int4")
    other = candidate("b", 2.0, 100)
    plans = greedy_plans([careful, coarse, other])
    assert [plan.candidates for plan in plans] == [(), (careful,), (careful, other), (other, coarse)]


@pytest.mark.parametrize(
    "useless",
    [
        pytest.param(candidate("a", 2.0, 50, "float8"), id="more error, fewer bytes"),
        pytest.param(candidate("a", 3.0, 150, "float8"), id="two others mixed are better"),
    ],
)
def test_kinds_that_others_beat_are_in_no_plan(useless):
    options = [candidate("a", 1.0, 100), useless, candidate("a", 4.0, 200, "int4")]
    assert all(useless not in plan.candidates for plan in greedy_plans(options))


GROUPS = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=2), min_size=1, max_size=5
)


@given(GROUPS)
def test_no_other_choice_has_less_error_and_saves_as_much(groups):
    options = [
        [candidate(str(number), float(error), saved, kind) for (error, saved), kind in zip(group, KINDS, strict=False)]
        for number, group in enumerate(groups)
    ]
    plans = greedy_plans([each for group in options for each in group])
    assert all(one.saved < other.saved and one.error <= other.error for one, other in itertools.pairwise(plans))
    every = [
        Plan(tuple(each for each in choice if each)) for choice in itertools.product(*([None, *g] for g in options))
    ]
    assert max(choice.saved for choice in every) == plans[-1].saved
    for plan in plans:
        assert not any(choice.saved >= plan.saved and choice.error < plan.error for choice in every)


def test_what_a_plan_leaves_out_is_kept_whatever_the_kind():
    candidates = [candidate("a", 1.0, 100), candidate("b", 2.0, 100)]
    assert Plan((candidates[0],)).per_layer(candidates) == {
        "a.up": "int8", "a.down": "int8", "b.up": None, "b.down": None
    }  # fmt: skip


def test_a_choice_in_a_given_order_saves_no_more_than_asked():
    order = [candidate("a", 1.0, 100), candidate("b", 1.0, 300), candidate("c", 1.0, 50)]
    assert plan_in_order(order, 160).candidates == (order[0], order[2])
    assert plan_in_order(order, 99).candidates == (order[2],)
    assert plan_in_order(order, 450).saved == 450
    assert plan_in_order([*order, candidate("a", 2.0, 150, "int4")], 200).saved == 200
