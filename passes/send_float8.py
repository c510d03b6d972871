"""Lets queries, values and results of attention travel between ranks in eight bits.

    y = attention(exchange(q), exchange(k), exchange(v))
    out = self.proj(exchange(y))
 -> y = attention(exchange_float8(q), exchange(k), exchange_float8(v))
    out = self.proj(exchange_float8(y))

Each head of a token gets a scale, which travels beside its values. Keys bear rounding less than the others: they keep
their bits, or travel less the mean of each rank's part. A value that is keys too travels as keys do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, cast

from torch import fx

from cachedit_fx import collectives
from cachedit_fx.kernels.quant_fp8 import FLOATS
from cachedit_fx.ring import ring_attention

from .base import Facts, FlatGraph, Rewrite, Rewritten
from .find_timestep import TimestepSource
from .graph_values import tensor_of
from .insert_ulysses import ContextParallel, fake_result
from .normalize import Normalized
from .replace_attention import Call, attention_calls


class SendFloat8(Rewrite):
    """Replaces the exchanges around attention.

    Args:
        with_keys: whether keys travel in eight bits too.
    """

    name: ClassVar[str] = "send_float8"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph, ContextParallel)
    provides: ClassVar[tuple[type, ...]] = (ContextParallel,)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized, TimestepSource)

    def __init__(self, with_keys: bool) -> None:
        self.with_keys = with_keys

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        count = sum(self._replace(call) for call in attention_calls(gm, ring_attention))
        return Rewritten(gm, count, (replace(facts[ContextParallel], in_float8=count),) if count else ())

    def _replace(self, call: Call) -> int:
        """Replace the exchanges around one call; their number."""
        plain, centred = collectives.exchange_float8, collectives.exchange_centred_float8
        targets = {"query": plain, "value": plain, "key": centred if self.with_keys else None}
        exchanges = {node: target for name, target in targets.items() if _is_exchange(node := call.arguments[name])}
        sent = {node: target for node, target in exchanges.items() if target is not None}
        received = [user for user in call.node.users if _is_exchange(user)]
        if not sent:
            return 0
        for node in received:
            node.target = collectives.exchange_float8
        for node, target in sent.items():
            node.target = target
        for node in (*sent, call.node, *received):
            node.meta["example_value"] = fake_result(node)
        return len(sent) + len(received)


def _is_exchange(node: Any) -> bool:
    """Whether the node exchanges rows of floats: axes before the last one."""
    if not isinstance(node, fx.Node) or node.target is not collectives.exchange:
        return False
    value, axes = tensor_of(node), cast("tuple[int, int]", (node.args[1], node.args[3]))
    return value is not None and value.dtype in FLOATS and max(axes) < value.dim() - 1
