"""Lets other back ends compute a model's calls of attention.

    y = scaled_dot_product_attention(q, k, v, attn_mask=None)    ->    y = sage_attention(q, k, v, attn_mask=None)

The node stays, with its arguments and its recorded value; only its target changes, to a function with the arguments of
sdpa whose result lies in memory as sdpa's does. So every fact about the graph stays true, and blocks are found as
without the pass. It runs after `insert_ulysses`: the calls are those of one rank then.

If steps differ, the node keeps its target, and its meta gets the other one for `insert_attention_forms`.

What diffusers puts around a call to choose torch's kernel (`_sdpa_kernel`) stays, and has no effect on another back
end. Calls of `flex_attention` have a score function of their own, and stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from cachedit_fx.attention.backends import OWN, fitting
from cachedit_fx.attention.calls import AttentionCall, mask_kind, same
from cachedit_fx.attention.functions import replacement
from cachedit_fx.config.attention import AttentionConfig

from .base import Facts, FlatGraph, Interface, Rewrite, Rewritten
from .block_loops import Detection
from .find_timestep import TimestepSource
from .graph_values import is_weight, target_name, tensor_of
from .infer_dependence import Dependence
from .insert_ulysses import ContextParallel
from .loops_by_name import module_path
from .normalize import Normalized

REPLACEMENT = "cachedit_attention"
"""Key in the meta of a call that other forms of its region replace: (name of the back end, the function to call)."""

_TARGETS = (scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
_OTHERS = frozenset({"flex_attention", "multi_head_attention_forward", "ring_attention"})
"""Names of other operations that attend. They keep their nodes."""
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True)
class ReplacedAttention(Interface):
    """Fact: what became of the graph's calls of attention.

    Attributes:
        calls: name of a back end -> how many calls it takes.
        kept: why calls keep the model's own attention -> how many.
        is_by_step: whether only other forms of regions take the back ends.
    """

    calls: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)
    is_by_step: bool = False

    @property
    def warning(self) -> str | None:
        """What to tell a user whose back ends take no call at all; None if one takes some."""
        if self.calls or not self.kept:
            return None
        reasons = "; ".join(f"{reason} ({count})" for reason, count in self.kept.items())
        return f"attention: all calls keep the model's own attention: {reasons}"


class ReplaceAttention(Rewrite):
    """Lets the back ends of a config compute the calls that they take.

    Args:
        config: None replaces nothing.
    """

    name: ClassVar[str] = "replace_attention"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph,)
    uses: ClassVar[tuple[type, ...]] = (Normalized, Detection, ContextParallel)
    provides: ClassVar[tuple[type, ...]] = (ReplacedAttention,)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph, Normalized, TimestepSource, Dependence, Detection)

    def __init__(self, config: AttentionConfig | None) -> None:
        self.config = config

    def run(self, gm: fx.GraphModule, facts: Facts) -> Rewritten:
        calls: Counter[str] = Counter()
        names = (target_name(node) for node in gm.graph.nodes if node.op == "call_function")
        kept = Counter(f"it is a call of {name}" for name in names if name in _OTHERS)
        config = self.config or AttentionConfig(OWN)
        for call in attention_calls(gm):
            chosen = _replacement(call, config)
            if isinstance(chosen, str):
                kept[chosen] += 1
                continue
            calls[chosen[0]] += 1
            if config.is_by_step:
                call.node.meta[REPLACEMENT] = chosen
            else:
                call.node.target = chosen[1]
        fact = ReplacedAttention(calls, kept, config.is_by_step)
        return Rewritten(gm, calls.total(), (fact,))


@dataclass(frozen=True)
class Call:
    """A call of sdpa in a graph.

    Attributes:
        node: the call.
        arguments: by name, those that are left out not among them.
    """

    node: fx.Node
    arguments: Mapping[str, Any]

    @property
    def facts(self) -> AttentionCall | None:
        """The call as back ends judge it; None if the tracer did not record its tensors."""
        query, key, value = (tensor_of(self.arguments[name]) for name in _PARAMETERS[:3])
        result, mask = tensor_of(self.node), self.arguments.get("attn_mask")
        mask_tensor = None if mask is None else tensor_of(mask)
        if query is None or key is None or value is None or result is None or (mask is None) != (mask_tensor is None):
            return None
        flags = (self.arguments.get(name, False) for name in ("is_causal", "enable_gqa"))
        is_causal, enable_gqa = (flag if isinstance(flag, bool) else None for flag in flags)
        dropout = self.arguments.get("dropout_p", 0.0)
        return AttentionCall(
            tuple(query.shape),
            tuple(key.shape),
            tuple(value.shape),
            dtypes=tuple(tensor.dtype for tensor in (query, key, value, result)),
            device=query.device.type,
            has_dense_rows=all(same(tensor.stride(-1), 1) for tensor in (query, key, value)),
            mask=None if mask_tensor is None else mask_kind(mask_tensor, query, key),
            is_causal=is_causal,
            enable_gqa=enable_gqa,
            dropout=None if isinstance(dropout, fx.Node) else dropout,
        )

    @property
    def is_cross(self) -> bool:
        """Whether queries and keys are projected from different values; without projections, whether lengths differ."""
        query, key = (self.arguments[name] for name in _PARAMETERS[:2])
        sources = [set(_projected(node)) for node in (query, key)]
        if all(sources):
            return sources[0].isdisjoint(sources[1])
        lengths = [tensor.shape[-2] for node in (query, key) if (tensor := tensor_of(node)) is not None]
        return not same(*lengths)

    @property
    def module(self) -> str:
        """The dotted name of the module that calls; empty if the tracer recorded none."""
        stack = self.node.meta.get("nn_module_stack") or {}
        return module_path(list(stack.values())[-1][0]) if stack else ""


def attention_calls(gm: fx.GraphModule, *others: Callable[..., Any]) -> Iterator[Call]:
    """The calls of sdpa, and of other functions with its arguments, in graph order."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and any(node.target is target for target in (*_TARGETS, *others)):
            yield Call(node, dict(zip(_PARAMETERS, node.args, strict=False)) | dict(node.kwargs))


def _replacement(call: Call, config: AttentionConfig) -> tuple[str, Any] | str:
    """The back end for a call and the function in place of sdpa, or why the call keeps its node."""
    facts, result = call.facts, tensor_of(call.node)
    if facts is None or result is None:
        return "its tensors were not recorded"
    choice = config.choice(call.module, config.cross_backend is not None and call.is_cross)
    if isinstance(choice, str):
        return choice
    backend, is_tokens_first = fitting(choice, facts), _is_tokens_first(result)
    if isinstance(backend, str) or is_tokens_first is None:
        return backend if isinstance(backend, str) else "its result has a layout of its own"
    return backend.name, replacement(backend.name, backend.load(), is_tokens_first)


def _is_tokens_first(result: torch.Tensor) -> bool | None:
    """Whether [..., H, L, D] is laid out as [..., L, H, D]; None if it has neither layout."""
    for is_tokens_first in (True, False):
        order = list(range(result.dim()))
        if is_tokens_first and result.dim() > 2:
            order[-3], order[-2] = order[-2], order[-3]
        expected: Any = 1
        for axis in reversed(order):
            if not same(result.shape[axis], 1) and not same(result.stride(axis), expected):
                break
            expected *= result.shape[axis]
        else:
            return is_tokens_first
    return None


def _projected(node: fx.Node) -> Iterator[fx.Node]:
    """The values that the nearest projections before a node take: whatever takes a matrix of weights beside them."""
    pending, visited = [node], set()
    while pending:
        source = pending.pop()
        if source in visited:
            continue
        visited.add(source)
        values = [each for each in source.all_input_nodes if not _is_matrix(each)]
        if 0 < len(values) < len(source.all_input_nodes):
            yield from (value for value in values if not is_weight(value))
        else:
            pending.extend(values)


def _is_matrix(node: fx.Node) -> bool:
    """Whether the node is a parameter of two dimensions or more, or a view of one."""
    while node.op != "placeholder" and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    tensor = tensor_of(node)
    return is_weight(node) and tensor is not None and tensor.dim() > 1
