"""DBPrune in whole runs: exactness, work, generations, branches, statistics."""

import threading
from typing import Any

import pytest
import torch
from lib.pruning import ALWAYS, BASE, TEXTS, fresh, run
from lib.toys import FALLING, CountingBackend, Timeless, denoise, make, noise

import cachedit_fx
from cachedit_fx import (
    DBCacheConfig,
    enable_cache,
    refresh_context,
    summary,
)
from cachedit_fx.report.stats import markdown

pytestmark = pytest.mark.filterwarnings("ignore:.*inert threshold")
EAGER: dict[str, Any] = {"inner_backend": "eager"}

# ---------------------------------------------------------------------------------------------------------------------
# branches, generations, sessions


def recorded(chain):
    return [branch.parts for branch in chain.branches]


@pytest.mark.keep_compiled
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS, (TEXTS[0], noise(1, 7, seed=3))], ids=["one", "cfg", "lengths"])
def test_two_generations_back_to_back_equal_two_fresh_ones(texts, shared):
    """With branches in graphs of their own too (two lengths); limits hold for each branch and generation."""
    config = BASE.reset(max_warmup_steps=0, max_cached_steps=4)
    model = enable_cache(make(), config, **EAGER)
    for start, steps in [(noise(), 10), (noise(seed=5), 7), (noise(tokens=7), 7)]:
        expected, again = fresh(shared, config, timesteps=FALLING[:steps], texts=texts, start=start)
        assert torch.equal(denoise(model, FALLING[:steps], texts, start), expected)
        (chain,) = summary(model)
        assert recorded(chain) == recorded(again) and len(recorded(chain)) == len(texts)
        assert 0 < len(chain.pruned_steps) <= 4
        assert len(chain.cfg_pruned_blocks) == len(chain.cfg_actual_blocks) == (steps if len(texts) == 2 else 0)


def test_names_of_the_second_branch():
    _, chain = run(make(), BASE, texts=TEXTS)
    first, second = chain.branches
    assert chain.cfg_pruned_steps == second.cached_steps and chain.cfg_pruned_blocks == second.reused
    assert chain.cfg_pruned_ratio == sum(second.reused) / 60 != chain.pruned_ratio == sum(first.reused) / 60
    assert chain.work == pytest.approx(1 - (sum(first.reused) + sum(second.reused)) / 120)


@pytest.mark.parametrize("first", [False, True], ids=["conditional first", "unconditional first"])
def test_one_difference_of_a_block_for_both_branches(first):
    config = ALWAYS.reset(enable_separate_cfg=True)
    model = make()
    _, apart = run(model, config, texts=TEXTS)
    assert apart.branch(0).differences != apart.branch(1).differences
    _, shared = run(model, config.reset(cfg_diff_compute_separate=False, cfg_compute_first=first), texts=TEXTS)
    assert shared.branch(0).differences == shared.branch(1).differences == apart.branch(0).differences


def test_fused_calls_are_steps():
    _, chain = run(make(), ALWAYS.reset(enable_separate_cfg=False), texts=TEXTS)
    assert chain.pruned_blocks == [0] + [5] * 19


def test_threads_and_sessions_do_not_meet():
    model = enable_cache(make(), BASE, **EAGER)
    expected, seed_5 = denoise(model), denoise(model, start=noise(seed=5))
    found = {}

    def work(name, seed):
        with cachedit_fx.session(name):
            found[name] = denoise(model, start=noise(seed=seed))

    threads = [threading.Thread(target=work, args=("a", 1)), threading.Thread(target=work, args=("b", 5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found["a"], expected) and torch.equal(found["b"], seed_5)


def test_a_policy_changes_without_compiling_and_the_class_with():
    counting = CountingBackend()
    model = enable_cache(make(), BASE, inner_backend=counting)
    denoise(model)
    pieces = counting.pieces
    refresh_context(model, cache_config=ALWAYS)
    denoise(model)
    assert counting.pieces == pieces and sum(summary(model)[0].pruned_blocks) == 45
    refresh_context(model, cache_config=DBCacheConfig(1, max_warmup_steps=1, residual_diff_threshold=1e9))
    denoise(model)
    (region,) = summary(model)
    assert counting.pieces > pieces
    assert (region.name, len(region.cached_steps), region.pruned_blocks) == ("region_0", 9, [])
    assert region.pruned_ratio is None and region.actual_blocks == region.pruned_steps == []


# ---------------------------------------------------------------------------------------------------------------------
# statistics


def test_differences_that_are_not_numbers_are_counted_by_block():
    model, hidden = make(Timeless), noise()
    enable_cache(model, ALWAYS, **EAGER)
    hidden[0, 0, 0] = torch.nan
    with torch.no_grad(), pytest.warns(cachedit_fx.CacheWarning, match="infinite or not a number"):
        for _ in range(3):
            model(hidden, TEXTS[0])
    (chain,) = summary(model)
    assert chain.non_finite == 10 and chain.pruned_blocks == [0, 0, 0] and chain.residual_diffs == {}


def test_a_threshold_that_never_triggers_is_reported():
    _, chain = run(make(), BASE.reset(residual_diff_threshold=1e-6))
    smallest = min(chain.branch(0).differences)
    assert f"smallest difference {smallest:.3g}" in str(chain.inert_threshold_message(BASE))
    _, chain = run(make(), BASE)
    assert chain.inert_threshold_message(BASE) is None


def test_bytes_held_are_those_of_every_block():
    _, chain = run(make(), ALWAYS)
    hidden, prompt = 5 * 8, 3 * 8
    assert chain.bytes_held == 5 * (4 * hidden + 8 * (hidden + prompt))  # what entered; two residuals, one precision up


def test_tables(capsys):
    model = enable_cache(make(), ALWAYS.reset(non_prune_block_ids=[3]), **EAGER)
    denoise(model)
    (chain,) = summary(model, details=True)
    printed = capsys.readouterr().out
    assert "prune 4 of 4" in printed and "36 x below" in printed
    assert str(chain).startswith("chain_0: 9 of 10 steps pruned, 36 blocks in all, work 40%")
    assert "| chain_0 | 0 | 1+5+0 | 9/10 | 40% |" in markdown([chain])
