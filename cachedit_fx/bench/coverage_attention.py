"""Puts a model with another attention through the cache, and counts which back ends take its calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from cachedit_fx.attention.backends import rows_of
from cachedit_fx.bench.coverage_steps import FIRST, LATER, NEVER, Make, at_timestep, equal, tensors
from cachedit_fx.bench.coverage_subject import Subject
from cachedit_fx.config.attention import AttentionConfig
from cachedit_fx.passes.replace_attention import attention_calls
from cachedit_fx.report.tables import Heading, Part, Table

BACKEND = "math"
"""The back end of the check. It takes every call, and runs everywhere."""
ATTENTION = (
    f"attention='{BACKEND}': threshold 0 equals the same model uncached, bit for bit; by step, a step in the model's "
    "own attention equals the plain module, bit for bit, and the next one runs in the back end"
)
"""What the column means."""
COUNTED = ("sage", "flash", "int8")
"""Back ends whose calls are counted; those for GPUs, if there are several of a name."""
COUNTS = (
    "Calls of attention in the largest graph of a step: all, those of cross-attention, and those that each back end "
    "for GPUs takes by its declaration: by mask, grouped heads, causality and shapes. The configurations are tiny and "
    "in float32, so head dims, lengths and dtypes are left out of account."
)


@dataclass(frozen=True)
class AttentionCounts:
    """Calls of attention in a model's largest graph.

    Attributes:
        model: its name.
        calls: all that can be replaced.
        cross: those of cross-attention.
        takes: name of a back end -> how many it takes.
    """

    model: str
    calls: int
    cross: int
    takes: dict[str, int]


def count(name: str, gm: fx.GraphModule) -> AttentionCounts | None:
    """Count the calls of a graph as dynamo captured it; None if it has none."""
    calls = list(attention_calls(gm))
    takes: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
    for call in calls:
        takes.update(each for each in COUNTED if call.facts is not None and not rows_of(each)[0].unlike(call.facts))
    return AttentionCounts(name, len(calls), sum(call.is_cross for call in calls), dict(takes)) if calls else None


def counts_table(counts: Sequence[AttentionCounts | None]) -> list[Part]:
    """The table of models that were counted; nothing if none was."""
    rows = [row for row in counts if row is not None]
    if not rows:
        return []
    table = Table(("model", "calls", "cross", *COUNTED), texts=(0,))
    for row in rows:
        table.add(row.model, str(row.calls), str(row.cross), *(str(row.takes[name]) for name in COUNTED))
    return [Heading("Attention", 2), COUNTS, table]


@torch.no_grad()
def check_attention(make: Make) -> tuple[bool | None, str]:
    """Whether a model with another attention is cached as with its own, and why not.

    Args:
        make: gives a module in eval mode and its inputs, anew at each call.

    Returns:
        True and no words; False, or None if it has no call of attention, and words.
    """
    module, inputs = make()
    subject = Subject(module)
    try:
        steps = [at_timestep(inputs(1), scale) for scale in (FIRST, LATER)]
        own = [tensors(module(**step)) for step in steps]
        subject.compile(None, verify=None, attention=BACKEND)
        uncached = list(map(subject, steps))
        if not subject.attention:
            return None, "it has no call of attention"
        subject.compile(NEVER, verify=None, attention=BACKEND)
        cached = list(map(subject, steps))
        subject.compile(NEVER, verify=None, attention=AttentionConfig(BACKEND, own_steps_mask=(1, 0)))
        first, _ = map(subject, steps)
        replaced = [stats.attention_steps for stats in subject.summary()]
    except Exception as error:  # whatever a model raises is told in the table
        return False, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    finally:
        subject.close()
    claims = {
        "threshold 0 differs from the uncached model": all(map(equal, cached, uncached)),
        "by step, the model's own attention differs from the plain module": equal(first, own[0]),
        "by step, no step ran in the back end": [1] in replaced,
    }
    failures = [words for words, holds in claims.items() if not holds]
    return not failures, "; ".join(failures)
