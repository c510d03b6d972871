"""Keeps hoisted values while nothing that they depend on has changed.

A result is kept under a key, one part for each graph input that it depends on, weights left out:

- the timestep: its numbers, if the host knows them. Else the clock's place, if its schedule was read already. Else
  nothing that depends on the timestep is kept;
- another tensor: the very object and its version. No contents are compared. Tensors made under inference mode count no
  versions, so what depends on them is not kept;
- a number: the number.

Results of the timestep alone serve every session and thread of the model. Results that depend on conditions too can be
hit again only if the conditions outlive a generation, and are kept when they are asked for a second time.

Weights are compared by identity and version when a piece is asked. If a weight has changed, everything made from it is
dropped. Some writes change no version: those through `.data` or numpy, and those of collectives. So samples of weights
and of conditions are compared when a generation begins. If a sample has changed, everything is dropped.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from cachedit_fx.passes.graph_values import tensor_of
from cachedit_fx.passes.hoist_invariants import Hoisted
from cachedit_fx.runtime.guard import on_host
from cachedit_fx.runtime.host_pieces import functions_of, weights_on_host
from cachedit_fx.runtime.samples import differ, samples_of
from cachedit_fx.runtime.warning import warn

if TYPE_CHECKING:
    from cachedit_fx.runtime.session import Session

Results = tuple[torch.Tensor, ...]
Key = tuple[Hashable, ...]

CONDITION_SAMPLES = 4096
"""Samples of a condition. Small conditions are compared whole."""
PLACES = 1024
"""Places of clocks whose timesteps are noted."""
OFTEN = 3
"""An input is named as new at every step if more tensors than these came in, in one generation. So many steps of a
generation are batched at most."""


class HoistedCode:
    """The hoisted pieces of one compiled graph, as functions.

    Args:
        hoisted: as the passes left it, its pieces compiled.
    """

    def __init__(self, hoisted: Hoisted) -> None:
        self.pieces, self.timestep, self.names = hoisted.pieces, hoisted.timestep, hoisted.names
        self.inputs = hoisted.inputs
        self.functions, self.captured = functions_of(hoisted)
        self.on_host = weights_on_host(hoisted)
        """The weights that lie on the host, as graph inputs."""
        self.makers = {index: number for number, piece in enumerate(self.pieces) for index in piece.results}
        """Index of a value -> the number of the piece that makes it."""
        self.before = [
            tuple(dict.fromkeys(self.makers[at.place] for at in piece.arguments if at.is_value))
            for piece in self.pieces
        ]
        """For each piece, the pieces whose values it takes."""
        self.contiguous = [[value.is_contiguous() for value in _captured_results(piece.code)] for piece in self.pieces]
        """For each piece, which of its values the compiled graph expects to be contiguous."""
        self.weights = tuple(dict.fromkeys(index for piece in self.pieces for index in piece.weights))

    def own_inputs(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The graph's inputs as the pieces take them: weights on the host as they are there."""
        if not self.on_host:
            return inputs
        own = list(inputs)
        for index in self.on_host:
            own[index] = own[index].host
        return own

    def after(self, number: int) -> list[int]:
        """The piece of this number, and all pieces that take its values, directly or not."""
        numbers = {number}
        for other in range(number + 1, len(self.pieces)):
            if not numbers.isdisjoint(self.before[other]):
                numbers.add(other)
        return sorted(numbers)


def _captured_results(code: fx.GraphModule) -> Iterator[torch.Tensor]:
    """The fake results of a captured piece."""
    results: Any = code.graph.output_node().args[0]
    return (value for node in results if (value := tensor_of(node)) is not None)


class ComputedValues:
    """The hoisted values of one call, each computed when it is taken first, and none kept.

    Args:
        code: the graph's hoisted pieces.
        inputs: of the graph, in order.
    """

    def __init__(self, code: HoistedCode, inputs: Sequence[Any]) -> None:
        self.code, self.inputs = code, code.own_inputs(inputs)
        self._values: dict[int, torch.Tensor] = {}

    def __getitem__(self, index: int) -> torch.Tensor:
        value = self._values.get(index)
        if value is None:
            number = self.code.makers[index]
            self._values.update(zip(self.code.pieces[number].results, self._results(number), strict=True))
            value = self._values[index]
        return value

    def _results(self, number: int) -> Results:
        """All values of one piece."""
        arguments = self.code.pieces[number].arguments
        return self.code.functions[number](
            *[self[at.place] if at.is_value else self.inputs[at.place] for at in arguments]
        )


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights that a piece's results were made with, and their versions."""

    versions: tuple[tuple[weakref.ref[torch.Tensor], int], ...]

    def are(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether these are the weights, unchanged."""
        return all(
            ref() is weight and weight._version == version
            for (ref, version), weight in zip(self.versions, weights, strict=True)
        )


@dataclass
class _Kept:
    """Results of one piece under one key.

    Attributes:
        tensors: weak references to the conditions that they were made from.
        generation: the number of the generation in which they were used last.
    """

    results: Results
    tensors: tuple[weakref.ref[torch.Tensor], ...]
    generation: int

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.results)


class Trust(Enum):
    """Whether the kept values were made with the present weights and conditions."""

    YES = auto()
    NO_LONGER = auto()
    """They were not, and are dropped."""
    NOT_YET = auto()
    """A device has not answered yet."""


class HoistedMemory:
    """The kept values of one graph and one model, for all its sessions.

    Args:
        code: the graph's hoisted pieces.
        limit: the highest number of bytes that are kept. Beyond it values are computed at every call.
    """

    def __init__(self, code: HoistedCode, limit: int) -> None:
        self.code, self.limit = code, limit
        self.lock = threading.RLock()
        self.bytes_held = 0
        self.renewed: Counter[int] = Counter()
        """Graph input -> how many tensors came in, in this generation."""
        self.timesteps: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        """Place of a clock -> the timestep that a call came with there."""
        self._generation = 0
        """Number of generations begun, in all sessions."""
        self._swept = -1
        """The generation in which unused values last made room. No others fall out of use before the next one."""
        self._kept: list[dict[Key, _Kept]] = [{} for _ in code.pieces]
        self._weights: list[Weights | None] = [None] * len(code.pieces)
        self._parts: defaultdict[int, set[Hashable]] = defaultdict(set)
        """Graph input -> the parts of keys that stood for it in this generation."""
        self._asked: OrderedDict[int, None] = OrderedDict()
        """Hashes of pieces and keys that were asked for once, and not kept."""
        self._samples: list[torch.Tensor] | None = None
        self._conditions: Any = WeakIdKeyDictionary()
        """Condition that results are kept for -> its version, and samples of it."""
        self._begun: weakref.WeakKeyDictionary[Session, int] = weakref.WeakKeyDictionary()
        """Session -> its present generation."""
        self._answers: list[_Answer] = []
        """Whether a weight has changed, and `_misled`: the answers that are still to come, the earliest first."""
        self._misled: torch.Tensor | None = None
        """Whether calls came to one place of a clock with two timesteps."""
        self._is_misled = False
        self.unbatched: set[int] = set()
        """Numbers of pieces that cannot be computed for a batch, and of those that take their values."""
        self._batched: defaultdict[int, set[Hashable]] = defaultdict(set)
        """Number of a piece -> the places of a clock from which it was batched in this generation."""

    @property
    def renewed_inputs(self) -> list[str]:
        """Names of the inputs of which other tensors came in at most steps of the present generation."""
        return [self.code.names[index] for index, count in self.renewed.items() if count > OFTEN]

    def begin(self, session: Session) -> bool:
        """A call of the session's present generation comes. Returns whether it is the first such call."""
        with self.lock:
            if self._begun.get(session) == session.generation:
                return False
            self._begun[session] = session.generation
            self._generation += 1
            self.renewed.clear()
            self._parts.clear()
            self._batched.clear()
            return True

    def compare(self, inputs: Sequence[Any]) -> None:
        """Have samples of weights and conditions compared with the last ones; `trust` tells the answer."""
        samples = samples_of([inputs[index] for index in self.code.weights])
        with self.lock:
            conditions = self._sample_conditions()
            if self._samples is not None:
                olds = [old for condition in conditions for old in self._conditions[condition][1]]
                news = [new for _, samples_now in conditions.values() for new in samples_now]
                changed = differ([*self._samples, *olds], [*samples, *news])
                misled = torch.zeros_like(changed) if self._misled is None else self._misled.to(changed.device)
                self._answers.append(_Answer(torch.stack([changed, misled])))
            self._samples = samples
            self._conditions.update(conditions)

    def _sample_conditions(self) -> Any:
        """Present samples of the conditions whose version says that they are unchanged, as in `_conditions`."""
        present: Any = WeakIdKeyDictionary()
        for condition, (version, _) in list(self._conditions.items()):
            if condition._version == version:
                present[condition] = version, samples_of([condition], CONDITION_SAMPLES)
        return present

    def trust(self, waits: bool = False) -> Trust:
        """Whether the kept values were made with the present weights and conditions, as far as samples tell.

        Args:
            waits: whether to wait for a device's answer.
        """
        with self.lock:
            flags = [False, False]
            while self._answers:
                answer = self._answers[0].flags(waits)
                if answer is None:
                    return Trust.NOT_YET
                flags = [one or two for one, two in zip(flags, answer, strict=True)]
                del self._answers[0]
            if flags[1]:
                self._misled, self._is_misled = None, True
                warn(
                    "calls came to one step of a scheduler with two timesteps, and took values that were computed for "
                    "the first: the last pictures may be wrong. From now on such values are computed at every call; "
                    "passes={'hoist_invariants': False} switches them off"
                )
            if any(flags):
                self._drop(range(len(self.code.pieces)))
            return Trust.NO_LONGER if any(flags) else Trust.YES

    def note(self, place: Hashable, timestep: torch.Tensor) -> bool:
        """Note the timestep that a call comes with at a clock's place. Returns whether the place tells the timestep."""
        with self.lock:
            before = self.timesteps.get(place)
            if self._is_misled and not on_host(timestep):
                return False
            if before is None:
                self.timesteps[place] = timestep.detach().clone()
                if len(self.timesteps) > PLACES:
                    self.timesteps.popitem(last=False)
            elif on_host(timestep):
                if not torch.equal(before, timestep):
                    self.timesteps[place] = timestep.detach().clone()
            else:
                differs = (before != timestep).any()
                self._misled = differs if self._misled is None else self._misled | differs
            return not self._is_misled

    def check_weights(self, number: int, inputs: Sequence[Any]) -> Weights | None:
        """The piece's present weights. Drops results that were made with others. None: nothing may be kept."""
        weights: list[torch.Tensor] = [inputs[index] for index in self.code.pieces[number].weights]
        known = self._weights[number]
        if known is not None and known.are(weights):
            return known
        with self.lock:
            self._drop(self.code.after(number))
            if any(weight.is_inference() for weight in weights):
                return None
            present = Weights(tuple([(weakref.ref(weight), weight._version) for weight in weights]))
            self._weights[number] = present
            return present

    def find(self, number: int, key: Key) -> Results | None:
        """The results of a piece that are kept under the key."""
        with self.lock:
            kept = self._kept[number].get(key)
            if kept is None or any(ref() is None for ref in kept.tensors):
                return None
            kept.generation = self._generation
            return kept.results

    def may_return(self, number: int, key: Key, has_tensors: bool) -> bool:
        """Whether results under this key may be asked for again, as far as can be told.

        Args:
            has_tensors: whether the key names tensors.
        """
        if not self.code.pieces[number].is_timed or not has_tensors:
            return True
        with self.lock:
            asked = hash((number, key))
            if asked in self._asked:
                return True
            self._asked[asked] = None
            if len(self._asked) > PLACES * len(self.code.pieces):
                self._asked.popitem(last=False)
            return False

    def may_batch(self, number: int, place: Hashable) -> bool:
        """Whether a piece may be computed for all steps from a place on. Not if batches turn out to be of no use."""
        with self.lock:
            places = self._batched[number]
            is_allowed = place in places or len(places) < OFTEN
            if is_allowed:
                places.add(place)
            return is_allowed

    def note_parts(self, number: int, key: Key) -> None:
        """Note the tensors that a piece is computed for. One that this generation has not shown yet is a renewal."""
        with self.lock:
            for index, part in zip(self.code.pieces[number].inputs, key, strict=True):
                if part not in self._parts[index] and index != self.code.timestep:
                    self.renewed[index] += 1
                    self._parts[index].add(part)

    def keep(self, number: int, key: Key, results: Results, weights: Weights, tensors: Sequence[torch.Tensor]) -> bool:
        """Keep the results of a piece, made from these conditions, if there is room and the weights are still these.

        Returns False if there is no room.
        """
        kept = _Kept(results, (), self._generation)
        with self.lock:
            if weights is not self._weights[number]:
                return True
            if not self._make_room(kept.size):
                return False
            self._forget(number, key)
            dropper = partial(_drop_result, weakref.ref(self), number, key)
            kept.tensors = tuple(weakref.ref(each, partial(dropper, part_of(each))) for each in tensors)
            for each in tensors:
                if self._conditions.get(each, (None,))[0] != each._version:
                    self._conditions[each] = each._version, samples_of([each], CONDITION_SAMPLES)
            self._kept[number][key] = kept
            self.bytes_held += kept.size
            return True

    def _drop(self, numbers: Iterable[int]) -> None:
        """Keep nothing of these pieces."""
        for number in numbers:
            for key in list(self._kept[number]):
                self._forget(number, key)
            self._weights[number] = None

    def _make_room(self, size: int) -> bool:
        """Whether there is room for `size` more bytes. What neither of the last two generations used makes room."""
        if self.bytes_held + size > self.limit and self._swept != self._generation:
            self._swept = self._generation
            for number, table in enumerate(self._kept):
                for key, kept in list(table.items()):
                    if kept.generation < self._generation - 1:
                        self._forget(number, key)
        return self.bytes_held + size <= self.limit

    def _forget(self, number: int, key: Key) -> None:
        kept = self._kept[number].pop(key, None)
        if kept is not None:
            self.bytes_held -= kept.size


@torch.compiler.disable  # a tensor may die while dynamo traces what runs
def _drop_result(reference: weakref.ref[HoistedMemory], number: int, key: Key, part: Hashable, _: Any) -> None:
    """Drop a result, since a tensor that it was made from has died. Another tensor may be the key's part later."""
    memory = reference()
    if memory is not None:
        with memory.lock:
            memory._forget(number, key)
            for parts in memory._parts.values():
                parts.discard(part)


def part_of(tensor: torch.Tensor) -> Hashable:
    """The part of a key that stands for a condition; None for a tensor without a version."""
    return None if tensor.is_inference() else (id(tensor), tensor._version)


class _Answer:
    """Flags that a device computes. The host takes them when they have arrived.

    Args:
        flags: bools, of one dimension.
    """

    def __init__(self, flags: torch.Tensor) -> None:
        self._flags, self._event = flags, None
        if flags.device.type == "cuda":
            self._flags = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def flags(self, waits: bool) -> list[bool] | None:
        """The flags; None if they have not arrived, unless `waits` is True."""
        if self._event is not None and not self._event.query():
            if not waits:
                return None
            self._event.synchronize()
        flags: list[bool] = self._flags.tolist()
        return flags
