"""`quantize` under cache-dit's names, by that of `cachedit_fx`. cache-dit's rules choose the layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Self, TypeVar

import torch

from cachedit_fx.compat.kept import keep
from cachedit_fx.compat.members import member_of
from cachedit_fx.compat.ours import check_ours, reject_other_package
from cachedit_fx.config.rules import (
    FLAG,
    Rule,
    check,
    check_fields,
    choice,
    optional,
    reject_unknown,
    setting,
)
from cachedit_fx.quantization.apply import quantize as quantize_layers
from cachedit_fx.quantization.layers import linear_layers, quantization_of
from cachedit_fx.runtime.registry import unwrapped
from cachedit_fx.runtime.warning import SettingWarning, warn

Module = TypeVar("Module", bound=torch.nn.Module)

_ALIASES = {"float8": "float8_per_row", "int8": "int8_per_row"}
_TYPES = (
    "float8_per_row",
    "float8_per_tensor",
    "float8_per_block",
    "float8_weight_only",
    "int8_per_row",
    "int8_per_tensor",
    "int8_weight_only",
    "int4",
    "int4_weight_only",
    "nvfp4",
)
_ABSENT = "svdq"


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


_NAMES = Rule(_are_names, "a list of names")
_FUNCTION = Rule(callable, "a function")
_PLAN = Rule(
    lambda value: isinstance(value, dict) and _are_names([*value, *value.values()]), "a dict of names and types"
)
_COMPONENTS = Rule(
    lambda value: (
        _are_names([*value]) and all(isinstance(more, dict | None) for more in value.values())
        if isinstance(value, dict)
        else _are_names(value)
    ),
    "a list of names, or a dict of names and fields",
)


class QuantizeBackend(Enum):
    """The library that quantizes. There is torchao."""

    AUTO = "AUTO"
    TORCHAO = "TORCHAO"
    CACHE_DIT = "CACHE_DIT"
    NONE = "NONE"

    @classmethod
    def from_str(cls, name: str) -> QuantizeBackend:
        """The backend of a name in any case; "ao" is torchao.

        Raises:
            OptionError: on an unknown name.
        """
        return member_of(cls, name, {"ao": cls.TORCHAO, "cache-dit": cls.CACHE_DIT, "cachedit": cls.CACHE_DIT})


@dataclass
class QuantizeConfig:
    """Which linear layers are quantized, and how.

    `quant_type` is "float8" (dynamic, a scale per row), "float8_per_tensor", "float8_per_block", "float8_weight_only",
    "int8", "int8_per_tensor", "int8_weight_only", "int4", "int4_weight_only" or "nvfp4".

    Raises:
        OptionError: on an unknown type or backend.
        NotImplementedError: for SVDQuant.
    """

    backend: QuantizeBackend | str = setting(QuantizeBackend.AUTO, Rule(lambda _: True, "a backend"))
    quant_type: str = setting("float8_per_row", choice(*_TYPES))
    exclude_layers: list[str] | None = field(
        default_factory=lambda: ["embedder", "embed", "modulation", "mod"], metadata={"rule": optional(_NAMES)}
    )
    """Layers with one of these in their name stay as they are."""
    regional_quantize: bool = setting(True, FLAG)
    """Only layers inside the module's repeated blocks, if it names such: `_repeated_blocks`, or `repeated_blocks`."""
    repeated_blocks: list[str] = field(default_factory=list, metadata={"rule": optional(_NAMES)})
    filter_fn: Callable[[torch.nn.Module, str], bool] | None = setting(None, optional(_FUNCTION))
    """Whether a module of this name is quantized; in place of `exclude_layers`."""
    components_to_quantize: list[str] | dict[str, dict[str, Any]] | None = setting(None, optional(_COMPONENTS))
    """Components of the pipeline, for `enable_cache`; None = the transformers. A dict has fields of each component."""
    per_tensor_fallback: bool = setting(True, FLAG)
    """Has no effect: a layer that the type does not fit stays as it is."""
    precision_plan: dict[str, str] | None = setting(None, optional(_PLAN))
    """Part of a layer's name -> its type, in place of `quant_type`."""
    calibrate_fn: Any = setting(None, optional(_FUNCTION))
    serialize_to: str | None = setting(None, optional(Rule(lambda value: isinstance(value, str), "a path")))
    svdq_kwargs: dict[str, Any] | None = setting(None, optional(Rule(lambda value: isinstance(value, dict), "a dict")))
    verbose: bool = setting(False, FLAG)

    def __post_init__(self) -> None:
        if not isinstance(self.backend, QuantizeBackend):
            self.backend = QuantizeBackend.from_str(str(self.backend))
        for name in ("exclude_layers", "repeated_blocks", "components_to_quantize"):
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else value)
        self.quant_type = _checked(self.quant_type)
        check_fields(self)
        if self.backend is QuantizeBackend.CACHE_DIT or self.svdq_kwargs is not None:
            raise NotImplementedError(_not_there("SVDQuant"))
        for name in (self.precision_plan or {}).values():
            _checked(name, "precision_plan")

    def update(self, **values: Any) -> Self:
        """Set those of `values` that are not None, and return this config."""
        _reject_unknown(values)
        for name, value in values.items():
            if value is not None:
                setattr(self, name, value)
        self.__post_init__()
        return self

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dict."""
        return dataclasses.asdict(self)

    def strify(self) -> str:
        """A short name for logs and files: the type, or "<component:type>" for each component with fields."""
        if not isinstance(self.components_to_quantize, dict):
            return self.quant_type
        return "".join(f"<{name}:{config.quant_type}>" for name, config in self.by_component().items())

    def by_component(self) -> dict[str, QuantizeConfig]:
        """A config for each component in `components_to_quantize`."""
        components = self.components_to_quantize or []
        changes = components if isinstance(components, dict) else dict.fromkeys(components)
        for more in changes.values():
            _reject_unknown(more or ())
        return {name: replace(self, components_to_quantize=None, **(more or {})) for name, more in changes.items()}


def quantize(module: Module, quantize_config: QuantizeConfig | None = None, **settings: Any) -> Module:
    """Quantize the linear layers of a module in place, and return it. Its cache stays enabled.

    Args:
        module: a transformer, a text encoder, or what `torch.compile` returned for it.
        quantize_config: or its fields as keywords, such as `quant_type="float8_weight_only"`.

    Raises:
        OptionError: before a weight changes, on an unknown type, or one that this device does not run.
        NotImplementedError: for SVDQuant, before a weight changes.
    """
    _reject_unknown(settings)
    check_ours("quantize_config", quantize_config, "QuantizeConfig", QuantizeConfig)
    reject_other_package(module)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module such as pipe.transformer, not {type(module).__name__}")
    config = QuantizeConfig(**settings) if quantize_config is None else replace(quantize_config, **settings)
    inner = unwrapped(module)
    plan = {name: _own_kind(_type_of(name, config), inner) for name in _layers(inner, config)}
    quantized = [name for name in plan if quantization_of(inner.get_submodule(name))]
    if quantized:
        warn(f"{len(quantized)} layers are quantized already, and stay as they are", SettingWarning)
    if len(quantized) < len(plan):
        quantize_layers(inner, None, per_layer=plan)
    if len(quantized) < len(plan) or not plan:
        keep(module, quantize_config=config)
    return module


def load(module: torch.nn.Module, quantize_config_or_path: Any) -> torch.nn.Module:
    """cache-dit's loader of SVDQuant checkpoints, which there are none of here.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(_not_there("load(...) of a SVDQuant checkpoint"))


def _reject_unknown(names: Iterable[str]) -> None:
    reject_unknown(names, dict.fromkeys(QuantizeConfig.__dataclass_fields__, "compat.QuantizeConfig"))


def _checked(kind: str, title: str = "quant_type") -> str:
    """The type by its longer name, if there is such."""
    kind = _ALIASES.get(str(kind).lower(), str(kind).lower())
    if kind.startswith(_ABSENT):
        raise NotImplementedError(_not_there(f"{title}={kind!r}"))
    check(title, kind, choice(*_TYPES, *_ALIASES))
    return kind


def _not_there(name: str) -> str:
    return f"{name}: cachedit_fx has no kernels for it; these types work: {', '.join(_TYPES)}"


def _layers(module: torch.nn.Module, config: QuantizeConfig) -> Iterable[str]:
    """Names of the linear layers that are quantized."""
    kinds = config.repeated_blocks or getattr(module, "_repeated_blocks", None) or []
    names = [name for name, child in module.named_modules() if type(child).__name__ in kinds]
    blocks = tuple(f"{name}." for name in names)
    is_regional = config.regional_quantize and bool(kinds)
    for name, child in linear_layers(module).items():
        if is_regional and not name.startswith(blocks):
            continue
        if config.filter_fn is not None:
            if config.filter_fn(child, name):
                yield name
        elif not any(part in name for part in config.exclude_layers or ()):
            yield name


def _type_of(name: str, config: QuantizeConfig) -> str:
    plan = config.precision_plan or {}
    return next((_checked(kind) for part, kind in plan.items() if part in name), config.quant_type)


def _own_kind(quant_type: str, module: torch.nn.Module) -> str:
    """The kind of `cachedit_fx.quantize`: a stand-in for int4 with activations in int8, and for int4 without a GPU."""
    on_gpu = any(parameter.is_cuda for parameter in module.parameters())
    if quant_type == "int4" or (quant_type == "int4_weight_only" and not on_gpu):
        return f"{quant_type}_emulated"
    return quant_type
