"""`save_quantized` and `load_quantized`: a module's weights as safetensors, and what they mean as JSON. No pickle.

weights.safetensors   plain tensors, and the parts of quantized ones (`blocks.0.up._weight_qdata`, `..._scale`)
quantization.json     versions, the class, the quantized tensors' types and settings, and names that share a tensor

Both files hold one key, so that files of two saves are not taken for one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cachedit_fx.config.rules import OptionError
from cachedit_fx.quantization.apply import start_anew
from cachedit_fx.quantization.layers import linear_layers
from cachedit_fx.quantization.selection import check_torchao, is_tensor_of_torchao, reject_host_weights
from cachedit_fx.report.files import check_folder, versions, whole_files
from cachedit_fx.runtime.registry import unwrapped

Module = TypeVar("Module", bound=nn.Module)

FORMAT = 1
WEIGHTS, MEANING = "weights.safetensors", "quantization.json"
KEY = "key"
PREFIX = "model."
"""Before every name that torchao splits at its last dot."""
LISTED = 3
"""Names that an error lists."""


def save_quantized(module: nn.Module, folder: str | Path) -> None:
    """Write a quantized module's parameters and buffers to `weights.safetensors` and `quantization.json`.

    An interrupted write leaves the folder as it was.

    Args:
        module: quantized by `quantize`; its cache may be enabled.
        folder: is made if it is missing. Files of an earlier save are replaced.

    Raises:
        OptionError: if no layer is quantized by torchao, if another library quantized some, or if the folder cannot be
            written to.
    """
    check_torchao()
    inner, folder = unwrapped(module), Path(folder)
    obstacle = check_folder(folder)
    if obstacle is not None:
        raise OptionError(f"save_quantized: {obstacle}")
    tensors, shared = _tensors_of(inner)
    quantized = {name: tensor for name, tensor in tensors.items() if is_tensor_of_torchao(tensor)}
    if not quantized:
        raise OptionError(f"{type(inner).__name__} has no layer that torchao quantized: call quantize first")
    for name, tensor in tensors.items():
        if name not in quantized and type(tensor.data) is not torch.Tensor:
            raise OptionError(
                f"{name} is a {type(tensor.data).__name__}: save_quantized writes plain weights and torchao's. "
                "save_pretrained of diffusers writes those of other libraries"
            )
    parts, meanings = _flat(quantized)
    contents = {name: tensor for name, tensor in tensors.items() if name not in quantized} | parts
    meaning: dict[str, Any] = {
        "format": FORMAT,
        "class": type(inner).__name__,
        "versions": versions("torch", "torchao", "cachedit-fx"),
        "quantized": meanings,
        "shared": shared,
    }
    meaning[KEY] = hashlib.sha256(json.dumps([meaning, _digests(contents)]).encode()).hexdigest()
    with whole_files(folder) as staging:
        save_file({name: _own(tensor) for name, tensor in contents.items()}, staging / WEIGHTS, {KEY: meaning[KEY]})
        (staging / MEANING).write_text(json.dumps(meaning, indent=1))


def load_quantized(module: Module, folder: str | Path) -> Module:
    """Give a module the weights that `save_quantized` wrote, equal to the bit, and return it.

    Args:
        module: of the same class and sizes, quantized or not, on any device. Buffers that are in no state dict stay.
        folder: the folder of `save_quantized`.

    Raises:
        OptionError: before a weight changes, if a file is missing or broken, or if the files are of another version of
            torchao, another model, or two different saves.
    """
    check_torchao()
    inner, folder = unwrapped(module), Path(folder)
    meaning = _meaning_in(folder)
    if meaning["class"] != type(inner).__name__:
        raise OptionError(f"{folder} holds a {meaning['class']}, and the module is a {type(inner).__name__}")
    reject_host_weights(inner)
    device = next((each.device for each in inner.parameters() if not each.is_meta), torch.device("cpu"))
    contents = _contents_in(folder, meaning, device)
    try:
        quantized, plain = _whole(contents, meaning["quantized"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OptionError(f"{folder / MEANING} does not fit its weights: {error}") from error
    state = plain | quantized
    state |= {name: state[other] for name, other in meaning["shared"].items() if other in state}
    present = inner.state_dict(keep_vars=True)
    _check_names(folder, inner, state, present)
    wrapped: dict[int, nn.Parameter] = {}
    for name, tensor in state.items():
        if isinstance(present[name], nn.Parameter):
            wants_gradient = present[name].requires_grad and name not in quantized
            wrapped.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=wants_gradient))
            state[name] = wrapped[id(tensor)]
    inner.load_state_dict(state, assign=True)
    for layer in linear_layers(inner).values():
        vars(layer).pop("extra_repr", None)  # torchao's, of an earlier quantization
    start_anew(inner)
    return module


def _tensors_of(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of the state dict by name, and the further names of those that have several."""
    tensors: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            raise OptionError(f"{name} is a {type(value).__name__} in the state dict: only tensors can be saved")
        other = first.setdefault(id(value), name)
        if other == name:
            tensors[name] = value.detach()
        else:
            shared[name] = other
    return tensors, shared


def _flat(quantized: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The parts of quantized tensors by name, and name -> what the parts mean, in torchao's own JSON."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    from cachedit_fx.quantization.torchao_int8 import without_sums

    try:
        known = {PREFIX + name: without_sums(tensor) for name, tensor in quantized.items()}
        parts, meanings = flatten_tensor_state_dict(known)
        meanings = {name: meanings[PREFIX + name] for name in quantized}
        parts = {name.removeprefix(PREFIX): part for name, part in parts.items()}
        _whole(parts, meanings)
    except (TypeError, ValueError) as error:
        kinds = ", ".join(sorted({type(tensor).__name__ for tensor in quantized.values()}))
        raise OptionError(f"torchao has no format without pickle for its {kinds}: {error}") from error
    return parts, meanings


def _whole(
    contents: Mapping[str, torch.Tensor], meanings: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The quantized tensors, from their parts, and the plain ones."""
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    from cachedit_fx.quantization.torchao_int8 import with_sums

    metadata = {PREFIX + name: meaning for name, meaning in meanings.items()}
    names = {"tensor_names": json.dumps([*metadata])}
    whole, rest = unflatten_tensor_state_dict(
        {PREFIX + name: each for name, each in contents.items()}, metadata | names
    )
    missing = [name for name in meanings if PREFIX + name not in whole]
    if missing:
        raise ValueError(f"parts of {_listed(missing)} are missing")
    quantized, plain = ({name.removeprefix(PREFIX): each for name, each in part.items()} for part in (whole, rest))
    return {name: with_sums(each) for name, each in quantized.items()}, plain


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and alone in its memory, as safetensors wants it."""
    contiguous = tensor.data.contiguous()
    is_alone = contiguous.untyped_storage().nbytes() == contiguous.nbytes
    return contiguous if is_alone else contiguous.clone()


def _digests(contents: Mapping[str, torch.Tensor]) -> list[tuple[str, list[int], str]]:
    return [(name, [*tensor.shape], str(tensor.dtype)) for name, tensor in contents.items()]


def _meaning_in(folder: Path) -> dict[str, Any]:
    for name in (MEANING, WEIGHTS):
        if not (folder / name).is_file():
            raise OptionError(f"{folder} has no file {name}: it is no folder of save_quantized, or not all of one")
    try:
        meaning = json.loads((folder / MEANING).read_text())
        present = versions("torchao")["torchao"]
        saved = meaning["versions"]["torchao"]
        if meaning["format"] != FORMAT:
            raise OptionError(f"{folder} has format {meaning['format']}, and this version reads format {FORMAT}")
        fields = {"class": str, "quantized": dict, "shared": dict, KEY: str}
        if any(not isinstance(meaning[name], kind) for name, kind in fields.items()):
            raise TypeError("a field has the wrong type")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"{folder / MEANING} is no description of quantized weights: {error}") from error
    if saved.split(".")[:2] != present.split(".")[:2]:
        raise OptionError(
            f"{folder} was saved with torchao {saved}, and this is {present}, whose tensors may be laid out otherwise: "
            "install that version, or quantize and save anew"
        )
    return dict(meaning)


def _contents_in(folder: Path, meaning: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    try:
        with safe_open(folder / WEIGHTS, "pt", str(device)) as file:
            if (file.metadata() or {}).get(KEY) != meaning[KEY]:
                raise OptionError(f"{folder}: {WEIGHTS} and {MEANING} are of two different saves; save anew")
            # A copy is aligned; a tensor in the mapped file need not be, and another kernel would round differently.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise OptionError(f"{folder / WEIGHTS} is broken: {error}") from error


def _check_names(
    folder: Path, module: nn.Module, state: Mapping[str, Any], present: Mapping[str, torch.Tensor]
) -> None:
    """Raise unless the file has the module's tensors, in their sizes, and no other."""
    problems = {
        "the file lacks": [name for name in present if name not in state],
        "the module lacks": [name for name in state if name not in present],
        "other sizes have": [
            f"{name} ({[*state[name].shape]}, in the module {[*tensor.shape]})"
            for name, tensor in present.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    words = [f"{title} {_listed(names)}" for title, names in problems.items() if names]
    if words:
        raise OptionError(f"{folder} does not fit this {type(module).__name__}: {'; '.join(words)}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
