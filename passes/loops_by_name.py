"""Finds evidence of block loops in module names: numbered members of a container that follow one another.

nn_module_stack: blocks.0.attn, blocks.0.mlp, blocks.1.attn, ...   ->   span `blocks`: [0, 40), [40, 80), ...
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

MIN_BLOCKS = 2
MIN_LIKENESS = 0.5
"""Consecutive blocks must have this share of their fingerprints in common to belong to one loop."""


@dataclass
class Span:
    """A candidate loop: the tight ranges of its blocks, before gaps are shared out.

    Attributes:
        ranges: [start, end) of each block, in positions of body nodes.
        kinds: the class of each block, if the blocks are modules; empty otherwise.
    """

    name: str
    block_names: list[str]
    ranges: list[tuple[int, int]]
    kinds: list[Any] = field(default_factory=list)


def module_path(raw: str) -> str:
    """`L['self'].__dict__['_modules']['blocks'].0.attn` -> `blocks.0.attn`."""
    path = re.sub(r"(?:\.?__dict__)?\[['\"]_modules['\"]\]", "", raw)
    path = re.sub(r"\._modules(?=[\[.])", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path)
    path = re.sub(r"^L\.[^.]+\.?", "", path)
    return path.strip(".")


def _family(path: str) -> tuple[str, int] | None:
    """(`blocks.#`, 3) for `blocks.3`; (`block_#`, 3) for `block_3`; None if the last name ends in no number."""
    head, _, last = path.rpartition(".")
    match = re.fullmatch(r"(.*?)(\d+)", last)
    if match is None:
        return None
    return (f"{head}.{match[1]}#" if head else f"{match[1]}#"), int(match[2])


def spans_by_name(nodes: Sequence[fx.Node]) -> list[Span]:
    """A span for each family of numbered members that follow one another."""
    families: dict[str, dict[str, list[int]]] = defaultdict(dict)
    kinds: dict[str, Any] = {}
    for position, node in enumerate(nodes):
        for key, entry in (node.meta.get("nn_module_stack") or {}).items():
            path = module_path(entry[0])
            family = _family(path)
            if family is None:
                continue
            # The key distinguishes two calls of one module ("id@1"), the path two modules.
            call = f"{path}@{key.partition('@')[2]}" if "@" in str(key) else path
            kinds[call] = entry[1]
            bounds = families[family[0]].setdefault(call, [position, position])
            bounds[1] = position
    spans: list[Span] = []
    for family_name, calls in families.items():
        members = sorted((first, last + 1, name) for name, (first, last) in calls.items())
        overlap = any(after[0] < before[1] for before, after in itertools.pairwise(members))
        if len(members) >= MIN_BLOCKS and not overlap:
            name = family_name.removesuffix("#").rstrip("._") or family_name
            names = [member[2] for member in members]
            spans.append(Span(name, names, [member[:2] for member in members], [kinds[call] for call in names]))
    return spans


def repeats_itself(span: Span, prints: Sequence[Hashable]) -> bool:
    """Whether a block is similar to one of the next two, by class or by fingerprints.

    Similar blocks need not be neighbours: dense and expert blocks may alternate.
    """
    blocks = list(zip(span.kinds, span.ranges, strict=True))
    return any(
        kind == other_kind or are_similar(prints, first, second)
        for gap in (1, 2)
        for (kind, first), (other_kind, second) in zip(blocks, blocks[gap:], strict=False)
    )


def similar_spans(span: Span, prints: Sequence[Hashable]) -> list[Span]:
    """The span cut between blocks that are not similar. Spans of one block are left out."""
    cuts = [
        index for index, pair in enumerate(itertools.pairwise(span.ranges), start=1) if not are_similar(prints, *pair)
    ]
    edges = [0, *cuts, len(span.ranges)]
    return [
        Span(span.name, span.block_names[start:end], span.ranges[start:end])
        for start, end in itertools.pairwise(edges)
        if end - start >= MIN_BLOCKS
    ]


def are_similar(prints: Sequence[Hashable], a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two ranges have at least `MIN_LIKENESS` of their fingerprints in common, in any order."""
    first, second = Counter(prints[a[0] : a[1]]), Counter(prints[b[0] : b[1]])
    return sum((first & second).values()) >= MIN_LIKENESS * max(first.total(), second.total())
