"""Estimates the seconds of a denoising step on several ranks: of the rank that does most, and waits most.

    step  = calls x (compute + packing + waiting) + waiting for the other branch
    calls = branches / cfg, or 1 if the branches are one doubled batch

With P = ring x ulysses ranks that share the tokens N of a call, and ceilings for what does not divide:

    linear layers   max(FLOPs x (N / P) / N, bytes of their weights / memory)       the roofline model
    attention       4 x (N / ring) x N x (heads / ulysses) x head size
    Ulysses         4 exchanges (q, k, v, result) of N / P tokens; (ulysses - 1) / ulysses of each leaves the rank
    ring            (ring - 1) passes of keys and values of N / ring tokens and heads / ulysses heads,
                    each beside attention to one chunk: waiting = max(0, sending - attention / ring)
    guidance        one result for the other half of the ranks

Sources: DeepSpeed-Ulysses (arXiv 2309.14509) for the four exchanges; Ring Attention (arXiv 2310.01889) and USP (arXiv
2405.07719) for passes beside attention; the roofline model (Williams, 2009) for weights.

What is left out: prologue and epilogue, what does not depend on the sample (it is kept between steps), launches by the
host, and that sending takes processors of the card from computing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cachedit_fx.parallel_plan.descriptions import SCALE_BYTES, Blocks, Cards, Model, Split, longest_part

PACKING = 4
"""How often an exchange in 16 bits reads or writes each element: one copy before it, one after it."""
PACKING_FLOAT8 = 2
"""How often an exchange in eight bits reads or writes each element in the model's dtype: when rounding, and after."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, and what a rank sends in it.

    Attributes:
        linear, attention: computing.
        packing: copies around exchanges, rounding to eight bits, merging the ring's results.
        waiting: for what -> seconds that nothing else fills.
        sent: for what -> bytes.
    """

    linear: float
    attention: float
    packing: float
    waiting: Mapping[str, float] = field(default_factory=dict)
    sent: Mapping[str, float] = field(default_factory=dict)

    @property
    def compute(self) -> float:
        """Seconds of computing."""
        return self.linear + self.attention

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.compute + self.packing + sum(self.waiting.values())


def cost(model: Model, cards: Cards, split: Split) -> Cost:
    """The cost of a step.

    Raises:
        ValueError: if the step cannot be split so.
    """
    if obstacle := refusal(model, split):
        raise ValueError(f"{split.words}: {obstacle}")
    batch = model.branches if model.is_doubled and split.cfg == 1 else 1
    calls = model.branches // batch // split.cfg
    parts = [_of_blocks(each, model.element_bytes, batch, cards, split) for each in model.blocks]
    waiting = {kind: calls * sum(part.waiting[kind] for part in parts) for kind in ("ulysses", "ring")}
    sent = {kind: calls * sum(part.sent[kind] for part in parts) for kind in ("ulysses", "ring")}
    leaving = batch * model.result_bytes * (split.tokens - 1) / split.tokens
    sent["gather"], waiting["gather"] = calls * leaving, calls * all_to_all_seconds(leaving, split.tokens, cards)
    if split.cfg > 1:
        sent["branches"] = model.result_bytes
        waiting["branches"] = cards.link_of(split.ranks).seconds(model.result_bytes)
    return Cost(
        calls * sum(part.linear for part in parts),
        calls * sum(part.attention for part in parts),
        calls * sum(part.packing for part in parts),
        {kind: seconds for kind, seconds in waiting.items() if seconds},
        {kind: size for kind, size in sent.items() if size},
    )


def refusal(model: Model, split: Split) -> str:
    """Why the step cannot be split so; empty if it can."""
    if split.cfg > model.branches:
        return "guidance has one branch"
    if split.ulysses > model.heads:
        return f"attention has {model.heads} heads, fewer than ranks"
    if split.tokens > model.tokens:
        return f"a call has {model.tokens} tokens, fewer than ranks"
    if split.ulysses == 1 and (split.is_async or split.float8):
        return "no heads are exchanged"
    return ""


def _of_blocks(blocks: Blocks, element_bytes: int, batch: int, cards: Cards, split: Split) -> Cost:
    """The cost of all blocks of one kind in one call."""
    own = longest_part(blocks.segments, split.tokens)
    chunk = longest_part(blocks.segments, split.ring)
    width = -(-blocks.heads // split.ulysses) * blocks.head_size
    share = batch * own / blocks.tokens
    linear = max(cards.compute_seconds(blocks.token_flops * share), cards.memory_seconds(blocks.weight_bytes))
    attention = cards.compute_seconds(4 * batch * chunk * blocks.tokens * width)
    sent, waiting, packing = {"ulysses": 0.0, "ring": 0.0}, {"ulysses": 0.0, "ring": 0.0}, 0.0
    if split.ulysses > 1:
        leaving = _leaving(blocks, batch * own, batch, batch * chunk * width, element_bytes, split)
        seconds = [all_to_all_seconds(size, split.ulysses, cards) for size in leaving]
        projection, beside = (
            cards.compute_seconds(flops * share) for flops in (blocks.projection_flops, blocks.beside_flops)
        )
        sent["ulysses"] = sum(leaving)
        waiting["ulysses"] = _waiting(seconds, projection, beside) if split.is_async else sum(seconds)
        packing += cards.memory_seconds(_packed(batch * own * blocks.inner_width, element_bytes, split))
    if split.ring > 1:
        passes = split.ring - 1
        keys_and_values = 2 * batch * chunk * width * element_bytes
        sent["ring"] = passes * keys_and_values
        transfer = cards.link_of(split.tokens).seconds(keys_and_values)
        waiting["ring"] = passes * max(0.0, transfer - attention / split.ring)
        merged = batch * chunk * width * (4 + 4 + element_bytes)  # the sum is float32, read and written
        packing += cards.memory_seconds(passes * merged)
    return Cost(
        blocks.count * linear,
        blocks.count * attention,
        blocks.count * packing,
        {kind: blocks.count * each for kind, each in waiting.items()},
        {kind: blocks.count * each for kind, each in sent.items()},
    )


def _leaving(
    blocks: Blocks, own: int, means: int, result: int, element_bytes: int, split: Split
) -> tuple[float, float, float, float]:
    """Bytes that leave the rank for queries, keys, values and the result of one block.

    In float8 a head of a token takes its size and a scale: (D + 4) / 2 D of 16 bits, 0.516 at D = 128. All but keys:
    (3 (D + 4) + 2 D) / 8 D, which is 0.637. Keys travel less their mean, which is one more token.

    Args:
        own: the rank's tokens, of all samples.
        means: samples.
        result: elements of the rank's result of attention.
    """
    plain = element_bytes * blocks.head_size
    row = blocks.head_size + SCALE_BYTES if split.float8 else plain
    queries = own * blocks.heads * row
    keys = own * blocks.heads * plain
    if split.float8 == "with_keys":
        keys = queries + means * blocks.heads * plain
    leaves = (split.ulysses - 1) / split.ulysses
    return queries * leaves, keys * leaves, queries * leaves, result // blocks.head_size * row * leaves


def _packed(elements: int, element_bytes: int, split: Split) -> float:
    """Bytes that copies around the four exchanges of one block read and write, if one value has `elements`."""
    plain = PACKING * element_bytes
    small = PACKING + PACKING_FLOAT8 + PACKING_FLOAT8 * element_bytes
    rounded = {False: 0, True: 3, "with_keys": 4}[split.float8]
    return elements * (rounded * small + (4 - rounded) * plain)


def _waiting(seconds: list[float], projection: float, beside: float) -> float:
    """Seconds of waiting in one block if each exchange starts as soon as its value is made.

    Exchanges follow each other on the wire, projections on the card: that of queries runs beside the projections of
    keys and values, and so on. The linear layers beside attention hide what is left of these three, or the result's.

    Args:
        seconds: of the exchanges of queries, keys, values and the result.
        projection: seconds of one projection.
        beside: seconds of the linear layers beside attention.
    """
    *inputs, result = seconds
    computed = arrived = 0.0
    for each in inputs:
        computed += projection
        arrived = max(computed, arrived) + each
    lag = arrived - computed
    return min(max(0.0, lag - beside) + result, lag + max(0.0, result - beside))


def all_to_all_seconds(leaving: float, ranks: int, cards: Cards) -> float:
    """Of sending `leaving` bytes, an equal part to each of the other ranks, which are consecutive.

    What leaves the node adds to what stays inside: on cards without NVLink both take the card's one PCIe slot.
    """
    if ranks == 1:
        return 0.0
    near = min(ranks, cards.per_node) - 1
    far = ranks - 1 - near
    seconds = cards.link_of(ranks).latency
    for members, link in ((near, cards.inside), (far, cards.between)):
        seconds += leaving * members / (ranks - 1) / (link.gbytes * 1e9)
    return seconds
