"""Defines when blocks are bypassed: the settings that every policy shares. DBCache has no others.

A policy with more settings derives its config from `DBCacheConfig` (`cachedit_fx.runtime.policies`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeAlias, get_args

from cachedit_fx.config.calibrators import CalibratorConfig
from cachedit_fx.config.rules import (
    FLAG,
    LIMIT,
    MASK,
    OptionError,
    Rule,
    as_mask,
    check_fields,
    choice,
    integer,
    is_number,
    optional,
    reject_unknown,
    setting,
)

Unit: TypeAlias = Literal["region", "block"]
"""The smallest thing that is bypassed: the middle of the chain, or each block of it."""
MaskPolicy: TypeAlias = Literal["dynamic", "static"]
RefreshPolicy: TypeAlias = Literal["once", "repeat"]


class Cut(NamedTuple):
    """The cut of a chain, or of one of its loops: the settings of a config that shape the graph."""

    first: int
    """F: blocks at the start that are always computed."""
    last: int
    """B: blocks at the end that are always computed."""
    unit: Unit = "region"
    exclusions: tuple[int, ...] = ()
    """Blocks that are never bypassed, sorted. For the unit "block"."""


@dataclass(frozen=True)
class DBCacheConfig:
    """When the blocks in the middle are bypassed.

    Steps are denoising steps, counted from 0 in each generation. Limits hold for each CFG branch separately.
    """

    unit: ClassVar[Unit] = "region"
    """The difference measured: with "region" that of the first F blocks' residual, with "block" that of each input."""

    calibrator: ClassVar[CalibratorConfig | None] = None
    """The calibrator that the policy brings with it; None leaves it to the option `calibrator`."""

    Fn_compute_blocks: int = setting(8, integer(0, "a number of blocks"))
    """F, the first blocks, computed at every step. Their residual is compared between steps. 0 needs a static mask."""
    Bn_compute_blocks: int = setting(0, integer(0, "a number of blocks"))
    """B, the last blocks, computed at every step. They smooth out the bypass's approximation."""
    residual_diff_threshold: float = setting(0.08, Rule(is_number, "a number (a ratio; 0 or less = never reuse)"))
    """The middle is bypassed if the relative L1 difference is below this threshold. A ratio, without unit."""
    downsample_factor: int = setting(1, integer(1, "a number of tokens"))
    """Every n-th token of the hidden states is compared; the others are not read. 1 = all."""
    max_accumulated_residual_diff_threshold: float | None = setting(
        None, optional(Rule(lambda value: is_number(value) and value >= 0, "a number >= 0 (a sum of ratios)"))
    )
    """Compute if the differences of the cached steps since the last computed one add up to this. None = no limit."""
    max_warmup_steps: int = setting(8, integer(0, "a number of steps"))
    """Steps at the start that are computed. Unused with a mask: the mask's leading ones are the warm-up."""
    warmup_interval: int = setting(1, integer(1, "a number of steps"))
    """Only every n-th step of the warm-up must compute. The steps between are decided like any other."""
    max_cached_steps: int = setting(-1, LIMIT)
    """Highest number of cached steps in a generation. -1 = no limit."""
    max_continuous_cached_steps: int = setting(-1, LIMIT)
    """Highest number of cached steps in a row. -1 = no limit."""
    enable_separate_cfg: bool | None = setting(None, optional(FLAG))
    """True: calls alternate between the conditional and the unconditional branch. False: every call is a step (fused or
    no CFG; also for second-order schedulers, which evaluate a timestep twice). None: detected (`runtime.tracker`)."""
    cfg_compute_first: bool = setting(False, FLAG)
    """With `enable_separate_cfg=True`: the unconditional branch is called first."""
    cfg_diff_compute_separate: bool = setting(True, FLAG)
    """True: each branch measures its own difference. False: the difference that the step's first branch measured serves
    the step's other branches too."""
    num_inference_steps: int | None = setting(None, optional(integer(1, "a number of steps")))
    """Steps in a generation; the next step starts a new one. None = generations are detected from the timestep."""
    steps_computation_mask: Sequence[int] | None = setting(None, optional(MASK))
    """One digit for each step: 1 computes, 0 may reuse. Lists and strings of digits become tuples."""
    steps_computation_policy: MaskPolicy = setting("dynamic", choice(*get_args(MaskPolicy)))
    """The meaning of a zero in the mask: "dynamic" = the difference decides, "static" = reuse, nothing is measured."""
    force_refresh_step_hint: int | None = setting(None, optional(integer(1, "a number of steps")))
    """Before this step all stored values are forgotten, and steps are counted from 0 again, for warm-up and mask too.
    For inputs that change much during a generation. None = never."""
    force_refresh_step_policy: RefreshPolicy = setting("once", choice(*get_args(RefreshPolicy)))
    """"once", or "repeat": after every `force_refresh_step_hint` steps."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps_computation_mask", as_mask(self.steps_computation_mask))
        check_fields(self)
        if self.Fn_compute_blocks == 0 and self.unit == "region" and not self.static:
            raise OptionError(
                "Fn_compute_blocks=0 leaves nothing to measure a difference on: it must be >= 1, unless "
                "steps_computation_mask is given with steps_computation_policy='static'"
            )
        if self.cfg_compute_first and self.cfg_diff_compute_separate:
            raise OptionError(
                "cfg_compute_first=True cannot be combined with cfg_diff_compute_separate=True, which is its default: "
                "pass cfg_diff_compute_separate=False too, so that one difference serves both branches of a step, "
                "or leave cfg_compute_first=False"
            )
        steps, mask = self.num_inference_steps, self.steps_computation_mask
        if steps is not None and mask is not None and len(mask) != steps:
            raise OptionError(
                f"steps_computation_mask has {len(mask)} digits but num_inference_steps={steps}: "
                "they must agree; change one of them or leave num_inference_steps=None"
            )

    @property
    def static(self) -> bool:
        """Whether the mask alone decides and no difference is ever measured."""
        return self.steps_computation_mask is not None and self.steps_computation_policy == "static"

    @property
    def expected_steps(self) -> int | None:
        """Steps in a generation, as the config tells them; None if it does not."""
        return self.num_inference_steps

    def reset(self, **changes: Any) -> Self:
        """A copy with some fields changed; this config stays as it is.

        Raises:
            OptionError: on a name that is no field, or a value that is not allowed.
        """
        owners = {field.name: f"cachedit_fx.{type(self).__name__}" for field in fields(self)}
        foreign = [name for name in changes if name not in owners and name in known_fields()]
        if foreign:
            owner = next(name for name, config in CONFIGS.items() if foreign[0] in config.__dataclass_fields__)
            raise OptionError(
                f"{', '.join(foreign)}: for {CONFIGS[owner].__name__} only, and this is a {type(self).__name__}; "
                f"leave it out, or pass cache={owner!r} or a {CONFIGS[owner].__name__}"
            )
        reject_unknown(changes, owners)
        return replace(self, **changes)

    def cut(self) -> Cut:
        """The settings that shape the graph. All other settings are read at each call."""
        return Cut(self.Fn_compute_blocks, self.Bn_compute_blocks, self.unit)


CONFIGS: dict[str, type[DBCacheConfig]] = {}
"""Name in the option `cache` -> config of a policy. Each policy registers its own."""


def known_fields() -> dict[str, str]:
    """Every field of every policy's config -> the first class that documents the field."""
    import cachedit_fx.runtime.policies  # noqa: F401 - the policies register themselves

    owners: dict[str, str] = {}
    for config in CONFIGS.values():
        for field in fields(config):
            owners.setdefault(field.name, f"cachedit_fx.{config.__name__}")
    return owners
