"""`quantize` and `dequantize`: everything is chosen, checked and tried before the first weight changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from cachedit_fx.config.patterns import patterns_of
from cachedit_fx.passes.graph_cost import bytes_of_tensors
from cachedit_fx.quantization.layers import Selection, linear_layers
from cachedit_fx.quantization.report import KeptLayer, QuantizationReport, QuantizedLayer, joined
from cachedit_fx.quantization.selection import (
    check_torchao,
    is_of_torchao,
    quantize_layers,
    request_of,
    selections_of,
    warned_notes,
)
from cachedit_fx.runtime.registry import states_of, unwrapped

Model = TypeVar("Model")
COMPONENTS = ("transformer",)
"""Of a pipeline, that are quantized by default."""


def quantize(
    pipe_or_module: Any,
    quant_type: Any,
    *,
    components: Sequence[str] = COMPONENTS,
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
    request = request_of(quant_type, exclude, include, per_layer, regional)
    modules = modules_of(pipe_or_module, components)
    selections = dict(zip(modules, selections_of(list(modules.values()), request), strict=True))
    with torch.no_grad():
        return joined([_apply(title, modules[title], selection) for title, selection in selections.items()])


def dequantize(pipe_or_module: Model, *, components: Sequence[str] = COMPONENTS) -> Model:
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
                _give(layer, nn.Parameter(_plain(layer.weight), requires_grad=False))
        if layers:
            start_anew(module)
    return pipe_or_module


@contextmanager
def quantized(pipe_or_module: Any, per_layer: Mapping[str, Any]) -> Iterator[QuantizationReport]:
    """Quantize the layers in `per_layer` until the block ends, which gives them their own weights back.

    Args:
        pipe_or_module, per_layer: as for `quantize`.
    """
    modules = modules_of(pipe_or_module, COMPONENTS).values()
    layers = [layer for module in modules for layer in linear_layers(module).values()]
    weights = [getattr(layer, "weight", None) for layer in layers]
    try:
        yield quantize(pipe_or_module, None, per_layer=per_layer)
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            if getattr(layer, "weight", None) is not weight:
                _give(layer, weight)
        for module in modules:
            start_anew(module)


def _give(layer: Any, weight: Any) -> None:
    layer.weight = weight
    vars(layer).pop("extra_repr", None)  # torchao's, with the kind


def modules_of(pipe_or_module: Any, components: Sequence[str]) -> dict[str, nn.Module]:
    """The modules by the prefix of their layers' names: "" for a module, `transformer.` for a component."""
    if isinstance(pipe_or_module, nn.Module):
        return {"": unwrapped(pipe_or_module)}
    parts = getattr(pipe_or_module, "components", None)
    if not isinstance(parts, dict):
        raise TypeError(f"expected a torch.nn.Module or a diffusers pipeline, not {type(pipe_or_module).__name__}")
    wanted = patterns_of("components", components)
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
        state.set_options(state.asked)


def bytes_of_layer(layer: Any) -> int:
    """Size of a layer's weight in bytes. All tensors count if the layer holds a packed weight under another name."""
    weight = getattr(layer, "weight", None)
    return bytes_of_tensors([weight] if isinstance(weight, torch.Tensor) else [*layer.parameters(), *layer.buffers()])


def _apply(title: str, module: nn.Module, selection: Selection) -> QuantizationReport:
    """Quantize the layers of a module; `title` comes before their names in the report."""
    layers = linear_layers(module)
    sizes = {name: bytes_of_layer(layers[name]) for name in selection.kinds}
    total = bytes_of_tensors([*module.parameters(), *module.buffers()])
    names = {
        kind: [name for name, each in selection.kinds.items() if each is kind] for kind in selection.kinds.values()
    }
    notes = warned_notes(module, selection)
    for kind in names:
        quantize_layers(module, {name: layers[name] for name in names[kind]}, kind)
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
        bytes_of_tensors([*module.parameters(), *module.buffers()]),
        tuple(notes),
    )


def _plain(weight: torch.Tensor) -> torch.Tensor:
    """The numbers that a quantized weight stands for. Kinds without such a method multiply the unit matrix."""
    if any("dequantize" in vars(base) for base in type(weight).__mro__ if base is not torch.Tensor):
        plain: torch.Tensor = weight.dequantize()
        return plain.to(weight.dtype)
    unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return torch.nn.functional.linear(unit, weight).T.contiguous()
