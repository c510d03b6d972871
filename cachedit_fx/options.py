"""The settings a user may pass, their defaults and their checks.

    torch.compile(model, backend="cachedit", options={"cache": "dbcache", "Fn_compute_blocks": 1, "scope": "loop"})
                                                         │
                                    parse_options(mapping) ──► Options(cache=DBCacheConfig(...), scope="loop", ...)

Settings are of two kinds. *Structural* ones shape the rewritten graph (where it is cut, who compiles the pieces) and
make up `Options.structure()`. All others are *policy*: they are read anew at every call, and changing them compiles
nothing.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar, Self, TypeAlias


class OptionError(ValueError):
    """A setting that is unknown, out of range, or at odds with another one."""


@dataclass(frozen=True)
class Rule:
    """What a setting may be: a test, the words for it in an error message, and the names to choose from, if any."""

    allows: Callable[[Any], bool]
    words: str
    choices: tuple[str, ...] = ()


def _setting(default: Any, rule: Rule, **more: Any) -> Any:
    return field(default=default, metadata={"rule": rule}, **more)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def integer(low: int, note: str = "") -> Rule:
    """An integer not below `low`; `note` says what it counts."""

    def allows(value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low

    return Rule(allows, f"an integer >= {low}{note and f' ({note})'}")


def choice(*names: str) -> Rule:
    """One of these names."""
    return Rule(lambda value: isinstance(value, str) and value in names, f"one of {', '.join(map(repr, names))}", names)


def _optional(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.allows(value), f"{rule.words}, or None", rule.choices)


def _is_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


def _is_switches(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], bool)
        for item in value
    )


_FLAG = Rule(lambda value: isinstance(value, bool), "True or False")
_MASK = Rule(
    lambda value: isinstance(value, tuple) and bool(value) and all(bit in (0, 1) for bit in value),
    "a non-empty list, tuple or string of ones (compute) and zeros (may reuse), one for each step",
)
_LIMIT = integer(-1, "a number of steps; -1 = no limit")


def nearest(name: str, known: Iterable[str]) -> str:
    """Of the known names the one that `name` was probably meant to be."""
    by_lower = {other.lower(): other for other in known}
    return by_lower[difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.0)[0]]


def _reject_unknown(given: Iterable[Any], known: Mapping[str, str]) -> None:
    """Raise on the first name that is not among `known`, a map from name to the class that documents it."""
    for name in given:
        if name not in known:
            guess = nearest(str(name), known)
            raise OptionError(
                f"unknown option {name!r}; the nearest known one is {guess!r} (see {known[guess]}). "
                f"Known options: {', '.join(sorted(known, key=str.lower))}."
            )


def check(name: str, value: Any, rule: Rule) -> None:
    """Raise unless the rule allows the value, saying what it must be, and the nearest name where there are names."""
    if not rule.allows(value):
        guess = isinstance(value, str) and rule.choices and f"; did you mean {nearest(value, rule.choices)!r}?"
        raise OptionError(f"{name}={value!r} is not allowed: it must be {rule.words}{guess or ''}")


def _check_fields(settings: Any) -> None:
    for item in fields(settings):
        check(item.name, getattr(settings, item.name), item.metadata["rule"])


@dataclass(frozen=True)
class DBCacheConfig:
    """When the blocks in the middle are bypassed.

    Steps are denoising steps, counted from 0 in each generation; limits hold for each CFG branch by itself.
    """

    compares_first_blocks: ClassVar[bool] = True
    """Whether the difference is that of what the first F blocks add."""

    Fn_compute_blocks: int = _setting(8, integer(0, "a number of blocks"))
    """First blocks, computed at every step; what they add to the hidden states is compared. 0 needs a static mask."""
    Bn_compute_blocks: int = _setting(0, integer(0, "a number of blocks"))
    """Last blocks, computed at every step; they smooth out what the bypass approximates."""
    residual_diff_threshold: float = _setting(0.08, Rule(_is_number, "a number (a ratio; 0 or less = never reuse)"))
    """The middle is bypassed where the relative L1 difference lies below this. A ratio, without unit."""
    downsample_factor: int = _setting(1, integer(1, "a number of tokens"))
    """Of the hidden states' tokens every n-th is compared; the others are not read. 1 = all."""
    max_accumulated_residual_diff_threshold: float | None = _setting(
        None, _optional(Rule(lambda value: _is_number(value) and value >= 0, "a number >= 0 (a sum of ratios)"))
    )
    """Compute once the differences of the cached steps since the last computed one add up to this. None = no limit."""
    max_warmup_steps: int = _setting(8, integer(0, "a number of steps"))
    """Steps at the start that are computed. Not used with a mask, whose leading ones are the warm-up."""
    warmup_interval: int = _setting(1, integer(1, "a number of steps"))
    """Of the warm-up only every n-th step must compute; those between are decided like any other."""
    max_cached_steps: int = _setting(-1, _LIMIT)
    """Cached steps in a generation. -1 = no limit."""
    max_continuous_cached_steps: int = _setting(-1, _LIMIT)
    """Cached steps in a row. -1 = no limit."""
    enable_separate_cfg: bool | None = _setting(None, _optional(_FLAG))
    """True: calls alternate between the conditional and the unconditional branch. False: every call is a step (fused or
    no CFG; also for second-order schedulers, which evaluate a timestep twice). None: found by `runtime.tracker`."""
    cfg_compute_first: bool = _setting(False, _FLAG)
    """With `enable_separate_cfg=True`: the unconditional branch is called first."""
    cfg_diff_compute_separate: bool = _setting(True, _FLAG)
    """False: the difference that the step's first branch measured serves the step's other branches too."""
    num_inference_steps: int | None = _setting(None, _optional(integer(1, "a number of steps")))
    """Steps in a generation; the step after starts a new one. None = new generations are found from the timestep."""
    steps_computation_mask: Sequence[int] | None = _setting(None, _optional(_MASK))
    """One digit for each step: 1 computes, 0 may reuse. Lists and strings of digits become tuples."""
    steps_computation_policy: str = _setting("dynamic", choice("dynamic", "static"))
    """What a zero in the mask means: "dynamic" = decided by the difference, "static" = reuse, with nothing measured."""
    force_refresh_step_hint: int | None = _setting(None, _optional(integer(1, "a number of steps")))
    """Ahead of this step all that is stored is forgotten and steps are counted from 0 again, warm-up and mask included:
    for inputs that change much in the middle of a generation. None = never."""
    force_refresh_step_policy: str = _setting("once", choice("once", "repeat"))
    """"once", or "repeat": after every `force_refresh_step_hint` steps."""

    def __post_init__(self) -> None:
        mask: Any = self.steps_computation_mask
        if isinstance(mask, (list, tuple, str)):
            entries = [{"0": 0, "1": 1}.get(digit, digit) for digit in mask] if isinstance(mask, str) else mask
            bits = tuple(int(bit) if bit in (0, 1) else bit for bit in entries)  # others: for the rule to reject
            object.__setattr__(self, "steps_computation_mask", bits)
        _check_fields(self)
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
        own = {name: where for name, where in _CACHE_FIELDS.items() if hasattr(self, name)}
        foreign = [name for name in changes if name in _CACHE_FIELDS.keys() - own.keys()]
        if foreign:
            raise OptionError(
                f"{', '.join(foreign)}: for DBPruneConfig only, and this is a {type(self).__name__}; "
                "leave it out, or pass cache='dbprune' or a DBPruneConfig"
            )
        _reject_unknown(changes, own)
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

    enable_dynamic_prune_threshold: bool = _setting(False, _FLAG)
    """Raise the threshold to the mean of the step's first five positive differences, those measured ahead of the block,
    times `dynamic_prune_threshold_relax_ratio`, where that lies above `residual_diff_threshold` and below
    `max_dynamic_prune_threshold`."""
    max_dynamic_prune_threshold: float | None = _setting(
        None, _optional(Rule(lambda value: _is_number(value) and value > 0, "a number > 0 (a ratio)"))
    )
    """A raised threshold that is not below this is not used. A ratio; None = 2 x `residual_diff_threshold`."""
    dynamic_prune_threshold_relax_ratio: float = _setting(
        1.25, Rule(lambda value: _is_number(value) and value > 0, "a number > 0 (a factor)")
    )
    """What the mean difference is multiplied by."""
    non_prune_block_ids: Sequence[int] = _setting(
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


@dataclass(frozen=True)
class CalibratorConfig:
    """How a bypassed region's results are predicted; the base of the calibrators' own classes."""

    calibrator_cache_type: str = _setting("residual", choice("residual", "hidden_states", "output"))
    """What is predicted: what the region adds to the values that run through it; those values themselves; or the
    model's output, where the region is all that follows the first blocks, so that with a static mask and
    `Fn_compute_blocks=0` a cached step runs nothing of the model."""
    calibrator_state_dtype: str = _setting("wider", choice("wider", "float32", "model"))
    """What the stored values are kept in: "wider" = one precision up (float32 for 16-bit models, float64 for float32
    ones; on identical inputs a prediction is then exact), or float32, or the model's own, at half the memory."""

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True)
class TaylorSeerCalibratorConfig(CalibratorConfig):
    """A Taylor expansion over the computed steps: order 1 continues on a line, order 0 repeats the latest value."""

    taylorseer_order: int = _setting(1, integer(0, "a number of derivatives"))
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

    calibrator_cache_type: str = _setting("output", choice("residual", "hidden_states", "output"))
    """As in every calibrator; here the model's output unless it is given."""
    lagrange_order: int = _setting(1, integer(0, "a degree"))
    """Degree of the polynomial through the latest computed steps: 0 repeats, 1 continues on a line."""
    lagrange_variable: str = _setting("timestep", choice("timestep", "step"))
    """What the polynomial runs over; "step" takes all steps to be of one length. Where no timestep is known, or where
    it does not run one way, steps are counted too."""
    deferred_correction: bool = _setting(True, _FLAG)
    """Whether the first prediction behind a computed step makes up for the error of those before. With it
    lagrange_order + 3 values are kept for every result and every CFG branch, without it lagrange_order + 1."""


_CACHES: dict[str, type[DBCacheConfig]] = {"dbcache": DBCacheConfig, "dbprune": DBPruneConfig}
_CALIBRATORS = {
    "taylorseer": TaylorSeerCalibratorConfig,
    "foca": FoCaCalibratorConfig,
    "lagrange": LagrangeCalibratorConfig,
}


def _calibrator(given: Any) -> Any:
    """The config that a name, or a mapping with a `name` and settings, stands for; anything else as it is."""
    named = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else None
    if named is None or named.get("name") not in _CALIBRATORS:
        return given
    made = _CALIBRATORS[named.pop("name")]
    _reject_unknown(named, dict.fromkeys((item.name for item in fields(made)), f"cachedit_fx.{made.__name__}"))
    return made(**named)


@dataclass(frozen=True, init=False)
class ParamsModifier:
    """Settings of one block loop, in place of those that all loops share; for `params_modifiers`.

    `ParamsModifier(DBCacheConfig(...), TaylorSeerCalibratorConfig(...))`, or `ParamsModifier(max_warmup_steps=4)` with
    fields of `DBCacheConfig`, which change the given or the shared config. What is None is shared.
    """

    cache_config: DBCacheConfig | None = None
    calibrator_config: CalibratorConfig | None = None
    changes: tuple[tuple[str, Any], ...] = ()

    def __init__(
        self,
        cache_config: DBCacheConfig | None = None,
        calibrator_config: CalibratorConfig | str | None = None,
        **changes: Any,
    ) -> None:
        for name, value, kind in (
            ("cache_config", cache_config, DBCacheConfig),
            ("calibrator_config", calibrator := _calibrator(calibrator_config), CalibratorConfig),
        ):
            if value is not None and not isinstance(value, kind):
                raise OptionError(f"{name}={value!r} is not allowed: it must be a {kind.__name__}, or None")
        _reject_unknown(changes, _CACHE_FIELDS)
        object.__setattr__(self, "cache_config", cache_config)
        object.__setattr__(self, "calibrator_config", calibrator)
        object.__setattr__(self, "changes", tuple(sorted(changes.items())))
        self.config(DBPruneConfig())

    def config(self, shared: DBCacheConfig) -> DBCacheConfig:
        """The loop's config, where all loops share `shared`."""
        return (self.cache_config or shared).reset(**dict(self.changes))


Backend: TypeAlias = str | Callable[..., Any]
Passes: TypeAlias = tuple[str, ...] | tuple[tuple[str, bool], ...]

_BACKENDS = ("inductor", "aot_eager", "eager")
# Names as of torch 2.13. Asking `torch._inductor` for them would import it.
_MODES = (
    "default",
    "reduce-overhead",
    "max-autotune",
    "max-autotune-no-cudagraphs",
    "lite",
)


@dataclass(frozen=True)
class Options:
    """Everything one compiled model was asked for. Hashable; not to be changed in place, `inner_options` included."""

    cache: DBCacheConfig | None = _setting(
        DBCacheConfig(),
        Rule(
            lambda value: value is None or isinstance(value, DBCacheConfig),
            f"{choice(*_CACHES).words}, a DBCacheConfig, a DBPruneConfig or None",
            tuple(_CACHES),
        ),
    )
    """When to reuse; None = never, the graph is cut and compiled as it is. "dbcache" = `DBCacheConfig()`, which
    bypasses the middle as a whole; "dbprune" = `DBPruneConfig()`, which prunes single blocks."""
    calibrator: CalibratorConfig | None = _setting(
        None,
        Rule(
            lambda value: value is None or isinstance(value, CalibratorConfig),
            f"{choice(*_CALIBRATORS).words}, a mapping with such a name and settings, a calibrator's config such as "
            "TaylorSeerCalibratorConfig(), or None",
            tuple(_CALIBRATORS),
        ),
    )
    """What predicts the results of a bypassed region: a config, a name, or a mapping such as {"name": "taylorseer",
    "taylorseer_order": 2}. None = what was stored last is used again."""
    params_modifiers: tuple[ParamsModifier, ...] = _setting(
        (),
        Rule(
            lambda value: isinstance(value, tuple) and all(isinstance(item, ParamsModifier) for item in value),
            "a list of ParamsModifier, one for each block loop of the chain, in its order",
        ),
    )
    """Settings of each block loop of the chain, in its order; loops beyond the list share the model's. Needs
    scope="loop", which they make the default."""
    # Hashes leave out what may be unhashable; comparison does not, so equal options still have equal hashes.
    inner_backend: Backend = _setting(
        "inductor",
        Rule(
            lambda value: callable(value) or value in _BACKENDS,
            f"{choice(*_BACKENDS).words}, or a callable",
            _BACKENDS,
        ),
        hash=False,
    )
    """What compiles each distinct piece: a name, or a callable (graph module, example inputs) -> callable."""
    inner_options: Mapping[str, Any] = _setting(
        None,
        Rule(
            lambda value: isinstance(value, dict) and all(isinstance(k, str) for k in value),
            "a mapping from names to values",
        ),
        hash=False,
    )
    """Handed on to the inner backend. None becomes an empty dict."""
    mode: str | None = _setting(None, _optional(choice(*_MODES)))
    """Inductor's mode for the pieces; `inner_options`, where given too, are applied on top of it."""
    granularity: str = _setting("block", choice("block", "region"))
    """What is compiled as one piece: a block (few distinct ones, fast to compile), or a whole region (more fusion)."""
    compiled_pieces: str = _setting("blocks", choice("blocks", "all"))
    """What the inner backend compiles: blocks, which are most of the work and alike; or prologue, glue and epilogue
    too, which cost more to compile than they save in thousands of steps. A "region" is always compiled as a whole."""
    scope: str = _setting(None, choice("model", "loop"))
    """One bypassed region over the chain of all block loops, or one for each loop. None becomes "model", or "loop" with
    `params_modifiers`."""
    passes: Passes | None = _setting(
        None,
        Rule(
            lambda value: value is None or _is_names(value) or _is_switches(value),
            "a mapping name -> bool, a list of names, or None",
        ),
    )
    """Passes switched on or off by name: sorted (name, bool) pairs where a mapping was given, else the names as listed.
    None = the defaults. The names are the pass manager's to check."""
    timestep: str | None = _setting(
        None, _optional(Rule(lambda value: isinstance(value, str) and value.isidentifier(), "the name of an argument"))
    )
    """The argument of `forward` that holds the timestep. None = found by itself."""
    loops: tuple[str, ...] | None = _setting(
        None,
        _optional(Rule(lambda value: _is_names(value) and bool(value), "a non-empty list of names of block loops")),
    )
    """The block loops that make up the chain. None = chosen by itself; `explain` says which and why."""

    def __post_init__(self) -> None:
        given: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        passes, loops, inner = given["passes"], given["loops"], given["inner_options"]
        if isinstance(given["cache"], str) and given["cache"] in _CACHES:
            object.__setattr__(self, "cache", _CACHES[given["cache"]]())
        object.__setattr__(self, "calibrator", _calibrator(given["calibrator"]))
        if isinstance(given["params_modifiers"], list):
            object.__setattr__(self, "params_modifiers", tuple(given["params_modifiers"]))
        if given["scope"] is None:
            object.__setattr__(self, "scope", "loop" if given["params_modifiers"] else "model")
        if inner is None or isinstance(inner, Mapping):
            object.__setattr__(self, "inner_options", dict(inner or {}))
        if isinstance(passes, Mapping):
            object.__setattr__(self, "passes", tuple(sorted(passes.items(), key=str)) or None)
        elif isinstance(passes, list):
            object.__setattr__(self, "passes", tuple(passes))
        if isinstance(loops, list):
            object.__setattr__(self, "loops", tuple(loops))
        _check_fields(self)
        if self.mode not in (None, "default") and self.inner_backend != "inductor":
            raise OptionError(
                f"mode={self.mode!r} is a mode of inductor, but inner_backend={self.inner_backend!r}: "
                "leave out mode, or pass inner_backend='inductor'"
            )

        if self.params_modifiers and (self.scope != "loop" or self.cache is None):
            raise OptionError(
                f"params_modifiers set the policy of each block loop by itself: they need scope='loop' and a cache, "
                f"not scope={self.scope!r}, cache={self.cache!r}"
            )
        for config, calibrator in self.policies:
            if calibrator is None or calibrator.calibrator_cache_type != "output":
                continue
            if isinstance(config, DBPruneConfig):
                raise OptionError(
                    "calibrator_cache_type='output' predicts the model's output, and DBPrune what single blocks add: "
                    "choose calibrator_cache_type='residual' or 'hidden_states' with it"
                )
            if self.scope == "loop":
                raise OptionError(
                    "calibrator_cache_type='output' predicts the output of the whole model, and scope='loop' decides "
                    "about each loop by itself: leave out one of them"
                )
            if config.Bn_compute_blocks:
                raise OptionError(
                    "calibrator_cache_type='output' predicts what lies behind the last blocks, so that computing those "
                    f"would be for nothing: Bn_compute_blocks={config.Bn_compute_blocks} must be 0"
                )

    def policy(self, loop: int | None = None) -> "Policy":
        """What decides and what predicts: for the whole chain, or for its loop of this number (from 0)."""
        if loop is None or loop >= len(self.params_modifiers):
            return self.policies[0]
        return self.policies[loop + 1]

    @cached_property
    def policies(self) -> "list[Policy]":
        """The policy that is shared, and each loop's that has one of its own; none without a cache. Made once: every
        call asks for them."""
        if self.cache is None:
            return []
        shared = self.cache
        own = [(item.config(shared), item.calibrator_config or self.calibrator) for item in self.params_modifiers]
        return [(shared, self.calibrator), *own]

    @property
    def predicts_output(self) -> bool:
        """Whether the bypassed region runs to the end of the model."""
        return self.calibrator is not None and self.calibrator.calibrator_cache_type == "output"

    def structure(self) -> "Structure":
        """A hashable key: options with equal structure share their compiled graphs, whatever their policy."""
        bare = replace(self, cache=None, calibrator=None, params_modifiers=())
        return bare, self.predicts_output, tuple(config.structure() for config, _ in self.policies)


Policy: TypeAlias = tuple[DBCacheConfig, CalibratorConfig | None]
Structure: TypeAlias = tuple[Options, bool, tuple[tuple[Any, ...], ...]]

_CACHE_FIELDS = {
    item.name: f"cachedit_fx.{config.__name__}" for config in (DBPruneConfig, DBCacheConfig) for item in fields(config)
}
_KNOWN = dict.fromkeys((item.name for item in fields(Options)), "cachedit_fx.options.Options") | _CACHE_FIELDS


def parse_options(options: Mapping[str, Any] | None, *, mode: str | None = None) -> Options:
    """Check what a user passed and fill in the defaults.

    `options` may hold any field of `Options` and, flat, any field of the class of `cache` (`DBCacheConfig` or
    `DBPruneConfig`), applied on top of it.
    `mode` is the keyword that torch.compile hands to a backend.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"options must be a mapping from names to values, not {type(options).__name__}: {options!r}")
    given = dict(options or {})
    _reject_unknown(given, _KNOWN)
    if mode is not None and given.setdefault("mode", mode) != mode:
        raise OptionError(
            f"mode is given twice, as {mode!r} and in the options as {given['mode']!r}: leave out one of them"
        )
    flat = {name: given.pop(name) for name in list(given) if name in _CACHE_FIELDS}
    parsed = Options(**given)
    if not flat:
        return parsed
    if parsed.cache is None:
        raise OptionError(
            f"{', '.join(flat)}: settings of a cache, but cache=None switches it off; "
            "leave them out, or pass cache='dbcache'"
        )
    return replace(parsed, cache=parsed.cache.reset(**flat))
