"""DBPrune in whole runs: exactness, work, generations, branches, statistics."""

import re
import threading
from typing import Any

import pytest
import torch
from lib import models
from lib.cases import Halves, text
from lib.helpers import UNMOVED
from lib.marks import only_in
from lib.pruning import ALWAYS, BASE, EAGER, STILL, TEXTS, fresh, pruned, run
from lib.shared import SharedCapture
from lib.toys import FALLING, CountingBackend, Timeless, denoise, make, noise

import cachedit_fx
from cachedit_fx import (
    DBCacheConfig,
    enable_cache,
    refresh_context,
    summary,
)
from cachedit_fx.metrics.flops import FlopCounter
from cachedit_fx.report.stats import markdown

pytestmark = pytest.mark.filterwarnings("ignore:.*inert threshold")

# ---------------------------------------------------------------------------------------------------------------------
# exactness and work

CASES: dict[str, Any] = {
    "toy": lambda: (models.Toy(5), models.inputs()),
    "two loops": lambda: (models.TwoLoops(3, 4), (*models.inputs(), text())),
    "image only": lambda: (models.TwoLoops(3, 4, style="image"), (*models.inputs(), text())),
    "last differs": lambda: (models.LastDiffers(), (*models.inputs(), text())),
    "refined": lambda: (models.Refined(), (*models.inputs(), text())),
    "parallel": lambda: (models.Parallel(), (*models.inputs(), text())),
    "controlled": lambda: (models.Controlled(), (*models.inputs(), [text(tokens=6) for _ in range(4)])),
    "skips": lambda: (models.UShaped(), models.inputs()),
    "in place": lambda: (models.InPlace(5), models.inputs()),
    "shared": lambda: (models.Shared(4), models.inputs()),
    "two graphs": lambda: (Halves(), models.inputs()),
    "flux": models.flux,
    "hunyuan": models.hunyuan_dit,
}


EXACT = [*((name, 0) for name in CASES), ("two loops", 1), ("flux", 4)]


SIBLINGS = [("hunyuan", 0), ("flux", 0), ("refined", 0), ("image only", 0)]
"""Forms of which the default run has a sibling."""


@pytest.mark.parametrize(("name", "first"), only_in("zoo", EXACT, but=[case for case in EXACT if case not in SIBLINGS]))
def test_exact_where_computed_and_on_identical_inputs(name, first):
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    model.eval()

    def call():
        (*_, result) = torch.utils._pytree.tree_leaves(model(*args, **kwargs))
        return result

    with torch.no_grad():
        plain = call()
        enable_cache(model, STILL.reset(Fn_compute_blocks=first, residual_diff_threshold=0), **EAGER)
        assert torch.equal(call(), plain) and torch.equal(call(), plain)
        enable_cache(model, STILL.reset(Fn_compute_blocks=first), **EAGER)
        assert all(torch.equal(call(), plain) for _ in range(3))
    for chain in summary(model):
        count = chain.num_blocks - first
        assert chain.pruned_blocks == [0, count, count]
        assert set(chain.branch(0).differences) == {0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_work_of_pruned_blocks_is_gone(dtype):
    model = make(Timeless, width=16).to(dtype)
    inputs = noise(2, 5, 16).to(dtype), noise(2, 3, 16, seed=2).to(dtype)
    with FlopCounter() as embed:
        model.embed(inputs[0])
    with FlopCounter() as block:
        model.blocks[0](inputs[0], inputs[1], inputs[1].mean(1))
    shared = SharedCapture(model)
    shared(*inputs)  # captures
    fewer = [(ALWAYS, 5), (ALWAYS.reset(Bn_compute_blocks=2), 3), (ALWAYS.reset(non_prune_block_ids=[2, 3]), 3)]
    for config, count in fewer:
        shared.compile_anew(cache=config, passes=UNMOVED)
        with FlopCounter() as computed:
            result = shared(*inputs)
        with FlopCounter() as reused:
            again = shared(*inputs)
        (chain,) = shared.summary()
        assert torch.equal(result, again)
        assert chain.pruned_blocks == [0, count]
        assert embed.flops and computed.flops == 2 * embed.flops + 6 * block.flops
        assert reused.flops == computed.flops - count * block.flops


def block_flops(model, blocks, arguments):
    """What each block costs, and the whole model."""
    costs: list[int] = []
    with torch.no_grad(), FlopCounter() as counter:
        started: list[int] = []
        handles = [block.register_forward_pre_hook(lambda *_: started.append(counter.flops)) for block in blocks]
        handles += [
            block.register_forward_hook(lambda *_: costs.append(counter.flops - started[-1])) for block in blocks
        ]
        model(**arguments)
    for handle in handles:
        handle.remove()
    return costs, counter.flops


def test_flux_spends_what_its_computed_blocks_cost():
    torch.manual_seed(0)
    model, inputs = models.flux()
    steps = [inputs | {"hidden_states": inputs["hidden_states"] * (1 + 0.1 * step)} for step in range(6)]
    blocks = [
        block for name, block in model.named_modules() if re.fullmatch(r"(single_)?transformer_blocks\.\d+", name)
    ]
    costs, whole = block_flops(model, blocks, inputs)
    assert len(costs) == 7 and len(set(costs)) > 1
    enable_cache(model, STILL.reset(residual_diff_threshold=0.09), passes=UNMOVED, **EAGER)
    spent = []
    with torch.no_grad():
        model(**steps[0])
        refresh_context(model)
        for arguments in steps:
            with FlopCounter() as counter:
                model(**arguments)
            spent.append(counter.flops)
    (chain,) = summary(model)
    assert any(0 < count < 6 for count in chain.pruned_blocks), chain.pruned_blocks
    assert spent == [whole - sum(costs[block] for block in blocks) for blocks in pruned(chain)]


@pytest.mark.parametrize("backend", ["aot_eager", "counting"])
def test_twins_share_one_compilation(backend):
    counts = []
    for blocks in (4, 9):
        torch._dynamo.reset()
        model, counting = make(blocks=blocks), CountingBackend()
        expected = denoise(make(blocks=blocks))
        inner = backend if backend == "aot_eager" else counting
        enable_cache(model, ALWAYS.reset(residual_diff_threshold=0), inner_backend=inner)
        torch.testing.assert_close(denoise(model), expected)
        counts.append(counting.pieces)
    assert counts[0] == counts[1] <= 4


@pytest.mark.keep_compiled
def test_granularity(shared):
    config = BASE.reset(non_prune_block_ids=[2])
    expected, chain = fresh(shared, config)
    found, by_region = fresh(shared, config, granularity="region")
    assert torch.equal(found, expected)
    assert pruned(by_region) == pruned(chain) and sum(chain.pruned_blocks)


def test_a_caller_may_write_to_its_input():
    """The first block takes the model's input as it is: what it is compared with must be a copy of that."""
    torch.manual_seed(0)
    model, (hidden, timestep) = models.LastDiffers(), models.inputs()
    prompt = text()
    enable_cache(model, STILL.reset(Fn_compute_blocks=0), **EAGER)
    with torch.no_grad():
        model(hidden, timestep, prompt)
        hidden.mul_(3)
        model(hidden, timestep, prompt)
    (chain,) = summary(model)
    assert chain.branch(0).parts[1][0].difference == pytest.approx(2)


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
