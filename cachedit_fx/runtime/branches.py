"""Lets two halves of a sample's ranks compute the branches of guidance: each call is computed once, and sent.

    step               rank 0                         rank 1
    call of branch 0   computes, sends ────────────►  returns at once: a result that is awaited at its first use
    call of branch 1   returns at once ◄────────────  computes, sends

A branch belongs to one half of the ranks, which alone keeps its stored values. So decisions are those of one process,
and no rank waits for a call that never comes: a step of one call, or of three, is right, and saves less.

Before a call has run, neither its place nor the form of its results is known. So the first call of each form is
computed on all ranks, which tell each other whether they could. The branch's owner sends its results.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from cachedit_fx.capture import ends_at_break
from cachedit_fx.passes.graph_aliases import memory_of
from cachedit_fx.passes.graph_values import value_of
from cachedit_fx.runtime.awaited import RESTART, Arrival, Awaited
from cachedit_fx.runtime.presence import RankMissing, RanksDisagree
from cachedit_fx.runtime.ranks import Ranks, device_among

if TYPE_CHECKING:
    from cachedit_fx.runtime.call import Call

HEADER = 16
"""Bytes before the values of a message: its number, and whether its rank has failed; int64 each."""
SHARED_CALLS = "cfg_parallel: each call of a step is a branch of guidance, which one half of the ranks computes"
"""A sentence for people."""
NUMBERS = torch.SymInt, torch.SymFloat, torch.SymBool
ALIGNMENT = 16
"""Every tensor of a message begins at a multiple of it, in bytes."""


@dataclass(frozen=True)
class Form:
    """A tensor without its values.

    Attributes:
        shape, dtype, device: its own.
        order: its axes, from the one with the largest stride on.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Form:
        """The form of a tensor."""
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        return cls(tensor.shape, tensor.dtype, tensor.device, tuple(order))

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of this form as bytes, in the order of its memory."""
        return tensor.resolve_conj().resolve_neg().permute(self.order).contiguous().view(-1).view(torch.uint8)

    def received(self, content: torch.Tensor) -> torch.Tensor:
        """A tensor of this form, on the memory of its bytes."""
        sizes = [self.shape[axis] for axis in self.order]
        places = [self.order.index(axis) for axis in range(len(sizes))]
        return content.view(self.dtype).view(sizes).permute(places)


@dataclass(frozen=True)
class Known:
    """What was learned from a call of some form.

    Attributes:
        signature: tells the shapes of the values that its first region reads.
        results: of its graph; `Form` in place of tensors.
    """

    signature: Hashable
    results: tuple[Any, ...]

    def fits(self, results: Sequence[Any]) -> bool:
        """Whether a call's results have these shapes and dtypes, and the same values of other kinds."""
        pairs = zip(self.results, results, strict=True)
        return all(
            (form.shape, form.dtype) == (value.shape, value.dtype) if isinstance(form, Form) else form == value
            for form, value in pairs
        )

    @property
    def offsets(self) -> list[int]:
        """Where each tensor begins in a message, and the message's end, in bytes."""
        offsets = [HEADER]
        for form in self.results:
            size = form.bytes if isinstance(form, Form) else 0
            offsets.append(offsets[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        return offsets


def branch_obstacle(gm: fx.GraphModule, has_writes: bool) -> str | None:
    """Why the calls of a captured graph cannot be left to other ranks; None if they can.

    Args:
        has_writes: whether the graph writes to its inputs.
    """
    if ends_at_break(gm):
        return "its capture breaks"
    if has_writes:
        return "it writes to its inputs"
    results = gm.graph.output_node().all_input_nodes
    values = [value_of(node) for node in results]
    if any(has_free_unbacked_symbols(value) for value in values if isinstance(value, (torch.Tensor, *NUMBERS))):
        return "numbers or sizes of its results depend on data"
    memories = Counter(memory for node in results for memory in memory_of(node))
    of_inputs = {memory for node in gm.graph.find_nodes(op="placeholder") for memory in memory_of(node)}
    if max(memories.values(), default=0) > 1 or not of_inputs.isdisjoint(memories):
        return "its results share memory, with each other or with its inputs"
    return None


class Branches:
    """The calls of one graph and one model, shared out by the branches of guidance.

    Args:
        ranks: those that compute the same part of the tokens, one for each half.
        model: name of its class, for errors.
    """

    def __init__(self, ranks: Ranks, model: str) -> None:
        self.ranks, self.model = ranks, model
        self._numbers: list[int] | None = None
        """Places of the graph's inputs that are no tensors. A thousand weights are among its inputs."""
        self._known: dict[Hashable, Known] = {}
        """Form of a call -> what was learned from one."""
        self._messages = 0
        self._pending: deque[tuple[int, Callable[[], Any]]] = deque()
        """Number of a message -> what waits until it is sent, or received without a fault."""

    def results(
        self, call: Call, inputs: Sequence[Any], on_locate: Sequence[Callable[[], None]], compute: Callable[[], Any]
    ) -> Sequence[Any]:
        """The results of the graph: computed here and sent, or on their way from another rank.

        Args:
            inputs: of the graph.
            on_locate: called in turn as soon as the call's position is known, unless `compute` is called before.
            compute: returns the results.

        Raises:
            RankMissing: if another rank has failed.
        """
        if call.session.is_stray:  # it has no position
            return compute()
        self._check()
        call.on_success(lambda: _count(call, self.ranks))
        if self._numbers is None:
            self._numbers = [index for index, value in enumerate(inputs) if not isinstance(value, torch.Tensor)]
        form = call.forms, tuple(inputs[index] for index in self._numbers)
        known = self._known.get(form)
        if known is None:
            return self._first_results(form, call, self._computed_by_all(inputs, compute))
        if not call.is_located:
            call.locate_region(known.signature)
            for notice in on_locate:
                notice()
        if call.position is None:
            return compute()
        branch = call.position.branch
        owner = branch % self.ranks.size
        if owner == self.ranks.rank:
            return self._computed(known, compute)
        call.on_success(lambda: call.session.record_elsewhere(branch))
        return self._awaited(known, owner)

    def _computed_by_all(self, inputs: Sequence[Any], compute: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """The results, which every rank computes. The ranks tell each other whether one has failed.

        Raises:
            RankMissing: if another rank has.
        """
        device = device_among(value for value in inputs if isinstance(value, torch.Tensor))
        has_failed = torch.ones(1, dtype=torch.int64, device=device)
        try:
            results = compute()
        except RanksDisagree:  # all ranks know
            raise
        except BaseException:
            self.ranks.tables(has_failed)
            raise
        failed = [rank for rank, (each,) in enumerate(self.ranks.tables(1 - has_failed)) if each]
        if failed:
            names = " and ".join(f"rank {self.ranks.presence.members[rank]}" for rank in failed)
            raise RankMissing(
                f"{self.ranks.presence.heading}{names} failed in a call of {self.model or 'the model'} that every rank "
                "computes. Its own output says why"
            )
        return results

    def _first_results(self, form: Hashable, call: Call, results: Sequence[Any]) -> Sequence[Any]:
        """What was computed on all ranks, to learn the form of the results. Those of the branch's owner count.

        In the midst of a generation it alone has the branch's present values. A new graph begins there where dynamo
        captures another length of a prompt.
        """
        forms = (Form.of(value) if isinstance(value, torch.Tensor) else value for value in results)
        known = Known(call.signature, tuple(forms))
        call.on_success(lambda: self._known.__setitem__(form, known))
        if call.position is None:
            return results
        owner = call.position.branch % self.ranks.size
        if owner != self.ranks.rank:
            return self._awaited(known, owner)
        self._send(known, results)
        return results

    def _computed(self, known: Known, compute: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """The results, computed here. The other ranks get them, or the news that this rank has failed."""
        try:
            results = compute()
            if not known.fits(results):
                raise RanksDisagree(
                    f"{self.ranks.presence.heading}the result of {self.model or 'the model'} has another form than "
                    "before, for inputs of the same form. Other ranks cannot await it: leave out cfg_parallel"
                )
        except BaseException as error:
            self._send(known, ())
            advice = f"in its branch of {self.model or 'the model'}, while other ranks awaited the result. {RESTART}"
            self.ranks.faults.append(f"{self.ranks.presence.heading}this rank has failed {advice}")
            error.add_note(f"This rank has failed {advice}")
            raise
        self._send(known, results)
        return results

    def _send(self, known: Known, results: Sequence[Any]) -> None:
        """Begin to send results; none: this rank has failed."""
        message = self._message(known)
        message[:HEADER] = torch.tensor([self._messages, not results]).view(torch.uint8)
        for form, value, start in zip(known.results, results, known.offsets, strict=False):
            if isinstance(form, Form):
                message[start : start + form.bytes] = form.sent(value)
        self._note(self._broadcast(message, self.ranks.rank).wait)

    def _awaited(self, known: Known, owner: int) -> Sequence[Any]:
        """The results on their way from their owner. Nothing waits."""
        message = self._message(known)
        work, header = self._broadcast(message, owner), message[:HEADER].view(torch.int64)
        arrival = Arrival(work, header, self._messages, self.ranks, owner, self.model)
        self._note(arrival.check)
        results = []
        for form, start in zip(known.results, known.offsets, strict=False):
            if isinstance(form, Form):
                content = form.received(message[start : start + form.bytes])
                results.append(Awaited(arrival.kept_on(form.device, content), arrival))
            else:
                results.append(form)
        return tuple(results)

    def _note(self, wait: Callable[[], Any]) -> None:
        """A message has begun its way."""
        self._pending.append((self._messages, wait))
        self._messages += 1

    def _message(self, known: Known) -> torch.Tensor:
        """Memory for a message."""
        device = next(form.device for form in known.results if isinstance(form, Form))
        return torch.empty(known.offsets[-1], dtype=torch.uint8, device=self.ranks.device_for(device))

    def _broadcast(self, message: torch.Tensor, owner: int) -> dist.Work:
        source = self.ranks.presence.members[owner]
        work: dist.Work = dist.broadcast(message, src=source, group=self.ranks.group, async_op=True)
        return work

    def _check(self) -> None:
        """Look at what earlier steps have sent and received. The present step's messages may be on their way still.

        Raises:
            RankMissing: if another rank has failed.
        """
        while self._pending and self._pending[0][0] <= self._messages - self.ranks.size:
            self._pending.popleft()[1]()


def _count(call: Call, ranks: Ranks) -> None:
    """Count the calls of each step, whose forms may be of several graphs. Warns once if ranks were idle."""
    if call.position is None:
        return
    session, place = call.session, (call.position.generation, call.position.step)
    latest, calls = session.step_calls
    session.step_calls = place, calls + 1 if latest == place else 1
    if latest != place and latest[0] == place[0] and calls != ranks.size:
        session.state.warn_once(
            f"{ranks.words}: a step had {calls} call{'s' * (calls > 1)}, of which each half of the ranks computes "
            f"{'one' if calls == 1 else 'some'} while the other waits. Two calls a step keep both busy; ulysses_size "
            "divides a single call"
        )
