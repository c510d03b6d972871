"""Defines the types that every policy shares: situation, decision, reasons, the protocol, and the table of policies.

    decide(situation, history, measure)     ──► Decision(action, reason, difference)
    advance(history, situation, decision)   ──► the history before the chain's next decision

A policy is pure: it holds its config and nothing else. The session stores its histories and never reads them. A new
policy is a file in this folder, with a config class and a policy class under `@register`, and a line in `__init__.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from cachedit_fx.config.cache import CONFIGS, Cut, DBCacheConfig, Unit
from cachedit_fx.config.calibrators import CalibratorConfig
from cachedit_fx.config.rules import ContractError, OptionError, check_config_class


class Action(Enum):
    """The treatment of a region at one step."""

    COMPUTE = "compute"
    REUSE = "reuse"


class Reason:
    """The reason of a decision: a short label, the action that follows, and one line for people.

    The reasons below are attributes of this class (`Reason.WARMUP`). A policy may make others. Like the members of an
    enumeration they are compared by identity, which copies and pickles keep.
    """

    _by_label: ClassVar[dict[str, Reason]] = {}

    WARMUP: ClassVar[Reason]
    MASK_COMPUTES: ClassVar[Reason]
    MASK_REUSES: ClassVar[Reason]
    MASK_ENDED: ClassVar[Reason]
    MAX_CACHED: ClassVar[Reason]
    MAX_CONTINUOUS: ClassVar[Reason]
    ACCUMULATED: ClassVar[Reason]
    THRESHOLD_OFF: ClassVar[Reason]
    NOTHING_STORED: ClassVar[Reason]
    SHAPES_DIFFER: ClassVar[Reason]
    NOT_FINITE: ClassVar[Reason]
    ABOVE_THRESHOLD: ClassVar[Reason]
    BELOW_THRESHOLD: ClassVar[Reason]

    def __init__(self, label: str, action: Action, explanation: str) -> None:
        self.label, self.action, self.explanation = label, action, explanation
        self._by_label[label] = self

    @classmethod
    def of(cls, label: str, action: Action, explanation: str) -> Reason:
        """The reason of this label, if there is one already; else a new one."""
        return cls._by_label.get(label) or cls(label, action, explanation)

    @property
    def value(self) -> str:
        """The label, under the attribute name of an enumeration's members."""
        return self.label

    def __repr__(self) -> str:
        return f"<Reason: {self.label!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Reason.of, (self.label, self.action, self.explanation)

    def __copy__(self) -> Reason:
        return self

    def __deepcopy__(self, memo: Any) -> Reason:
        return self


_COMPUTE, _REUSE = Action.COMPUTE, Action.REUSE
Reason.WARMUP = Reason("warm-up", _COMPUTE, "one of the first steps (max_warmup_steps, warmup_interval)")
Reason.MASK_COMPUTES = Reason("mask: 1", _COMPUTE, "steps_computation_mask has a 1 here")
Reason.MASK_REUSES = Reason("mask: 0", _REUSE, "steps_computation_mask has a 0 here and its policy is static")
Reason.MASK_ENDED = Reason("mask ended", _COMPUTE, "steps_computation_mask is shorter than the generation")
Reason.MAX_CACHED = Reason("max cached", _COMPUTE, "max_cached_steps are cached already")
Reason.MAX_CONTINUOUS = Reason("max in a row", _COMPUTE, "max_continuous_cached_steps were cached in a row")
Reason.ACCUMULATED = Reason("accumulated", _COMPUTE, "differences reached max_accumulated_residual_diff_threshold")
Reason.THRESHOLD_OFF = Reason("threshold off", _COMPUTE, "residual_diff_threshold is zero or less")
Reason.NOTHING_STORED = Reason("nothing stored", _COMPUTE, "no step of this generation and branch was computed before")
Reason.SHAPES_DIFFER = Reason("shapes differ", _COMPUTE, "what is stored has another shape")
Reason.NOT_FINITE = Reason("not finite", _COMPUTE, "the difference is infinite or not a number")
Reason.ABOVE_THRESHOLD = Reason("above", _COMPUTE, "the difference is not below residual_diff_threshold")
Reason.BELOW_THRESHOLD = Reason("below", _REUSE, "the difference is below residual_diff_threshold")


@dataclass(frozen=True)
class Decision:
    """The decision about one region at one step of one CFG branch."""

    action: Action
    reason: Reason
    difference: float | None = None
    """The relative L1 difference; None if none was measured."""


class Stored(Enum):
    """The stored values at a step: none, values that fit, or values for other shapes."""

    NOTHING = "nothing"
    OTHER_SHAPES = "other shapes"
    FITS = "fits"


class Situation(NamedTuple):
    """The facts about a region that are known before the difference is measured."""

    step: int
    """The step's number, counted from the start of its context (`context_start`)."""
    stored: Stored = Stored.FITS
    block: int | None = None
    """The index of the region's block; None for the middle as a whole."""


class GenerationFacts(NamedTuple):
    """What is known of a generation from its second step on."""

    steps: int | None
    """Number of steps, by the calling pipeline's scheduler; None if it is not known."""
    guidance: float | None
    """The scale of classifier-free guidance: 1 without guidance, None if the scale is not known."""


Measure = Callable[[], float]
"""Returns the relative L1 difference. On a GPU the call waits for the device, so there is at most one."""

HistoryT = TypeVar("HistoryT")
ConfigT = TypeVar("ConfigT", bound=DBCacheConfig)


class Policy(ABC, Generic[ConfigT, HistoryT]):
    """Decides about the regions of one chain, in one CFG branch at a time.

    Attributes:
        config_class: class of the configs that `options={"cache": ...}` takes for this policy.
        config: its settings.
    """

    config_class: ClassVar[type[DBCacheConfig]]

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @property
    def unit(self) -> Unit:
        """The subject of one decision: the middle of the chain, or one block of it."""
        return self.config.unit

    def structure(self) -> Cut:
        """The cut of the chain. Policies of equal structure share a compiled graph."""
        return self.config.cut()

    @abstractmethod
    def start(self) -> HistoryT:
        """The history before a context's first decision."""

    @abstractmethod
    def decide(self, situation: Situation, history: HistoryT, measure: Measure) -> Decision:
        """Decide whether to compute or reuse. Calls `measure` at most once, and only if no rule decides without it."""

    @abstractmethod
    def advance(self, history: HistoryT, situation: Situation, decision: Decision) -> HistoryT:
        """The history after `decision` was carried out."""

    def choose(self, facts: GenerationFacts) -> tuple[DBCacheConfig, CalibratorConfig | None] | None:
        """Config and calibrator for the rest of a generation, chosen once at its second step.

        None keeps the present ones. The config chosen must have the structure of the present one.
        """
        return None

    @property
    def measures(self) -> bool:
        """Whether `decide` may ever call `measure`. If not, no reference is kept."""
        return self.config.residual_diff_threshold > 0 and not self.config.static

    @property
    def reuses(self) -> bool:
        """Whether any step may ever reuse. If not, nothing is stored."""
        if self.config.static:
            return not all(self.config.steps_computation_mask or ())
        return self.config.residual_diff_threshold > 0

    def warning(self, decision: Decision) -> str | None:
        """A sentence for the user about this decision, shown once for each model; None as a rule."""
        return None


POLICIES: dict[type[DBCacheConfig], type[Policy[Any, Any]]] = {}
"""Config class -> policy class."""


def register(name: str) -> Callable[[type[Policy[Any, Any]]], type[Policy[Any, Any]]]:
    """Enter a policy under the name that `options={"cache": name}` takes.

    Raises:
        TypeError: if the policy's `config_class` is no subclass of `DBCacheConfig`.
        ValueError: if another policy has the name, or the config class.
    """

    def enter(policy: type[Policy[Any, Any]]) -> type[Policy[Any, Any]]:
        check_config_class(getattr(policy, "config_class", None), DBCacheConfig, f"policy {name!r}")
        owner = POLICIES.get(CONFIGS[name]) if name in CONFIGS else None
        if owner is not None and (owner.__module__, owner.__qualname__) != (policy.__module__, policy.__qualname__):
            raise ValueError(f"{name!r} is the name of {owner.__module__}.{owner.__qualname__}: choose another name")
        others = [other for other, config in CONFIGS.items() if config is policy.config_class and other != name]
        if others:
            raise ValueError(
                f"{policy.config_class.__name__} is the config of the policy {others[0]!r}: "
                f"give {name!r} a config_class of its own"
            )
        CONFIGS[name] = policy.config_class
        POLICIES[policy.config_class] = policy
        return policy

    return enter


def policy_of(config: DBCacheConfig) -> Policy[Any, Any]:
    """The policy of a config: that of its class, or of the nearest base class that has one.

    Raises:
        OptionError: if there is none.
    """
    policy = next((POLICIES[base] for base in type(config).__mro__ if base in POLICIES), None)
    if policy is None:
        raise OptionError(f"no policy is registered for {type(config).__name__}; there are {', '.join(CONFIGS)}")
    return policy(config)


def decision_of(policy: Policy[Any, Any], situation: Situation, history: Any, measure: Measure) -> Decision:
    """The policy's decision, checked.

    Raises:
        ContractError: if it is no `Decision`, if its reason stands for another action, or if it reuses what is not
            stored.
    """
    decision = policy.decide(situation, history, measure)
    reason = getattr(decision, "reason", None)
    if not (isinstance(decision, Decision) and isinstance(decision.action, Action) and isinstance(reason, Reason)):
        problem = "it must be a Decision of an Action and a Reason"
    elif reason.action is not decision.action:
        problem = f"the reason {reason.label!r} stands for {reason.action}"
    elif decision.difference is not None and not isinstance(decision.difference, (int, float)):
        problem = "the difference must be a number, or None"
    elif decision.action is Action.REUSE and situation.stored is not Stored.FITS:
        problem = f"nothing can be reused if situation.stored is {situation.stored}: compute then"
    else:
        return decision
    raise ContractError(f"{type(policy).__name__}.decide returned {decision!r} for {situation}: {problem}")


def context_start(config: DBCacheConfig, step: int) -> int:
    """The step of a generation at which the context of `step` began.

    A new context begins with forgetting all stored values, at the steps that `force_refresh_step_hint` sets.
    """
    hint = config.force_refresh_step_hint
    if hint is None or step < hint:
        return 0
    return step // hint * hint if config.force_refresh_step_policy == "repeat" else hint
