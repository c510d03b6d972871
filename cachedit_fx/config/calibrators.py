"""How a bypassed region's results are predicted: the settings of each calibrator."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from cachedit_fx.config.rules import FLAG, check_fields, choice, integer, setting

Target: TypeAlias = Literal["residual", "hidden_states", "output"]
StateDtype: TypeAlias = Literal["wider", "float32", "model"]
Variable: TypeAlias = Literal["timestep", "step"]


@dataclass(frozen=True)
class CalibratorConfig:
    """How a bypassed region's results are predicted; the base of the calibrators' own classes."""

    calibrator_cache_type: Target = setting("residual", choice(*get_args(Target)))
    """What is predicted: what the region adds to the values that run through it; those values themselves; or the
    model's output, where the region is all that follows the first blocks, so that with a static mask and
    `Fn_compute_blocks=0` a cached step runs nothing of the model."""
    calibrator_state_dtype: StateDtype = setting("wider", choice(*get_args(StateDtype)))
    """What the stored values are kept in: "wider" = one precision up (float32 for 16-bit models, float64 for float32
    ones; on identical inputs a prediction is then exact), or float32, or the model's own, at half the memory."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class TaylorSeerCalibratorConfig(CalibratorConfig):
    """A Taylor expansion over the computed steps: order 1 continues on a line, order 0 repeats the latest value."""

    taylorseer_order: int = setting(1, integer(0, "a number of derivatives"))
    """Derivatives used. order + 1 values are kept for every result of a region and every CFG branch."""


@dataclass(frozen=True)
class FoCaCalibratorConfig(CalibratorConfig):
    """Forecast, then calibrate: the slope between computed steps averaged with the latest one, predictions included,
    and drawn back to the latest computed value beyond the third step. Three values are kept for every result of a
    region and every CFG branch."""


@dataclass(frozen=True)
class LagrangeCalibratorConfig(CalibratorConfig):
    """Lagrange extrapolation over the real timestep, of the model's output, with deferred correction.

    A sampler sums up what the model puts out. At a computed step it turns out by how much the predictions since the
    computed step before it were wrong: the interpolation between the two minus what was predicted, each weighted with
    the length of its step. The first prediction behind the computed step makes up for this error, as deferred
    correction does in the integration of differential equations. It costs no evaluation, and two stored values more.

    Why these defaults: PSNR on the bundled model, 12 of 28 steps computed, 16 prompts (`cachedit bench
    examples/benchmarks/calibrators.toml --held-out 16 --prompt-seed 5`; 12 steps without a cache have 47.4 dB):

        order                        0      1      2    FoCa   TaylorSeer 2
        output, corrected          49.4   62.8   61.9
        output, not corrected             55.4   57.8   57.3       56.0
        residual, corrected               58.7
        residual, not corrected           54.9          57.0
        hidden states, corrected          58.4

    Over the step number in place of the timestep the figures were the same within 0.1 dB, on a schedule with shift 3.
    """

    calibrator_cache_type: Target = setting("output", choice(*get_args(Target)))
    """As in every calibrator; here the model's output unless it is given."""
    lagrange_order: int = setting(1, integer(0, "a degree"))
    """Degree of the polynomial through the latest computed steps: 0 repeats, 1 continues on a line."""
    lagrange_variable: Variable = setting("timestep", choice(*get_args(Variable)))
    """What the polynomial runs over; "step" takes all steps to be of one length. Where no timestep is known, or where
    it does not run one way, steps are counted too."""
    deferred_correction: bool = setting(True, FLAG)
    """Whether the first prediction behind a computed step makes up for the error of those before. With it
    lagrange_order + 3 values are kept for every result and every CFG branch, without it lagrange_order + 1."""
