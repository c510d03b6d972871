"""Makes sure that the ranks which share a sample call a graph in the same way, before they exchange anything.

    rank 0   options, form of the call, graph, weights, each input's values ─► 64 numbers ─┐
    rank 1   options, form of the call, graph, weights, each input's values ─► 64 numbers ─┴► equal? else: what differs

A rank that drew its own noise, or encoded its own prompt, would give a garbage picture and no error. The ranks compare
their calls where a generation begins, at the first call of each further branch, and when the inputs have another form
than before. First they make sure that all of them have come (`runtime.presence`). Then one small all-gather and one
read-back compare the calls.

All other calls are compared a call late, and up to rounding (`runtime.drift`). What ranks compute may be rounded in
other ways, so a comparison within a generation forgives that in samples too.

With ulysses_inputs="first_rank" the values of tensors are not compared: at every call all ranks take those of the
group's first rank.
"""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from cachedit_fx.passes.find_timestep import source_name
from cachedit_fx.passes.graph_values import is_of_module, tensor_of, value_of
from cachedit_fx.runtime.checksum import checksum
from cachedit_fx.runtime.drift import Drift
from cachedit_fx.runtime.presence import RanksDisagree
from cachedit_fx.runtime.ranks import Gathering, Ranks, device_among
from cachedit_fx.runtime.samples import parts_of, samples_of
from cachedit_fx.runtime.shared_inputs import SharedInputs

if TYPE_CHECKING:
    from cachedit_fx.runtime.call import Call
    from cachedit_fx.runtime.model_state import ModelState
    from cachedit_fx.runtime.session import Session

SLOTS = 64
"""Numbers that each rank tells. Inputs beyond them share the last one."""
IS_LATER, OPTIONS, FORMS, GRAPH, PLAN, WEIGHTS, FIRST_INPUT = range(7)
"""What the first numbers stand for. Each of the others stands for the values of one input."""


@dataclass(frozen=True)
class Captured:
    """What ranks compare of a graph as dynamo captured it.

    Attributes:
        model: name of its class; empty if it is not known.
        arguments: index of an input -> name, of the inputs that a call brings.
        weights: indices of the other inputs.
        operations: those that make tensors, in order, with their constants. Sizes are left out: dynamo may have made
            symbols of them on one rank, and numbers on another.
        plan: what the passes have made of the graph: name of a region, or of what is shared -> a description.
    """

    model: str
    arguments: Mapping[int, str]
    weights: tuple[int, ...]
    operations: tuple[str, ...]
    plan: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, gm: fx.GraphModule, model: str = "") -> Captured:
        """Read a graph before the passes change it. Inputs that are symbols are left out: they are sizes of others."""
        inputs = list(enumerate(gm.graph.find_nodes(op="placeholder")))
        others = [(index, node) for index, node in inputs if not isinstance(value_of(node), torch.SymInt)]
        arguments = {index: source_name(node) for index, node in others if not is_of_module(node)}
        weights = tuple(index for index, _ in others if index not in arguments)
        calls = [node for node in gm.graph.nodes if node.op.startswith("call") and tensor_of(node) is not None]
        return cls(model, arguments, weights, tuple(map(_operation, calls)))


def _operation(node: fx.Node) -> str:
    """An operation and its constants, such as `gelu('tanh')`."""
    constants = [leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, _CONSTANTS)]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", type(node.target).__name__)
    return f"{name}({', '.join(map(repr, constants))})"


_CONSTANTS = (bool, float, complex, str, torch.dtype)


@dataclass(frozen=True)
class Comparison:
    """What one rank tells of a call.

    Attributes:
        row: the numbers that ranks compare, [SLOTS] int64.
        kinds: slot -> what it stands for, and the texts that its number was made of.
        arguments: the call's inputs, by name.
    """

    row: torch.Tensor
    kinds: Mapping[int, tuple[str, Mapping[Any, Hashable]]]
    arguments: Mapping[str, Any]
    state: ModelState


class Agreement:
    """What the ranks of a group have compared, of one graph and one model.

    Args:
        ranks: those that share a sample.
        captured: the graph.
        state: the model's.
        shares_branches: whether ranks compute the branches of guidance apart. Then a step's further branches are
            compared without waiting: the next call tells the outcome.
    """

    def __init__(self, ranks: Ranks, captured: Captured, state: ModelState, shares_branches: bool = False) -> None:
        self.ranks, self.captured, self.model = ranks, captured, state.title or captured.model
        self._shares_branches = shares_branches and state.grid is not None and state.grid.branches is not None
        takes_first = state.options.ulysses_inputs == "first_rank"
        self._shared_inputs = SharedInputs(ranks) if takes_first else None
        self._drift = Drift(ranks, list(captured.arguments.values()))
        self._forms: set[Hashable] = set()
        """Of all comparisons since ranks disagreed."""
        self._begun: tuple[Comparison, Gathering] | None = None
        """A comparison that nobody has waited for yet, and the ranks' rows on their way."""
        self._branches: weakref.WeakKeyDictionary[Session, tuple[int, frozenset[int | None]]] = (
            weakref.WeakKeyDictionary()
        )
        """Session -> the latest generation, and its branches that were compared."""

    @contextmanager
    def watch(self, state: ModelState) -> Iterator[None]:
        """Context manager for a call of the graph. The next call is compared if ranks disagree in this one.

        Raises:
            RankMissing: if a collective fails, or one has failed for good.
        """
        call = state.session().call
        if call is not None:
            call.is_shared = True
        self.ranks.check()
        if state.grid is not None and state.grid.branches is not None:
            state.grid.branches.check()
        try:
            with self.ranks.presence.watch(self.model):
                yield
        except RanksDisagree:
            self._forms, self._begun = set(), None
            self._drift.restart()
            raise

    def begin(self, inputs: Sequence[Any], state: ModelState, call: Call | None = None) -> bool:
        """The graph is called. Compares the call if its form is new, or if it begins a generation for certain.

        Returns:
            Whether it was compared to the bit.

        Raises:
            RanksDisagree: on all ranks, if the calls differ, or those before it did.
            RankMissing: if a rank does not take part.
        """
        self._check_drift()
        arguments = (inputs[index] for index in self.captured.arguments)
        forms = tuple((x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else type(x) for x in arguments)
        if call is None:  # nothing tells generations
            is_first = not any(agreement._forms for agreement in state.agreements)
        else:
            call.forms = forms
            is_first = call.begins_by_clock or call.begins_afresh
        if forms in self._forms and not is_first:
            return False
        self._compare(inputs, state, is_later=not is_first)
        self._forms.add(forms)
        return is_first

    def end(self, session: Session) -> None:
        """A pipeline has ended, which made the session's calls. Tells the outcome of the last one's comparison.

        Raises:
            RanksDisagree: on all ranks, if the last calls differed.
            RankMissing: if a rank has ended.
        """
        if not self.ranks.is_destroyed:
            with self.ranks.presence.watch(self.model):
                self._check_drift(session)

    def _check_drift(self, session: Session | None = None) -> None:
        """Tell the outcome of comparisons that nobody has waited for.

        Raises:
            RanksDisagree: on all ranks, if calls differed.
        """
        begun, self._begun = self._begun, None
        if begun is not None:
            comparison, gathering = begun
            self._judge(comparison, gathering.rows().tolist())
        number = self._drift.calls
        names = self._drift.differing(session)
        if names:
            raise RanksDisagree(
                f"{self.ranks.presence.heading}the ranks have drifted apart: {' and '.join(names)} had other values on "
                f"each of them in the latest call, which is call {number} after the ranks compared all inputs. Use one "
                "guidance scale, one seed for the noise of the scheduler's steps, and the same callbacks on all ranks; "
                "or pass ulysses_inputs='first_rank', and all ranks take the inputs of the first one"
            )

    def taken(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The inputs with which the graph is to run: the first rank's tensors, if the options ask for these."""
        if self._shared_inputs is None:
            return inputs
        indices = [index for index in self.captured.arguments if isinstance(inputs[index], torch.Tensor)]
        taken = list(inputs)
        for index, value in zip(indices, self._shared_inputs.of([inputs[index] for index in indices]), strict=True):
            taken[index] = value
        return taken

    def enter(self, inputs: Sequence[Any], call: Call) -> bool:
        """The call's timestep is known now, before the graph runs. Compares the call if the timestep turns back.

        Returns:
            Whether it was compared to the bit.

        Raises:
            RanksDisagree: on all ranks, if the calls differ.
            RankMissing: if a rank does not take part.
        """
        if call.is_located or not call.turns_back:
            return False
        self._compare(inputs, call.session.state)
        return True

    def locate(self, inputs: Sequence[Any], call: Call, is_compared: bool) -> None:
        """The call's position is known now. Compares the first call of each branch, unless `is_compared` to the bit.

        Raises:
            RanksDisagree: on all ranks, if the calls differ.
            RankMissing: if a rank does not take part.
        """
        session, branch = call.session, call.position and call.position.branch
        generation, compared = self._branches.get(session, (None, frozenset()))
        compared = compared if generation == session.generation else frozenset()
        if branch in compared:
            self.follow(inputs, session, is_compared)
            return
        is_later = call.position is not None and call.position.step > 0
        if self._shares_branches and not is_compared and not is_later:
            comparison = self._comparison(inputs, session.state, with_weights=False)
            self._begun = comparison, Gathering(self.ranks, comparison.row)
        elif not is_compared:
            self._compare(inputs, session.state, is_later)
        self._branches[session] = session.generation, compared | {branch}

    def follow(self, inputs: Sequence[Any], session: Session, is_compared: bool) -> None:
        """Begin to compare a call that is no first one, unless it was compared. The next call tells the outcome.

        No rank waits here. One that did not come would leave the group out of step, so this is for calls in which the
        ranks exchange values anyway.
        """
        if not is_compared and self._shared_inputs is None:
            self._drift.send([inputs[index] for index in self.captured.arguments], session)

    def _compare(self, inputs: Sequence[Any], state: ModelState, is_later: bool = False) -> None:
        """Compare a call: to the bit, or with `is_later` on all ranks up to rounding of what ranks compute."""
        comparison = self._comparison(inputs, state, is_later)
        self._drift.restart()
        with self.ranks.presence.meeting(self.model):
            state.is_apart = False
            self._judge(comparison, self.ranks.tables(comparison.row))

    def _comparison(
        self, inputs: Sequence[Any], state: ModelState, is_later: bool = False, with_weights: bool = True
    ) -> Comparison:
        """What this rank tells of a call. A step's further branches leave out the weights, which have been compared."""
        arguments = {name: inputs[index] for index, name in self.captured.arguments.items()}
        settings = {each.name: _text(getattr(state.options, each.name)) for each in fields(state.options)}
        forms = {name: _form_of(value) for name, value in arguments.items()}
        weights = [inputs[index] for index in self.captured.weights] if with_weights else []
        operations = dict(enumerate(self.captured.operations))
        values = [self._number_of(value) for value in arguments.values()]
        texts = map(_hash, (settings, forms, operations, self.captured.plan))
        row = _in_slots([int(is_later), *texts, _number_of_weights(weights, state), *values])
        kinds: dict[int, tuple[str, Mapping[Any, Hashable]]] = {
            OPTIONS: ("option", settings),
            FORMS: ("input", forms),
            GRAPH: ("operation", operations),
            PLAN: ("plan of", self.captured.plan),
        }
        return Comparison(row, kinds, arguments, state)

    def _judge(self, comparison: Comparison, rows: Sequence[Sequence[int]]) -> None:
        """Raise if the ranks' rows show that their calls differ. All ranks must call it together."""
        slots = [slot for slot in range(OPTIONS, SLOTS) if len({row[slot] for row in rows}) > 1]
        if all(row[IS_LATER] for row in rows):
            slots = self._beyond_rounding(slots, comparison.arguments, comparison.state)
        if slots:
            slot, kinds = slots[0], comparison.kinds
            what = self._difference(*kinds[slot]) if slot in kinds else _other_values(slot, list(comparison.arguments))
            ranks = f"{self.ranks.presence.heading}{self._places(rows, slot)}"
            raise RanksDisagree(f"{ranks} differ in their calls: {what}")

    def _beyond_rounding(self, slots: list[int], arguments: Mapping[str, Any], state: ModelState) -> list[int]:
        """Those slots in which calls differ by more than rounding. All ranks must call it together."""
        names = list(arguments)
        inputs = {slot: _names_in(slot, names) for slot in slots if slot >= FIRST_INPUT}
        rounded = {slot for slot, each in inputs.items() if all(_may_be_rounded(arguments[name]) for name in each)}
        if not slots or rounded != set(slots):
            return [slot for slot in slots if slot not in rounded]
        self._drift.send(list(arguments.values()), state.session())
        differing = self._drift.differing()
        self._drift.restart()
        return [slot for slot in slots if not set(differing).isdisjoint(inputs[slot])]

    def _number_of(self, value: Any) -> int | torch.Tensor:
        """One number for the values of an input; 0 for a tensor that is taken from the first rank."""
        if not isinstance(value, torch.Tensor):
            return _hash(value)
        return checksum(value) if self._shared_inputs is None else 0

    def _difference(self, kind: str, texts: Mapping[Any, Hashable]) -> str:
        """The first thing of which the ranks have different texts."""
        everywhere = self.ranks.objects(dict(texts))
        name = next(name for each in everywhere for name in each if len({rank.get(name) for rank in everywhere}) > 1)
        values = ", ".join(
            f"{each.get(name, 'nothing')} on rank {rank}"
            for rank, each in zip(self.ranks.presence.members, everywhere, strict=True)
        )
        return f"the {kind} {name} is {values}"

    def _places(self, rows: Sequence[Sequence[int]], slot: int) -> str:
        """The ranks, those that agree together: `ranks 0, 2 and 1`."""
        groups: dict[int, list[str]] = {}
        for rank, row in zip(self.ranks.presence.members, rows, strict=True):
            groups.setdefault(row[slot], []).append(str(rank))
        return "ranks " + " and ".join(", ".join(ranks) for ranks in groups.values())


def _other_values(slot: int, names: Sequence[str]) -> str:
    """What it means that numbers of weights, or of inputs of these names, differ."""
    if slot == WEIGHTS:
        return "the weights have other values. Load the same ones, and the same adapters, on every rank"
    return (
        f"{' or '.join(_names_in(slot, names))} has other values. Draw the noise with one seed on every rank "
        "(torch.Generator), encode one prompt, and give all ranks equal inputs; or pass ulysses_inputs='first_rank', "
        "and all ranks take those of the first one"
    )


def _names_in(slot: int, names: Sequence[str]) -> Sequence[str]:
    """Names of the inputs that a slot stands for."""
    return names[slot - FIRST_INPUT : None if slot == SLOTS - 1 else slot - FIRST_INPUT + 1]


def _may_be_rounded(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


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


def _number_of_weights(weights: Sequence[torch.Tensor], state: ModelState) -> torch.Tensor:
    """One number for the weights: of all their bits as far as they count writes, and of samples as they are now."""
    parts = [part for weight in weights for part in parts_of(weight)]
    numbers = [*map(state.checksums, parts), *map(checksum, samples_of(parts))]
    return checksum(torch.stack([number.to(numbers[0].device) for number in numbers])) if numbers else torch.tensor(0)


def _in_slots(numbers: Sequence[int | torch.Tensor]) -> torch.Tensor:
    """The numbers as one vector of `SLOTS` elements, on the device of the last tensor that is not on the host."""
    tensors = [torch.as_tensor(number, dtype=torch.int64) for number in numbers]
    device = device_among(reversed(tensors))
    row = torch.stack([each.to(device) for each in tensors])
    if len(row) > SLOTS:
        row = torch.cat([row[: SLOTS - 1], row[SLOTS - 1 :].sum().reshape(1)])
    return torch.nn.functional.pad(row, (0, SLOTS - len(row)))
