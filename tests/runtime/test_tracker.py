"""Positions of calls: each rule by table, simulated servers by properties."""

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.runtime.clock import Timestep
from cachedit_fx.runtime.tracker import Evidence, Position, Tracker

SHAPE = (1, 64)
SEPARATE = DBCacheConfig(enable_separate_cfg=True)
FIRST = DBCacheConfig(enable_separate_cfg=True, cfg_compute_first=True, cfg_diff_compute_separate=False)
FUSED = DBCacheConfig(enable_separate_cfg=False)
AUTO = DBCacheConfig()


def observe(tracker, timestep, name=None, shape=SHAPE, tick=None):
    return tracker.observe(Evidence(shape, name, tick, Timestep(timestep)))


def positions(config, calls):
    """Positions as "g.s.b". A call is a timestep, (timestep, name) or (timestep, name, shape); "r" is a refresh."""
    tracker, found = Tracker(config), []
    for call in calls:
        if call == "r":
            tracker.refresh()
            continue
        timestep, name, shape = (*(call if isinstance(call, tuple) else (call,)), None, None)[:3]
        found.append("{}.{}.{}".format(*observe(tracker, timestep, name, shape or SHAPE)))
    return " ".join(found)


C, U = "cond", "uncond"


@pytest.mark.parametrize(
    ("config", "calls", "expected"),
    [
        # a step a call, falling and rising; turning back
        (AUTO, [9, 8, 7, 9, 8], "0.0.0 0.1.0 0.2.0 1.0.0 1.1.0"),
        (AUTO, [1, 2, 3, 1, 2], "0.0.0 0.1.0 0.2.0 1.0.0 1.1.0"),
        (AUTO, [9, 5, 1, 3, 2], "0.0.0 0.1.0 0.2.0 1.0.0 1.1.0"),
        # a new generation finds its own direction
        (AUTO, [9, 8, 9, 10, 11, 10], "0.0.0 0.1.0 1.0.0 1.1.0 1.2.0 2.0.0"),
        # branches by equal timesteps; they come and go; a fifth call
        (AUTO, [9, 9, 8, 8, 9, 9], "0.0.0 0.0.1 0.1.0 0.1.1 1.0.0 1.0.1"),
        (AUTO, [9, 8, 8, 7, 6, 6], "0.0.0 0.1.0 0.1.1 0.2.0 0.3.0 0.3.1"),
        (AUTO, [9, 9, 9, 9, 8, 8], "0.0.0 0.0.1 0.0.2 0.0.3 0.1.0 0.1.1"),
        (AUTO, [9, 9, 9, 9, 9], "0.0.0 0.0.1 0.0.2 0.0.3 1.0.0"),
        # nothing known: every call is a step; NaN is not known
        (AUTO, [None, None, None], "0.0.0 0.1.0 0.2.0"),
        (AUTO, [math.nan, math.nan, 3, math.nan], "0.0.0 0.1.0 0.2.0 0.3.0"),
        (AUTO, [9, 8, None, 9], "0.0.0 0.1.0 0.2.0 1.0.0"),
        (AUTO, [9, 8, math.nan, 9], "0.0.0 0.1.0 0.2.0 1.0.0"),
        # names; one seen again is a step at an equal timestep too; a name alone; unknown timesteps
        (AUTO, [(9, C), (9, U), (8, C), (8, U)], "0.0.0 0.0.1 0.1.0 0.1.1"),
        (AUTO, [(9, C), (9, U), (8, C), (8, U), (8, C), (8, U)], "0.0.0 0.0.1 0.1.0 0.1.1 0.2.0 0.2.1"),
        # at the first timestep it starts anew: what came before was a generation of one step
        (AUTO, [(9, C), (9, C), (8, C), (7, C)], "0.0.0 1.0.0 1.1.0 1.2.0"),
        (AUTO, [(9, C), (9, U), (9, C), (9, U), (8, C)], "0.0.0 0.0.1 1.0.0 1.0.1 1.1.0"),
        (AUTO, [(9, C)] * 5, "0.0.0 1.0.0 2.0.0 3.0.0 4.0.0"),
        (AUTO, [(9, U), (9, C), (8, C), (7, U), (7, C)], "0.0.0 0.0.1 0.1.1 0.2.0 0.2.1"),
        (AUTO, [(9, U), (9, C), (8, C), (9, C), (9, U)], "0.0.0 0.0.1 0.1.1 1.0.0 1.0.1"),
        (AUTO, [(None, C), (None, U), (None, C), (None, U)], "0.0.0 0.0.1 0.1.0 0.1.1"),
        (AUTO, [(9, "abcdef"[i % 6]) for i in range(7)], "0.0.0 0.0.1 0.0.2 0.0.3 0.0.4 0.0.5 1.0.0"),
        (AUTO, [9, (9, U), 8, (8, U)], "0.0.0 0.0.1 0.1.0 0.1.1"),
        # shapes: guidance that ends midway halves the batch; alone they tell only if no timestep does
        (AUTO, [(9, None, 1), (8, None, 1), (7, None, 2)], "0.0.0 0.1.0 0.2.0"),
        (AUTO, [(None, None, 1), (None, None, 1), (None, None, 2)], "0.0.0 0.1.0 1.0.0"),
        (AUTO, [(9, None, 1), (9, None, 2), (8, None, 1), (8, None, 2)], "0.0.0 0.0.1 0.1.0 0.1.1"),
        (AUTO, [(9, C, 1), (9, U, 2), (9, C, 3), (9, U, 2)], "0.0.0 0.0.1 1.0.0 1.0.1"),
        (SEPARATE, [(9, C, 1), (9, U, 2), (8, C, 2), (8, U, 1)], "0.0.0 0.0.1 0.1.0 0.1.1"),
        # explicit settings win over names, and those over detection
        (SEPARATE, [9, 9, 8, 8, 7], "0.0.0 0.0.1 0.1.0 0.1.1 0.2.0"),
        (SEPARATE, [None] * 3, "0.0.0 0.0.1 0.1.0"),
        (SEPARATE, [(9, U), (9, C), (9, C), (9, C)], "0.0.0 0.0.1 0.1.0 0.1.1"),
        (FIRST, [9, 9, 8, 8, 9, 9], "0.0.1 0.0.0 0.1.1 0.1.0 1.0.1 1.0.0"),
        (FUSED, [9, 8, 8, 7, 7, 9], "0.0.0 0.1.0 0.2.0 0.3.0 0.4.0 1.0.0"),
        (FUSED, [(9, C), (9, U)], "0.0.0 0.1.0"),
        # an interrupted step does not shift the next generation's branches
        (SEPARATE, [9, 9, 8, 9, 9], "0.0.0 0.0.1 0.1.0 1.0.0 1.0.1"),
        # refresh; twice is once, before the first call nothing
        (AUTO, ["r", 9, 8, "r", "r", 7, 6, 7], "0.0.0 0.1.0 1.0.0 1.1.0 2.0.0"),
        # a number of steps
        (AUTO.reset(num_inference_steps=2), [9, 8, 7, 6, 5], "0.0.0 0.1.0 1.0.0 1.1.0 2.0.0"),
        (AUTO.reset(num_inference_steps=2), [9, 9, 8, 8, 7, 7], "0.0.0 0.0.1 0.1.0 0.1.1 1.0.0 1.0.1"),
        (AUTO.reset(num_inference_steps=1), [(9, C), (9, U), (9, C), (9, U)], "0.0.0 0.0.1 1.0.0 1.0.1"),
        (AUTO.reset(num_inference_steps=5), [9, 8, 9, 8], "0.0.0 0.1.0 1.0.0 1.1.0"),
        (SEPARATE.reset(num_inference_steps=1), [9, 9, 9, 9], "0.0.0 0.0.1 1.0.0 1.0.1"),
        (FUSED.reset(num_inference_steps=2), [None] * 3, "0.0.0 0.1.0 1.0.0"),
        # documented as beyond what calls can tell
        (AUTO, [9, 9], "0.0.0 0.0.1"),
        (AUTO, [9, 8, 7, 6], "0.0.0 0.1.0 0.2.0 0.3.0"),
        (AUTO, [6, 9, 8], "0.0.0 0.1.0 1.0.0"),
        (AUTO, [(9, None, 1), (9, None, 2), (8, None, 2)], "0.0.0 0.0.1 0.1.0"),
        (SEPARATE, [9, 9, 8, 7, 7], "0.0.0 0.0.1 0.1.0 0.1.1 0.2.0"),
    ],
)  # fmt: skip
def test_rules(config, calls, expected):
    assert positions(config, calls) == expected


def test_a_replaced_config_counts_from_the_next_call():
    tracker = Tracker(AUTO)
    observe(tracker, 9)
    tracker.config = FUSED
    assert observe(tracker, 9) == Position(0, 1, 0)
    tracker.config = FUSED.reset(num_inference_steps=2)
    assert observe(tracker, 8) == Position(1, 0, 0)


@pytest.mark.parametrize(
    ("config", "calls", "name", "expected"),
    [
        (AUTO, [], None, ()),
        (AUTO, [9], None, (0,)),
        (AUTO, [9, 9], None, (0,)),
        (AUTO, [9, 9, 8], None, (0, 1)),
        (AUTO, [9, 9, 9, 9, 8, 8, 8], None, (0, 3)),
        (AUTO, [(9, C), (9, U)], C, (0,)),
        (AUTO, [(9, C), (9, U)], U, (1,)),
        (AUTO, [(9, C), (9, U)], "other", ()),
        (SEPARATE, [9], None, ()),
        (SEPARATE, [9, 9, 8], None, (1,)),
        (FIRST, [9, 9, 8], None, (0,)),
        (FUSED, [9, 9], None, (0,)),
    ],
)
def test_candidates(config, calls, name, expected):
    tracker = Tracker(config)
    for call in calls:
        timestep, branch = call if isinstance(call, tuple) else (call, None)
        observe(tracker, timestep, branch)
    assert tracker.candidates(name) == expected
    tracker.refresh()
    assert tracker.candidates(name) == ()


NAMES = ["cond", "uncond", "cond_2", "negative"]


@st.composite
def servers(draw, *, named=False, equal_branches=False):
    """Calls (timestep, name, shape, expected position) of generations run back to back by one model.

    Every generation starts before where the last one stopped, as seen in its direction, has two steps or more, and its
    own shapes. Steps call some of the branches: the first few, or, named, any in any order.
    """
    sign, calls, latest = draw(st.sampled_from([-1, 1])), [], None
    for generation in range(draw(st.integers(1, 4))):
        # Spacing is uneven, and starts differ (img2img): what counts is the order alone.
        times = sorted(draw(st.sets(st.integers(0, 1000), min_size=2, max_size=8)))
        assume(latest is None or times[0] < latest)
        latest = times[-1]
        branches = draw(st.integers(1, 4))
        shapes = draw(st.lists(st.integers(1, 3), min_size=branches, max_size=branches))
        order: dict[str, int] = {}
        for step, time in enumerate(times):
            used = draw(st.integers(1, branches)) if not equal_branches else branches
            labels = draw(st.permutations(NAMES[:branches]))[:used] if named else [None] * used
            for index, name in enumerate(labels):
                branch = index if name is None else order.setdefault(name, len(order))
                calls.append((sign * time / 7.0, name, shapes[branch], Position(generation, step, branch)))
    return calls


def follow(tracker, calls):
    """Observe every call; check that `candidates` announced each branch that has something stored."""
    seen: set[tuple[int, int]] = set()
    for timestep, name, shape, expected in calls:
        announced = tracker.candidates(name)
        found = observe(tracker, timestep, name, shape)
        assert found == expected
        if (found.generation, found.branch) in seen:
            assert found.branch in announced
        assert len(announced) <= (2 if name is None and tracker.config.enable_separate_cfg is None else 1)
        seen.add((found.generation, found.branch))


@given(servers())
def test_detection_follows_a_server(calls):
    follow(Tracker(AUTO), calls)


@given(servers(named=True))
def test_names_follow_a_server(calls):
    follow(Tracker(AUTO), calls)


@given(servers(equal_branches=True), st.sampled_from([SEPARATE, FIRST]))
def test_parity_follows_a_server_with_two_calls_a_step(calls, config):
    pairs = [call for call in calls if call[3].branch < 2]
    assume(sum(call[3].branch for call in pairs) * 2 == len(pairs))
    if config is FIRST:
        pairs = [(t, n, s, Position(p.generation, p.step, 1 - p.branch)) for t, n, s, p in pairs]
    follow(Tracker(config), pairs)


@given(servers())
def test_one_branch_follows_every_call(calls):
    expected, step = [], -1
    for (_, _, _, before), (timestep, _, _, now) in pairwise([calls[0], *calls]):
        step = step + 1 if before.generation == now.generation else 0
        expected.append((timestep, None, SHAPE, Position(now.generation, step, 0)))
    follow(Tracker(FUSED), expected)


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=5), min_size=1, max_size=4))
def test_named_branches_need_no_timestep_if_told_when_to_start(generations):
    """Unknown timesteps: each step calls its first few branches, by name, and no other evidence is given."""
    tracker = Tracker(AUTO)
    for number, steps in enumerate(generations):
        tracker.refresh()
        for step, used in enumerate(steps):
            for branch, name in enumerate(NAMES[:used]):
                found = observe(tracker, None, name)
                assert (found.generation, found.step) == (number, step)
                assert found.branch == branch


@given(st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_a_number_of_steps_is_enough(steps, generations, named):
    """Timesteps that never turn back (a model whose generations all go on where the last one stopped)."""
    tracker, timestep = Tracker(AUTO.reset(num_inference_steps=steps)), 0
    for generation in range(generations):
        for step in range(steps):
            timestep += 1
            for branch, name in enumerate(NAMES[:2] if named else [None, None]):
                assert observe(tracker, timestep, name) == Position(generation, step, branch)


@given(servers(), st.sets(st.integers(0, 40)))
def test_no_other_generation_gets_the_number_of_one_that_was_taken_back(calls, failures):
    """Calls of these indices fail once: what was noted of their generations must not hold for the retries."""
    tracker, latest = Tracker(AUTO), (-1, -1)
    for index, (*call, expected) in enumerate(calls):
        taken_back = set()
        if index in failures:
            before = tracker.generation
            taken_back = {observe(tracker, *call).generation} - {latest[1]}
            tracker.restore(before)
        position = observe(tracker, *call)
        assert position[1:] == expected[1:] and position.generation not in taken_back
        assert (position.generation == latest[1]) == (expected.generation == latest[0])
        latest = expected.generation, position.generation


@given(servers(), servers())
def test_two_trackers_do_not_meet(one, two):
    trackers = Tracker(AUTO), Tracker(AUTO)
    for index in range(max(len(one), len(two))):
        for tracker, calls in zip(trackers, (one, two), strict=True):
            if index < len(calls):
                *call, expected = calls[index]
                assert observe(tracker, *call) == expected
