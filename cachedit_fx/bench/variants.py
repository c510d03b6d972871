"""Which variants of a model there are: each argument of its constructor and forward, changed alone.

    __init__(self, out_channels: int | None = None, qk_norm: str = "rms_norm", guidance_embeds: bool = False)
    forward(self, hidden_states, timestep, encoder_attention_mask: Tensor | None = None)
    ──► out_channels=4   qk_norm='layer_norm'   guidance_embeds=True   encoder_attention_mask given

Signatures, the model's configuration and its inputs say all. `changes_of` has the rules for values. A variant that the
class refuses is tried again with one more change: `guidance_embeds=True` needs a guidance.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

Inputs: TypeAlias = Callable[[int], dict[str, Any]]
Target: TypeAlias = Literal["config", "input"]


@dataclass(frozen=True)
class Change:
    """One argument with another value.

    Attributes:
        target: whether the constructor takes it, or the forward.
        is_guess: whether the value is taken from elsewhere, so that the class may not know it.
    """

    target: Target
    name: str
    value: Any = field(compare=False)
    label: str
    is_guess: bool = False


@dataclass(frozen=True)
class Variant:
    """A model with one argument changed, and with one more input changed if the class asks for that."""

    changes: tuple[Change, ...]

    @property
    def label(self) -> str:
        """The arguments as in a call."""
        return ", ".join(change.label for change in self.changes)

    def make(self, module: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
        """The variant of a module and of its inputs. Raises what the class raises."""
        config = {change.name: change.value for change in self.changes if change.target == "config"}
        values = {change.name: change.value for change in self.changes if change.target == "input"}
        return rebuilt(module, config) if config else module, lambda size: inputs(size) | values


def companions_of(module: nn.Module, inputs: Inputs, changes: Sequence[Change]) -> list[Change]:
    """Changes that may go with another one: each change, and each input left out that has None for its default."""
    values = inputs(1)
    omitted = [
        Change("input", parameter.name, None, f"{parameter.name}=None")
        for parameter in _parameters(module.forward)
        if parameter.default is None and values.get(parameter.name) is not None
    ]
    return list(dict.fromkeys([*changes, *omitted]))


VariantOutcome: TypeAlias = Literal["right", "uncached", "wrong", "refused", "unknown"]
RUN: tuple[VariantOutcome, ...] = ("right", "uncached", "wrong")
"""Outcomes of variants that the class itself runs."""


@dataclass(frozen=True)
class VariantResult:
    """What was seen of one variant.

    Attributes:
        label: the arguments as in a call.
        outcome: "refused" by the class itself, if the value is a guess "unknown" to it; else right and cached,
            "uncached" and right, or "wrong".
        reason: why it is not right and cached.
    """

    label: str
    outcome: VariantOutcome
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.label}: {self.reason or self.outcome}"


class Vocabulary:
    """The strings and numbers that the arguments of some models have, by name.

    A string argument is one of those that its name has anywhere: in a Literal, as a default, in a configuration.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._values: dict[str, dict[Any, None]] = {}
        for module in modules:
            for parameter in [*_parameters(type(module).__init__), *_parameters(module.forward)]:
                candidates = [parameter.default, config_of(module).get(parameter.name), *_literals(parameter)]
                values = self._values.setdefault(parameter.name, {})
                values |= dict.fromkeys(value for value in candidates if type(value) in (str, int, float))

    def values(self, name: str, kind: type) -> list[Any]:
        """The values of this type, in the order of the models."""
        return [value for value in self._values.get(name, {}) if type(value) is kind]


def config_of(module: nn.Module) -> dict[str, Any]:
    """The arguments that the module was made with; empty if it does not say."""
    config = getattr(module, "config", None)
    return dict(config) if isinstance(config, Mapping) else {}


def rebuilt(module: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Another module of the class with these arguments changed.

    Weights of equal names and shapes are the module's. All others are drawn, the same at every call: gates and
    projections that start at zero would make a block do nothing.
    """
    names = {parameter.name for parameter in _parameters(type(module).__init__)}
    arguments = {name: value for name, value in config_of(module).items() if name in names}
    weights = dict(module.named_parameters())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        result = type(module)(**arguments | dict(config)).eval()
        for name, parameter in result.named_parameters():
            if name in weights and weights[name].shape == parameter.shape:
                parameter.copy_(weights[name])
            elif parameter.dtype.is_floating_point:
                parameter.normal_(std=0.2)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Which values
# ---------------------------------------------------------------------------------------------------------------------


def changes_of(module: nn.Module, inputs: Inputs, vocabulary: Vocabulary) -> list[Change]:
    """Every change of one argument, by these rules.

    - A boolean is flipped.
    - A string with a Literal annotation becomes each other string of the annotation. Any other string becomes each
      other string that the vocabulary has for its name: a guess.
    - An argument becomes None if its annotation allows None. That is a guess unless None is the default, and the
      class's source asks whether the argument is None.
    - An argument that is None gets a value, a guess too. In a constructor, it is the value of its counterpart
      (`in_channels` for `out_channels`), or the first in the vocabulary. In a forward, a mask keeps all tokens of its
      stream but the last, a guidance or a timestep has the timestep's value, a dict is empty. If no rule gives a value,
      there is no change.
    """
    config, values, source = config_of(module), inputs(1), inspect.getsource(type(module))
    changes: list[Change] = []
    for parameter in _parameters(type(module).__init__):
        if parameter.name in config:
            value = config[parameter.name]
            changes += _changes(
                "config", parameter, value, vocabulary, source, lambda p: _setting(p, config, vocabulary)
            )
    for parameter in _parameters(module.forward):
        value = values.get(parameter.name, parameter.default)
        changes += _changes("input", parameter, value, vocabulary, source, lambda p: _input(p, values))
    return changes


def _changes(
    target: Target,
    parameter: inspect.Parameter,
    value: Any,
    vocabulary: Vocabulary,
    source: str,
    derive: Callable[[inspect.Parameter], Any],
) -> Iterator[Change]:
    name, literals = parameter.name, _literals(parameter)
    if isinstance(value, bool) or (value is None and _allows(parameter, bool)):
        others: list[Any] = [not value]
    elif isinstance(value, str) or (value is None and (literals or _allows(parameter, str))):
        others = [other for other in literals or vocabulary.values(name, str) if other != value]
    elif value is None:
        others = [derived] if (derived := derive(parameter)) is not None else []
    else:
        others = []
    for other in others:
        shown = f"{name} given" if isinstance(other, (Tensor, dict)) else f"{name}={other!r}"
        yield Change(target, name, other, shown, is_guess=not isinstance(other, bool) and not literals)
    if value is not None and _allows(parameter, type(None)):
        is_guess = parameter.default is not None or not re.search(rf"\b{name} is (not )?None", source)
        yield Change(target, name, None, f"{name}=None", is_guess)


def _setting(parameter: inspect.Parameter, config: Mapping[str, Any], vocabulary: Vocabulary) -> Any:
    """A value for a constructor's argument that is None; None if there is none."""
    counterpart = config.get(re.sub(r"(^|_)out_", r"\1in_", parameter.name))
    if isinstance(counterpart, int):
        return counterpart
    return next(iter([*vocabulary.values(parameter.name, int), *vocabulary.values(parameter.name, float)]), None)


def _input(parameter: inspect.Parameter, values: Mapping[str, Any]) -> Any:
    """A value for a forward's argument that is None; None if there is none."""
    name = parameter.name
    if _allows(parameter, dict):
        return {}
    if name.endswith(("mask", "masks")):
        stream = values.get(re.sub(r"(_hidden_states|_attention)?_?masks?$", "", name) + "_hidden_states")
        stream = values.get("hidden_states") if name in ("attention_mask", "hidden_states_mask") else stream
        if isinstance(stream, Tensor) and stream.dim() == 3:
            mask = torch.ones(stream.shape[:2], dtype=torch.long if "Long" in str(parameter.annotation) else torch.bool)
            mask[:, -1] = 0
            return mask
    timestep = values.get("timestep")
    if isinstance(timestep, Tensor) and (name == "guidance" or re.search(r"timestep(_r)?$", name)):
        return timestep.clone()
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Signatures
# ---------------------------------------------------------------------------------------------------------------------


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Named parameters with their annotations as objects, if these can be evaluated."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except (NameError, TypeError, AttributeError, SyntaxError):
        signature = inspect.signature(function)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter for parameter in signature.parameters.values() if parameter.kind in named]


def _members(annotation: Any) -> Iterator[Any]:
    """The members of a union, or the annotation itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _allows(parameter: inspect.Parameter, kind: type) -> bool:
    """Whether the annotation has this type, or a container of it, as a member."""
    return any((typing.get_origin(member) or member) is kind for member in _members(parameter.annotation))


def _literals(parameter: inspect.Parameter) -> Sequence[str]:
    """The strings of a Literal annotation."""
    members = (member for member in _members(parameter.annotation) if typing.get_origin(member) is Literal)
    return [value for member in members for value in typing.get_args(member) if isinstance(value, str)]
