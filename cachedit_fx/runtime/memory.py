"""What is stored for one region and one CFG branch. Buffers outlive their generation and are written again."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from cachedit_fx.kernels.residual_apply import residual_apply
from cachedit_fx.kernels.residual_store import residual_dtype, residual_like, residual_store
from cachedit_fx.runtime.calibrators import Moment
from cachedit_fx.runtime.policies.base import Stored


@dataclass
class BranchMemory:
    """Stored values and their reference. A generation's end empties it, but keeps the buffers."""

    signature: Hashable = None
    """Shapes and dtypes of the streams that entered when the values were stored; None while nothing is stored."""
    reference: torch.Tensor | None = None
    """Residual r of the last computed step, float32. While `signature` is None only its buffer is of use."""
    start: int = 0
    """The step at which the present context began (`policies.base.context_start`)."""
    trail: list[Moment] = field(default_factory=list)
    """The steps since the earliest one whose values are stored, the latest first."""
    stored: list[list[torch.Tensor]] = field(default_factory=list)
    """For each result of the region, as the computed steps of `trail`: its residual, or the result itself where it has
    no base."""
    dtypes: list[torch.dtype] = field(default_factory=list)
    strides: list[tuple[int, ...]] = field(default_factory=list)
    """Of the results as they were computed; what reads them is given the same layout."""

    def forget(self, start: int = 0) -> None:
        """Begin anew at step `start`: keep the buffers, not their contents."""
        self.start = start
        self.signature = None
        self.trail = []

    def stored_for(self, signature: Hashable) -> Stored:
        """What there is to reuse for streams of this signature."""
        if self.signature is None:
            return Stored.NOTHING
        return Stored.FITS if self.signature == signature else Stored.OTHER_SHAPES

    def store(
        self,
        results: Sequence[torch.Tensor],
        bases: Sequence[torch.Tensor | None],
        now: Moment,
        kept: int,
        dtype: str = "wider",
    ) -> None:
        """Keep the residuals of a computed step, and of the `kept` - 1 computed before it, in `dtype` (see
        `CalibratorConfig.calibrator_state_dtype`)."""
        if len(self.stored) != len(results):
            self.stored = [[] for _ in results]
        self.trail = _since_computed([now, *self.trail], kept)
        self.dtypes = [result.dtype for result in results]
        self.strides = [_strides(result) for result in results]
        oldest = []
        for buffers, result in zip(self.stored, results, strict=True):
            buffers[:] = [buffer for buffer in buffers if _fits(buffer, result, dtype)][:kept]
            oldest.append(buffers.pop() if len(buffers) == kept else residual_like(result, dtype))
        residual_store(results, bases, oldest)
        for buffers, buffer in zip(self.stored, oldest, strict=True):
            buffers.insert(0, buffer)

    def restore(self, bases: Sequence[torch.Tensor | None], weights: Sequence[float]) -> tuple[torch.Tensor, ...]:
        """The region's results from the bases of the present step and the weights of the stored values. They have the
        computed ones' strides: matrix products round differently on another layout."""
        used = [index for index, weight in enumerate(weights) if weight]
        outs = tuple(
            torch.empty_strided(buffers[0].shape, strides, dtype=dtype, device=buffers[0].device)
            for buffers, dtype, strides in zip(self.stored, self.dtypes, self.strides, strict=True)
        )
        terms = [[buffers[index] for index in used] for buffers in self.stored]
        residual_apply(bases, terms, [weights[index] for index in used], outs)
        return outs

    @property
    def bytes_held(self) -> int:
        tensors = [*itertools.chain.from_iterable(self.stored), *([] if self.reference is None else [self.reference])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _since_computed(trail: Sequence[Moment], count: int) -> list[Moment]:
    """The trail back to its `count`-th computed step."""
    ends = [index for index, moment in enumerate(trail) if moment.computed][:count]
    return list(trail[: ends[-1] + 1])


def _strides(value: torch.Tensor) -> tuple[int, ...]:
    """Those that a twin of `value` can have whose elements share no memory, as an expanded dimension's do."""
    return torch.empty_like(value, device="meta").stride() if 0 in value.stride() else value.stride()


def _fits(buffer: torch.Tensor, result: torch.Tensor, dtype: str) -> bool:
    same_place = buffer.shape == result.shape and buffer.device == result.device
    return same_place and buffer.dtype == residual_dtype(result, dtype)
