"""Calibrators as classes on plain tensors: `update` at computed steps, `approximate` at the others.

The predictions are weighted sums of the tensors of computed steps (`cachedit_fx.runtime.calibrators`). Tensors are kept
by name, so that one object serves several streams.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from cachedit_fx.config.calibrators import CalibratorConfig, FoCaCalibratorConfig, TaylorSeerCalibratorConfig
from cachedit_fx.config.rules import check, integer
from cachedit_fx.runtime.calibrators import Moment, coefficients, values_kept


@dataclass
class _Stream:
    """The steps of one stream so far, the latest first."""

    step: int = -1
    trail: list[Moment] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    """Of the latest computed steps, the latest first."""

    def record(self, moment: Moment) -> None:
        """Remember the step, and forget those before the stored values. A second record replaces the first."""
        trail = [moment, *(each for each in self.trail if each.step != moment.step)]
        computed = [index for index, each in enumerate(trail) if each.computed]
        self.trail = trail[: computed[: len(self.values)][-1] + 1]


class _Calibrator:
    """What both calibrators share.

    Every step begins with `mark_step_begin`; `step` does that for itself.
    """

    def __init__(self, config: CalibratorConfig) -> None:
        self._config = config
        self._streams: dict[str, _Stream] = {}

    def reset_cache(self) -> None:
        """Forget all tensors and steps: a new generation begins."""
        self._streams = {name: _Stream() for name in self._streams}

    def maybe_init_state(self, name: str = "default") -> None:
        """Make the stream, if there is none of this name: only streams that exist count steps."""
        self._streams.setdefault(name, _Stream())

    def mark_step_begin(self, *_: Any, **__: Any) -> None:
        """The next step of every stream begins."""
        for stream in self._streams.values():
            stream.step += 1

    def update(self, Y: torch.Tensor, name: str = "default") -> None:
        """Store the tensor of a computed step. Another shape than before begins anew."""
        stream = self._stream(name)
        if stream.values and stream.values[0].shape != Y.shape:
            stream = self._streams[name] = _Stream(stream.step)
        stream.values = [Y.detach().clone(), *stream.values][: values_kept(self._config)]
        stream.record(Moment(stream.step))

    def approximate(self, name: str = "default") -> torch.Tensor:
        """The prediction for the present step, of the shape and dtype of the stored tensors.

        Raises:
            RuntimeError: before the first `update`.
        """
        stream = self._stream(name)
        if not stream.values:
            raise RuntimeError(f"approximate({name!r}): nothing is stored; call update at a computed step first")
        weights = coefficients(self._config, stream.trail, Moment(stream.step))
        stream.record(Moment(stream.step, computed=False))
        total = sum(weight * value for weight, value in zip(weights, stream.values, strict=False))
        assert isinstance(total, torch.Tensor)
        return total.to(stream.values[0].dtype)

    def step(self, Y: torch.Tensor, name: str = "default") -> torch.Tensor:
        """Begin a step of one stream: `Y` itself if the step computes, else the prediction."""
        stream = self._stream(name)
        stream.step += 1
        if not self._computes(stream):
            return self.approximate(name)
        self.update(Y, name)
        return Y

    def _computes(self, stream: _Stream) -> bool:
        return not stream.values

    def _stream(self, name: str) -> _Stream:
        self.maybe_init_state(name)
        return self._streams[name]


class TaylorSeerCalibrator(_Calibrator):
    """TaylorSeer: a Taylor expansion over the computed steps.

    Args:
        n_derivatives: the order.
        max_warmup_steps: first steps that `step` computes.
        skip_interval_steps: after these `step` computes every step of this number.
    """

    def __init__(
        self, n_derivatives: int = 1, max_warmup_steps: int = 1, skip_interval_steps: int = 1, **_: Any
    ) -> None:
        for name, value in (("max_warmup_steps", max_warmup_steps), ("skip_interval_steps", skip_interval_steps)):
            check(name, value, integer(1, "a number of steps"))
        super().__init__(TaylorSeerCalibratorConfig(taylorseer_order=n_derivatives))
        self.n_derivatives = n_derivatives
        self.max_warmup_steps, self.skip_interval_steps = max_warmup_steps, skip_interval_steps

    def _computes(self, stream: _Stream) -> bool:
        later = stream.step - self.max_warmup_steps
        return later < 0 or (later + 1) % self.skip_interval_steps == 0

    def __repr__(self) -> str:
        return f"TaylorSeerCalibrator_O({self.n_derivatives})"


class FoCaCalibrator(_Calibrator):
    """FoCa: forecast, then calibrate. `step` computes the first step only."""

    def __init__(self, **_: Any) -> None:
        super().__init__(FoCaCalibratorConfig())

    def __repr__(self) -> str:
        return "FoCaCalibrator"
