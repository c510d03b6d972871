"""A result of a model that another rank computes: a tensor that waits for its values at its first use.

    result = model(...)        returns at once: shape, dtype and device are known
    result[:, 64:]             a view, which does not wait either
    result * 2.0               waits, and is a plain tensor

torch's own tensors of this kind cannot say which rank did not come, or has failed.
"""

from __future__ import annotations

import copy
import functools
import operator
import threading
from collections import UserList, deque
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._guards import TracingContext
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._pytree import tree_map_only

from cachedit_fx.runtime.presence import RankMissing
from cachedit_fx.runtime.ranks import Ranks

RESTART = "Start all ranks again"
"""What helps ranks whose collectives are out of step."""
MAX_DEPTH = 8
"""Containers in containers in which results are looked for."""
ADVICE = (
    "changes the shape or the memory of a result that another rank computes, with cfg_parallel. Take the form that "
    "returns a tensor, as unsqueeze is for unsqueeze_, or clone the result"
)
"""What is wrong with an operation."""
_PLAIN = torch.Tensor, str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.nn.Module, type
"""Kinds of inputs in which no result is looked for."""


class Arrival:
    """A message on its way from another rank.

    Args:
        work: of the collective that brings it.
        header: its number and whether its rank has failed, once it is here: int64 [2].
        number: the one that is expected.
        ranks: those of the group.
        owner: the rank that sends it, in the group.
        model: name of the class, for errors.
    """

    def __init__(
        self, work: dist.Work, header: torch.Tensor, number: int, ranks: Ranks, owner: int, model: str
    ) -> None:
        self._work, self._header, self._number = work, header, number
        self._ranks, self._owner, self._model = ranks, ranks.presence.members[owner], model
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._event: torch.cuda.Event | None = None
        self._is_here = False
        self._lock = threading.Lock()

    def kept_on(self, device: torch.device, content: torch.Tensor) -> torch.Tensor:
        """A part of the message, on a device and in memory of its own, for after the wait."""
        copy = torch.empty_like(content, device=device)
        self._copies.append((copy, content))
        return copy

    def wait(self) -> None:
        """Wait for the message. On an accelerator its stream waits, and not the host.

        Raises:
            RankMissing: if the other rank does not send, or has failed.
        """
        with self._lock:
            if self._is_here:
                return
            with self._ranks.presence.watch(self._model):
                self._work.wait()
            for copy, content in self._copies:
                copy.copy_(content)
            self._copies = []
            if self._header.device.type == "cpu":
                self._judge()
            else:  # the host looks at it when the next call begins
                header = torch.empty(self._header.shape, dtype=self._header.dtype, pin_memory=True)
                self._header = header.copy_(self._header, non_blocking=True)
                self._event = torch.cuda.current_stream(self._header.device).record_event()
            self._is_here = True

    def check(self) -> None:
        """Look at the message's header, if `wait` has not.

        Raises:
            RankMissing: if the other rank has failed.
        """
        self.wait()
        if self._event is not None:
            self._event.synchronize()
            self._event = None
            self._judge()

    def _judge(self) -> None:
        number, has_failed = self._header.tolist()
        if not has_failed and number == self._number:
            return
        model = self._model or "the model"
        fault = (
            f"failed in its branch of {model}. Its own output says why"
            if has_failed
            else f"sent the result of another call of {model}: the ranks have not called the model equally often"
        )
        self._ranks.faults.append(f"{self._ranks.presence.heading}rank {self._owner} {fault}. {RESTART}")
        raise RankMissing(self._ranks.faults[-1])


class Awaited(AsyncCollectiveTensor):  # torch's compilers ask such tensors to wait
    """A tensor whose values another rank sends.

    Args:
        elem: the memory that has the values after the wait.
        arrival: of the message.
    """

    _arrival: Arrival

    @staticmethod
    def __new__(cls, elem: torch.Tensor, arrival: Arrival) -> Awaited:
        tensor: Awaited = AsyncCollectiveTensor.__new__(cls, elem)
        tensor._arrival = arrival
        return tensor

    def __init__(self, elem: torch.Tensor, arrival: Arrival) -> None:
        super().__init__()

    @torch.compiler.disable  # dynamo runs what a graph breaks at
    def trigger_wait(self) -> torch.Tensor:
        """The plain tensor, once its values are here.

        Raises:
            RankMissing: if the other rank does not send them.
        """
        if not self.completed:
            self._arrival.wait()
            self.completed = True
        return self.elem

    wait = trigger_wait

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.trigger_wait())

    def __format__(self, format_spec: str) -> str:
        return format(self.trigger_wait(), format_spec)

    def __deepcopy__(self, memo: dict[Any, Any]) -> torch.Tensor:
        return copy.deepcopy(self.trigger_wait(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.trigger_wait().__reduce_ex__(protocol)

    def __dlpack__(self, **options: Any) -> Any:
        return self.trigger_wait().__dlpack__(**options)

    def data_ptr(self) -> int:
        """Where the plain tensor's values are."""
        return self.trigger_wait().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The plain tensor's memory."""
        if TracingContext.try_get() is not None:  # compilers take the wrapper's, which has no values
            return super().untyped_storage()
        return self.trigger_wait().untyped_storage()

    @property
    def data(self) -> torch.Tensor:
        """The same values, without gradients."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        plain = self.trigger_wait()
        if (plain.shape, plain.dtype) != (value.shape, value.dtype):
            raise TypeError(f"data of another form {ADVICE}")
        plain.data = value

    def share_memory_(self) -> torch.Tensor:
        """The plain tensor, moved to shared memory."""
        return self.trigger_wait().share_memory_()

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Views wait for nothing; all other operations get plain tensors.

        In inference mode operations come whole that are made of others. Their schemas call copies views, as of `to`.
        """
        kind = _kind_of(func)
        if kind.is_composite:
            return func.decompose(*args, **(kwargs or {}))
        first = args[0] if args else None
        if kind.changes_shape:
            raise TypeError(f"{func.overloadpacket.__name__} {ADVICE}")
        if kind.is_view and isinstance(first, Awaited):  # a plain view would hold the wrapper as its base
            views = func(first.elem, *args[1:], **(kwargs or {}))
            return tree_map_only(torch.Tensor, lambda view: Awaited(view, first._arrival), views)
        plain_args, plain_kwargs = tree_map_only(Awaited, Awaited.trigger_wait, (args, kwargs or {}))
        return func(*plain_args, **plain_kwargs)


def arrived(value: Any, is_inside: bool = False, depth: int = 0) -> Any:
    """An input of a model, with plain tensors in place of results that are on their way: waits for these.

    Dynamo guards on the types of a model's inputs. Where one rank has a result of its own, and another an awaited one,
    it would capture on one rank alone. Containers and objects take the plain tensors in place, since models may write
    to them. A tuple that holds such a result is made anew.

    Args:
        is_inside: whether the value lies in an object already. Objects in objects are not looked at.
        depth: of the containers around it. One that holds itself has no end.
    """
    if isinstance(value, Awaited):
        return value.trigger_wait()
    if isinstance(value, _PLAIN) or depth == MAX_DEPTH:
        return value
    if isinstance(value, tuple):
        elements = [arrived(element, is_inside, depth + 1) for element in value]
        if all(map(operator.is_, elements, value)):
            return value
        return type(value)._make(elements) if hasattr(value, "_make") else type(value)(elements)
    if isinstance(value, (list, deque, UserList)):
        _take(enumerate(value), value.__setitem__, is_inside, depth + 1)
    elif isinstance(value, MutableMapping):
        _take(value.items(), value.__setitem__, is_inside, depth + 1)
    elif not is_inside:
        take_arrived(value, depth)
    return value


def take_arrived(owner: Any, depth: int = 0) -> None:
    """Put plain tensors in place of results that are on their way, among the attributes of an object."""
    _take(getattr(owner, "__dict__", {}).items(), functools.partial(object.__setattr__, owner), True, depth + 1)


def _take(places: Iterable[tuple[Any, Any]], put: Callable[[Any, Any], None], is_inside: bool, depth: int) -> None:
    for place, value in list(places):
        plain = arrived(value, is_inside, depth)
        if plain is not value:
            put(place, plain)


@dataclass(frozen=True)
class _Kind:
    """What an awaited result must know of an operator.

    Attributes:
        is_composite: whether it is made of other operators.
        changes_shape: whether it changes the shape of its argument in place.
        is_view: whether it returns views of its first argument, and writes to nothing.
    """

    is_composite: bool
    changes_shape: bool
    is_view: bool


@functools.cache
def _kind_of(func: Any) -> _Kind:
    arguments, results = func._schema.arguments, func._schema.returns
    aliases = [arguments[0].alias_info, *(result.alias_info for result in results)] if arguments else []
    is_view = len(aliases) > 1 and all(alias is not None and not alias.is_write for alias in aliases)
    return _Kind(func._can_decompose(), torch.Tag.inplace_view in func.tags, is_view)
