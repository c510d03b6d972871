"""Computes hoisted values when a graph asks for them: the values of one call.

    values[7] ─► the piece that makes value 7 ─► kept for these very inputs? ─► yes: the kept result
                                                                             └► no: compute, keep

`cachedit_fx.runtime.hoisted_memory` says what is kept, and how long.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from cachedit_fx.passes.hoist_invariants import HoistedPiece
from cachedit_fx.runtime.guard import on_host
from cachedit_fx.runtime.hoisted_memory import ComputedValues, HoistedMemory, Key, Results, Trust, Weights, part_of
from cachedit_fx.runtime.host_tensor import to_host

if TYPE_CHECKING:
    from cachedit_fx.runtime.call import Call


class StaleValues(Exception):  # noqa: N818 - no error: the call is made again
    """A call began a generation with values whose weights or conditions had changed: it is to be made again."""


class HoistedValues(ComputedValues):
    """The hoisted values of one call, computed when they are taken first, or found in memory.

    Args:
        memory: where values are kept.
        inputs: of the graph, in order.
        call: the transformer call, for its clock.
    """

    def __init__(self, memory: HoistedMemory, inputs: Sequence[Any], call: Call) -> None:
        super().__init__(memory.code, inputs)
        self.memory, self.call = memory, call
        self._has_kept_ones = False
        self._weights: dict[int, Weights | None] = {}
        """Number of a piece -> its weights; None if its results may not be kept."""
        self._keys: dict[tuple[int, ...], Key | None] = {}
        """Graph inputs that results depend on -> their key in this call."""
        self._time: Hashable = None
        self._batches: dict[int, list[Results]] = {}
        """Number of a piece -> its results for each of `_steps`."""
        self._is_batched = call.session.state.options.motion == "batched"
        self._is_compared = not call.is_located and call.begins_by_clock
        if self._is_compared:  # a clock shows before the first block that a generation begins
            memory.compare(self.inputs)
        self._is_open = memory.trust() is not Trust.NOT_YET
        if call.is_located:
            self.locate()

    def locate(self) -> None:
        """The call's position is known now.

        Raises:
            StaleValues: if the call has taken values whose weights or conditions have changed since they were made.
        """
        if not self.memory.begin(self.call.session):
            return
        if not self._is_compared:
            self.memory.compare(self.inputs)
        trust = self.memory.trust(waits=self._has_kept_ones and not self._is_compared)
        self._weights, self._is_open = {}, trust is not Trust.NOT_YET
        if trust is Trust.NO_LONGER and self._has_kept_ones:
            raise StaleValues

    def _results(self, number: int) -> Results:
        piece = self.code.pieces[number]
        weights = self._present_weights(number)
        key = self._present_key(piece) if weights is not None else None
        if key is None or weights is None:
            return super()._results(number)
        results = self.memory.find(number, key)
        if results is not None:
            self._has_kept_ones = True
            return results
        self.memory.note_parts(number, key)
        if piece.is_timed and self._is_batched and (rows := self._batch(number)):
            return rows[0]
        results = super()._results(number)
        tensors = self._conditions(piece)
        if self.memory.may_return(number, key, bool(tensors)):
            self.memory.keep(number, key, results, weights, tensors)
        return results

    def _present_weights(self, number: int) -> Weights | None:
        """The piece's weights; None if its results, or those of the pieces before it, may not be kept."""
        if number not in self._weights:
            before = [self._present_weights(other) for other in self.code.before[number]]
            weights = self.memory.check_weights(number, self.inputs) if self._is_open else None
            self._weights[number] = None if None in before else weights
        return self._weights[number]

    def _conditions(self, piece: HoistedPiece) -> list[torch.Tensor]:
        values = (self.inputs[index] for index in piece.inputs if index != self.code.timestep)
        return [value for value in values if isinstance(value, torch.Tensor)]

    def _present_key(self, piece: HoistedPiece) -> Key | None:
        """The key of the piece's results in this call. Most pieces depend on the same inputs, and have one key."""
        if piece.inputs not in self._keys:
            self._keys[piece.inputs] = self._key(piece, self._time_key())
        return self._keys[piece.inputs]

    def _key(self, piece: HoistedPiece, time: Hashable) -> Key | None:
        """The key of the piece's results at a time; None if they cannot be kept."""
        parts: list[Hashable] = []
        for index in piece.inputs:
            value = self.inputs[index]
            if index == self.code.timestep:
                part = time
            elif isinstance(value, torch.Tensor):
                part = part_of(value)
            else:
                part = (type(value), value)
            if part is None:
                return None
            parts.append(part)
        return tuple(parts)

    def _time_key(self) -> Hashable:
        """The part of a key that stands for the timestep; None if it would have to be read from a device."""
        if self._time is None and self.code.timestep is not None:
            timestep = self.inputs[self.code.timestep]
            self._time = self._numbers(timestep)
            places = self._places if self._time is None or self._is_batched else []
            if places:
                is_told = self.memory.note(places[0], timestep)
                if self._time is None and is_told and timestep.dim() <= 1:
                    self._time = places[0]
            if self._time is None and self.code.on_host:
                self._time = time_key(to_host(timestep))
        return self._time

    def _numbers(self, timestep: Any) -> Hashable:
        """The numbers of a timestep as a part of a key; None if they would have to be read from a device.

        They are read for pieces on the host if no place can tell them: in a timestep for each token.
        """
        is_read = self.code.on_host and isinstance(timestep, torch.Tensor) and timestep.dim() > 1
        return time_key(to_host(timestep) if is_read else timestep)

    @cached_property
    def _places(self) -> list[Hashable]:
        """The clock's places from the present one on, each with the form of the timestep; empty without a clock."""
        tick, timestep = self.call.tick, self.inputs[self.code.timestep or 0]
        schedule = self.call.session.schedule(tick, waits=bool(self.code.on_host))
        if schedule is None or tick is None or not isinstance(timestep, torch.Tensor):
            return []
        times, place = schedule
        return [(timestep.shape, timestep.dtype, tick.method, time) for time in times[place:]]

    @cached_property
    def _steps(self) -> list[tuple[Hashable, torch.Tensor]]:
        """The steps from the present one on: the part of a key, and the timestep. Empty if one is not known."""
        later = [self.memory.timesteps.get(place) for place in self._places[1:]]
        known = [self.inputs[self.code.timestep or 0], *(timestep for timestep in later if timestep is not None)]
        if len(known) != len(self._places):
            return []
        parts = [self._numbers(timestep) or place for place, timestep in zip(self._places, known, strict=True)]
        return list(zip(parts, known, strict=True))

    def _batch(self, number: int) -> list[Results]:
        """Compute and keep the results of a timed piece for all steps from the present one on, in one batch.

        Empty if the steps are not known, or if the piece cannot be computed for a batch.
        """
        if number not in self._batches:
            self._batches[number] = self._rows(number)
        return self._batches[number]

    def _rows(self, number: int) -> list[Results]:
        piece, steps, weights = self.code.pieces[number], self._steps, self._present_weights(number)
        keys = [key for time, _ in steps if (key := self._key(piece, time)) is not None]
        if len(steps) < 2 or len(keys) < len(steps) or weights is None or number in self.memory.unbatched:
            return []
        kept = [results for key in keys if (results := self.memory.find(number, key)) is not None]
        if len(kept) == len(steps):
            return kept
        if not self.memory.may_batch(number, self._places[0]):
            self.call.session.state.warn_once(
                "motion='batched': some values are computed at each step, since steps came with other timesteps or "
                "conditions than those that the step before was batched with"
            )
            return []
        rows = self._mapped(number, [timestep for _, timestep in steps])
        tensors = self._conditions(piece)
        pairs = zip(keys, rows, strict=bool(rows))
        if not all(self.memory.keep(number, key, results, weights, tensors) for key, results in pairs):
            self.memory.unbatched.update(self.code.after(number))
            self.call.session.state.warn_once(
                f"motion='batched': some values are computed at each step, since those of {len(steps)} steps exceed "
                f"hoisted_mib={self.call.session.state.options.hoisted_mib}"
            )
        return rows

    def _mapped(self, number: int, timesteps: list[torch.Tensor]) -> list[Results]:
        """The results of a piece for each timestep; empty if the piece cannot be computed for a batch."""
        piece = self.code.pieces[number]
        arguments: list[Any] = []
        dims: list[int | None] = []
        for at in piece.arguments:
            maker = self.code.makers[at.place] if at.is_value else None
            if maker is not None and self.code.pieces[maker].is_timed:
                place = self.code.pieces[maker].results.index(at.place)
                values = [results[place] for results in self._batch(maker)]
                if not values:
                    return []
            else:
                values = timesteps if maker is None and at.place == self.code.timestep else []
            dims.append(0 if values else None)
            if values:
                arguments.append(torch.stack(values))
            else:
                arguments.append(self[at.place] if at.is_value else self.inputs[at.place])
        try:
            batch: Results = torch.vmap(self.code.captured[number], in_dims=tuple(dims))(*arguments)
        except Exception as error:  # whatever vmap raises; what the piece itself raises comes again without a batch
            self.memory.unbatched.update(self.code.after(number))
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            self.call.session.state.warn_once(f"motion='batched': {piece.name} is computed at each step: {reason}")
            return []
        pairs = zip(batch, self.code.contiguous[number], strict=True)
        laid_out = (result.contiguous() if is_contiguous else result for result, is_contiguous in pairs)
        return list(zip(*(result.unbind(0) for result in laid_out), strict=True))


def time_key(timestep: Any) -> Hashable:
    """The part of a key that stands for a timestep; None if the timestep would have to be read from a device."""
    if not isinstance(timestep, torch.Tensor):
        return type(timestep), timestep
    if not on_host(timestep):
        return None
    numbers = timestep.detach()
    if numbers.dtype is torch.bfloat16:  # numpy has none
        numbers = numbers.view(torch.int16)
    return timestep.shape, timestep.dtype, numbers.numpy().tobytes()
