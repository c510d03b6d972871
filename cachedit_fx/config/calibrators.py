"""Defines how a bypassed region's results are predicted: the settings of each calibrator."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from cachedit_fx.config.rules import Rule, check_fields, choice, integer, is_number, setting

Target: TypeAlias = Literal["residual", "hidden_states", "output"]
StateDtype: TypeAlias = Literal["wider", "float32", "model"]
Variable: TypeAlias = Literal["timestep", "step"]

_SHARE = Rule(lambda value: isinstance(value, bool) or (is_number(value) and 0 <= value <= 1), "a share from 0 to 1")


@dataclass(frozen=True)
class CalibratorConfig:
    """How a bypassed region's results are predicted; the base of the calibrators' own classes."""

    calibrator_cache_type: Target = setting("residual", choice(*get_args(Target)))
    """The predicted values. "residual" = the region's addition to the values that run through it. "hidden_states" =
    these values after the region. "output" = the model's output: the region then holds all nodes after the first
    blocks. With a static mask and `Fn_compute_blocks=0` a cached step runs nothing of the model."""
    calibrator_state_dtype: StateDtype = setting("wider", choice(*get_args(StateDtype)))
    """Dtype of the stored values. "wider" = one precision up: float32 for 16-bit models, float64 for float32 models; a
    prediction on identical inputs is then exact. "float32", or "model" = the model's own, at half the memory."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class TaylorSeerCalibratorConfig(CalibratorConfig):
    """A Taylor expansion over the computed steps: order 1 continues on a line, order 0 repeats the latest value."""

    taylorseer_order: int = setting(1, integer(0, "a number of derivatives"))
    """Number of derivatives. order + 1 values are stored for every result of a region and every CFG branch."""


@dataclass(frozen=True)
class FoCaCalibratorConfig(CalibratorConfig):
    """Forecast, then calibrate: the slope between computed steps, averaged with the latest slope, predictions included.

    After the third step the prediction moves back towards the latest computed value. Three values are stored for every
    result of a region and every CFG branch.
    """


@dataclass(frozen=True)
class DMDCalibratorConfig(CalibratorConfig):
    """Dynamic mode decomposition: the latest change continues as a linear map takes each change to the next one.

    The map is the least-squares fit to the stored computed steps (Schmid, J. Fluid Mech. 656, 2010). Snapshots are
    changes per step, not values, so a constant part needs no mode. The changes count as evenly spaced, by the mean
    spacing of the computed steps. A line is continued exactly, and so is an exponential if the spacing is even. With
    two values the prediction is a line. One fit serves the whole batch.

    Only inner products of the stored values enter the fit. After a gap the host waits for the device once more: at the
    first reuse after computed steps. docs/choosing.md has the gain.
    """

    dmd_history: int = setting(5, integer(2, "a number of values"))
    """Number of computed steps that the map is fitted to. So many values are stored for every result of a region and
    every CFG branch."""
    dmd_rank: int = setting(0, integer(0, "a number of modes"))
    """The number of modes, at most: the strongest ones are kept. 0 keeps all that stand out from rounding."""


@dataclass(frozen=True)
class LagrangeCalibratorConfig(CalibratorConfig):
    """Lagrange extrapolation over the real timestep, of the model's output, with deferred correction.

    A sampler sums up the model's outputs. A computed step shows the error of the predictions since the previous
    computed step. The error is the interpolation between the two computed steps minus the predictions, each weighted
    with the length of its step. The first prediction after the computed step makes up for this error, as deferred
    correction does in the integration of differential equations. The correction needs no evaluation, but two more
    stored values.

    Why these defaults: PSNR on the bundled model, 12 of 28 steps computed, 16 prompts (`cachedit bench
    examples/benchmarks/calibrators.toml --held-out 16 --prompt-seed 5`; 12 steps without a cache have 47.4 dB):

        order                        0      1      2    FoCa   TaylorSeer 2
        output, corrected          60.0   62.8   61.9
        output, not corrected             55.4   57.8   57.3       56.0
        residual, corrected               58.7
        residual, not corrected           54.9          57.0
        hidden states, corrected          58.4

    With the step number in place of the timestep the figures agreed within 0.1 dB, on a schedule with shift 3.
    """

    calibrator_cache_type: Target = setting("output", choice(*get_args(Target)))
    """The predicted values, as in every calibrator; the default here is the model's output."""
    lagrange_order: int = setting(1, integer(0, "a degree"))
    """Degree of the polynomial through the latest computed steps: 0 repeats, 1 continues on a line."""
    lagrange_variable: Variable = setting("timestep", choice(*get_args(Variable)))
    """The polynomial's variable. "step" assumes that all steps have one length. Step numbers are also used if no
    timestep is known, or if timesteps do not run one way."""
    deferred_correction: float = setting(1.0, _SHARE)
    """The share of the earlier predictions' error that the first prediction after a computed step makes up for. False
    means 0, True means 1. Guidance asks for less, because the model has pulled the state back meanwhile. With
    correction lagrange_order + 3 values are stored for every result and CFG branch, otherwise lagrange_order + 1."""
