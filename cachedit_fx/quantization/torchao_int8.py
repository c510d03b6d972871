"""An int8 weight of torchao that keeps the sums of its rows, which some CPUs need at every product.

    x @ w^T  =  (x + 128) @ w^T - 128 * (sum of each row of w)

A CPU with VNNI multiplies unsigned numbers by signed ones, so torchao shifts activations by 128, and takes the shift
off the product. The sums depend on the weight alone. torchao 0.18 adds them up at each call (`torchao.kernel.intmm`),
which reads the whole weight a second time. This module imports torchao. Other libraries know torchao's classes by
"torchao" in the name of their module (accelerate), so it stands in this one's too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.quantization import Int8Tensor, PerRow, PerTensor
from torchao.quantization.quant_primitives import MappingType
from torchao.utils import _cpu_is_amx_tile_supported, _cpu_is_vnni_supported

SHIFT = 128
"""Makes an int8 number an unsigned one."""


class SummedInt8Tensor(Int8Tensor):
    """A weight of shape [output features, input features], for activations that are quantized when they come.

    Results equal torchao's to the bit. On another device than a CPU the sums are left aside. Write to the whole weight,
    by `copy_`: a write to `qdata` alone leaves the sums as they were.

    Attributes:
        sums: int32 [output features, 1], the sums of the rows, times 128.
    """

    tensor_data_names = ["qdata", "scale", "sums"]  # noqa: RUF012 - torchao copies the list

    def __new__(cls, qdata: torch.Tensor, scale: torch.Tensor, sums: torch.Tensor, *rest: Any, **options: Any) -> Any:
        return super().__new__(cls, qdata, scale, *rest, **options)

    def __init__(
        self, qdata: torch.Tensor, scale: torch.Tensor, sums: torch.Tensor, *rest: Any, **options: Any
    ) -> None:
        super().__init__(qdata, scale, *rest, **options)
        self.sums = sums

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file of a state dict holds torchao's class, which is read without this package."""
        return without_sums(self).__reduce_ex__(protocol)


def _multiplies_unsigned() -> bool:
    """Whether torchao shifts activations on this CPU."""
    return _cpu_is_vnni_supported() and not _cpu_is_amx_tile_supported()


def with_sums(weight: Any) -> Any:
    """The weight with its sums, if it is on a CPU and its activations are symmetric. Any other one as it is."""
    activations = weight.act_quant_kwargs if type(weight) is Int8Tensor else None
    has_sums = (
        activations is not None
        and weight.device.type == "cpu"
        and weight.dim() == 2
        and weight.act_pre_scale is weight.act_quant_scale is None
        and activations.mapping_type is MappingType.SYMMETRIC
        and activations.granularity in (PerRow(), PerTensor())
    )
    return _unflattened(SummedInt8Tensor, weight, {"sums": _sums_of(weight)}) if has_sums else weight


def without_sums(weight: Any) -> Any:
    """The weight as torchao's own class, which other programs know."""
    return _unflattened(Int8Tensor, weight) if type(weight) is SummedInt8Tensor else weight


def _sums_of(weight: Any) -> torch.Tensor:
    sums: torch.Tensor = weight.qdata.sum(dim=-1, keepdim=True, dtype=torch.int32) * SHIFT
    return sums


def _unflattened(kind: Any, weight: Any, further: Mapping[str, torch.Tensor] | None = None) -> Any:
    names, settings = weight.__tensor_flatten__()
    tensors = {name: getattr(weight, name) for name in names} | dict(further or {})
    return kind.__tensor_unflatten__(tensors, settings, weight.shape, weight.stride())


def _of_torchao(func: Any, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What torchao's class makes of an operation."""
    return Int8Tensor._ATEN_OP_TABLE[Int8Tensor][func](func, types, args, kwargs)


@SummedInt8Tensor.implements([torch.ops.aten.slice.Tensor, torch.ops.aten.select.int])
def _part(func: Any, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A part of the rows is a view, sums included. A part of the columns has sums of its own."""
    weight, *place = args
    part = _of_torchao(func, types, (without_sums(weight), *place), kwargs)
    is_of_rows = not place or place[0] == 0
    sums = func(weight.sums, *place, **kwargs) if is_of_rows else _sums_of(part)
    return return_and_correct_aliasing(func, args, kwargs, _unflattened(SummedInt8Tensor, part, {"sums": sums}))


@SummedInt8Tensor.implements(torch.ops.aten.copy_.default)
def _copy(func: Any, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Takes weights of both classes, such as those of a state dict that torchao wrote."""
    target, source = args[:2]
    if type(target) is Int8Tensor:
        source = without_sums(source)
    elif type(source) is Int8Tensor:
        source = with_sums(source.to(target.device))
    return _of_torchao(func, types, (target, source), kwargs)


@SummedInt8Tensor.implements(torch.ops.aten.linear.default)
@SummedInt8Tensor.implements_torch_function(linear)
def _linear(func: Any, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    return _product(*args, **kwargs)


def _product(input: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torchao's product with quantized activations, in its order of operations, with the sums at hand.

    torchao compares the number of rows with one, so dynamo cannot trace it on a length that depends on data. As with
    torchao, no gradient goes through the rounding.
    """
    if input.device.type != "cpu":
        return linear(input, without_sums(weight), bias)
    values, scale = _quantized(input.detach(), weight.act_quant_kwargs)
    values, scale = values.reshape(-1, input.shape[-1]), scale.reshape(-1, 1)
    rows = weight.qdata.contiguous().t()
    if _multiplies_unsigned():
        product = torch._int_mm((values.to(torch.int32) + SHIFT).to(torch.uint8), rows) - weight.sums.flatten()
    else:
        product = torch._int_mm(values, rows)
    scaled = (product.to(scale.dtype) * scale).to(input.dtype)
    result = (scaled * weight.scale.flatten()).reshape(*input.shape[:-1], rows.shape[1])
    return (result if bias is None else result + bias).to(input.dtype)


def _quantized(x: torch.Tensor, settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 numbers and their float32 scale: one per row, or one in all."""
    levels = 128 >> bool(settings.reduce_range)
    axes = tuple(range(x.dim())) if settings.granularity == PerTensor() else -1
    scale = (x.abs().amax(axes, keepdim=True) / (levels - 0.5)).clamp(min=torch.finfo(torch.float32).eps).float()
    return (x * (1.0 / scale)).round().clamp(-levels, levels - 1).to(torch.int8), scale
