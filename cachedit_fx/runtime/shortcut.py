"""Takes a call's inputs straight to its graph, past dynamo's guards, after the first two calls of a generation.

    guarded      inputs ─► dynamo: guards, a thousand weights fetched ─► graph ─► dynamo: outputs put together
    shortcut     inputs ─► same look as a guarded call of this generation? ─► graph, same weights ─► same outputs

Two consecutive guarded calls show the places of inputs and results: the index of each of the call's tensors among the
graph's inputs, and the place of each of the graph's results in the call's result. All other inputs of the graph must be
the same tensors in both calls, as the module's weights are, or equal numbers. Inputs of another look, and every first
step of a generation, pass the guards.

Shortcuts are safe if only the contents of the module's weights change between two steps of one generation: no adapter
is set or scaled, no processor or layer exchanged, no `train()`, no hook added. Between generations all these changes
are noticed. A model that changes attributes, or containers of its caller's, does so past its graph, and takes no
shortcut. Neither does one that writes to its inputs: it needs the guard on memory that these share.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from cachedit_fx.runtime.call import Call

GUARDED_CALLS = 2
"""Calls of one look that pass the guards in a generation. Two show whether a model counts its own steps."""
Execution = tuple[Callable[..., Any], Sequence[Any], Sequence[Any]]
"""A graph that ran, which takes its inputs as one sequence; its inputs; its results."""

_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


def look_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Hashable, list[torch.Tensor]] | None:
    """The look of a call, and the tensors among its inputs.

    The look is everything that may select a graph: all inputs, except the contents of tensors, and torch's modes.

    None if an input is neither a plain tensor, nor plain data, nor a container of these. None too if a dispatch or
    function mode of torch is on, which must see every operation.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return None
    tensors: list[torch.Tensor] = []
    try:
        look = _look(args, tensors), _look(kwargs, tensors)
    except _UnknownInput:
        return None
    autocast: Hashable = None
    if torch._C._is_any_autocast_enabled():
        devices = sorted({"cpu", *(tensor.device.type for tensor in tensors)})
        autocast = tuple((d, torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d))
    return (look, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast), tensors


class _UnknownInput(Exception):
    pass


def _look(value: Any, tensors: list[torch.Tensor]) -> Hashable:
    kind = type(value)
    if kind is torch.Tensor and value.layout is torch.strided:
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if kind in _PLAIN:
        return kind, value
    if kind is list or kind is tuple:
        return (kind, *[_look(element, tensors) for element in value])
    if kind is dict:
        return (kind, *[(name, _look(element, tensors)) for name, element in value.items()])
    raise _UnknownInput


class Shortcut:
    """The graph of one look of a call, and how its inputs and results are put together.

    Args:
        graph: takes its inputs as one sequence.
        inputs: the graph's inputs; None in place of the call's tensors.
        slots: (index of a graph input, index of the call's tensor that it is).
        leaves: for each leaf of the call's result (index of the graph's result, None), or (None, the leaf).
        spec: the structure of the call's result.
    """

    def __init__(
        self,
        graph: Callable[..., Any],
        inputs: list[Any],
        slots: tuple[tuple[int, int], ...],
        leaves: tuple[tuple[int | None, Any], ...],
        spec: TreeSpec,
    ) -> None:
        self.graph, self.inputs, self.slots, self.leaves, self.spec = graph, inputs, slots, leaves, spec
        self.is_flat_tuple = spec.type is tuple and all(child.is_leaf() for child in spec.children())
        self.calls = 1
        """Guarded calls that agreed about the shortcut so far."""

    @property
    def is_open(self) -> bool:
        """Whether enough guarded calls agreed."""
        return self.calls >= GUARDED_CALLS

    def agrees(self, other: Shortcut) -> bool:
        """Whether both have the same graph, weights and numbers, and the same places of inputs and results."""
        tensors = {index for index, _ in self.slots}
        return (
            (self.graph, self.slots, self.leaves, self.spec) == (other.graph, other.slots, other.leaves, other.spec)
            and len(self.inputs) == len(other.inputs)
            and all(
                index in tensors or one is two or (not isinstance(one, torch.Tensor) and one == two)
                for index, (one, two) in enumerate(zip(self.inputs, other.inputs, strict=True))
            )
        )

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The call's result, from the tensors among its inputs. No reference to the tensors stays."""
        inputs = self.inputs
        try:
            for index, place in self.slots:
                inputs[index] = tensors[place]
            results = self.graph(inputs)
        finally:
            for index, _ in self.slots:
                inputs[index] = None
        leaves = [value if index is None else results[index] for index, value in self.leaves]
        return tuple(leaves) if self.is_flat_tuple else tree_unflatten(leaves, self.spec)


def learn(tensors: Sequence[torch.Tensor], executions: Sequence[Execution], result: Any) -> Shortcut | None:
    """The shortcut that a guarded call shows, which turned `tensors` into `result` by `executions`.

    None if the call is more than one graph whose results are put together.
    """
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    if len(executions) != 1 or len(places) != len(tensors):
        return None
    graph, args, results = executions[0]
    if not all(isinstance(value, (torch.Tensor, int, float)) for value in args):
        return None
    inputs = list(args)
    slots = tuple((index, places[id(value)]) for index, value in enumerate(inputs) if id(value) in places)
    for index, _ in slots:
        inputs[index] = None  # one call's tensor must not live until the next call
    leaves: list[tuple[int | None, Any]] = []
    values, spec = tree_flatten(result)
    for leaf in values:
        place = next((place for place, value in enumerate(results) if value is leaf), None)
        if place is None and type(leaf) not in _PLAIN:
            return None
        leaves.append((place, leaf if place is None else None))
    return Shortcut(graph, inputs, slots, tuple(leaves), spec)


class _BeginsGeneration(Exception):
    """A call that took a shortcut begins a generation, and must pass the guards."""


class Route:
    """The way of one call to its graphs: through dynamo's guards, or past them by a shortcut.

    A call through the guards shows its graphs to `record`, to learn from. If a call by a shortcut turns out to begin a
    generation, the call is abandoned at once, and made again through the guards.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self._takes_shortcut = False
        self._executions: list[Execution] = []

    def result(self, look: Hashable, tensors: Sequence[torch.Tensor], guarded: Callable[[], Any]) -> Any:
        """The call's result: by a shortcut if one is open for the call's look, else from `guarded`, to learn one."""
        session = self.call.session
        shortcut = session.shortcuts.get(look)
        if shortcut is not None and shortcut.is_open:
            self._takes_shortcut = True
            try:
                return shortcut(tensors)
            except _BeginsGeneration:
                self._takes_shortcut = False
                self.call.restart()
        result = guarded()
        lesson = learn(tensors, self._executions, result) if len(self.call.graphs) == 1 else None
        shortcut = session.shortcuts.get(look)
        if lesson is None:
            session.shortcuts.pop(look, None)
        elif shortcut is not None and shortcut.agrees(lesson):
            shortcut.calls += 1
        else:
            session.shortcuts[look] = lesson
        return result

    def record(self, graph: Callable[..., Any], inputs: Sequence[Any], results: Sequence[Any]) -> None:
        """A graph with regions ran."""
        if not self._takes_shortcut:
            self._executions.append((graph, inputs, results))

    def generation_begins(self) -> None:
        """The call turns out to begin a generation. Abandons the call if it takes a shortcut."""
        if self._takes_shortcut:
            raise _BeginsGeneration
