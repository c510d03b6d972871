"""Captures a model's graph without running or compiling anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from cachedit_fx.capture import CAPTURE_ERRORS, capturing


@torch.no_grad()
def largest_graph(module: nn.Module, arguments: Mapping[str, Any]) -> fx.GraphModule:
    """The largest graph of one call of a module, which may be on the meta device.

    Values that are read back and lengths from data are captured, unless the capture fails by that, as at a first call.

    Args:
        arguments: keyword arguments of the call.
    """
    try:
        with capturing():
            graphs = _graphs(module, arguments)
    except CAPTURE_ERRORS:
        graphs = _graphs(module, arguments)
    return max(graphs, key=lambda graph: len(graph.graph.nodes))


def _graphs(module: nn.Module, arguments: Mapping[str, Any]) -> list[fx.GraphModule]:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch.compiler.reset()
    torch.compile(module, backend=backend)(**arguments)
    return graphs
