"""InferSequenceAxes and InsertUlysses: each way to run on parts, on two and three ranks of gloo, against one rank.

All cases are captured in this process, and run by ranks that are forked once for each number of ranks.
"""

from __future__ import annotations

import functools
import traceback
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lib import models
from lib.helpers import capture, outcome_of, run_graph
from lib.ranks import close, on_ranks, ranks_of
from torch import nn

from cachedit_fx.passes.detect_block_loops import DetectBlockLoops
from cachedit_fx.passes.graph_values import op_counts
from cachedit_fx.passes.infer_sequence_axes import InferSequenceAxes, SequenceAxes
from cachedit_fx.passes.insert_ulysses import ContextParallel, InsertUlysses
from cachedit_fx.passes.normalize import Normalize
from cachedit_fx.passes.overlap_collectives import OverlapCollectives

pytestmark = pytest.mark.xdist_group("ulysses rules")

WIDTH = 16


class Layer(nn.Module):
    """A block that adds `mix` of its input to it, and then a feed-forward."""

    def __init__(self, mix, heads):
        super().__init__()
        self.qkv, self.out, self.ff = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mix, self.heads = mix, heads

    def forward(self, x, *others):
        x = x + self.out(self.mix(self, x, *others))
        return x + self.ff(F.layer_norm(x, (WIDTH,)))


class Model(nn.Module):
    """Three such blocks between two linear layers. Further inputs go to each block."""

    def __init__(self, mix, heads=2):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Layer(mix, heads) for _ in range(3))

    def forward(self, x, *others):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, *others)
        return self.last(x)


def heads_of(layer, x):
    """q, k and v as [batch, heads, tokens, size]."""
    return (each.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for each in layer.qkv(x).chunk(3, dim=-1))


def attends(layer, x, mask=None, **options):
    q, k, v = heads_of(layer, x)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options).transpose(1, 2).flatten(2)


def rotated(layer, x, table):
    q, k, v = heads_of(layer, x)

    def turned(each):
        return each * table.cos() + torch.stack((-each[..., 1::2], each[..., ::2]), -1).flatten(3) * table.sin()

    return F.scaled_dot_product_attention(turned(q), turned(k), v).transpose(1, 2).flatten(2)


def rotated_in_place(layer, x, table):
    """The first tokens stay as they are."""
    q, k, v = heads_of(layer, x)
    q = q.clone()
    q[:, :, 3:] = q[:, :, 3:] * table[3:].cos()
    halves = torch.empty_like(k)
    halves[..., ::2], halves[..., 1::2] = k[..., 1::2], k[..., ::2]
    return F.scaled_dot_product_attention(q, halves, v).transpose(1, 2).flatten(2)


def by_hand(layer, x, mask=None):
    q, k, v = heads_of(layer, x)
    scores = q @ k.transpose(-1, -2) * 0.5
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def by_einsum(layer, x):
    q, k, v = heads_of(layer, x)
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, v).flatten(2)


def linear_attention(layer, x):
    q, k, v = (each.relu() for each in heads_of(layer, x))
    return ((q @ (k.transpose(-1, -2) @ v)) / (1 + k.sum(-2, keepdim=True))).transpose(1, 2).flatten(2)


def looks_at_text(layer, x, text):
    q, _, _ = heads_of(layer, x)
    _, k, v = heads_of(layer, text)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def joins_text(layer, x, text):
    """The text is joined to the image for attention, and left behind after it."""
    length = text.shape[1]
    return attends(layer, torch.cat([text, x], 1))[:, length:]


def in_frames(layer, x):
    """Attention in each of four frames, then in each place over the frames."""
    y = attends(layer, x.reshape(4, -1, WIDTH)).reshape(x.shape)
    y = y.reshape(1, 4, -1, WIDTH).transpose(1, 2).flatten(0, 1)
    return attends(layer, y).reshape(1, -1, 4, WIDTH).transpose(1, 2).reshape(x.shape)


def grouped(layer, x):
    q, k, v = heads_of(layer, x)
    k, v = (each[:, :2] for each in (k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def repeated(layer, x):
    q, k, v = heads_of(layer, x)
    k, v = (each[:, :1].repeat_interleave(layer.heads, 1) for each in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def sorts(layer, x):
    """No rule knows what to do with it."""
    return torch.fft.fft(layer.qkv(x)[..., :WIDTH], dim=1).real


def counts(layer, x):
    """Running sums in place, along the tokens."""
    y = torch.zeros_like(x)
    y += x
    y[:, 1:] = y[:, 1:] + y[:, :-1]
    return y


class Joint(nn.Module):
    """Blocks of two streams, then blocks of both as one, which is taken apart at the end."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.pairs = nn.ModuleList(models.JointBlock() for _ in range(3))
        self.single = nn.ModuleList(models.Block() for _ in range(3))

    def forward(self, x, text, timestep):
        temb, length = models.time_embedding(timestep), text.shape[1]
        x = self.first(x)
        for block in self.pairs:
            text, x = block(x, text, temb)
        x = torch.cat([text, x], 1)
        for block in self.single:
            x = block(x, temb)
        return x[:, length:]


class JoinedBefore(nn.Module):
    """The streams are joined before the blocks, and each block takes them apart."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Layer(attends, 2) for _ in range(3))
        self.text = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, text):
        length = text.shape[1]
        x = torch.cat([text, x], 1)
        for block in self.blocks:
            x = block(x)
            text, image = x.split([length, x.shape[1] - length], 1)
            x = torch.cat([text + self.text(text), image], 1)
        return x[:, length:]


class WritesLate(nn.Module):
    """The stream is made, and then written to, before the blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Layer(attends, 2) for _ in range(3))

    def forward(self, x, text):
        joint = torch.zeros(x.shape[0], x.shape[1] + text.shape[1], WIDTH)
        joint[:, : text.shape[1]] = text
        joint[:, text.shape[1] :] = x
        for block in self.blocks:
            joint = block(joint)
        return joint


def tokens(count, batch=1):
    return torch.randn(batch, count, WIDTH)


def keys(count):
    """A mask of keys, of which a third is hidden."""
    return (torch.arange(count) % 3 > 0)[None, None, None]


CASES: dict[str, Any] = {
    "plain": lambda: (Model(attends), tokens(6)),
    "odd length": lambda: (Model(attends), tokens(7)),
    "batch": lambda: (Model(attends), tokens(7, 3)),
    "three heads": lambda: (Model(attends, heads=4), tokens(7)),
    "mask of keys": lambda: (Model(attends), tokens(7), keys(7)),
    "mask of pairs": lambda: (Model(attends), tokens(7), torch.randn(7, 7)),
    "mask of heads": lambda: (Model(attends, heads=4), tokens(7), torch.randn(1, 4, 7, 7)),
    "causal": lambda: (Model(functools.partial(attends, is_causal=True)), tokens(7)),
    "rotary": lambda: (Model(rotated), tokens(7), torch.randn(7, 8)),
    "rotary in place": lambda: (Model(rotated_in_place), tokens(7), torch.randn(7, 8)),
    "by hand": lambda: (Model(by_hand), tokens(7)),
    "by hand, mask": lambda: (Model(by_hand), tokens(7), torch.randn(7, 7)),
    "by einsum": lambda: (Model(by_einsum), tokens(7)),
    "linear attention": lambda: (Model(linear_attention), tokens(7)),
    "text": lambda: (Model(looks_at_text), tokens(7), tokens(5)),
    "joined text": lambda: (Model(joins_text), tokens(7), tokens(5)),
    "frames": lambda: (Model(in_frames), tokens(12)),
    "grouped heads": lambda: (Model(grouped, heads=4), tokens(7)),
    "repeated heads": lambda: (Model(repeated), tokens(7)),
    "two streams": lambda: (Joint(), tokens(7), tokens(5), torch.tensor([500.0])),
    "joined before": lambda: (JoinedBefore(), tokens(7), tokens(5)),
    "written before": lambda: (WritesLate(), tokens(7), tokens(5)),
    "no rule": lambda: (Model(sorts), tokens(7)),
    "written along tokens": lambda: (Model(counts), tokens(7)),
}
GATHERED = {"no rule", "written along tokens"}
"""Cases whose blocks gather with two ranks."""
FEW_HEADS = {name for name in CASES if name not in GATHERED} - {
    "three heads", "mask of heads", "linear attention", "text", "grouped heads", "frames", "batch", "causal",
}  # fmt: skip
"""Cases whose two heads are fewer than three ranks."""

OVERLAPPED = ("odd length", "rotary in place", "linear attention", "two streams", "no rule", "written along tokens")
"""Cases that run once more, with collectives that run beside the computation."""


@functools.cache
def graphs():
    torch.manual_seed(0)
    return {name: capture(*make()) for name, make in CASES.items()}


def rewritten(name, ranks, *more):
    """The outcome of the passes, and of `more`, on a case's graph, for all ranks."""
    group = ranks_of(ranks)
    assert group is not None
    passes = Normalize(), DetectBlockLoops(), InferSequenceAxes(ranks), InsertUlysses(group.name)
    return outcome_of(graphs()[name].copy(), *passes, *more)


@functools.cache
def results(ranks):
    """For each rank: case -> (results, the fact, op counts), or the traceback of what it raised.

    ("overlapped", case) -> results and op counts with collectives that run beside the computation.
    """
    graphs()

    def run(rank):
        found: dict[Any, Any] = {}
        for name, graph in graphs().items():
            try:
                outcome = rewritten(name, ranks)
                outputs = run_graph(outcome.graph_module, graph.inputs)
                found[name] = outputs, outcome.facts.get(ContextParallel), op_counts(outcome.graph_module)
                if ranks == 2 and name in OVERLAPPED:
                    overlapped = rewritten(name, ranks, OverlapCollectives()).graph_module
                    found["overlapped", name] = run_graph(overlapped, graph.inputs), op_counts(overlapped)
            except Exception:
                found[name] = traceback.format_exc()
        return found

    return on_ranks(run, ranks)


@pytest.mark.budget(60, "captures all cases, and two or three ranks run them")
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_rank(case, ranks):
    for found in results(ranks):
        assert not isinstance(found[case], str), found[case]
        outputs, fact, _ = found[case]
        expected = graphs()[case].expected
        assert len(outputs) == len(expected)
        assert all(close(a, b) for a, b in zip(outputs, expected, strict=True))
        assert fact is not None and fact.share >= 0.5


@pytest.mark.parametrize("case", CASES)
def test_gathers_only_where_it_must(case):
    _, fact, ops = results(2)[0][case]
    assert bool(fact.gathers) == (case in GATHERED)
    assert ops["gather_sequence"] > 1 if case in GATHERED else ops["gather_sequence"] == 1  # one is for the result
    assert fact.share > 0.9 or case == "text" or case in GATHERED


@pytest.mark.parametrize("case", OVERLAPPED)
def test_overlap_changes_no_bit(case):
    for found in results(2):
        outputs, ops = found["overlapped", case]
        assert all(torch.equal(a, b) for a, b in zip(outputs, found[case][0], strict=True))
        assert not ops.keys().isdisjoint({"start_exchange", "start_gather_sequence", "start_sum_over_ranks"})


@pytest.mark.parametrize("case", sorted(FEW_HEADS))
def test_fewer_heads_than_ranks_gather_keys_and_values(case):
    _, fact, _ = results(3)[0][case]
    assert fact.gathers and fact.share > 0.9


def test_text_and_frames_need_no_exchange():
    found = results(2)[0]
    assert found["text"][1].exchanges == 0
    assert found["frames"][1].exchanges < 3 * 4 * 2
    assert found["plain"][1].exchanges == 3 * 4


def test_linear_attention_adds_up_over_ranks():
    _, fact, ops = results(2)[0]["linear attention"]
    assert ops["sum_over_ranks"] == 2 * 3 and fact.exchanges == 0


def test_blocks_stay_alike_and_ranks_have_one_text():
    def codes(rank):
        outcome = rewritten("two streams", 2)
        detection = DetectBlockLoops().run(outcome.graph_module, outcome.facts)
        return outcome.graph_module.code, [loop.num_blocks for loop in detection.chain_loops]

    graphs()
    first, second = on_ranks(codes)
    assert first == second and first[1] == [3, 3]


def test_one_rank_or_no_chain_match_nothing():
    gm = graphs()["plain"].copy()
    outcome = outcome_of(gm, Normalize(), DetectBlockLoops(), InferSequenceAxes(1), InsertUlysses(""))
    assert SequenceAxes not in outcome.facts and ContextParallel not in outcome.facts
    flat = capture(lambda x: x * 2 + 1, tokens(6))
    outcome = outcome_of(flat.gm, Normalize(), DetectBlockLoops(), InferSequenceAxes(2), InsertUlysses(""))
    assert ContextParallel not in outcome.facts
