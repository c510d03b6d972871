"""Describes a step of a model, cards with their links, and a split of the step over ranks.

Model: 60 blocks of 256 + 4096 tokens, 24 heads of 128, two branches of guidance
Cards: 8 a node, 600 TFLOP/s, 360 GB/s inside a node, 40 GB/s between nodes
Split: 2 branches x ring of 2 x Ulysses of 4 = 16 ranks
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

Float8: TypeAlias = bool | Literal["with_keys"]
SCALE_BYTES = 4
"""Of a float8 row: the scale of one head of one token."""


@dataclass(frozen=True)
class Blocks:
    """Blocks that are alike, on one sample and one branch of guidance.

    Attributes:
        name: of the list that holds them in the module.
        count: their number.
        segments: tokens that attend to each other, such as text and image. Each run is cut by itself.
        heads, head_size: of self-attention.
        width: of the values that queries, keys and values are projected from.
        token_flops: of one block: linear layers on these tokens, and attention to keys that each rank has whole.
        beside_flops: those of them that neither feed attention nor need its result, such as the MLP beside it.
        weight_bytes: of these linear layers, in one block.
    """

    name: str
    count: int
    segments: tuple[int, ...]
    heads: int
    head_size: int
    width: int
    token_flops: int
    beside_flops: int = 0
    weight_bytes: int = 0

    @property
    def tokens(self) -> int:
        """All that attend to each other."""
        return sum(self.segments)

    @property
    def inner_width(self) -> int:
        """Of a token's queries, all heads together."""
        return self.heads * self.head_size

    @property
    def attention_flops(self) -> int:
        """Of self-attention in one block: two products of tokens x tokens x width, 2 FLOPs each."""
        return 4 * self.tokens**2 * self.inner_width

    @property
    def projection_flops(self) -> int:
        """Of making the queries in one block; keys and values take as many."""
        return 2 * self.tokens * self.width * self.inner_width

    def resized(self, *segments: int) -> Blocks:
        """The same blocks on other numbers of tokens: the work of linear layers grows with them."""
        flops = (self.token_flops, self.beside_flops)
        token_flops, beside_flops = (each * sum(segments) // self.tokens for each in flops)
        return replace(self, segments=segments, token_flops=token_flops, beside_flops=beside_flops)


@dataclass(frozen=True)
class Model:
    """What a denoising step computes.

    Attributes:
        blocks: each kind.
        result_bytes: of the result of one branch.
        element_bytes: of an activation's element.
        branches: of guidance: 2 with a negative prompt.
        is_doubled: whether the branches are one call of a doubled batch, and not calls in sequence.
    """

    name: str
    blocks: tuple[Blocks, ...]
    result_bytes: int
    element_bytes: int = 2
    branches: int = 1
    is_doubled: bool = False

    @property
    def heads(self) -> int:
        """Of the blocks with the fewest."""
        return min(each.heads for each in self.blocks)

    @property
    def tokens(self) -> int:
        """Of the longest segment of the blocks with the fewest: no more ranks can have a part."""
        return min(max(each.segments) for each in self.blocks)

    @property
    def flops(self) -> int:
        """Of a step, all branches."""
        return self.branches * sum(each.count * (each.token_flops + each.attention_flops) for each in self.blocks)


@dataclass(frozen=True)
class Link:
    """A way between ranks.

    Attributes:
        gbytes: 10^9 bytes a second that a rank sends while it receives as many.
        latency: seconds that an exchange takes beyond its bytes.
    """

    gbytes: float
    latency: float

    def seconds(self, size: float) -> float:
        """Of sending `size` bytes."""
        return self.latency + size / (self.gbytes * 1e9)


@dataclass(frozen=True)
class Cards:
    """Cards that are alike, in nodes that are alike.

    Attributes:
        tflops: 10^12 FLOPs a second that a card reaches.
        memory_gbytes: 10^9 bytes a second that a card reads or writes in its memory.
        inside, between: the ways inside a node, and between nodes. Both tell what one card gets.
        per_node: cards of a node.
    """

    name: str
    tflops: float
    memory_gbytes: float
    inside: Link
    between: Link
    per_node: int = 8

    def compute_seconds(self, flops: float) -> float:
        """Of this much work."""
        return flops / (self.tflops * 1e12)

    def memory_seconds(self, size: float) -> float:
        """Of reading or writing `size` bytes."""
        return size / (self.memory_gbytes * 1e9)

    def link_of(self, ranks: int) -> Link:
        """The slowest way among this many consecutive ranks."""
        return self.inside if ranks <= self.per_node else self.between


@dataclass(frozen=True)
class Split:
    """How ranks share a step: consecutive ones exchange heads, then come the ring's, then the branches'.

    Attributes:
        cfg, ring, ulysses: ranks of each dimension.
        is_async: whether exchanges of heads run beside the computation.
        float8: what they send in eight bits: nothing, all but keys, or all.
    """

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    is_async: bool = False
    float8: Float8 = False

    @property
    def tokens(self) -> int:
        """Ranks that share the tokens of a call."""
        return self.ring * self.ulysses

    @property
    def ranks(self) -> int:
        """All that share a sample."""
        return self.cfg * self.tokens

    @property
    def words(self) -> str:
        """The options that ask for it."""
        words = ["cfg_parallel=True"] if self.cfg > 1 else []
        words += [f"ring_size={self.ring}"] if self.ring > 1 else []
        words += [f"ulysses_size={self.ulysses}"] if self.ulysses > 1 else []
        words += ["ulysses_async=True"] if self.is_async else []
        words += [f"ulysses_float8={self.float8!r}"] if self.float8 else []
        return ", ".join(words) or "one rank"


def longest_part(segments: Sequence[int], ranks: int) -> int:
    """Tokens of the rank with the most: the first ones take one more of each segment that the ranks do not divide."""
    return sum(math.ceil(length / ranks) for length in segments)
