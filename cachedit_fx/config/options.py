"""Defines the settings that a user may pass, their defaults and their checks.

    torch.compile(model, backend="cachedit", options={"cache": "dbcache", "Fn_compute_blocks": 1, "scope": "loop"})
                                                         │
                                    parse_options(mapping) ──► Options(cache=DBCacheConfig(...), scope="loop", ...)

Settings are of two kinds. *Structural* settings shape the rewritten graph: its cuts, and who compiles the pieces. They
make up `Options.structure()`. All others are *read at each call*, and changing them compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from cachedit_fx.attention.functions import holds_tensors
from cachedit_fx.config.attention import AttentionConfig, as_attention
from cachedit_fx.config.cache import CONFIGS, Cut, DBCacheConfig, known_fields
from cachedit_fx.config.calibrators import CalibratorConfig
from cachedit_fx.config.parallel import ParallelOptions
from cachedit_fx.config.precision import PrecisionConfig, as_precision
from cachedit_fx.config.rules import OptionError, Rule, check_fields, choice, integer, optional, reject_unknown, setting
from cachedit_fx.runtime.calibrators import CALIBRATORS, as_config, calibrator_of
from cachedit_fx.runtime.grid import Mesh
from cachedit_fx.runtime.policies.base import Policy, policy_of

Scope: TypeAlias = Literal["model", "loop"]
Granularity: TypeAlias = Literal["block", "region"]
CompiledPieces: TypeAlias = Literal["blocks", "all"]
Verify: TypeAlias = Literal["first"]
Motion: TypeAlias = Literal["step", "batched"]
TimeWeights: TypeAlias = Literal["device", "host"]
BackendName: TypeAlias = Literal["inductor", "aot_eager", "eager"]
InnerBackend: TypeAlias = BackendName | Callable[..., Any]
# Names as of torch 2.13 and 2.14. Asking `torch._inductor` for them would import it.
Mode: TypeAlias = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite"]


_HOISTING = frozenset(
    {"normalize", "find_timestep", "infer_dependence", "detect_block_loops", "plan_regions", "outline_blocks"}
    | {"hoist_invariants"}
)
"""Passes without which nothing is hoisted."""
_REGIONS = frozenset({"normalize", "detect_block_loops", "plan_regions", "outline_blocks", "insert_cache_branch"})
_COPYING = _REGIONS | {"gather_inputs", "insert_low_precision"}
"""Passes without which no block runs in low precision."""
_SWITCHING = _REGIONS | {"insert_attention_forms"}
"""Passes without which no step runs in another attention than the next."""


class LoopSettings(NamedTuple):
    """The policy that decides about a chain of blocks, and the calibrator that predicts a bypassed region's results."""

    policy: Policy[Any, Any]
    calibrator: CalibratorConfig | None


@dataclass(frozen=True, init=False)
class ParamsModifier:
    """Settings of one block loop that differ from the shared ones; for `params_modifiers`.

    `ParamsModifier(DBCacheConfig(...), TaylorSeerCalibratorConfig(...))` replaces the shared configs; a config that is
    None is shared. `ParamsModifier(max_warmup_steps=4)` changes fields of the loop's config.
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
            ("calibrator_config", calibrator := as_config(calibrator_config), CalibratorConfig),
        ):
            if value is not None and not isinstance(value, kind):
                raise OptionError(f"{name}={value!r} is not allowed: it must be a {kind.__name__}, or None")
        reject_unknown(changes, known_fields())
        object.__setattr__(self, "cache_config", cache_config)
        object.__setattr__(self, "calibrator_config", calibrator)
        object.__setattr__(self, "changes", tuple(sorted(changes.items())))
        self._check()

    def config(self, shared: DBCacheConfig) -> DBCacheConfig:
        """The loop's config, from the shared one."""
        return (self.cache_config or shared).reset(**dict(self.changes))

    def _check(self) -> None:
        """Raise if no config allows the changes. The config that the loops share is not known yet."""
        names = {name for name, _ in self.changes}
        candidates = [config for config in CONFIGS.values() if names <= config.__dataclass_fields__.keys()]
        errors = []
        for config_class in candidates or CONFIGS.values():
            try:
                self.config(config_class())
            except OptionError as error:
                errors.append(error)
            else:
                return
        raise errors[0]


def _is_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


def _is_switches(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], bool)
        for pair in value
    )


@dataclass(frozen=True)
class Options(ParallelOptions):
    """All options of one compiled model. Hashable, and never changed in place, `inner_options` included."""

    cache: DBCacheConfig | None = setting(
        DBCacheConfig(),
        Rule(
            lambda value: value is None or isinstance(value, DBCacheConfig),
            "{choices}, the config of such a policy (DBCacheConfig, DBPruneConfig), or None",
            CONFIGS,
        ),
    )
    """When to reuse. "dbcache" = `DBCacheConfig()`, which bypasses the middle as a whole; "dbprune" =
    `DBPruneConfig()`, which prunes single blocks. None = never; the graph is cut and compiled as it is."""
    calibrator: CalibratorConfig | None = setting(
        None,
        Rule(
            lambda value: value is None or isinstance(value, CalibratorConfig),
            "{choices}, a mapping with such a name and settings, a calibrator's config such as "
            "TaylorSeerCalibratorConfig(), or None",
            CALIBRATORS,
        ),
    )
    """How the results of a bypassed region are predicted: a config, a name, or a mapping such as {"name": "taylorseer",
    "taylorseer_order": 2}. None = the values stored last are used again."""
    params_modifiers: tuple[ParamsModifier, ...] = setting(
        (),
        Rule(
            lambda value: isinstance(value, tuple) and all(isinstance(entry, ParamsModifier) for entry in value),
            "a list of ParamsModifier, one for each block loop of the chain, in its order",
        ),
    )
    """Settings of each block loop of the chain, in the chain's order. Loops beyond the list share the model's settings.
    Needs scope="loop", which then is the default."""
    # Hashes leave out fields that may be unhashable; comparison does not. Equal options still have equal hashes.
    inner_backend: InnerBackend = setting(
        "inductor",
        Rule(
            lambda value: callable(value) or value in get_args(BackendName),
            "{choices}, or a callable",
            get_args(BackendName),
        ),
        hash=False,
    )
    """The compiler of each distinct piece: a name, or a callable (graph module, example inputs) -> callable."""
    inner_options: Mapping[str, Any] | None = setting(
        None,
        Rule(
            lambda value: isinstance(value, dict) and all(isinstance(k, str) for k in value),
            "a mapping from names to values",
        ),
        hash=False,
    )
    """Options that are passed on to the inner backend. None becomes an empty dict."""
    mode: Mode | None = setting(None, optional(choice(*get_args(Mode))))
    """Inductor's mode for the pieces. `inner_options` are applied on top of it."""
    granularity: Granularity = setting("block", choice(*get_args(Granularity)))
    """The size of a piece that is compiled as one: a block (few distinct ones, fast to compile), or a whole region
    (more fusion)."""
    compiled_pieces: CompiledPieces = setting("blocks", choice(*get_args(CompiledPieces)))
    """The pieces that the inner backend compiles. "blocks" are most of the work, and most are identical. "all" adds
    prologue, glue and epilogue, which cost more to compile than they save in thousands of steps. With
    granularity="region" a region is always compiled as a whole."""
    scope: Scope | None = setting(None, choice(*get_args(Scope)))
    """One bypassed region over the chain of all block loops, or one for each loop. None becomes "model", or "loop" with
    `params_modifiers`."""
    passes: tuple[tuple[str, bool], ...] = setting((), Rule(_is_switches, "a mapping from names of passes to bools"))
    """Passes switched on or off by name, `{"normalize": False}`; stored as sorted pairs. The pass manager checks the
    names."""
    timestep: str | None = setting(
        None, optional(Rule(lambda value: isinstance(value, str) and value.isidentifier(), "the name of an argument"))
    )
    """The argument of `forward` that holds the timestep. None = found automatically."""
    loops: tuple[str, ...] | None = setting(
        None,
        optional(Rule(lambda value: _is_names(value) and bool(value), "a non-empty list of names of block loops")),
    )
    """The block loops that make up the chain. None = chosen automatically; `explain` shows why."""
    motion: Motion = setting("step", choice(*get_args(Motion)))
    """When hoisted values that change with the timestep are computed. "step" = when a step asks for them; no bit
    changes. "batched" = for all steps of a generation at once, if an earlier generation had the same steps. Weights are
    then read once a generation, and results differ by rounding, since a batch sums in another order."""
    time_weights: TimeWeights = setting("device", choice(*get_args(TimeWeights)))
    """Where weights lie that serve the timestep's values alone. "host" = on the CPU, which computes these values, and
    only results go to the model's device. Results differ by rounding, since another processor computes them. It is best
    with motion="batched". `explain` says how many bytes leave the device. `torch.compile(backend="cachedit")` does not
    take it."""
    precision: PrecisionConfig | None = setting(
        None,
        Rule(
            lambda value: value is None or isinstance(value, PrecisionConfig),
            "a PrecisionConfig, a mapping of its settings, the name of a kind, or None",
        ),
    )
    """Precision by step: quantized copies of the middle blocks' weights, and the steps that leave them aside. A kind's
    name such as "int8" stands for `PrecisionConfig("int8")`, with no step in full precision, and a mapping such as
    {"full_first_steps": 6} for a config of these settings. None = the module's own weights at all steps.
    `torch.compile(backend="cachedit")` does not take it."""
    attention: AttentionConfig | None = setting(
        None,
        Rule(
            lambda value: value is None or isinstance(value, AttentionConfig),
            "an AttentionConfig, a mapping of its settings, the name of a back end, a function with the arguments of "
            "scaled_dot_product_attention, or None",
        ),
    )
    """The back end that computes attention. A name such as "sage", or a function, stands for `AttentionConfig("sage")`,
    and a mapping such as {"backend": "int8", "own_first_steps": 4} for a config of these settings. A call that the back
    end does not take keeps the model's own attention; `explain` says which and why. None = the model's own. A call that
    wants gradients runs in the model's own attention too."""
    hoisted_mib: int = setting(256, integer(0, "MiB"))
    """The highest size of the hoisted values that a model keeps for each of its graphs, in MiB. Values beyond it are
    computed at every step."""
    verify: Verify | None = setting(None, optional(choice(*get_args(Verify))))
    """"first" = compare the first computed call of each compiled graph with the plain module. If the results differ,
    `VerificationError` names the first piece that differs. Results must be equal to the bit with inner_backend="eager",
    else up to the dtype's rounding. It is for trying out a new model: each call copies its inputs and the module's
    buffers. `torch.compile(backend="cachedit")` does not take it."""

    def __post_init__(self) -> None:
        for name, value in self._canonical().items():
            object.__setattr__(self, name, value)
        check_fields(self)
        self._check_combinations()

    def _canonical(self) -> dict[str, Any]:
        """The fields that users may pass in several forms, in the one form that is stored."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        cache, passes, modifiers, loops = (values[name] for name in ("cache", "passes", "params_modifiers", "loops"))
        inner = values["inner_options"]
        cache = CONFIGS[cache]() if isinstance(cache, str) and cache in CONFIGS else cache
        own = cache.calibrator if isinstance(cache, DBCacheConfig) else None
        return {
            "cache": cache,
            "calibrator": as_config(own if values["calibrator"] is None else values["calibrator"]),
            "params_modifiers": tuple(modifiers) if isinstance(modifiers, list) else modifiers,
            "scope": ("loop" if modifiers else "model") if values["scope"] is None else values["scope"],
            "inner_options": dict(inner or {}) if inner is None or isinstance(inner, Mapping) else inner,
            "passes": ()
            if passes is None
            else tuple(sorted(passes.items(), key=str))
            if isinstance(passes, Mapping)
            else passes,
            "precision": as_precision(values["precision"]),
            "attention": as_attention(values["attention"]),
            "loops": tuple(loops) if isinstance(loops, list) else loops,
            **self._canonical_sizes(),
        }

    def _check_combinations(self) -> None:
        """Raise on settings that contradict each other."""
        if self.mode not in (None, "default") and self.inner_backend != "inductor":
            raise OptionError(
                f"mode={self.mode!r} is a mode of inductor, but inner_backend={self.inner_backend!r}: "
                "leave out mode, or pass inner_backend='inductor'"
            )
        if self.params_modifiers and (self.scope != "loop" or self.cache is None):
            raise OptionError(
                f"params_modifiers set the policy of each block loop separately: they need scope='loop' and a cache, "
                f"not scope={self.scope!r}, cache={self.cache!r}"
            )
        self._check_sizes()
        if self.cfg_parallel:
            self._check_branches()
        if self.time_weights == "host":
            self._check_host()
        if self.precision is not None:
            self._check_precision()
        if self.attention is not None:
            self._check_attention(self.attention)
        if self.verify and self.ulysses_inputs == "first_rank":
            raise OptionError(
                "verify compares with the plain module, which gets each rank's own inputs, not those of "
                "ulysses_inputs='first_rank': leave out one of them"
            )
        for policy, calibrator in self.loop_settings:
            calibrator_of(calibrator)  # raises if there is none
            own = policy.config.calibrator
            if own is not None and calibrator != own:
                name = next(name for name, config in CONFIGS.items() if config is type(policy.config))
                raise OptionError(f"cache={name!r} brings its own calibrator: leave out calibrator={calibrator!r}")
            if calibrator is not None and calibrator.calibrator_cache_type == "output":
                self._check_output_target(policy.structure())

    def _check_branches(self) -> None:
        """Raise on settings under which ranks cannot compute the branches of guidance apart."""
        if self.cache is None:
            raise OptionError(
                "cfg_parallel tells branches by the cache's count of calls, and cache=None switches it off: leave out "
                "one of them; DBCacheConfig(residual_diff_threshold=0) computes every step"
            )
        if self.ulysses_inputs == "first_rank":
            raise OptionError(
                "cfg_parallel computes two calls at once, and ulysses_inputs='first_rank' lets each call wait for the "
                "first rank: leave out one of them"
            )
        if any(not policy.config.cfg_diff_compute_separate for policy, _ in self.loop_settings):
            raise OptionError(
                "cfg_parallel decides about each branch where it is computed, and cfg_diff_compute_separate=False lets "
                "one branch take the difference of the other: leave out one of them"
            )

    def _check_host(self) -> None:
        """Raise on settings under which no weight can lie on the host."""
        obstacle = self._obstacle(_HOISTING)
        if obstacle is not None:
            raise OptionError(
                f"time_weights='host' computes hoisted values on the host, and {obstacle} leaves nothing hoisted: "
                "leave out one of them"
            )
        if self.verify:
            raise OptionError(
                "verify compares with the plain module, which cannot run while time_weights='host' keeps weights on "
                "the host: leave out one of them"
            )

    def _check_precision(self) -> None:
        """Raise on settings under which no block can run in low precision."""
        obstacle = self._obstacle(_COPYING)
        if obstacle is not None:
            raise OptionError(
                f"precision chooses the weights of the middle blocks, and {obstacle} leaves no middle: leave out one "
                "of them; DBCacheConfig(residual_diff_threshold=0) computes every step"
            )
        if self.verify:
            raise OptionError(
                "verify compares with the plain module, and precision rounds its weights: leave out one of them"
            )

    def _check_attention(self, attention: AttentionConfig) -> None:
        """Raise on settings under which no call is replaced, or all steps are the same."""
        if ("replace_attention", False) in self.passes:
            raise OptionError(
                "attention chooses back ends, and passes={'replace_attention': False} leaves all calls as they are: "
                "leave out one of them"
            )
        holding = next((each for each in attention.functions if holds_tensors(each)), None)
        if holding is not None and self.inner_backend != "eager":
            raise OptionError(
                f"attention: {holding} reads tensors of its own, which a compiler cannot trace: make it an operator "
                "(torch.library.custom_op), or pass inner_backend='eager'"
            )
        obstacle = self._obstacle(_SWITCHING) if attention.is_by_step else None
        if obstacle is not None:
            raise OptionError(
                f"attention by step chooses the attention of the middle blocks, and {obstacle} leaves no middle: leave "
                "out one of them; DBCacheConfig(residual_diff_threshold=0) computes every step"
            )
        if self.verify:
            raise OptionError(
                "verify compares with the plain module, and attention replaces its own: leave out one of them"
            )

    def _obstacle(self, needed: Collection[str]) -> str | None:
        """The setting that switches one of these passes, or the cache, off; None if there is none."""
        off = next((name for name, is_on in self.passes if not is_on and name in needed), None)
        if off is not None:
            return f"passes={{{off!r}: False}}"
        return "cache=None" if self.cache is None else None

    def _check_output_target(self, cut: Cut) -> None:
        if cut.unit == "block":
            raise OptionError(
                "calibrator_cache_type='output' predicts the model's output, and this policy bypasses single blocks: "
                "choose calibrator_cache_type='residual' or 'hidden_states' with it"
            )
        if self.scope == "loop":
            raise OptionError(
                "calibrator_cache_type='output' predicts the output of the whole model, and scope='loop' decides "
                "about each loop separately: leave out one of them"
            )
        if cut.last:
            raise OptionError(
                "calibrator_cache_type='output' predicts what follows the last blocks, so that computing those "
                f"would be for nothing: Bn_compute_blocks={cut.last} must be 0"
            )

    def settings_of(self, loop: int | None = None) -> LoopSettings:
        """Policy and calibrator of the whole chain, or of the chain's loop with this index."""
        if loop is None or loop >= len(self.params_modifiers):
            return self.loop_settings[0]
        return self.loop_settings[loop + 1]

    @cached_property
    def loop_settings(self) -> list[LoopSettings]:
        """The shared settings, then the settings of each entry in `params_modifiers`; empty if `cache` is None.

        Made once, since every call asks for them.
        """
        if self.cache is None:
            return []
        shared = self.cache
        more = [(entry.config(shared), entry.calibrator_config or self.calibrator) for entry in self.params_modifiers]
        return [LoopSettings(policy_of(config), predictor) for config, predictor in [(shared, self.calibrator), *more]]

    @property
    def predicts_output(self) -> bool:
        """Whether the bypassed region runs to the end of the model."""
        return self.calibrator is not None and self.calibrator.calibrator_cache_type == "output"

    @property
    def is_exact(self) -> bool:
        """Whether results without reuse equal the plain module's to the bit: nothing is fused, shared or replaced."""
        replaces = self.precision is not None or self.attention is not None
        return self.inner_backend == "eager" and self.is_alone and not replaces

    def compiles(self, kind: str) -> bool:
        """Whether the inner backend compiles pieces of this kind."""
        if self.inner_backend == "eager":
            return False
        return self.compiled_pieces == "all" or kind in ("block", "region")

    def structure(self) -> Structure:
        """A hashable key of the structural settings. Options of equal structure can share their compiled graphs."""
        # The bare options have no cache. What is refused without one stands beside them.
        copies = None if self.precision is None else self.precision.structure()
        attention = None if self.attention is None else self.attention.structure()
        bare = replace(
            self,
            cache=None,
            calibrator=None,
            params_modifiers=(),
            time_weights="device",
            precision=None,
            attention=None,
            cfg_parallel=False,
            ulysses_mesh=None,
        )
        cuts = tuple(policy.structure() for policy, _ in self.loop_settings)
        ranks = self.cfg_parallel, self.ulysses_mesh
        return (self.time_weights, copies, attention, ranks, bare), self.predicts_output, cuts


Structure: TypeAlias = tuple[
    tuple[TimeWeights, PrecisionConfig | None, AttentionConfig | None, "tuple[bool, Mesh | None]", Options],
    bool,
    tuple[Cut, ...],
]


def parse_options(options: Mapping[str, Any] | None, *, mode: str | None = None) -> Options:
    """Check the options that a user passed, and fill in the defaults.

    Args:
        options: any field of `Options` and, flat, any field of the class of `cache` (`DBCacheConfig` or
            `DBPruneConfig`). Flat fields are applied on top of `cache`.
        mode: the keyword that `torch.compile` passes to a backend.

    Raises:
        OptionError: on an unknown name, a value that is not allowed, or options that contradict each other.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"options must be a mapping from names to values, not {type(options).__name__}: {options!r}")
    settings = dict(options or {})
    owners = dict.fromkeys((field.name for field in fields(Options)), "cachedit_fx.Options")
    reject_unknown(settings, owners | known_fields())
    if mode is not None and settings.setdefault("mode", mode) != mode:
        raise OptionError(
            f"mode is given twice, as {mode!r} and in the options as {settings['mode']!r}: leave out one of them"
        )
    flat = {name: settings.pop(name) for name in list(settings) if name not in owners}
    result = Options(**settings)
    if not flat:
        return result
    if result.cache is None:
        raise OptionError(
            f"{', '.join(flat)}: settings of a cache, but cache=None switches it off; "
            "leave them out, or pass cache='dbcache'"
        )
    return replace(result, cache=result.cache.reset(**flat))
