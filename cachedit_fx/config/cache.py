"""When blocks are bypassed: the settings of DBCache and DBPrune."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

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


@dataclass(frozen=True)
class DBCacheConfig:
    """When the blocks in the middle are bypassed.

    Steps are denoising steps, counted from 0 in each generation; limits hold for each CFG branch by itself.
    """

    compares_first_blocks: ClassVar[bool] = True
    """Whether the difference is that of what the first F blocks add."""

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
    steps_computation_policy: str = setting("dynamic", choice("dynamic", "static"))
    """What a zero in the mask means: "dynamic" = decided by the difference, "static" = reuse, with nothing measured."""
    force_refresh_step_hint: int | None = setting(None, optional(integer(1, "a number of steps")))
    """Ahead of this step all that is stored is forgotten and steps are counted from 0 again, warm-up and mask included:
    for inputs that change much in the middle of a generation. None = never."""
    force_refresh_step_policy: str = setting("once", choice("once", "repeat"))
    """"once", or "repeat": after every `force_refresh_step_hint` steps."""

    def __post_init__(self) -> None:
        mask: Any = self.steps_computation_mask
        if isinstance(mask, (list, tuple, str)):
            entries = [{"0": 0, "1": 1}.get(digit, digit) for digit in mask] if isinstance(mask, str) else mask
            bits = tuple(int(bit) if bit in (0, 1) else bit for bit in entries)  # others: for the rule to reject
            object.__setattr__(self, "steps_computation_mask", bits)
        check_fields(self)
        if self.Fn_compute_blocks == 0 and self.compares_first_blocks and not self.static:
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
        own = {name: where for name, where in CACHE_FIELDS.items() if hasattr(self, name)}
        foreign = [name for name in changes if name in CACHE_FIELDS.keys() - own.keys()]
        if foreign:
            raise OptionError(
                f"{', '.join(foreign)}: for DBPruneConfig only, and this is a {type(self).__name__}; "
                "leave it out, or pass cache='dbprune' or a DBPruneConfig"
            )
        reject_unknown(changes, own)
        return replace(self, **changes)

    def structure(self) -> tuple[Any, ...]:
        """The fields that shape the graph: numbers of first and of last blocks. All others are policy."""
        return self.Fn_compute_blocks, self.Bn_compute_blocks


@dataclass(frozen=True)
class DBPruneConfig(DBCacheConfig):
    """When each block of the middle is pruned: DBPrune, which decides about every block by itself.

    A block is pruned where its input has hardly moved since it was last computed; its output is then its input plus
    what it added at that time. All fields of `DBCacheConfig` hold, read like this: the difference is that of a block's
    input (so F may be 0), and each block accumulates its own; a step in which a block was pruned is a cached step; the
    limits on these are looked at when a step begins, never in its middle.
    """

    compares_first_blocks: ClassVar[bool] = False

    enable_dynamic_prune_threshold: bool = setting(False, FLAG)
    """Raise the threshold to the mean of the step's first five positive differences, those measured ahead of the block,
    times `dynamic_prune_threshold_relax_ratio`, where that lies above `residual_diff_threshold` and below
    `max_dynamic_prune_threshold`."""
    max_dynamic_prune_threshold: float | None = setting(
        None, optional(Rule(lambda value: is_number(value) and value > 0, "a number > 0 (a ratio)"))
    )
    """A raised threshold that is not below this is not used. A ratio; None = 2 x `residual_diff_threshold`."""
    dynamic_prune_threshold_relax_ratio: float = setting(
        1.25, Rule(lambda value: is_number(value) and value > 0, "a number > 0 (a factor)")
    )
    """What the mean difference is multiplied by."""
    non_prune_block_ids: Sequence[int] = setting(
        (),
        Rule(
            lambda value: isinstance(value, tuple) and all(integer(0).allows(item) for item in value),
            "a list, tuple, set or range of block numbers >= 0",
        ),
    )
    """Blocks that are never pruned, numbered from 0 over the whole chain, or in each loop with `scope="loop"`; numbers
    beyond are ignored. Shapes the graph, as F and B do."""

    def __post_init__(self) -> None:
        given: Any = self.non_prune_block_ids
        if isinstance(given, (list, tuple, set, frozenset, range)):
            object.__setattr__(self, "non_prune_block_ids", tuple(dict.fromkeys(given)))
        super().__post_init__()
        highest = self.max_dynamic_prune_threshold
        if self.enable_dynamic_prune_threshold and highest is not None and highest <= self.residual_diff_threshold:
            raise OptionError(
                f"max_dynamic_prune_threshold={highest} is not above residual_diff_threshold="
                f"{self.residual_diff_threshold}, so that the threshold could never be raised: choose a larger one, or "
                "None for twice residual_diff_threshold"
            )

    def structure(self) -> tuple[Any, ...]:
        """F, B, and the blocks that are never pruned."""
        return *super().structure(), tuple(sorted(self.non_prune_block_ids))


CACHES: dict[str, type[DBCacheConfig]] = {"dbcache": DBCacheConfig, "dbprune": DBPruneConfig}


CACHE_FIELDS = {
    item.name: f"cachedit_fx.{config.__name__}" for config in (DBPruneConfig, DBCacheConfig) for item in fields(config)
}
