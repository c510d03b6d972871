"""The kinds of quantization: torchao's configuration of each, and the devices, shapes and dtypes that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from cachedit_fx.config.rules import OptionError, check, choice

MIN_CPU_WIDTHS = {torch.float32: 64, torch.bfloat16: 256}
"""The model's dtype -> input features from which int8 multiplication is faster on a CPU, compiled by inductor."""
INT4_GROUP = 128
EMULATED_GROUP = 32


@dataclass(frozen=True)
class Kind:
    """A kind of quantization.

    Attributes:
        name: the user's name for it; the class's name for a configuration of torchao.
        meaning: dtypes of weights and activations, and the scales.
        config: makes torchao's configuration. It imports torchao.
        capability: least compute capability of an NVIDIA GPU; None if every device will do.
        package: a package that the kernels need.
        multiples: numbers that divide the weight's sizes, in the order (output features, input features).
        dtypes: dtypes that the weight may have; empty if any floating-point dtype will do.
        stands_in_for: the kind whose results this one has, without its gain.
    """

    name: str
    meaning: str
    config: Callable[[], Any]
    capability: tuple[int, int] | None = None
    package: str | None = None
    multiples: tuple[int, int] = (1, 1)
    dtypes: tuple[torch.dtype, ...] = ()
    stands_in_for: str | None = None

    def lack(self, device: torch.device) -> str | None:
        """What weights on this device lack for the kind; None if it runs there."""
        if self.capability is None:
            return None
        needs = f"it needs an NVIDIA GPU of compute capability {_version(self.capability)} or newer"
        if device.type != "cuda":
            hint = "; move the module to the GPU first" if torch.cuda.is_available() else ""
            return f"{needs}, and the weights are on {device.type!r}{hint}"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < self.capability:
            present = _version(torch.cuda.get_device_capability(device))
            return f"{needs}; {torch.cuda.get_device_name(device)} has {present}"
        if self.package is not None and find_spec(self.package) is None:
            return f"it needs the package {self.package}, which is not installed"
        return None

    def misfit(self, weight: torch.Tensor) -> str | None:
        """Why the kind cannot take a weight of shape [output features, input features]; None if it can."""
        if self.dtypes and weight.dtype not in self.dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"{self.name} takes weights in {allowed}, not {str(weight.dtype).removeprefix('torch.')}"
        for title, size, multiple in zip(("output", "input"), weight.shape, self.multiples, strict=True):
            if size % multiple:
                return f"{self.name} needs {title} features in multiples of {multiple}, not {size}"
        return None


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _of_torchao(make: Callable[[Any], Any]) -> Callable[[], Any]:
    """The configuration that `make` takes out of `torchao.quantization`, imported when it is asked for.

    Every configuration here gets `set_inductor_config=False` if it has that field: the field's default sets inductor's
    global options.
    """

    def config() -> Any:
        import torchao.quantization as ao

        return make(ao)

    return config


def _mx(dtype: torch.dtype) -> Callable[[], Any]:
    def make() -> Any:
        from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig

        return MXDynamicActivationMXWeightConfig(activation_dtype=dtype, weight_dtype=dtype)

    return make


def _nvfp4() -> Any:
    from torchao.prototype.mx_formats import NVFP4DynamicActivationNVFP4WeightConfig

    has_triton_kernel = find_spec("mslk") is not None
    return NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=has_triton_kernel)


_FOUR_BITS: torch.dtype = torch.int4  # type: ignore[attr-defined]
_ADA, _AMPERE, _HOPPER, _BLACKWELL = (8, 9), (8, 0), (9, 0), (10, 0)
_BFLOAT16 = (torch.bfloat16,)

_KINDS = (
    Kind(
        "float8",
        "weights and activations in float8, a scale per row",
        _of_torchao(
            lambda ao: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False)
        ),
        _ADA,
        multiples=(16, 16),
        dtypes=_BFLOAT16,
    ),
    Kind(
        "float8_per_tensor",
        "weights and activations in float8, a scale per tensor",
        _of_torchao(
            lambda ao: ao.Float8DynamicActivationFloat8WeightConfig(
                granularity=ao.PerTensor(), set_inductor_config=False
            )
        ),
        _ADA,
        multiples=(16, 16),
    ),
    Kind(
        "float8_per_block",
        "weights in float8, a scale per 128 x 128; activations in float8, a scale per 128 features",
        _of_torchao(
            lambda ao: ao.Float8DynamicActivationFloat8WeightConfig(
                granularity=[ao.PerBlock([1, 128]), ao.PerBlock([128, 128])], set_inductor_config=False
            )
        ),
        _ADA,
        multiples=(128, 128),
    ),
    Kind(
        "float8_weight_only",
        "weights in float8, a scale per row",
        _of_torchao(lambda ao: ao.Float8WeightOnlyConfig(set_inductor_config=False)),
    ),
    Kind(
        "int8",
        "weights and activations in int8, a scale per row",
        _of_torchao(
            lambda ao: ao.Int8DynamicActivationInt8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False)
        ),
    ),
    Kind(
        "int8_per_tensor",
        "weights and activations in int8, a scale per tensor",
        _of_torchao(
            lambda ao: ao.Int8DynamicActivationInt8WeightConfig(granularity=ao.PerTensor(), set_inductor_config=False)
        ),
    ),
    Kind(
        "int8_weight_only",
        "weights in int8, a scale per row",
        _of_torchao(lambda ao: ao.Int8WeightOnlyConfig(set_inductor_config=False)),
    ),
    Kind(
        "int4",
        "weights in int4, a scale per 128 features; activations in float8, a scale per row",
        _of_torchao(lambda ao: ao.Float8DynamicActivationInt4WeightConfig()),
        _HOPPER,
        package="mslk",
        multiples=(1, INT4_GROUP),
        dtypes=_BFLOAT16,
    ),
    Kind(
        "int4_weight_only",
        "weights in int4, a scale per 128 features",
        _of_torchao(
            lambda ao: ao.Int4WeightOnlyConfig(
                group_size=INT4_GROUP, set_inductor_config=False, int4_packing_format="tile_packed_to_4d"
            )
        ),
        _AMPERE,
        multiples=(1, INT4_GROUP),
        dtypes=_BFLOAT16,
    ),
    Kind(
        "int4_emulated",
        "weights in int4, stored in int8, a scale per 32 features; activations in int8",
        _of_torchao(
            lambda ao: ao.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=_FOUR_BITS, weight_granularity=ao.PerGroup(EMULATED_GROUP)
            )
        ),
        multiples=(1, EMULATED_GROUP),
        stands_in_for="int4",
    ),
    Kind(
        "int4_weight_only_emulated",
        "weights in int4, stored in int8, a scale per 32 features",
        _of_torchao(
            lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=_FOUR_BITS, granularity=ao.PerGroup(EMULATED_GROUP))
        ),
        multiples=(1, EMULATED_GROUP),
        stands_in_for="int4_weight_only",
    ),
    Kind(
        "mxfp8",
        "weights and activations in float8, a scale per 32 features",
        _mx(torch.float8_e4m3fn),
        _BLACKWELL,
        multiples=(32, 32),
        dtypes=_BFLOAT16,
    ),
    Kind(
        "mxfp4",
        "weights and activations in 4-bit floats, a scale per 32 features",
        _mx(torch.float4_e2m1fn_x2),
        _BLACKWELL,
        multiples=(32, 32),
        dtypes=_BFLOAT16,
    ),
    Kind(
        "nvfp4",
        "weights and activations in 4-bit floats, a scale per 16 features and one per tensor",
        _nvfp4,
        _BLACKWELL,
        multiples=(16, 16),
        dtypes=_BFLOAT16,
    ),
)

KINDS = {kind.name: kind for kind in _KINDS}
"""Every kind by its name."""
ALIASES = {"float8_per_row": "float8", "int8_per_row": "int8"}
"""Another name -> the kind's name."""


def kind_of(quant_type: Any, title: str = "quant_type") -> Kind:
    """The kind of a name, in any case, or of a configuration of torchao.

    Raises:
        OptionError: on an unknown name; it names the nearest one.
    """
    if isinstance(quant_type, str):
        name = ALIASES.get(quant_type.lower(), quant_type.lower())
        check(title, name, choice(*KINDS, *ALIASES))
        return KINDS[name]
    if any(
        f"{base.__module__}.{base.__name__}" == "torchao.core.config.AOBaseConfig" for base in type(quant_type).__mro__
    ):
        return Kind(type(quant_type).__name__, "a configuration of torchao", lambda: quant_type)
    raise OptionError(
        f"{title}={quant_type!r} is not allowed: it must be a configuration of torchao or one of {', '.join(KINDS)}"
    )


def kinds_for(device: torch.device) -> str:
    """The kinds that run on a device, for an error message; stand-ins are named as such."""
    kinds = [kind for kind in KINDS.values() if kind.lack(device) is None]
    real = ", ".join(kind.name for kind in kinds if kind.stands_in_for is None)
    emulated = ", ".join(kind.name for kind in kinds if kind.stands_in_for is not None)
    return f"on {device.type!r} run {real}, and as stand-ins of int8's size {emulated}"


def warnings_about(kind: Kind, weights: Iterable[torch.Tensor]) -> list[str]:
    """What the kind costs these weights of shape [output features, input features], a sentence each."""
    weights = list(weights)
    on_cpu = [weight for weight in weights if weight.device.type == "cpu"]
    sentences = []
    if kind.stands_in_for is not None:
        sentences.append(
            f"{kind.name} is a stand-in: it rounds like {kind.stands_in_for}, has the size of int8, and is no faster"
        )
    for dtype, width in MIN_CPU_WIDTHS.items():
        of_dtype = [weight for weight in on_cpu if weight.dtype is dtype]
        narrow = [weight for weight in of_dtype if weight.shape[1] < width]
        if kind.name in ("int8", "int8_per_tensor") and narrow:
            sentences.append(
                f"{kind.name} gains no time on a CPU in layers of fewer than {width} input features in "
                f"{str(dtype).removeprefix('torch.')}, which are {len(narrow)} of {len(of_dtype)}"
            )
    if kind.name == "int8_weight_only" and any(weight.dtype == torch.bfloat16 for weight in on_cpu):
        sentences.append(
            "int8_weight_only takes 2.2 to 2.7 times the time of bfloat16 under inductor on a CPU; int8 is faster"
        )
    return sentences
