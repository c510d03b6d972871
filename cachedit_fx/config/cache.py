"""When blocks are bypassed: the settings that every policy shares. DBCache has no others.

A policy with more settings derives its config from `DBCacheConfig` (`cachedit_fx.runtime.policies`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeAlias, get_args

from cachedit_fx.config.rules import (
    FLAG,
    LIMIT,
    MASK,
    OptionError,
    Rule,
    check_fields,
    choice,
    integer,
    is_number,
    optional,
    reject_unknown,
    setting,
)

Unit: TypeAlias = Literal["region", "block"]
"""What is bypassed as one: the middle of the chain, or each block of it."""
MaskPolicy: TypeAlias = Literal["dynamic", "static"]
RefreshPolicy: TypeAlias = Literal["once", "repeat"]


class Cut(NamedTuple):
    """Where a chain, or a loop of it, is cut: the part of a config that shapes the graph."""

    first: int
    """F: blocks at the start that are always computed."""
    last: int
    """B: blocks at the end that are always computed."""
    unit: Unit = "region"
    kept: tuple[int, ...] = ()
    """Blocks that are never bypassed, sorted. For the unit "block"."""


@dataclass(frozen=True)
class DBCacheConfig:
    """When the blocks in the middle are bypassed.

    Steps are denoising steps, counted from 0 in each generation; limits hold for each CFG branch by itself.
    """

    unit: ClassVar[Unit] = "region"
    """With "region" the difference is that of the first F blocks' residual; with "block", of each block's input."""

    Fn_compute_blocks: int = setting(8, integer(0, "a number of blocks"))
    """First blocks, computed at every step; what they add to the hidden states is compared. 0 needs a static mask."""
    Bn_compute_blocks: int = setting(0, integer(0, "a number of blocks"))
    """Last blocks, computed at every step; they smooth out what the bypass approximates."""
    residual_diff_threshold: float = setting(0.08, Rule(is_number, "a number (a ratio; 0 or less = never reuse)"))
    """The middle is bypassed where the relative L1 difference lies below this. A ratio, without unit."""
    downsample_factor: int = setting(1, integer(1, "a number of tokens"))
    """Of the hidden states' tokens every n-th is compared; the others are not read. 1 = all."""
    max_accumulated_residual_diff_threshold: float | None = setting(
        None, optional(Rule(lambda value: is_number(value) and value >= 0, "a number >= 0 (a sum of ratios)"))
    )
    """Compute once the differences of the cached steps since the last computed one add up to this. None = no limit."""
    max_warmup_steps: int = setting(8, integer(0, "a number of steps"))
    """Steps at the start that are computed. Not used with a mask, whose leading ones are the warm-up."""
    warmup_interval: int = setting(1, integer(1, "a number of steps"))
    """Of the warm-up only every n-th step must compute; those between are decided like any other."""
    max_cached_steps: int = setting(-1, LIMIT)
    """Cached steps in a generation. -1 = no limit."""
    max_continuous_cached_steps: int = setting(-1, LIMIT)
    """Cached steps in a row. -1 = no limit."""
    enable_separate_cfg: bool | None = setting(None, optional(FLAG))
    """True: calls alternate between the conditional and the unconditional branch. False: every call is a step (fused or
    no CFG; also for second-order schedulers, which evaluate a timestep twice). None: found by `runtime.tracker`."""
    cfg_compute_first: bool = setting(False, FLAG)
    """With `enable_separate_cfg=True`: the unconditional branch is called first."""
    cfg_diff_compute_separate: bool = setting(True, FLAG)
    """False: the difference that the step's first branch measured serves the step's other branches too."""
    num_inference_steps: int | None = setting(None, optional(integer(1, "a number of steps")))
    """Steps in a generation; the step after starts a new one. None = new generations are found from the timestep."""
    steps_computation_mask: Sequence[int] | None = setting(None, optional(MASK))
    """One digit for each step: 1 computes, 0 may reuse. Lists and strings of digits become tuples."""
    steps_computation_policy: MaskPolicy = setting("dynamic", choice(*get_args(MaskPolicy)))
    """What a zero in the mask means: "dynamic" = decided by the difference, "static" = reuse, with nothing measured."""
    force_refresh_step_hint: int | None = setting(None, optional(integer(1, "a number of steps")))
    """Ahead of this step all that is stored is forgotten and steps are counted from 0 again, warm-up and mask included:
    for inputs that change much in the middle of a generation. None = never."""
    force_refresh_step_policy: RefreshPolicy = setting("once", choice(*get_args(RefreshPolicy)))
    """"once", or "repeat": after every `force_refresh_step_hint` steps."""

    def __post_init__(self) -> None:
        mask: Any = self.steps_computation_mask
        if isinstance(mask, (list, tuple, str)):
            entries = [{"0": 0, "1": 1}.get(digit, digit) for digit in mask] if isinstance(mask, str) else mask
            bits = tuple(int(bit) if bit in (0, 1) else bit for bit in entries)  # others: for the rule to reject
            object.__setattr__(self, "steps_computation_mask", bits)
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

    def reset(self, **changes: Any) -> Self:
        """A copy with some fields changed; this one stays as it is."""
        own = {field.name: f"cachedit_fx.{type(self).__name__}" for field in fields(self)}
        foreign = [name for name in changes if name not in own and name in known_fields()]
        if foreign:
            owner = next(name for name, config in CONFIGS.items() if foreign[0] in config.__dataclass_fields__)
            raise OptionError(
                f"{', '.join(foreign)}: for {CONFIGS[owner].__name__} only, and this is a {type(self).__name__}; "
                f"leave it out, or pass cache={owner!r} or a {CONFIGS[owner].__name__}"
            )
        reject_unknown(changes, own)
        return replace(self, **changes)

    def cut(self) -> Cut:
        """The settings that shape the graph. All others are read anew at every call."""
        return Cut(self.Fn_compute_blocks, self.Bn_compute_blocks, self.unit)


CONFIGS: dict[str, type[DBCacheConfig]] = {}
"""The policies' configs, by the name that the option `cache` takes. Policies register theirs."""


def known_fields() -> dict[str, str]:
    """Every field of every policy's config, and the first class that documents it."""
    import cachedit_fx.runtime.policies  # noqa: F401 - whose policies register themselves

    known: dict[str, str] = {}
    for config in CONFIGS.values():
        for field in fields(config):
            known.setdefault(field.name, f"cachedit_fx.{config.__name__}")
    return known
