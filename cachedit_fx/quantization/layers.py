"""Which linear layers of a module are quantized: those of its repeated blocks that work on tokens.

blocks.0.attn.to_q      -> quantized
blocks.0.norm1.linear   -> kept: its name says that it steers the block (adaLN), from one row a sample
proj_out                -> kept: outside the blocks

No model is named. Blocks are found by structure, as numbered members of a container that repeat themselves.
"""

from __future__ import annotations

import os.path
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cachedit_fx.config.patterns import first_match, matches
from cachedit_fx.quantization.kinds import Kind

STEERING = frozenset(
    [
        "ada",
        "adaln",
        "emb",
        "embed",
        "embedder",
        "embedding",
        "embeddings",
        "guidance",
        "mod",
        "modulate",
        "modulation",
        "norm",
        "router",
        "scale",
        "shift",
        "temb",
        "time",
        "timestep",
    ]
)
"""Words in the names of layers that work on a timestep, a pooled text or an expert's choice, and not on tokens."""
ENDS = frozenset(["final", "head", "in", "input", "out", "output", "patch"])
"""Words in the names of the first and last layers, outside the blocks."""
OUTSIDE = "outside the repeated blocks"
PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class Request:
    """The layers that a caller asks for.

    Attributes:
        kind: of every layer that `per_layer` does not name; None if no other layer is quantized.
        exclude: patterns of layers that are kept.
        include: patterns of layers that are quantized though the default choice leaves them out.
        per_layer: pattern -> the layers' kind; None keeps them. A layer's whole name comes first, and also takes in a
            layer that the default choice leaves out. Then the first pattern that matches holds.
        regional: whether only layers in the repeated blocks are taken.
    """

    kind: Kind | None
    exclude: Sequence[str] = ()
    include: Sequence[str] = ()
    per_layer: Mapping[str, Kind | None] = field(default_factory=dict)
    regional: bool = True

    @property
    def patterns(self) -> dict[str, str]:
        """Every pattern -> the argument that it is from."""
        sources: dict[str, Any] = {"exclude": self.exclude, "include": self.include, "per_layer": self.per_layer}
        return {pattern: title for title, patterns in sources.items() for pattern in patterns}


@dataclass(frozen=True)
class Selection:
    """The layers of one module.

    Attributes:
        kinds: name of a layer that is to be quantized -> its kind.
        kept: name of any other linear layer -> the reason.
        quantized: names of those among `kept` that are quantized already.
    """

    kinds: Mapping[str, Kind]
    kept: Mapping[str, str]
    quantized: frozenset[str]


def select(module: nn.Module, request: Request) -> Selection:
    """Choose the layers of a module."""
    blocks = blocks_of(module)
    kinds: dict[str, Kind] = {}
    kept: dict[str, str] = {}
    layers = linear_layers(module)
    for name, layer in layers.items():
        reason = _obstacle(module, name, layer) or _left_out(name, blocks, request)
        kind = _kind_of(name, request)
        if reason is None and kind is not None:
            reason = kind.misfit(layer.weight)
        if reason is not None:
            kept[name] = reason
        elif kind is None:
            kept[name] = "per_layer names no kind for it"
        else:
            kinds[name] = kind
    return Selection(kinds, kept, frozenset(name for name, layer in layers.items() if quantization_of(layer)))


def linear_layers(module: nn.Module) -> dict[str, Any]:
    """The linear layers of a module by name, those of other libraries' classes too."""
    return {name: child for name, child in module.named_modules() if _is_linear(child)}


def _is_linear(module: nn.Module) -> bool:
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return all(isinstance(size, int) for size in sizes) and not module._modules


def quantization_of(layer: nn.Module) -> str | None:
    """The class that holds a layer's quantized weight; None if the weight is a plain one."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return type(layer).__name__  # such as Nunchaku's, with a packed weight under another name
    for tensor in (weight, weight.data):
        if type(tensor) not in (nn.Parameter, torch.Tensor):
            classes = (base for base in type(tensor).__mro__ if not base.__module__.startswith(PACKAGE))
            return next(classes).__name__  # torchao's, if ours is derived from it
    return None if weight.is_floating_point() else type(layer).__name__


def blocks_of(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's repeated blocks: numbered members of a container, with two linear layers or more.

    Blocks within blocks are not listed. A member counts if one of the next two has its class.
    """
    return tuple(_blocks_below(module, ""))


def groups_of(module: nn.Module, names: Iterable[str]) -> dict[tuple[str, str], tuple[str, ...]]:
    """Layers in blocks by (block, part), such as ("blocks.0", "attn") or ("blocks.0", "ff").

    A part is what the block itself is made of: the first part of a name below the block that not all its layers share.

    Args:
        module: has the blocks.
        names: of the layers; those outside the blocks are left out.
    """
    names = list(names)
    groups: dict[tuple[str, str], tuple[str, ...]] = {}
    for block in blocks_of(module):
        inside = {name: name.removeprefix(f"{block}.").split(".") for name in names if name.startswith(f"{block}.")}
        depth = len(os.path.commonprefix([*inside.values()])) + 1
        for name, parts in inside.items():
            group = block, ".".join(parts[:depth])
            groups[group] = (*groups.get(group, ()), name)
    return groups


def _blocks_below(module: nn.Module, prefix: str) -> Iterator[str]:
    families: dict[str, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, child in module.named_children():
        numbered = re.fullmatch(r"(.*?)\d+", name)
        families[numbered[1] if numbered else f"{name}#"].append((name, child))
    for members in families.values():
        if _repeats_itself([child for _, child in members]):
            yield from (f"{prefix}{name}" for name, _ in members)
        else:
            for name, child in members:
                yield from _blocks_below(child, f"{prefix}{name}.")


def _repeats_itself(members: Sequence[nn.Module]) -> bool:
    if any(len(linear_layers(member)) < 2 for member in members):
        return False
    return any(
        type(member) is type(other)
        for distance in (1, 2)
        for member, other in zip(members, members[distance:], strict=False)
    )


def _obstacle(module: nn.Module, name: str, layer: Any) -> str | None:
    """Why a layer cannot be quantized, whatever the caller asks for."""
    *path, last = name.split(".")
    owners = [module.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1)]
    for owner, child in zip(owners, [*path, last], strict=True):
        if "base_layer" in owner._modules and child != "base_layer":
            return "a layer of an adapter (LoRA)"
    quantization = quantization_of(layer)
    if quantization is not None:
        return f"quantized already ({quantization})"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "torch.nn.MultiheadAttention reads its weight"
    if "weight" not in layer._parameters:
        return "its weight is no parameter, but a buffer or a hook's result"
    if layer.weight.dim() != 2:
        return f"its weight is no matrix, but has {layer.weight.dim()} dimensions"
    if layer.weight.is_meta:
        return "its weight is on the device 'meta': quantize before offloading"
    return None


def _left_out(name: str, blocks: Sequence[str], request: Request) -> str | None:
    """Why the caller, or the default choice, keeps a layer."""
    excluding = next((pattern for pattern in request.exclude if matches(name, pattern)), None)
    if excluding is not None:
        return f"excluded by {excluding!r}"
    planned = first_match(name, request.per_layer)
    if planned is not None and request.per_layer[planned] is None:
        return f"kept by {'its name' if planned == name else repr(planned)} in per_layer"
    if planned == name or any(matches(name, pattern) for pattern in request.include):
        return None
    is_inside = any(name.startswith(f"{block}.") for block in blocks)
    if request.regional and not is_inside:
        return OUTSIDE
    parts = name.split(".")
    steering = next((part for part in parts if part == "gate" or _words(part) & STEERING), None)
    if steering is not None:
        return f"{steering!r}: it steers, and works on no tokens"
    end = next((part for part in parts if not is_inside and _words(part) & ENDS), None)
    return None if end is None else f"{end!r}: a first or last layer"


def _words(part: str) -> set[str]:
    """The words of a name: `adaLN_modulation` -> ada, ln, modulation."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)}


def _kind_of(name: str, request: Request) -> Kind | None:
    pattern = first_match(name, request.per_layer)
    return request.kind if pattern is None else request.per_layer[pattern]
