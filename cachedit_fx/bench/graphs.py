"""Captures a model's graph without running or compiling anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from cachedit_fx.capture import capturing


@torch.no_grad()
def largest_graph(module: nn.Module, arguments: Mapping[str, Any]) -> fx.GraphModule:
    """The largest graph of one call of a module, which may be on the meta device.

    Args:
        arguments: keyword arguments of the call.
    """
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch.compiler.reset()
    with capturing():
        torch.compile(module, backend=backend)(**arguments)
    return max(graphs, key=lambda graph: len(graph.graph.nodes))
