"""Defines the choice of attention: a back end for a model's calls, by kind, by module and by step.

step 0 1 2 3 4 5 6 7
     o o . . . . . o        AttentionConfig("int8", own_first_steps=2, own_last_steps=1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cachedit_fx.attention.backends import OWN, Backend, backends_of, check_machine
from cachedit_fx.config.patterns import check_patterns, first_match, matches, patterns_of
from cachedit_fx.config.rules import OptionError, reject_unknown
from cachedit_fx.config.steps import ChosenSteps, StepFacts


@dataclass(frozen=True)
class AttentionConfig:
    """The back end of a model's attention.

    A call that the back end does not take keeps the model's own attention; `explain` says which and why. Without a
    choice of steps, every other call of the model is replaced. With one, only calls of the middle blocks are replaced,
    at the steps that `is_own` leaves. The first F and the last B blocks then always run in the model's own attention,
    so differences between steps compare like with like.

    A subclass may choose the steps by another rule: it overrides `is_own`.

    Raises:
        OptionError: on an unknown back end, or a value that is not allowed.
    """

    backend: Any = field(default="int8", hash=False)
    """A name, or a function with the arguments of `torch.nn.functional.scaled_dot_product_attention`. Names: "sdpa"
    (the model's own attention), "flash", "cudnn", "math", "flex", "sage", "int8", "int8_emulated"."""
    cross_backend: Any = field(default=None, hash=False)
    """Of cross-attention: calls whose queries and keys are projected from different values. None = `backend`."""
    exclude: str | Sequence[str] = ()
    """Patterns of modules whose calls keep the model's own attention: "transformer_blocks.0", "attn2"."""
    per_layer: Mapping[str, Any] | None = field(default=None, hash=False)
    """Pattern -> the back end of these modules' calls, self or cross; None = the model's own attention. A module's
    whole name comes first, then the first pattern that matches."""
    own_first_steps: int = 0
    """Steps at the start of a generation that run in the model's own attention."""
    own_last_steps: int = 0
    """Steps at the end that run in the model's own attention. It has no effect if nothing tells the number of steps:
    `num_inference_steps`, a preset's `steps` or a pipeline's scheduler."""
    own_steps_mask: Sequence[int] | None = None
    """One digit for each step: 1 = the model's own attention. Steps beyond the mask are as its last digit."""

    def __post_init__(self) -> None:
        self.own_steps  # noqa: B018 - raises on what is not allowed, as the back ends do
        object.__setattr__(self, "exclude", patterns_of("exclude", self.exclude))
        if self.per_layer is not None and (
            not isinstance(self.per_layer, Mapping) or not all(isinstance(pattern, str) for pattern in self.per_layer)
        ):
            raise OptionError(
                f"per_layer={self.per_layer!r} is not allowed: it must be a dict of patterns and back ends"
            )
        self._choices  # noqa: B018

    @cached_property
    def own_steps(self) -> ChosenSteps:
        """The steps that run in the model's own attention."""
        return ChosenSteps.of(self, "own")

    @cached_property
    def _choices(self) -> dict[str, tuple[Backend, ...]]:
        """A setting in words -> the back ends that it names."""
        settings = {"backend": self.backend}
        if self.cross_backend is not None:
            settings["cross_backend"] = self.cross_backend
        for pattern, value in (self.per_layer or {}).items():
            settings[_entry(pattern)] = OWN if value is None else value
        return {title: backends_of(f"attention {title}", value) for title, value in settings.items()}

    @property
    def functions(self) -> list[Any]:
        """The back ends that are functions."""
        values = (self.backend, self.cross_backend, *(self.per_layer or {}).values())
        return [value for value in values if callable(value)]

    def choice(self, module: str, is_cross: bool) -> tuple[Backend, ...] | str:
        """The back ends for a call, or why it is to keep the model's own attention.

        Args:
            module: the dotted name of the module that calls.
            is_cross: whether queries and keys are projected from different values. It matters to `cross_backend` alone.
        """
        excluding = next((pattern for pattern in self.exclude if matches(module, pattern)), None)
        if excluding is not None:
            return f"excluded by {excluding!r}"
        pattern = first_match(module, self.per_layer or ())
        kind = "cross_backend" if is_cross and self.cross_backend is not None else "backend"
        title = _entry(pattern) if pattern is not None else kind
        return self._choices[title] or f"{title} is {OWN!r}"

    def check(self, modules: Sequence[str] | None) -> None:
        """Raise on a back end that does not run on this machine, or a pattern that matches no module.

        Args:
            modules: the dotted names of the model's modules; None if they are not known.
        """
        for title, backends in self._choices.items():
            check_machine(f"attention {title}", backends)
        if modules is not None:
            patterns = dict.fromkeys(self.exclude, "exclude") | dict.fromkeys(self.per_layer or (), "per_layer")
            check_patterns(patterns, modules, "modules")

    @property
    def is_by_step(self) -> bool:
        """Whether steps differ."""
        return bool(self.own_steps) or type(self).is_own is not AttentionConfig.is_own

    def structure(self) -> AttentionConfig:
        """The settings that shape the graph. Which steps differ is read at each call; whether some do shapes it."""
        return AttentionConfig(
            self.backend, self.cross_backend, self.exclude, self.per_layer, own_first_steps=int(self.is_by_step)
        )

    def is_own(self, facts: StepFacts) -> bool:
        """Whether a step that computes the middle runs it in the model's own attention. Pure, called once a step."""
        return self.own_steps.holds(facts)


def _entry(pattern: str) -> str:
    """An entry of `per_layer` in words."""
    return f"per_layer[{pattern!r}]"


def as_attention(value: Any) -> Any:
    """The config of a name, a function or a mapping of settings. Other values stay as they are."""
    if isinstance(value, Mapping):
        reject_unknown(value, dict.fromkeys(AttentionConfig.__dataclass_fields__, "cachedit_fx.AttentionConfig"))
        return AttentionConfig(**value)
    if isinstance(value, str) or (callable(value) and not isinstance(value, type)):
        return AttentionConfig(value)
    return value
