"""A weight whose elements lie on the host, in a module whose device is another one.

    HostWeight ── device, shape, dtype: as if it lay on the model's device; modules, dynamo and `to` see this
               └─ host: the module's own parameter, on the host; the state dict and hoisted pieces read this

Dynamo captures a graph with such a weight as with any other, since its metadata is that of the model's device. An
operation that would need the weight on the device raises. Writes to the weight are made on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

HOST = torch.device("cpu")
"""The device that the weights lie on."""
_aten = torch.ops.aten
_can_become: Callable[[torch.Tensor, torch.Tensor], bool] = torch._has_compatible_shallow_copy_type


class HostWeightError(RuntimeError):
    """A call needs a weight on the model's device, and the weight lies on the host."""


def host_weight_error(layers: Sequence[str], reason: str) -> HostWeightError:
    """The error for a call that needs these layers."""
    rest = f", as {len(layers) - 1} more weights do" if len(layers) > 1 else ""
    return HostWeightError(
        f"{layers[0]} lies on the host (time_weights='host'){rest}, and this call needs it on the model's device: "
        f"{reason}. Call cachedit_fx.disable_cache(...) to bring all weights back, or enable the cache with "
        "time_weights='device'"
    )


class _WhileTracing:
    """A function of a class that its instances show only while dynamo traces.

    `torch.nn.Module.to` exchanges parameters that it takes for wrappers of others, and fails if dynamo refers to them.
    For other parameters it writes to `data`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        if instance is not None and TracingContext.try_get() is None:
            raise AttributeError
        return self.function


class HostWeight(torch.Tensor):
    """A tensor whose elements lie on the host, with the metadata of one on `device`.

    Operations on such tensors alone give such tensors. They, and writes to one, run on the host. All others raise
    `HostWeightError`.

    Attributes:
        host: the elements. For a module's weight, the module's own parameter.
        layer: the weight's name in its module.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    host: torch.Tensor
    layer: str

    @staticmethod
    def __new__(cls, host: torch.Tensor, device: torch.device, layer: str = "") -> HostWeight:
        made: Callable[..., HostWeight] = torch.Tensor._make_wrapper_subclass
        return made(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=device,
        )

    def __init__(self, host: torch.Tensor, device: torch.device, layer: str = "") -> None:
        self.host, self.layer = host, layer

    @classmethod
    def of(cls, parameter: torch.nn.Parameter, layer: str) -> HostWeight:
        """Take the elements of a parameter to the host. The weight stands for the parameter on its device."""
        weight = cls(parameter, parameter.device, layer)
        weight.requires_grad_(parameter.requires_grad)
        weight._is_param = True  # an instance of torch.nn.Parameter from here on
        parameter.data = parameter.data.to(HOST)
        return weight

    def parameter(self) -> torch.nn.Parameter:
        """The module's own parameter, its elements back on the device; a new one for a device of another kind."""
        elements = self.host.detach().to(self.device)
        if not isinstance(self.host, torch.nn.Parameter) or not _can_become(self.host, elements):
            return torch.nn.Parameter(elements, self.requires_grad)
        self.host.data = elements
        self.host.requires_grad_(self.requires_grad)
        return self.host

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.layer!r}, {tuple(self.shape)}, {self.dtype}, device={str(self.device)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Parameter:
        """A plain parameter on the device: copies of a module are uncompiled."""
        copied = torch.nn.Parameter(self.host.detach().to(self.device, copy=True), self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.host.__reduce_ex__(protocol)

    @property
    def data(self) -> torch.Tensor:
        """The elements without autograd, of the same kind."""
        inner: torch.Tensor = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return inner

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self.host.data = value.host.detach() if isinstance(value, HostWeight) else value.detach().to(HOST)
        torch.Tensor.data.__set__(self, HostWeight(self.host, value.device, self.layer))  # type: ignore[attr-defined]

    def share_memory_(self) -> HostWeight:
        """Move the elements to memory that processes share."""
        self.host.share_memory_()
        return self

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["host"], self.device

    @_WhileTracing
    def __tensor_unflatten__(inner: Mapping[str, Any], device: torch.device, size: Any, stride: Any) -> HostWeight:
        return HostWeight(inner["host"], device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, keywords)) if isinstance(leaf, torch.Tensor)]
        weights = [tensor for tensor in tensors if isinstance(tensor, HostWeight)]
        first = weights[0]
        if isinstance(first.host, FakeTensor) and func is not _aten.detach.default:
            with first.host.fake_mode:
                return func(*tree_map(stand_in, tuple(args)), **tree_map(stand_in, keywords))
        if func is _aten._to_copy.default:
            device = torch.device(keywords.get("device") or first.device)
            return HostWeight(first.host.detach().to(keywords.get("dtype") or first.dtype), device, first.layer)
        if func is _aten.copy_.default and args[0] is not first:
            return func(args[0], first.host, *args[2:])
        is_write = func._schema.is_mutable and args[0] is first
        if len(weights) < len(tensors) and not is_write:
            raise host_weight_error([first.layer], f"{func} takes it")
        if "device" in keywords:
            keywords["device"] = HOST
        results = func(*tree_map(_on_host, tuple(args)), **tree_map(_on_host, keywords))
        return args[0] if is_write else tree_map(lambda result: _like(first, result), results)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, which waits for the tensor's device."""
    return tensor.to(HOST)


def stand_in(value: Any) -> Any:
    """For a fake `HostWeight`, a fake tensor on the model's device. Any other value unchanged."""
    if not isinstance(value, HostWeight):
        return value
    assert isinstance(value.host, FakeTensor)
    with value.host.fake_mode:
        tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return torch.nn.Parameter(tensor, value.requires_grad) if isinstance(value, torch.nn.Parameter) else tensor


def _on_host(value: Any) -> Any:
    if isinstance(value, HostWeight):
        return value.host
    return to_host(value) if isinstance(value, torch.Tensor) else value


def _like(weight: HostWeight, value: Any) -> Any:
    """A result on the host as one on the weight's device."""
    return HostWeight(value, weight.device, weight.layer) if isinstance(value, torch.Tensor) else value
