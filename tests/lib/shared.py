"""One capture of a module for many compilations: the capture is what costs.

`SharedCapture` stands for `cachedit_fx.compile`, and `SharedGraph` for plain `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from cachedit_fx.backend import cachedit, compile_graph
from cachedit_fx.bench.coverage_steps import tensors
from cachedit_fx.bench.coverage_subject import Subject
from cachedit_fx.capture import RECOMPILE_LIMIT, copy_of
from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.config.options import Options, parse_options
from cachedit_fx.passes.base import Facts, Traced
from cachedit_fx.runtime.compiled_call import CompiledCall
from cachedit_fx.runtime.model_state import ModelState
from cachedit_fx.runtime.stats import CacheStats


class SharedCapture:
    """Calls a module as `cachedit_fx.compile` has it called, under one set of options after another.

        shared = SharedCapture(module)
        shared.compile(Fn_compute_blocks=1)    # options as for `cachedit_fx.compile`
        shared(*args)                          # captures, the first time
        shared.compile(scope="loop")           # compiles a copy of the captured graph
        shared(*args)

    The module itself stays plain. `observe` is called with what the passes learn of each graph.

    Dynamo guards what the passes assume of lengths during its capture, and nothing that they assume later. So a later
    compilation that makes a number of a length raises `AssertionError`.
    """

    def __init__(self, module: nn.Module, observe: Callable[[Facts], None] | None = None) -> None:
        self.module, self.observe = module, observe
        self.graphs: list[tuple[fx.GraphModule, Sequence[Any]]] = []
        """Each graph as dynamo captured it, and its inputs."""
        self._compiled: list[Callable[..., Any]] = []
        self._state = ModelState(Options(cache=None, inner_backend="eager"))
        self._call = CompiledCall(module, self._backend, self._state, {"recompile_limit": RECOMPILE_LIMIT})

    def compile(self, **options: Any) -> None:
        """Go on under these options. A change of policy compiles nothing."""
        parsed = parse_options({"inner_backend": "eager"} | options)
        if self._compiled and parsed.structure() == self._state.options.structure():
            self._state.set_options(parsed)
        else:
            self.compile_anew(**options)

    def compile_anew(self, **options: Any) -> None:
        """Go on under these options, as a module that was never called before."""
        parsed = parse_options({"inner_backend": "eager"} | options)
        self._state = self._call.state = ModelState(parsed)
        self._state.traced, self._state.observe = Traced.of(self.module), self.observe
        self._compiled = [self._compile(*graph) for graph in self.graphs]
        numbers = [name for gm, _ in self.graphs for name in _lengths_made_numbers(gm)]
        assert not numbers, f"no guard has this compilation's {', '.join(numbers)}: capture the module at other lengths"

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def summary(self) -> list[CacheStats]:
        """Statistics of the latest generation."""
        return self._state.latest.summary() if self._state.latest is not None else []

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        number = len(self.graphs)
        self.graphs.append((gm, example_inputs))
        self._compiled.append(self._compile(gm, example_inputs))
        return lambda *inputs: self._compiled[number](*inputs)

    @torch.no_grad()
    def _compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_graph(copy_of(gm), example_inputs, self._state.options, self._state)


def _lengths_made_numbers(gm: fx.GraphModule) -> list[str]:
    """The symbols among a graph's inputs that stand for one number alone, as `symbol = number`."""
    values = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    symbols = [value.node for value in values if isinstance(value, torch.SymInt)]
    return [f"{node._expr} = {node.expr}" for node in symbols if node.expr.is_number]


class SharedGraph:
    """A module under `torch.compile(module, backend="cachedit")`, with one set of options after another.

        shared = SharedGraph(module)
        shared.compile(granularity="block")    # options as for `torch.compile`
        shared(*args)                          # captures, the first time
        shared.compile(granularity="region")   # compiles a copy of the captured graph
        shared(*args)

    Every set of options has a state of its own, as two compiled forms of one module have.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._options: dict[str, Any] = {}
        self._graph: tuple[fx.GraphModule, Sequence[Any]] | None = None
        self._compiled: Callable[..., Any] | None = None
        self._call = torch.compile(module, backend=self._backend, fullgraph=True)

    def compile(self, **options: Any) -> None:
        """Go on under these options."""
        self._options = options
        if self._graph is not None:
            self._compiled = self._compile(*self._graph)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self._graph = gm, example_inputs
        self._compiled = self._compile(gm, example_inputs)
        return self._run

    def _run(self, *inputs: Any) -> Any:
        assert self._compiled is not None
        return self._compiled(*inputs)

    @torch.no_grad()
    def _compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return cachedit(copy_of(gm), example_inputs, options=self._options)


class SharedSubject(Subject):
    """For the check of `cachedit coverage`, which captures a module anew for each structure otherwise."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.shared = SharedCapture(module, self.note)

    def compile(self, cache: DBCacheConfig | None, **options: Any) -> None:
        self.shared.compile(cache=cache, verify="first", **options)

    def __call__(self, arguments: Mapping[str, Any]) -> list[torch.Tensor]:
        return tensors(self.shared(**arguments))

    def summary(self) -> list[CacheStats]:
        return self.shared.summary()
