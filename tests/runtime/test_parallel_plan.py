"""The model of a step's cost on several cards, and the choice among splits."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
from lib.counted import COUNTED

import cachedit_fx.parallel_plan
from cachedit_fx.parallel_plan.choice import choose, splits_of
from cachedit_fx.parallel_plan.costs import all_to_all_seconds, cost, refusal
from cachedit_fx.parallel_plan.descriptions import Blocks, Cards, Link, Model, Split, longest_part

FLUX = Model("FLUX.1-dev", COUNTED["FLUX.1-dev"], 4096 * 64 * 2)
QWEN = Model("Qwen-Image", COUNTED["Qwen-Image"], 4096 * 64 * 2, branches=2)
WAN = Model("Wan 2.1 14B", COUNTED["Wan 2.1 14B"], 16 * 21 * 90 * 160 * 2, branches=2)
MODELS = (FLUX, QWEN, WAN)
SLOW = Cards("slow links", 90, 700, Link(10, 20e-6), Link(2, 30e-6))
FAST = Cards("fast links", 570, 2700, Link(360, 20e-6), Link(40, 30e-6))


BLOCK = Blocks("blocks", 1, (1024,), heads=4, head_size=128, width=512, token_flops=10**10)


def of(branches=1, **changes):
    """A model of one block, with some of its parts changed."""
    return Model("small", (replace(BLOCK, **changes),), 10**6, branches=branches)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_one_rank_computes_and_nothing_else(model):
    alone = cost(model, FAST, Split())
    assert alone.seconds == alone.compute == pytest.approx(model.flops / 570e12)
    assert not alone.sent and not alone.waiting and not alone.packing


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_faster_links_are_never_slower(model):
    for split in (*splits_of(8), *splits_of(32, float8=True)):
        if refusal(model, split):
            continue
        for slower, faster in ((1, 10), (10, 25), (25, 400)):
            first, second = (Link(speed, 20e-6) for speed in (slower, faster))
            pairs = (
                (replace(SLOW, inside=first), replace(SLOW, inside=second)),
                (replace(SLOW, between=first), replace(SLOW, between=second)),
            )
            for before, after in pairs:
                assert cost(model, after, split).seconds <= cost(model, before, split).seconds, split


def test_all_parts_add_up():
    found = cost(QWEN, SLOW, Split(2, 2, 4))
    assert found.waiting.keys() == found.sent.keys() == {"ulysses", "ring", "gather", "branches"}
    assert found.seconds == found.linear + found.attention + found.packing + sum(found.waiting.values())


@pytest.mark.parametrize(("float8", "ratio"), [(True, (3 * 132 + 2 * 128) / 1024), ("with_keys", 132 / 256)])
def test_float8_sends_0_637_and_0_516_of_the_bytes(float8, ratio):
    plain, small = (cost(FLUX, SLOW, Split(ulysses=8, float8=form)).sent["ulysses"] for form in (False, float8))
    means = 57 * 24 * 128 * 2 * 7 / 8 if float8 == "with_keys" else 0
    assert small - means == pytest.approx(ratio * plain)
    assert round(ratio, 3) == {True: 0.637, "with_keys": 0.516}[float8]


def test_ulysses_sends_four_values_and_a_ring_keys_and_values():
    model = of()
    size = 1024 * 512 * 2
    assert cost(model, SLOW, Split(ulysses=4)).sent["ulysses"] == 4 * size / 4 * 3 / 4
    assert cost(model, SLOW, Split(ring=4)).sent["ring"] == 2 * size / 4 * 3
    mixed = cost(model, SLOW, Split(ring=2, ulysses=2)).sent
    assert mixed["ulysses"] == 4 * size / 4 / 2 and mixed["ring"] == 2 * size / 4


def test_a_ring_waits_for_what_attention_does_not_hide():
    model = of(token_flops=0)
    passes = Link(10, 20e-6).seconds(2 * 512 * 512 * 2)
    chunk = SLOW.compute_seconds(model.blocks[0].attention_flops) / 4
    assert cost(model, SLOW, Split(ring=2)).waiting["ring"] == pytest.approx(passes - chunk)
    assert "ring" not in cost(model, replace(SLOW, tflops=0.1), Split(ring=2)).waiting


def test_an_asynchronous_exchange_waits_less():
    """With slow cards the exchanges of queries and keys hide behind the next projections, with fast ones nothing."""
    model, split = of(), Split(ulysses=4)
    one = cost(model, SLOW, split).waiting["ulysses"] / 4
    for cards, waits in ((replace(SLOW, tflops=0.1), 2), (replace(SLOW, tflops=1e9), 4)):
        found = cost(model, cards, replace(split, is_async=True)).waiting["ulysses"]
        assert found == pytest.approx(waits * one, rel=1e-3)
    beside = of(beside_flops=10**10)
    hidden = cost(beside, replace(SLOW, tflops=0.1), replace(split, is_async=True)).waiting["ulysses"]
    assert hidden == pytest.approx(one)


def test_what_does_not_divide_is_rounded_up():
    assert longest_part((5, 7), 4) == 2 + 2
    three, four = (cost(of(), SLOW, Split(ulysses=size)) for size in (3, 4))
    assert three.attention == 2 * four.attention  # two of four heads on the first rank
    odd = cost(of(segments=(1025,)), SLOW, Split(ring=2))
    assert odd.linear / cost(of(segments=(1026,)), SLOW, Split(ring=2)).linear == pytest.approx(1026 / 1025)


def test_every_rank_reads_the_weights():
    model = of(token_flops=10**6, weight_bytes=7 * 10**8)
    assert cost(model, SLOW, Split(ulysses=4)).linear == pytest.approx(1e-3)
    assert cost(model, SLOW, Split()).linear == pytest.approx(1e-3)


def test_branches_of_one_batch_share_latencies_and_weights():
    two = of(branches=2, weight_bytes=10**6)
    doubled = replace(two, is_doubled=True)
    split = Split(ulysses=4)
    first, second = cost(two, SLOW, split), cost(doubled, SLOW, split)
    assert first.compute == pytest.approx(second.compute) and first.sent == second.sent
    assert sum(first.waiting.values()) - sum(second.waiting.values()) == pytest.approx(5 * 20e-6)  # exchanges, gather
    assert cost(two, SLOW, Split(cfg=2)) == cost(doubled, SLOW, Split(cfg=2))


def test_ranks_of_several_nodes_use_the_slower_way():
    for split in (Split(ulysses=2), Split(ring=2), Split(cfg=2)):
        near, far = (cost(of(branches=2), replace(SLOW, per_node=size), split) for size in (2, 1))
        assert near.seconds < far.seconds, split
    seconds = all_to_all_seconds(15e9, 16, replace(SLOW, inside=Link(7, 0), between=Link(8, 0)))
    assert seconds == pytest.approx(1 + 1)  # 7 of 15 parts inside, 8 between


# ---------------------------------------------------------------------------------------------------------------------
# Choice
# ---------------------------------------------------------------------------------------------------------------------


def best(model, cards, ranks, **options):
    choice = choose(model, cards, ranks, **options).best
    assert choice is not None and choice.split.ranks == ranks
    return choice.split


def test_two_cards_share_the_branches_of_guidance():
    plan = choose(QWEN, SLOW, 2)
    assert plan.best is not None and plan.best.split == Split(cfg=2) and plan.best.speed == pytest.approx(2, rel=0.01)
    assert "one result of 524 kB a step is sent" in plan.notes[0] and "ulysses_size=2" in plan.notes[1]


def test_one_branch_is_not_shared():
    plan = choose(FLUX, SLOW, 4)
    assert plan.best is not None and plan.best.split == Split(ulysses=4, is_async=True)
    assert "6 of 24 heads a rank" in plan.notes[0]
    assert (Split(cfg=2, ulysses=2), "guidance has one branch") in plan.refused


def test_fewer_heads_than_ranks_need_a_ring():
    plan = choose(of(heads=2), FAST, 8)
    assert all(choice.split.ring >= 4 for choice in plan.ranked) and len(plan.ranked) == 3
    assert "not ulysses_size=8: attention has 2 heads, fewer than ranks" in plan.notes


def test_a_ring_joins_nodes_and_ulysses_stays_inside():
    assert best(WAN, FAST, 32, with_async=False) == Split(2, 2, 8)


def test_a_ring_must_gain_a_tenth():
    long, quicker = of(segments=(65536,), heads=8), replace(SLOW, inside=Link(25, 20e-6))
    costs = [cost(long, quicker, split).seconds for split in (Split(ring=2), Split(ulysses=2))]
    assert costs[0] < costs[1] < 1.1 * costs[0]
    assert best(long, quicker, 2, with_async=False) == Split(ulysses=2)
    assert best(long, SLOW, 2, with_async=False) == Split(ring=2)


def test_float8_is_asked_for():
    assert all(not choice.split.float8 for choice in choose(QWEN, SLOW, 8).ranked)
    splits = [choice.split for choice in choose(QWEN, SLOW, 8, float8="with_keys").ranked]
    assert all((split.ulysses > 1) == (split.float8 == "with_keys") for split in splits)


@pytest.mark.parametrize(
    ("split", "obstacle"),
    [
        (Split(cfg=2), "guidance has one branch"),
        (Split(ulysses=8), "attention has 4 heads, fewer than ranks"),
        (Split(ring=2048), "a call has 1024 tokens, fewer than ranks"),
        (Split(ring=2, is_async=True), "no heads are exchanged"),
    ],
)
def test_impossible_splits_are_named(split, obstacle):
    assert refusal(of(), split) == obstacle
    with pytest.raises(ValueError, match=obstacle):
        cost(of(), SLOW, split)


def test_no_split_of_a_model_that_is_too_small():
    plan = choose(of(heads=1, segments=(2,)), SLOW, 4)
    assert plan.best is None and not plan.ranked and plan.notes


def test_words_are_those_of_the_options():
    split = Split(2, 2, 4, is_async=True, float8="with_keys")
    words = "cfg_parallel=True, ring_size=2, ulysses_size=4, ulysses_async=True, ulysses_float8='with_keys'"
    assert split.words == words and split.ranks == 16 and Split().words == "one rank"


def test_the_choice_needs_no_torch():
    folder = Path(cachedit_fx.parallel_plan.__file__).parent
    for name in ("descriptions", "costs", "choice"):
        tree = ast.walk(ast.parse((folder / f"{name}.py").read_text()))
        modules = {node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module}
        assert "torch" not in modules
        assert {m.rpartition(".")[0] for m in modules if m.startswith("cachedit_fx")} <= {"cachedit_fx.parallel_plan"}
