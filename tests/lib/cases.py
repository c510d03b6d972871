"""Graphs that several tests of the passes and of the call share."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from lib import models
from lib.helpers import Captured, capture, rewritten
from torch import nn


def text(batch=1, tokens=5):
    return torch.randn(batch, tokens, models.WIDTH)


class Collects(models.Toy):
    """Each block's mean is an output of its own, and continues nothing."""

    def forward(self, hidden_states, timestep):
        temb, means = models.time_embedding(timestep), []
        x = self.embed(hidden_states)
        for block in self.blocks:
            x = block(x, temb)
            means.append(x.mean(1))
        return self.project(x), *means


class Late(models.Toy):
    """Something that no stream reaches is computed among the blocks, and needed behind them."""

    def forward(self, hidden_states, timestep):
        temb = models.time_embedding(timestep)
        x = self.embed(hidden_states)
        for index, block in enumerate(self.blocks):
            if index == 2:
                scale = torch.tanh(temb * 2)[:, None]
            x = block(x, temb)
        return self.project(x) * scale


class WithLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)


class Weighted(WithLinear):
    """Asks for the length of what it is given; dynamo computes it where the first block asks."""

    def forward(self, x):
        weights = self.linear(x).reshape(-1, x.shape[1], 4).softmax(1)
        return x + weights.view(x.shape[0], x.shape[1], -1)


class SumsLengths(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Weighted() for _ in range(3))

    def forward(self, x, text):
        joint = torch.cat([text, x], dim=1)
        for block in self.blocks:
            joint = block(joint)
        return joint


class Chain(nn.Module):
    """Four blocks; what stands before them is for others to say."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(models.Block() for _ in range(count))

    def prepare(self, x, timestep):
        return x

    def forward(self, x, timestep):
        temb = models.time_embedding(timestep)
        x = self.prepare(x, timestep)
        for block in self.blocks:
            x = block(x, temb)
        return x


class Halves(Chain):
    """The blocks lie in two graphs, four in each."""

    def __init__(self) -> None:
        super().__init__(8)

    def forward(self, x, timestep):
        temb = models.time_embedding(timestep)
        for block in self.blocks[:4]:
            x = block(x, temb)
        if x.sum() > 1e9:
            x = x * 2
        for block in self.blocks[4:]:
            x = block(x, temb)
        return x


CASES = {
    "plain": lambda: (models.Toy(), models.inputs()),
    "two loops": lambda: (models.TwoLoops(), (*models.inputs(), text())),
    "no glue": lambda: (models.TwoLoops(style="image"), (*models.inputs(), text())),
    "last differs": lambda: (models.LastDiffers(), (*models.inputs(), text())),
    "skips": lambda: (models.UShaped(), models.inputs()),
    "in place": lambda: (models.InPlace(), models.inputs()),
    "refiners": lambda: (models.Refined(), (*models.inputs(), text())),
    "batch of two": lambda: (models.TwoLoops(), (*models.inputs(batch=2), text(2))),
}


ALL = CASES | {
    "stored whole": lambda: (Collects(), models.inputs()),
    "hoisted": lambda: (Late(), models.inputs()),
    "shared": lambda: (models.Shared(), models.inputs()),
}


Make = Callable[[], tuple[nn.Module, Any]]
"""Gives a module and its inputs: by position, or by name in a dict."""


@functools.cache
def _captured(make: Make) -> Captured:
    module, inputs = make()
    return capture(module, **inputs) if isinstance(inputs, Mapping) else capture(module, *inputs)


def graph_of(make: Make) -> Captured:
    """The graph of a module that several tests look at: captured once in a process, and a copy each time.

    `make` is a value of `ALL` or a class of `lib.models`. Modules that use it have the mark `SHARES_GRAPHS`.
    """
    graph = _captured(make)
    return replace(graph, gm=graph.copy())


def rewrites(case):
    """A graph of `ALL`, and what becomes of it at each granularity and cut."""
    graph = graph_of(ALL[case])
    for granularity, (first, last) in itertools.product(("block", "region"), ((1, 0), (0, 0), (2, 1))):
        yield graph, rewritten(graph.copy(), first, last, granularity=granularity)
