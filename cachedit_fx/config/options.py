"""The settings a user may pass, their defaults and their checks.

    torch.compile(model, backend="cachedit", options={"cache": "dbcache", "Fn_compute_blocks": 1, "scope": "loop"})
                                                         │
                                    parse_options(mapping) ──► Options(cache=DBCacheConfig(...), scope="loop", ...)

Settings are of two kinds. *Structural* ones shape the rewritten graph (where it is cut, who compiles the pieces) and
make up `Options.structure()`. All others are *policy*: they are read anew at every call, and changing them compiles
nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeAlias

from cachedit_fx.config.cache import CACHE_FIELDS, CACHES, DBCacheConfig, DBPruneConfig
from cachedit_fx.config.calibrators import CALIBRATORS, CalibratorConfig, as_calibrator
from cachedit_fx.config.rules import (
    OptionError,
    Rule,
    check_fields,
    choice,
    is_names,
    is_switches,
    optional,
    reject_unknown,
    setting,
)


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
            ("calibrator_config", calibrator := as_calibrator(calibrator_config), CalibratorConfig),
        ):
            if value is not None and not isinstance(value, kind):
                raise OptionError(f"{name}={value!r} is not allowed: it must be a {kind.__name__}, or None")
        reject_unknown(changes, CACHE_FIELDS)
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

    cache: DBCacheConfig | None = setting(
        DBCacheConfig(),
        Rule(
            lambda value: value is None or isinstance(value, DBCacheConfig),
            f"{choice(*CACHES).words}, a DBCacheConfig, a DBPruneConfig or None",
            tuple(CACHES),
        ),
    )
    """When to reuse; None = never, the graph is cut and compiled as it is. "dbcache" = `DBCacheConfig()`, which
    bypasses the middle as a whole; "dbprune" = `DBPruneConfig()`, which prunes single blocks."""
    calibrator: CalibratorConfig | None = setting(
        None,
        Rule(
            lambda value: value is None or isinstance(value, CalibratorConfig),
            f"{choice(*CALIBRATORS).words}, a mapping with such a name and settings, a calibrator's config such as "
            "TaylorSeerCalibratorConfig(), or None",
            tuple(CALIBRATORS),
        ),
    )
    """What predicts the results of a bypassed region: a config, a name, or a mapping such as {"name": "taylorseer",
    "taylorseer_order": 2}. None = what was stored last is used again."""
    params_modifiers: tuple[ParamsModifier, ...] = setting(
        (),
        Rule(
            lambda value: isinstance(value, tuple) and all(isinstance(item, ParamsModifier) for item in value),
            "a list of ParamsModifier, one for each block loop of the chain, in its order",
        ),
    )
    """Settings of each block loop of the chain, in its order; loops beyond the list share the model's. Needs
    scope="loop", which they make the default."""
    # Hashes leave out what may be unhashable; comparison does not, so equal options still have equal hashes.
    inner_backend: Backend = setting(
        "inductor",
        Rule(
            lambda value: callable(value) or value in _BACKENDS,
            f"{choice(*_BACKENDS).words}, or a callable",
            _BACKENDS,
        ),
        hash=False,
    )
    """What compiles each distinct piece: a name, or a callable (graph module, example inputs) -> callable."""
    inner_options: Mapping[str, Any] = setting(
        None,
        Rule(
            lambda value: isinstance(value, dict) and all(isinstance(k, str) for k in value),
            "a mapping from names to values",
        ),
        hash=False,
    )
    """Handed on to the inner backend. None becomes an empty dict."""
    mode: str | None = setting(None, optional(choice(*_MODES)))
    """Inductor's mode for the pieces; `inner_options`, where given too, are applied on top of it."""
    granularity: str = setting("block", choice("block", "region"))
    """What is compiled as one piece: a block (few distinct ones, fast to compile), or a whole region (more fusion)."""
    compiled_pieces: str = setting("blocks", choice("blocks", "all"))
    """What the inner backend compiles: blocks, which are most of the work and alike; or prologue, glue and epilogue
    too, which cost more to compile than they save in thousands of steps. A "region" is always compiled as a whole."""
    scope: str = setting(None, choice("model", "loop"))
    """One bypassed region over the chain of all block loops, or one for each loop. None becomes "model", or "loop" with
    `params_modifiers`."""
    passes: Passes | None = setting(
        None,
        Rule(
            lambda value: value is None or is_names(value) or is_switches(value),
            "a mapping name -> bool, a list of names, or None",
        ),
    )
    """Passes switched on or off by name: sorted (name, bool) pairs where a mapping was given, else the names as listed.
    None = the defaults. The names are the pass manager's to check."""
    timestep: str | None = setting(
        None, optional(Rule(lambda value: isinstance(value, str) and value.isidentifier(), "the name of an argument"))
    )
    """The argument of `forward` that holds the timestep. None = found by itself."""
    loops: tuple[str, ...] | None = setting(
        None,
        optional(Rule(lambda value: is_names(value) and bool(value), "a non-empty list of names of block loops")),
    )
    """The block loops that make up the chain. None = chosen by itself; `explain` says which and why."""

    def __post_init__(self) -> None:
        given: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        passes, loops, inner = given["passes"], given["loops"], given["inner_options"]
        if isinstance(given["cache"], str) and given["cache"] in CACHES:
            object.__setattr__(self, "cache", CACHES[given["cache"]]())
        object.__setattr__(self, "calibrator", as_calibrator(given["calibrator"]))
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
        check_fields(self)
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


_KNOWN = dict.fromkeys((item.name for item in fields(Options)), "cachedit_fx.options.Options") | CACHE_FIELDS


def parse_options(options: Mapping[str, Any] | None, *, mode: str | None = None) -> Options:
    """Check what a user passed and fill in the defaults.

    `options` may hold any field of `Options` and, flat, any field of the class of `cache` (`DBCacheConfig` or
    `DBPruneConfig`), applied on top of it.
    `mode` is the keyword that torch.compile hands to a backend.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"options must be a mapping from names to values, not {type(options).__name__}: {options!r}")
    given = dict(options or {})
    reject_unknown(given, _KNOWN)
    if mode is not None and given.setdefault("mode", mode) != mode:
        raise OptionError(
            f"mode is given twice, as {mode!r} and in the options as {given['mode']!r}: leave out one of them"
        )
    flat = {name: given.pop(name) for name in list(given) if name in CACHE_FIELDS}
    parsed = Options(**given)
    if not flat:
        return parsed
    if parsed.cache is None:
        raise OptionError(
            f"{', '.join(flat)}: settings of a cache, but cache=None switches it off; "
            "leave them out, or pass cache='dbcache'"
        )
    return replace(parsed, cache=parsed.cache.reset(**flat))
