"""A model behind the cache, compared with the plain model at each call; it tells what it hoists and computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cachedit_fx.passes.hoist_invariants import Hoisted
from cachedit_fx.runtime.graph import CachedGraph
from cachedit_fx.runtime.hoisted_memory import HoistedMemory

from .conditioned import conditions, sample, times
from .shared import SharedCapture
from .toy_pipeline import ToyPipeline

STATIC: dict[str, Any] = {"steps_computation_policy": "static", "residual_diff_threshold": 0.08}
ALWAYS = STATIC | {"steps_computation_mask": "1" * 8}


class Cached:
    """A model behind the cache at threshold 0, so that each result equals the plain model's; its hoisted memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.shared = model, SharedCapture(model)
        self.compile()
        self(sample(), times()[0], **conditions())

    def compile(self, **options: Any) -> None:
        self.shared.compile_anew(**({"residual_diff_threshold": 0.0, "Fn_compute_blocks": 1} | options))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.shared(*args, **kwargs)

    @property
    def memory(self) -> HoistedMemory:
        (memory,) = self.shared._state.hoisted
        return memory

    @property
    def hoisted(self) -> Hoisted:
        (outcome,) = (graph.outcome for graph in self.shared._state.latest_graphs)
        assert outcome is not None
        return outcome.facts[Hoisted]

    def computed(self, *args: Any, **kwargs: Any) -> list[str]:
        """Names of the hoisted pieces that a right call computes; the rest come from memory."""
        with self.noting() as names:
            self.assert_right(*args, **kwargs)
        return names

    @contextmanager
    def noting(self) -> Iterator[list[str]]:
        """Context manager for the names of the hoisted pieces that are computed inside."""
        names: list[str] = []
        graphs = [graph for graph in self.shared._compiled if isinstance(graph, CachedGraph)]
        codes = [graph.hoisted for graph in graphs if graph.hoisted is not None]
        functions = [code.functions for code in codes]

        def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def note(*arguments: Any) -> Any:
                names.append(name)
                return function(*arguments)

            return note

        for code in codes:
            pairs = zip(code.pieces, code.functions, strict=True)
            code.functions = [noted(piece.name, function) for piece, function in pairs]
        yield names
        for code, before in zip(codes, functions, strict=True):
            code.functions = before

    @torch.no_grad()
    def assert_right(self, *args: Any, **kwargs: Any) -> None:
        """Call, and compare with the plain model, bit for bit."""
        assert torch.equal(self(*args, **kwargs), self.model(*args, **kwargs))


def generation(model: Cached, prompt: dict[str, Any], steps: int = 4, batch: int = 1) -> list[list[str]]:
    """The hoisted pieces that each step computes."""
    return [model.computed(sample(step, batch), time, **prompt) for step, time in enumerate(times(steps, batch))]


def of_time(names: list[str]) -> list[str]:
    return [name for name in names if "time" in name]


class Pipeline(ToyPipeline):
    """Denoises for a prompt, and compares each step with the plain model."""

    def __init__(self, model: Cached, rounds: bool = False) -> None:
        super().__init__(model.shared)
        self.model, self.prompt, self.offsets = model, conditions(), [0.0]
        self.compare: Callable[..., bool] = (
            functools.partial(torch.allclose, rtol=1e-4, atol=1e-5) if rounds else torch.equal
        )

    def predict(self, latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        for offset in self.offsets:  # a call for each
            time = (timestep + offset).expand(1)
            result = self.transformer(latents, time, **self.prompt)
            assert self.compare(result, self.model.model(latents, time, **self.prompt))
        return result
