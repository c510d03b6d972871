"""What is read off the decisions, and the tables."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.report.stats import PERCENTILES, markdown, percentiles, render
from cachedit_fx.runtime.policies.base import Action, Decision, Reason
from cachedit_fx.runtime.stats import BranchStats, CacheStats

R = Reason


def because(reason, difference=None):
    return Decision(reason.action, reason, difference)


def stats(*decisions, name="blocks", first=1, last=1):
    made = CacheStats(name, num_blocks=10, first=first, last=last)
    for step, decision in enumerate(decisions):
        made.record(0, step, decision)
    return made


def printed(renderable, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


BELOW, ABOVE, WARMUP = because(R.BELOW_THRESHOLD, 0.05), because(R.ABOVE_THRESHOLD, 0.25), because(R.WARMUP)


def test_names_without_prefix_are_branch_0_and_cfg_is_branch_1():
    made = stats(WARMUP, ABOVE, BELOW)
    made.record(1, 0, WARMUP)
    made.record(1, 1, because(R.BELOW_THRESHOLD, 0.01))
    made.record(3, 0, WARMUP)
    assert made.executed_steps == 3
    assert made.cached_steps == [2]
    assert made.residual_diffs == {1: 0.25, 2: 0.05}
    assert made.reasons == {0: R.WARMUP, 1: R.ABOVE_THRESHOLD, 2: R.BELOW_THRESHOLD}
    assert made.cfg_cached_steps == [1]
    assert made.cfg_residual_diffs == {1: 0.01}
    assert [branch.executed_steps for branch in made.branches] == [3, 2, 0, 1]


def test_no_call_yet():
    made = stats()
    assert (made.executed_steps, made.cached_steps, made.cfg_cached_steps, made.work) == (0, [], [], 1.0)
    assert made.expected_seconds_saved is None and made.measured_seconds_saved is None
    assert made.branch(5) == BranchStats()
    assert "no steps cached" in str(made) and "0/0" in printed(render([made], details=True))


def test_work_counts_blocks_of_all_branches_and_uncached_calls():
    made = stats(WARMUP, BELOW)
    assert made.work == pytest.approx((10 + 2) / 20)
    made.record(1, 0, BELOW)
    assert made.work == pytest.approx((10 + 2 + 2) / 30)
    made.record_uncached("gradients wanted")
    assert made.work == pytest.approx((10 + 2 + 2 + 10) / 40)
    assert made.uncached_calls == 1 and made.uncached_causes == {"gradients wanted": 1}


def test_bypassing_everything_is_no_work():
    assert stats(because(R.MASK_REUSES), first=0, last=0).work == 0.0


@given(st.lists(st.sampled_from([WARMUP, BELOW, ABOVE]), min_size=1), st.integers(0, 5), st.integers(0, 5))
def test_work_lies_between_first_and_last_blocks_and_all(decisions, first, last):
    made = stats(*decisions, first=first, last=last)
    executed = sum(first + last if d is BELOW else 10 for d in decisions)
    assert made.work == pytest.approx(executed / (10 * len(decisions)))
    assert (first + last) / 10 <= made.work + 1e-9 and made.work <= 1.0


def test_times_are_medians_so_that_the_first_compiling_call_does_not_count():
    made = stats(WARMUP, WARMUP, WARMUP, BELOW)
    for seconds in (60.0, 1.0, 1.0):
        made.record_seconds(Action.COMPUTE, seconds)
    assert made.expected_seconds_saved == 1.0
    assert made.measured_seconds_saved is None
    made.record(0, 4, BELOW)
    made.record_seconds(Action.REUSE, 0.25)
    assert made.compute_seconds == [60.0, 1.0, 1.0] and made.reuse_seconds == [0.25]
    assert made.expected_seconds_saved == 2.0
    assert made.measured_seconds_saved == 1.5


def test_percentiles_interpolate():
    assert percentiles([4.0, 1.0, 2.0, 3.0, 5.0]) == pytest.approx(
        {"P00": 1.0, "P25": 2.0, "P50": 3.0, "P75": 4.0, "P95": 4.8, "Min": 1.0, "Max": 5.0}
    )
    assert percentiles([]) == percentiles([math.nan]) == {}


@given(st.lists(st.floats(0, 1) | st.sampled_from([math.nan, math.inf])))
def test_what_is_not_finite_is_counted_but_kept_out(values):
    finite = [value for value in values if math.isfinite(value)]
    made = stats(*(because(R.ABOVE_THRESHOLD if math.isfinite(v) else R.NOT_FINITE, v) for v in values))
    assert made.non_finite == len(values) - len(finite)
    assert list(made.residual_diffs.values()) == finite
    found = percentiles(made.residual_diffs.values())
    assert not finite or (found["Min"], found["Max"]) == (min(finite), max(finite))
    assert not finite or found["P00"] <= found["P25"] <= found["P50"] <= found["P75"] <= found["P95"] <= found["Max"]
    assert "nan" not in markdown([made]) and "inf" not in markdown([made])


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ((ABOVE, because(R.ABOVE_THRESHOLD, 0.21)), "smallest difference 0.21, threshold 0.08"),
        ((WARMUP, ABOVE, BELOW), None),
        ((WARMUP, because(R.MAX_CACHED)), None),
        ((WARMUP, because(R.NOT_FINITE, math.nan)), None),
        ((WARMUP, because(R.NOT_FINITE, math.nan), ABOVE), "smallest difference 0.25, threshold 0.08"),
        ((), None),
    ],
)  # fmt: skip
def test_inert_threshold(decisions, message):
    assert stats(*decisions).inert_threshold_message(DBCacheConfig()) == (message and f"inert threshold: {message}")


def test_a_branch_that_reuses_makes_the_threshold_work():
    made = stats(ABOVE)
    assert made.inert_threshold_message(DBCacheConfig()) is not None
    made.record(1, 0, BELOW)
    assert made.inert_threshold_message(DBCacheConfig()) is None


def test_markdown_has_a_row_for_each_branch():
    made = stats(WARMUP, ABOVE, BELOW, name="a|b")
    made.record(1, 0, WARMUP)
    assert markdown([made]).splitlines() == [
        f"| region | branch | F+mid+B | cached | work | {' | '.join(PERCENTILES)} |",
        f"| --- |{' ---: |' * 11}",
        "| a/b | 0 | 1+8+1 | 1/3 | 80% | 0.050 | 0.100 | 0.150 | 0.200 | 0.240 | 0.050 | 0.250 |",
        "| a/b | 1 |  | 0/1 |  | - | - | - | - | - | - | - |",
    ]


def test_steps_of_51_fit_into_100_columns_and_26_rows():
    reasons = [reason for reason in vars(R).values() if isinstance(reason, R)]
    longest = max(reasons, key=lambda reason: len(reason.value))
    made = stats(*[because(longest, 0.123456)] * 50, BELOW, name="transformer_blocks[0] + single [bold]blocks")
    text = printed(render([made], details=True))
    assert text.count("transformer_blocks[0] + single [bold]blocks") == 2
    assert "…" not in text
    assert sum(f"│ {longest.value}" in line for line in text.splitlines()) == 26
    assert text.count(f"│ {longest.value}") == 50
    assert " 50 │ reuse   │ below" in text and "0.0500" in text
    assert longest.explanation in text


def test_details_are_left_out_unless_asked_for():
    assert "warm-up" not in printed(render([stats(WARMUP)]))
    assert "warm-up" in printed(render([stats(WARMUP)], details=True))


def test_one_line():
    made = stats(WARMUP, BELOW, because(R.NOT_FINITE, math.nan))
    made.bytes_held = 3 * 2**20
    made.record_uncached("autocast")
    made.compute_seconds, made.reuse_seconds = [0.5], [0.25]
    assert str(made) == (
        "blocks: 1 of 3 steps cached, work 80%; by median times 0.5 s left out, 0.25 s saved; 3 MiB held; "
        "differences not finite: 1; uncached calls: 1 (autocast)"
    )
