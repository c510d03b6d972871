"""From a call's inputs straight to its graph: the calls of a generation behind its first two, past dynamo's guards.

    guarded      inputs ─► dynamo: guards, a thousand weights fetched ─► graph ─► dynamo: outputs put together
    shortcut     inputs ─► same look as a guarded call of this generation? ─► graph, same weights ─► same outputs

What is learned from two guarded calls in a row: which input of the graph is which tensor of the call, and which result
of the graph is where in the call's result. All others of the graph's inputs must be the very same tensors in both, as
the module's weights are, or equal numbers. Inputs that look otherwise, and every first step of a generation, pass the
guards.

That is safe as long as nothing about the module changes between two steps of one generation but the contents of its
weights: no adapter is set or scaled, no processor or layer exchanged, no `train()`, no hook added. Such changes between
generations are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from cachedit_fx.runtime.call import Call

GUARDED_CALLS = 2
"""Alike calls of a generation that pass the guards: a model that counts its own steps is told by them."""

Ran = tuple[Callable[..., Any], Sequence[Any], Sequence[Any]]
"""A graph, which takes its inputs as one sequence; what it was given; and what it gave."""

_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


def look_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Hashable, list[torch.Tensor]] | None:
    """What tells a call from others as far as its graph goes: everything but the contents of its tensors; and those.

    None where an input is neither a plain tensor, nor plain data, nor a container of these, or where a mode of torch's
    is on that wants to see every operation.
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
        return (kind, *[_look(item, tensors) for item in value])
    if kind is dict:
        return (kind, *[(name, _look(item, tensors)) for name, item in value.items()])
    raise _UnknownInput


class Shortcut:
    """What one look of a call comes to. `calls` guarded ones agreed about it so far."""

    def __init__(
        self,
        graph: Callable[..., Any],
        given: list[Any],
        slots: tuple[tuple[int, int], ...],
        leaves: tuple[tuple[int | None, Any], ...],
        spec: TreeSpec,
    ) -> None:
        self.graph, self.given, self.slots, self.leaves, self.spec = graph, given, slots, leaves, spec
        self.is_flat_tuple = spec.type is tuple and all(child.is_leaf() for child in spec.children())
        self.calls = 1

    @property
    def is_open(self) -> bool:
        return self.calls >= GUARDED_CALLS

    def agrees(self, other: Shortcut) -> bool:
        """Whether both come to the same: graph, weights and numbers, and places of inputs and results."""
        inputs = {index for index, _ in self.slots}
        return (
            (self.graph, self.slots, self.leaves, self.spec) == (other.graph, other.slots, other.leaves, other.spec)
            and len(self.given) == len(other.given)
            and all(
                index in inputs or one is two or (not isinstance(one, torch.Tensor) and one == two)
                for index, (one, two) in enumerate(zip(self.given, other.given, strict=True))
            )
        )

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The call's result, from the tensors among its inputs, which are not kept."""
        given = self.given
        try:
            for index, place in self.slots:
                given[index] = tensors[place]
            results = self.graph(given)
        finally:
            for index, _ in self.slots:
                given[index] = None
        leaves = [value if index is None else results[index] for index, value in self.leaves]
        return tuple(leaves) if self.is_flat_tuple else tree_unflatten(leaves, self.spec)


def learn(tensors: Sequence[torch.Tensor], ran: Sequence[Ran], result: Any) -> Shortcut | None:
    """What a guarded call shows: `tensors` went in, the graphs in `ran` ran, and `result` came out. None where that is
    more than one graph and its results put together."""
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    if len(ran) != 1 or len(places) != len(tensors):
        return None
    graph, args, results = ran[0]
    if not all(isinstance(value, (torch.Tensor, int, float)) for value in args):
        return None
    given = list(args)
    slots = tuple((index, places[id(value)]) for index, value in enumerate(given) if id(value) in places)
    for index, _ in slots:
        given[index] = None  # an input of one call is not kept for the next
    leaves: list[tuple[int | None, Any]] = []
    values, spec = tree_flatten(result)
    for leaf in values:
        place = next((place for place, value in enumerate(results) if value is leaf), None)
        if place is None and type(leaf) not in _PLAIN:
            return None
        leaves.append((place, leaf if place is None else None))
    return Shortcut(graph, given, slots, tuple(leaves), spec)


class _BeginsGeneration(Exception):
    """A call that took a shortcut turns out to begin a generation, which has to pass the guards."""


class Route:
    """How one call reaches its graphs: through dynamo's guards, or past them by a shortcut.

    A call through the guards shows its graphs to `record`, to learn from. A call by a shortcut that turns out to begin
    a generation is given up where it stands, and made again through the guards.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self._takes_shortcut = False
        self._ran: list[Ran] = []

    def result(self, look: Hashable, tensors: Sequence[torch.Tensor], guarded: Callable[[], Any]) -> Any:
        """The call's result, by a shortcut if one is open for its look, else from `guarded`, to learn one."""
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
        lesson = learn(tensors, self._ran, result) if self.call.graphs == 1 else None
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
            self._ran.append((graph, inputs, results))

    def generation_begins(self) -> None:
        """The call turns out to begin a generation."""
        if self._takes_shortcut:
            raise _BeginsGeneration
