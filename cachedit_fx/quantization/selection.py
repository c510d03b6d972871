"""Turns a caller's words into the layers that are quantized: checked and tried before a weight changes.

quant_type, exclude, include, per_layer ──► Request ──► layers.select ──► a trial of each shape ──► Selection
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cachedit_fx.config.patterns import check_patterns, patterns_of
from cachedit_fx.config.rules import FLAG, OptionError, check
from cachedit_fx.quantization.kinds import Kind, kind_of, kinds_for, warnings_about
from cachedit_fx.quantization.layers import Request, Selection, linear_layers, quantization_of, select
from cachedit_fx.runtime.host_tensor import HostWeight
from cachedit_fx.runtime.warning import warn

TRIAL_ROWS = 32
"""Rows of the input that a layer is tried with on an accelerator, whose integer product takes no fewer than 17."""


def request_of(
    quant_type: Any,
    exclude: str | Sequence[str] = (),
    include: str | Sequence[str] = (),
    per_layer: Mapping[str, Any] | None = None,
    regional: bool = True,
) -> Request:
    """The layers that a caller asks for, in the words of `cachedit_fx.quantize`.

    Raises:
        OptionError: on an unknown kind, or a value that is not allowed.
    """
    check("regional", regional, FLAG)
    plan = {pattern: None if value is None else kind_of(value, "per_layer") for pattern, value in _plan(per_layer)}
    if quant_type is None and not plan:
        raise OptionError("quant_type=None quantizes the layers in per_layer alone, and per_layer is empty")
    kind = None if quant_type is None else kind_of(quant_type)
    return Request(kind, patterns_of("exclude", exclude), patterns_of("include", include), plan, regional)


def selections_of(modules: Sequence[nn.Module], request: Request) -> list[Selection]:
    """The layers of each module. Every class and shape was tried on a copy of one layer.

    Raises:
        OptionError: on a pattern that matches no layer, a kind that this device does not run, or if there is no layer
            to quantize in any of the modules.
    """
    for module in modules:
        _check_device(module, [each for each in (request.kind, *request.per_layer.values()) if each is not None])
    names = {name for module in modules for name in linear_layers(module)}
    check_patterns(request.patterns, names, "linear layers")
    selections = [_checked(module, request) for module in modules]
    _check_any(modules, selections)
    return selections


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
    """The layers of a module, after a trial of each class and shape. Those that torchao does not take are kept."""
    selection = select(module, request)
    layers = linear_layers(module)
    obstacles: dict[Any, str | None] = {}
    refused: dict[str, str] = {}
    for name, kind in selection.kinds.items():
        weight = layers[name].weight
        case = kind, type(layers[name]), weight.shape, weight.dtype, weight.device
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
    """Why torchao does not quantize and run a layer of this class and shape here; None if it does. A copy is tried."""
    weight = layer.weight
    rows = 1 if weight.device.type == "cpu" else TRIAL_ROWS
    trouble = "torchao does not take it here"
    try:
        with torch.no_grad():
            quantized = quantized_layer(weight, kind)
            tokens = torch.ones(rows, layer.in_features, dtype=weight.dtype, device=weight.device)
            quantized(tokens)
            trouble = f"its class {type(layer).__name__} does not run with a quantized weight"
            twin = copy.copy(layer)
            twin._parameters = {**layer._parameters, "weight": quantized.weight}
            # The class's own code: the instance may hold a hook's, which would run on the layer itself.
            type(layer).forward(twin, tokens)
    except Exception as error:  # whatever a kernel raises on hardware that it is not made for
        words = str(error).strip().splitlines() or [type(error).__name__]
        return f"{trouble}: {words[0]}"
    return None if quantization_of(quantized) else "torchao leaves a layer of this shape as it is"


def quantized_layer(weight: torch.Tensor, kind: Kind) -> nn.Linear:
    """A linear layer without bias, whose weight is a quantized copy of one of shape [output, input features]."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    quantize_layers(nn.Sequential(layer), {"0": layer}, kind)
    return layer


def quantize_layers(module: nn.Module, layers: Mapping[str, Any], kind: Kind) -> None:
    """Give layers of a module, by their names, quantized weights in place."""
    from torchao.quantization import quantize_

    from cachedit_fx.quantization.torchao_int8 import with_sums

    quantize_(module, kind.config(), filter_fn=lambda _, name: name in layers)
    for layer in layers.values():
        weight = layer.weight.data
        summed = with_sums(weight)
        if summed is not weight:
            layer.weight = nn.Parameter(summed, requires_grad=False)


def warned_notes(module: nn.Module, selection: Selection) -> list[str]:
    """What the kinds cost the module's layers, a sentence each. The user is warned of each."""
    layers = linear_layers(module)
    weights: dict[Kind, list[torch.Tensor]] = defaultdict(list)
    for name, kind in selection.kinds.items():
        weights[kind].append(layers[name].weight)
    notes = [note for kind, chosen in weights.items() for note in warnings_about(kind, chosen)]
    for note in notes:
        warn(f"{type(module).__name__}: {note}")
    return notes


def _check_any(modules: Sequence[nn.Module], selections: Sequence[Selection]) -> None:
    """Raise if no layer is quantized, unless another library quantized the modules."""
    if any(selection.kinds for selection in selections):
        return
    quantized = [
        module.get_submodule(name)
        for module, selection in zip(modules, selections, strict=True)
        for name in selection.quantized
    ]
    titles = ", ".join(type(module).__name__ for module in modules)
    if any(is_of_torchao(layer) for layer in quantized):
        raise OptionError(
            f"{titles}: {len(quantized)} layers are quantized already, and no other is to be quantized; call "
            "dequantize first, or name further layers by include"
        )
    if quantized:
        return
    counts = Counter(reason for selection in selections for reason in selection.kept.values())
    reasons = "; ".join(f"{count} x {reason}" for reason, count in counts.items()) or "it has no linear layer"
    raise OptionError(
        f"{titles}: nothing to quantize: {reasons}. Name layers by include; quantize also takes regional=False, for "
        "layers outside repeated blocks"
    )


def is_tensor_of_torchao(tensor: Any) -> bool:
    """Whether a tensor is one that torchao quantized."""
    return any(base.__module__.startswith("torchao.") for base in type(tensor).__mro__)


def is_of_torchao(layer: nn.Module) -> bool:
    """Whether torchao quantized the layer's weight."""
    return is_tensor_of_torchao(getattr(layer, "weight", None))
