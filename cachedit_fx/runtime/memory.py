"""Stores the values of one region in one CFG branch. Buffers outlive their generation, and are written again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from cachedit_fx.kernels.residual_apply import residual_apply
from cachedit_fx.kernels.residual_store import residual_dtype, residual_like, residual_store
from cachedit_fx.runtime.calibrators import Moment
from cachedit_fx.runtime.guard import read_back
from cachedit_fx.runtime.policies.base import Stored
from cachedit_fx.runtime.ranks import Ranks


@dataclass
class BranchMemory:
    """Stored values and their reference. The end of a generation forgets the values, but keeps the buffers."""

    signature: Hashable = None
    """Shapes and dtypes of the streams for which the values were stored; None while nothing is stored."""
    reference: torch.Tensor | None = None
    """Residual r of the last computed step, float32. While `signature` is None only the buffer is reused, not its
    contents."""
    start: int = 0
    """The step at which the present context began (`policies.base.context_start`)."""
    trail: list[Moment] = field(default_factory=list)
    """The steps since the earliest one with stored values, the latest first."""
    unread: dict[int, torch.Tensor] = field(default_factory=dict)
    """Step -> `Moment.products` of computed steps in `trail` whose products are still on the device."""
    stored: list[list[torch.Tensor]] = field(default_factory=list)
    """For each result of the region, the values of the computed steps in `trail`, the latest first. A value is the
    result's residual, or the result if it has no base."""
    dtypes: list[torch.dtype] = field(default_factory=list)
    """Dtypes of the computed results."""
    strides: list[tuple[int, ...]] = field(default_factory=list)
    """Strides of the computed results. Restored results have the same layout."""

    def forget(self, start: int = 0) -> Callable[[], None]:
        """Begin a new context at step `start`: keep the buffers, not their contents. Returns what restores the context.

        The context can be restored until the next `store`.
        """
        before = {"start": self.start, "signature": self.signature, "trail": self.trail, "unread": self.unread}
        self.start = start
        self.signature = None
        self.trail, self.unread = [], {}
        return lambda: vars(self).update(before)

    def stored_for(self, signature: Hashable) -> Stored:
        """Whether there are stored values for streams of this signature."""
        if self.signature is None:
            return Stored.NOTHING
        return Stored.FITS if self.signature == signature else Stored.OTHER_SHAPES

    def store(
        self,
        results: Sequence[torch.Tensor],
        bases: Sequence[torch.Tensor | None],
        now: Moment,
        count: int,
        dtype: str = "wider",
        products: bool = False,
    ) -> None:
        """Store the residuals of a computed step.

        Args:
            results: the region's results.
            bases: the base of each result; None for a result that is stored whole.
            now: the step.
            count: number of computed steps whose values are stored afterwards, this one included.
            dtype: see `CalibratorConfig.calibrator_state_dtype`.
            products: whether `Moment.products` are wanted.
        """
        if len(self.stored) != len(results):
            self.stored = [[] for _ in results]
        self.trail = _since_computed([now, *self.trail], count)
        self.dtypes = [result.dtype for result in results]
        self.strides = [_strides(result) for result in results]
        oldest = []
        for buffers, result in zip(self.stored, results, strict=True):
            buffers[:] = [buffer for buffer in buffers if _fits(buffer, result, dtype)][:count]
            oldest.append(buffers.pop() if len(buffers) == count else residual_like(result, dtype))
        residual_store(results, bases, oldest)
        for buffers, buffer in zip(self.stored, oldest, strict=True):
            buffers.insert(0, buffer)
        if products:
            computed = {moment.step for moment in self.trail if moment.computed}
            self.unread = {step: row for step, row in self.unread.items() if step in computed}
            self.unread[now.step] = _inner_products(self.stored, len(computed))

    def read_trail(self, ranks: Ranks | None = None) -> list[Moment]:
        """The trail, its products read back in one transfer if they were asked for and are still on the device.

        Products of values that ranks hold a part of are added up before.
        """
        if self.unread:
            rows = self.unread
            products_here = list(rows.values())
            totals = products_here if ranks is None else [ranks.total(torch.cat(products_here))]
            numbers = iter(read_back(totals))
            products = {step: tuple(itertools.islice(numbers, row.numel())) for step, row in rows.items()}
            self.trail = [
                moment._replace(products=products[moment.step]) if moment.step in products else moment
                for moment in self.trail
            ]
            self.unread = {}
        return self.trail

    def restore(self, bases: Sequence[torch.Tensor | None], weights: Sequence[float]) -> tuple[torch.Tensor, ...]:
        """The region's results from the bases of the present step and the weights of the stored values.

        Results have the computed results' strides: matrix products round differently on another layout.
        """
        indices = [index for index, weight in enumerate(weights) if weight]
        outs = tuple(
            torch.empty_strided(buffers[0].shape, strides, dtype=dtype, device=buffers[0].device)
            for buffers, dtype, strides in zip(self.stored, self.dtypes, self.strides, strict=True)
        )
        terms = [[buffers[index] for index in indices] for buffers in self.stored]
        residual_apply(bases, terms, [weights[index] for index in indices], outs)
        return outs

    @property
    def bytes_held(self) -> int:
        """Size of all buffers, in bytes."""
        tensors = [*itertools.chain.from_iterable(self.stored), *([] if self.reference is None else [self.reference])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _since_computed(trail: Sequence[Moment], count: int) -> list[Moment]:
    """The trail back to its `count`-th computed step."""
    ends = [index for index, moment in enumerate(trail) if moment.computed][:count]
    return list(trail[: ends[-1] + 1])


def _inner_products(stored: Sequence[Sequence[torch.Tensor]], count: int) -> torch.Tensor:
    """<Y_0, Y_j> of the latest `count` values, summed over all results of floating point: [count].

    Products are float32 or wider, sums float64 (float32 on Metal): the differences of the sums count, which are small.
    """
    device = stored[0][0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros(count, dtype=dtype, device=device)
    for buffers in stored:
        if buffers[0].is_floating_point():
            latest = buffers[0].to(torch.promote_types(buffers[0].dtype, torch.float32))
            sums = [(latest * buffer).sum(dtype=dtype) for buffer in buffers[:count]]
            total += torch.stack(sums).to(device)
    return total


def _strides(value: torch.Tensor) -> tuple[int, ...]:
    """The strides of `value`. If its elements share memory, as in an expanded dimension, those of a dense copy."""
    return torch.empty_like(value, device="meta").stride() if 0 in value.stride() else value.stride()


def copy_of(value: torch.Tensor) -> torch.Tensor:
    """A copy with the strides that a restored result would have."""
    strides = _strides(value)
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)


def _fits(buffer: torch.Tensor, result: torch.Tensor, dtype: str) -> bool:
    same_place = buffer.shape == result.shape and buffer.device == result.device
    return same_place and buffer.dtype == residual_dtype(result, dtype)
