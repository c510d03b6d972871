"""Makes sure that the ranks which share a sample call a graph in the same way, before they exchange anything.

    rank 0   options, form of the call, weights, values of each input   ─► 64 numbers ─┐
    rank 1   options, form of the call, weights, values of each input   ─► 64 numbers ─┴► equal? else: what differs

A rank that drew its own noise, or encoded its own prompt, would give a garbage picture and no error. The ranks compare
their calls where a generation begins, and when the inputs have another form than before. That is one small all-gather
and one read-back.
"""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from cachedit_fx.passes.find_timestep import source_name
from cachedit_fx.passes.graph_values import is_of_module, value_of
from cachedit_fx.runtime.ranks import Ranks
from cachedit_fx.runtime.samples import samples_of

if TYPE_CHECKING:
    from cachedit_fx.config.options import Options
    from cachedit_fx.runtime.call import Call
    from cachedit_fx.runtime.session import Session

SLOTS = 64
"""Numbers that each rank tells. Inputs beyond them share the last one."""
OPTIONS, FORMS, WEIGHTS, FIRST_INPUT = range(4)
"""What the first numbers stand for. Each of the others stands for the values of one input."""


class RanksDisagree(RuntimeError):
    """The ranks that share a sample do not call the model in the same way."""


@dataclass(frozen=True)
class InputNames:
    """The inputs of a graph, by index.

    Attributes:
        arguments: index -> name, of the inputs that a call brings.
        weights: indices of the others.
    """

    arguments: Mapping[int, str]
    weights: tuple[int, ...]


def input_names(gm: fx.GraphModule) -> InputNames:
    """The inputs of a graph as dynamo captured it. Symbols are left out: they are sizes of other inputs."""
    inputs = list(enumerate(gm.graph.find_nodes(op="placeholder")))
    others = [(index, node) for index, node in inputs if not isinstance(value_of(node), torch.SymInt)]
    arguments = {index: source_name(node) for index, node in others if not is_of_module(node)}
    return InputNames(arguments, tuple(index for index, _ in others if index not in arguments))


class Agreement:
    """What the ranks of a group have compared, of one graph and one model.

    Args:
        ranks: those that share a sample.
        names: of the graph's inputs.
    """

    def __init__(self, ranks: Ranks, names: InputNames) -> None:
        self.ranks, self.names = ranks, names
        self._forms: Hashable = None
        """Of the latest comparison."""
        self._generations: weakref.WeakKeyDictionary[Session, int] = weakref.WeakKeyDictionary()
        """Session -> the generation that was compared."""

    def begin(self, inputs: Sequence[Any], options: Options, call: Call | None = None) -> bool:
        """The graph is called. Compares the call if its form is new, or if a clock shows that a generation begins.

        Returns:
            Whether it was compared.

        Raises:
            RanksDisagree: on all ranks, if the calls differ.
        """
        arguments = (inputs[index] for index in self.names.arguments)
        forms = tuple((x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else type(x) for x in arguments)
        if forms == self._forms and not (call is not None and call.begins_by_clock):
            return False
        self._compare(inputs, options)
        self._forms = forms
        return True

    def locate(self, inputs: Sequence[Any], session: Session, is_compared: bool) -> None:
        """The call's position is known now. Compares the first call of a generation, unless `begin` did.

        Raises:
            RanksDisagree: on all ranks, if the calls differ.
        """
        if self._generations.get(session) != session.generation:
            if not is_compared:
                self._compare(inputs, session.state.options)
            self._generations[session] = session.generation

    def _compare(self, inputs: Sequence[Any], options: Options) -> None:
        arguments = {name: inputs[index] for index, name in self.names.arguments.items()}
        settings = {each.name: _text(getattr(options, each.name)) for each in fields(options)}
        forms = {name: _form_of(value) for name, value in arguments.items()}
        weights = samples_of(inputs[index] for index in self.names.weights)
        values = [
            _checksum([value]) if isinstance(value, torch.Tensor) else _hash(value) for value in arguments.values()
        ]
        rows = self.ranks.tables(_in_slots([_hash(settings), _hash(forms), _checksum(weights), *values]))
        slot = next((slot for slot in range(SLOTS) if len({row[slot] for row in rows}) > 1), None)
        if slot is None:
            return
        if slot == OPTIONS:
            what = self._difference("option", settings)
        elif slot == FORMS:
            what = self._difference("input", forms)
        elif slot == WEIGHTS:
            what = "the weights have other values. Load the same ones, and the same adapters, on every rank"
        else:
            names = list(arguments)[slot - FIRST_INPUT : None if slot == SLOTS - 1 else slot - FIRST_INPUT + 1]
            what = (
                f"{' or '.join(names)} has other values. Draw the noise with one seed on every rank (torch.Generator), "
                "encode one prompt, and give all ranks equal inputs"
            )
        raise RanksDisagree(f"ulysses_size={self.ranks.size}: {_places(rows, slot)} differ in their calls: {what}")

    def _difference(self, kind: str, texts: Mapping[str, Hashable]) -> str:
        """The first thing of which the ranks have different texts."""
        everywhere = self.ranks.objects(dict(texts))
        name = next(name for each in everywhere for name in each if len({rank.get(name) for rank in everywhere}) > 1)
        values = ", ".join(f"{rank.get(name, 'nothing')} on rank {number}" for number, rank in enumerate(everywhere))
        return f"the {kind} {name} is {values}"


def _places(rows: Sequence[Sequence[int]], slot: int) -> str:
    """The ranks, those that agree together: `ranks 0, 2 and 1`."""
    groups: dict[int, list[str]] = {}
    for rank, row in enumerate(rows):
        groups.setdefault(row[slot], []).append(str(rank))
    return "ranks " + " and ".join(", ".join(ranks) for ranks in groups.values())


def _form_of(value: Any) -> Hashable:
    """Everything about an input but its numbers, for people."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}] on {value.device.type}"
    return type(value).__name__


def _text(value: Any) -> str:
    """A text that is equal in all processes: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _hash(value: Any) -> int:
    digest = hashlib.blake2b(_text(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _checksum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """One number for the contents of tensors, int64, on the device of the first. Equal contents have equal numbers."""
    total = torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        bits = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        flat = bits.detach().reshape(-1)
        if flat.dtype is not torch.bool:
            flat = flat.view(_INTEGERS[flat.element_size()])
        half = flat[: len(flat) // 2].sum(dtype=torch.int64)
        total = total.to(flat.device) * 31 + flat.sum(dtype=torch.int64) + 7 * half
    return total


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _in_slots(numbers: Sequence[int | torch.Tensor]) -> torch.Tensor:
    """The numbers as one vector of `SLOTS` elements, on the device of the last tensor that is not on the host."""
    tensors = [torch.as_tensor(number, dtype=torch.int64) for number in numbers]
    device = next((each.device for each in reversed(tensors) if each.device.type != "cpu"), torch.device("cpu"))
    row = torch.stack([each.to(device) for each in tensors])
    if len(row) > SLOTS:
        row = torch.cat([row[: SLOTS - 1], row[SLOTS - 1 :].sum().reshape(1)])
    return torch.nn.functional.pad(row, (0, SLOTS - len(row)))
