"""`quantize` and `dequantize`: everything is chosen, checked and tried before the first weight changes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cachedit_fx.config.rules import FLAG, OptionError, check
from cachedit_fx.quantization.kinds import Kind, kind_of, kinds_for, warnings_about
from cachedit_fx.quantization.layers import (
    Request,
    Selection,
    check_patterns,
    linear_layers,
    quantization_of,
    select,
)
from cachedit_fx.quantization.report import KeptLayer, QuantizationReport, QuantizedLayer, joined
from cachedit_fx.runtime.host_tensor import HostWeight
from cachedit_fx.runtime.registry import states_of, unwrapped
from cachedit_fx.runtime.warning import warn

Model = TypeVar("Model")
TRIAL_ROWS = 32
"""Rows of the input that a layer is tried with on an accelerator, whose integer product takes no fewer than 17."""


def quantize(
    pipe_or_module: Any,
    quant_type: Any,
    *,
    components: Sequence[str] = ("transformer",),
    exclude: str | Sequence[str] = (),
    include: str | Sequence[str] = (),
    per_layer: Mapping[str, Any] | None = None,
    regional: bool = True,
) -> QuantizationReport:
    """Quantize linear layers in place by torchao, before or after `enable_cache`, and return a report.

    Chosen are the layers of the repeated blocks that work on tokens. Kept are embedders, modulations, norms, the first
    and last layers, layers of adapters (LoRA), and layers that the kind does not fit. The report lists all of them.
    Layers that bitsandbytes, GGUF or Nunchaku quantized stay as they are.

    A pattern is a part of a layer's name between dots, such as `attn.to_q` or `blocks.0`; `*` stands for anything.

    Args:
        pipe_or_module: a pipeline, a module, or what `torch.compile` returned for a module.
        quant_type: name of a kind, such as "int8" or "float8_weight_only", or a configuration of torchao. None
            quantizes the layers in `per_layer` alone.
        components: of a pipeline; "transformer" stands for `transformer_2` too. No effect on a module.
        exclude: patterns of layers that are kept.
        include: patterns of layers that are quantized though the default choice keeps them.
        per_layer: pattern -> kind, in place of `quant_type`; None keeps the layers. A layer's whole name comes first,
            and also takes in a layer that the default choice keeps. Then the first pattern that matches holds.
        regional: choose in the repeated blocks alone. False also takes layers outside, but not first and last ones.

    Raises:
        OptionError: before a weight changes, on an unknown kind or pattern, a kind that this device does not run, or if
            no layer is left to quantize. The words name what would work.
        TypeError: if the argument is neither a module nor a pipeline with these components.
        ImportError: if torchao is not installed.
    """
    check_torchao()
    check("regional", regional, FLAG)
    plan = {pattern: None if value is None else kind_of(value, "per_layer") for pattern, value in _plan(per_layer)}
    if quant_type is None and not plan:
        raise OptionError("quant_type=None quantizes the layers in per_layer alone, and per_layer is empty")
    kind = None if quant_type is None else kind_of(quant_type)
    request = Request(kind, _patterns("exclude", exclude), _patterns("include", include), plan, regional)
    modules = modules_of(pipe_or_module, components)
    for module in modules.values():
        _check_device(module, [each for each in (kind, *plan.values()) if each is not None])
    check_patterns(request, {name for module in modules.values() for name in linear_layers(module)})
    selections = {title: _checked(module, request) for title, module in modules.items()}
    _check_any(modules, selections)
    with torch.no_grad():
        return joined([_apply(title, modules[title], selection) for title, selection in selections.items()])


def dequantize(pipe_or_module: Model, *, components: Sequence[str] = ("transformer",)) -> Model:
    """Give layers that torchao quantized plain weights again, and return the argument.

    The weights have the rounding of their quantization, and `requires_grad=False`. Other layers stay as they are.

    Args:
        pipe_or_module: as for `quantize`.
        components: of a pipeline; "transformer" stands for `transformer_2` too.
    """
    for module in modules_of(pipe_or_module, components).values():
        layers = [layer for layer in linear_layers(module).values() if is_of_torchao(layer)]
        with torch.no_grad():
            for layer in layers:
                layer.weight = nn.Parameter(_plain(layer.weight), requires_grad=False)
                vars(layer).pop("extra_repr", None)  # torchao's, with the kind
        if layers:
            start_anew(module)
    return pipe_or_module


def is_tensor_of_torchao(tensor: Any) -> bool:
    """Whether a tensor is one that torchao quantized."""
    return type(tensor).__module__.startswith("torchao.")


def is_of_torchao(layer: nn.Module) -> bool:
    """Whether torchao quantized the layer's weight."""
    return is_tensor_of_torchao(getattr(layer, "weight", None))


def modules_of(pipe_or_module: Any, components: Sequence[str]) -> dict[str, nn.Module]:
    """The modules by the prefix of their layers' names: "" for a module, `transformer.` for a component."""
    if isinstance(pipe_or_module, nn.Module):
        return {"": unwrapped(pipe_or_module)}
    parts = getattr(pipe_or_module, "components", None)
    if not isinstance(parts, dict):
        raise TypeError(f"expected a torch.nn.Module or a diffusers pipeline, not {type(pipe_or_module).__name__}")
    wanted = _patterns("components", components)
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    families = {name: name.rstrip("0123456789").removesuffix("_") for name in modules}
    missing = [name for name in wanted if name not in {*families, *families.values()}]
    if missing or not wanted:
        raise TypeError(
            f"components={components!r}: {type(pipe_or_module).__name__} has no such module; it has "
            f"{', '.join(modules)}"
        )
    chosen = {name: unwrapped(part) for name, part in modules.items() if name in wanted or families[name] in wanted}
    first = {id(part): name for name, part in reversed(chosen.items())}
    return {f"{name}.": part for name, part in chosen.items() if first[id(part)] == name}


def start_anew(module: nn.Module) -> None:
    """Let the next call of every session start a generation: stored values are those of other weights."""
    for state in states_of(module):
        state.set_options(state.options)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Size of tensors in bytes, the parts of quantized ones counted."""
    return sum(_bytes_of(tensor) for tensor in tensors)


def _bytes_of(tensor: torch.Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor):
        return bytes_of(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def check_torchao() -> None:
    """Raise, with the command that installs it, if torchao is missing."""
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise ImportError("quantize needs torchao: pip install 'cachedit-fx[quantization]'") from error


def _plan(per_layer: Any) -> Iterable[tuple[str, Any]]:
    if per_layer is None:
        return ()
    if not isinstance(per_layer, Mapping) or not all(isinstance(pattern, str) for pattern in per_layer):
        raise OptionError(f"per_layer={per_layer!r} is not allowed: it must be a dict of patterns and kinds")
    return per_layer.items()


def _patterns(title: str, values: Any) -> tuple[str, ...]:
    values = (values,) if isinstance(values, str) else values
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) for value in values):
        raise OptionError(f"{title}={values!r} is not allowed: it must be a name or a list of names")
    return tuple(values)


def reject_host_weights(module: nn.Module) -> None:
    """Raise if weights of the module wait on the host, where a tensor of another class stands in for them."""
    if any(isinstance(weight, HostWeight) for weight in module.parameters()):
        raise OptionError(
            f"{type(module).__name__} has weights that wait on the host (time_weights='host'): quantize or load it "
            "before enable_cache, or after disable_cache"
        )


def _check_device(module: nn.Module, kinds: Iterable[Kind]) -> None:
    """Raise if a kind does not run on a device of the module's weights."""
    reject_host_weights(module)
    devices = dict.fromkeys(weight.device for weight in module.parameters() if not weight.is_meta)
    for kind, device in itertools.product(kinds, devices):
        lack = kind.lack(device)
        if lack is not None:
            raise OptionError(f"quant_type={kind.name!r} does not run here: {lack}; {kinds_for(device)}")


def _checked(module: nn.Module, request: Request) -> Selection:
    """The layers of a module, after a trial of each shape. Shapes that torchao does not take are among those kept."""
    selection = select(module, request)
    layers = linear_layers(module)
    obstacles: dict[Any, str | None] = {}
    refused: dict[str, str] = {}
    for name, kind in selection.kinds.items():
        weight = layers[name].weight
        case = kind, weight.shape, weight.dtype, weight.device
        if case not in obstacles:
            obstacles[case] = _try(layers[name], kind)
        reason = obstacles[case]
        if reason is not None:
            refused[name] = reason
    for kind in {selection.kinds[name] for name in refused}:
        names = [name for name, each in selection.kinds.items() if each is kind]
        if all(name in refused for name in names):
            device = layers[names[0]].weight.device
            raise OptionError(f"quant_type={kind.name!r}: {refused[names[0]]}; {kinds_for(device)}")
    kinds = {name: kind for name, kind in selection.kinds.items() if name not in refused}
    return Selection(kinds, {**selection.kept, **refused}, selection.quantized)


def _try(layer: Any, kind: Kind) -> str | None:
    """Why torchao does not quantize and run a layer of this shape here; None if it does. A copy is tried."""
    from torchao.quantization import quantize_

    weight = layer.weight
    copy = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    copy.weight = nn.Parameter(weight.detach(), requires_grad=False)
    shell = nn.Sequential(copy)
    rows = 1 if weight.device.type == "cpu" else TRIAL_ROWS
    try:
        with torch.no_grad():
            quantize_(shell, kind.config(), filter_fn=lambda module, _: module is copy)
            shell(torch.ones(rows, layer.in_features, dtype=weight.dtype, device=weight.device))
    except Exception as error:  # whatever a kernel raises on hardware that it is not made for
        words = str(error).strip().splitlines() or [type(error).__name__]
        return f"torchao does not take it here: {words[0]}"
    return None if quantization_of(shell[0]) else "torchao leaves a layer of this shape as it is"


def _check_any(modules: Mapping[str, nn.Module], selections: Mapping[str, Selection]) -> None:
    """Raise if no layer is quantized, unless another library quantized the modules."""
    if any(selection.kinds for selection in selections.values()):
        return
    quantized = [
        modules[title].get_submodule(name) for title, selection in selections.items() for name in selection.quantized
    ]
    titles = ", ".join(type(module).__name__ for module in modules.values())
    if any(is_of_torchao(layer) for layer in quantized):
        raise OptionError(
            f"{titles}: {len(quantized)} layers are quantized already, and no other is to be quantized; call "
            "dequantize first, or name further layers by include"
        )
    if quantized:
        return
    counts = Counter(reason for selection in selections.values() for reason in selection.kept.values())
    reasons = "; ".join(f"{count} x {reason}" for reason, count in counts.items()) or "it has no linear layer"
    raise OptionError(
        f"{titles}: nothing to quantize: {reasons}. Name layers by include, or pass regional=False for layers outside "
        "repeated blocks"
    )


def bytes_of_layer(layer: Any) -> int:
    """Size of a layer's weight in bytes. All tensors count if the layer holds a packed weight under another name."""
    weight = getattr(layer, "weight", None)
    return bytes_of([weight] if isinstance(weight, torch.Tensor) else [*layer.parameters(), *layer.buffers()])


def _apply(title: str, module: nn.Module, selection: Selection) -> QuantizationReport:
    """Quantize the layers of a module; `title` comes before their names in the report."""
    from torchao.quantization import quantize_

    layers = linear_layers(module)
    weights = {name: layers[name].weight for name in selection.kinds}
    sizes = {name: bytes_of_layer(layers[name]) for name in weights}
    total = bytes_of([*module.parameters(), *module.buffers()])
    names = {
        kind: [name for name, each in selection.kinds.items() if each is kind] for kind in selection.kinds.values()
    }
    notes = [note for kind in names for note in warnings_about(kind, [weights[name] for name in names[kind]])]
    for note in notes:
        warn(f"{type(module).__name__}: {note}")
    del weights  # each is freed when its layer gets another
    for kind in names:
        quantize_(module, kind.config(), filter_fn=lambda _, name, chosen={*names[kind]}: name in chosen)
    if selection.kinds:
        start_anew(module)
    return QuantizationReport(
        type(module).__name__,
        tuple(
            QuantizedLayer(
                title + name, kind.name, layers[name].weight.shape, sizes[name], bytes_of_layer(layers[name])
            )
            for name, kind in selection.kinds.items()
        ),
        tuple(KeptLayer(title + name, reason, bytes_of_layer(layers[name])) for name, reason in selection.kept.items()),
        total,
        bytes_of([*module.parameters(), *module.buffers()]),
        tuple(notes),
    )


def _plain(weight: torch.Tensor) -> torch.Tensor:
    """The numbers that a quantized weight stands for. Kinds without such a method multiply the unit matrix."""
    if any("dequantize" in vars(base) for base in type(weight).__mro__ if base is not torch.Tensor):
        plain: torch.Tensor = weight.dequantize()
        return plain.to(weight.dtype)
    unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return torch.nn.functional.linear(unit, weight).T.contiguous()
