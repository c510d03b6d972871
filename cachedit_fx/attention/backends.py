"""The table of back ends: what each takes of a model's calls, where it runs, and the function that a node calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import torch

from cachedit_fx.attention import functions
from cachedit_fx.attention.calls import MASKS, REGULAR_MASKS, AttentionCall, MaskKind, same
from cachedit_fx.attention.functions import Function
from cachedit_fx.attention.sage import KEY_MULTIPLE, major_version, sage_attention
from cachedit_fx.config.rules import OptionError, check, choice

OWN = "sdpa"
"""The name that keeps the model's own attention."""


@dataclass(frozen=True)
class Backend:
    """A back end on one kind of device.

    Attributes:
        name: the user's name for it.
        meaning: how it computes.
        load: gives the function, of the form that functions.py describes. It may import a package.
        device: device type that it runs on; None if it runs on all.
        capability: least compute capability of an NVIDIA GPU.
        package: a package that it needs.
        major: the package's major version; None if all will do.
        dtypes: that the tensors may have; empty for every floating-point dtype.
        head_dims: that it takes; empty for all.
        masks: kinds of masks that it takes.
        takes_gqa: whether it takes fewer heads of keys than of queries.
        causal: whether it takes causal calls: of as many queries as keys ("square"), or of any lengths.
        key_multiple: divides the number of keys of calls that are not causal. With a length that is known in the call
            alone, the function itself decides.
        is_general: whether it takes tensors that are broadcast, or of several dtypes or not four dimensions.
        log_sum_exp: whether the kernel can return the scores' log-sum-exp, as ring attention needs.
        changes: inputs that the kernel changes in place. The function gives it copies.
        stands_in_for: the back end whose results this one has, without its gain.
    """

    name: str
    meaning: str
    load: Callable[[], Function]
    device: str | None = None
    capability: tuple[int, int] | None = None
    package: str | None = None
    major: int | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    head_dims: Collection[int] = ()
    masks: Collection[MaskKind] = ()
    takes_gqa: bool = False
    causal: Literal["square", "any"] | None = None
    key_multiple: int = 1
    is_general: bool = False
    log_sum_exp: bool = False
    changes: tuple[str, ...] = ()
    stands_in_for: str | None = None

    def lack(self) -> str | None:
        """What this machine lacks for the back end; None if it runs here."""
        if self.device == "cuda":
            needs = f"it needs {_gpu(self.capability)}"
            if not torch.cuda.is_available():
                return f"{needs}, and torch finds no GPU"
            best = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
            if self.capability is not None and torch.version.hip is None and best < self.capability:
                return f"{needs}; {torch.cuda.get_device_name()} has {_version(best)}"
        if self.package is not None and find_spec(self.package) is None:
            return f"it needs the package {self.package}, which is not installed"
        if self.major is not None and major_version() != self.major:
            return f"it needs version {self.major} of {self.package}"
        return None

    def misfit(self, call: AttentionCall) -> str | None:
        """Why the back end does not take a call; None if it does."""
        return self.unlike(call) or self.unfit_sizes(call)

    def unlike(self, call: AttentionCall) -> str | None:
        """Why the back end takes no call of this kind, whatever its lengths, head dim and dtype."""
        if (obstacle := call.obstacle()) is not None:
            return obstacle
        if not self.is_general and (irregularity := call.irregularity()) is not None:
            return irregularity
        if call.mask is not None and call.mask not in self.masks:
            return f"{self.name} takes no {call.mask} mask"
        if call.enable_gqa and not self.takes_gqa:
            return f"{self.name} takes no grouped heads"
        if call.is_causal and self.causal is None:
            return f"{self.name} takes no causal call"
        if call.is_causal and self.causal == "square" and not same(call.query[-2], call.keys):
            return f"{self.name} takes causal calls only of as many queries as keys"
        return None

    def unfit_sizes(self, call: AttentionCall) -> str | None:
        """Why the back end does not take the call's head dim, number of keys or dtype."""
        dtype = call.dtypes[0]
        if self.dtypes and dtype not in self.dtypes:
            return f"{self.name} takes {_names(self.dtypes)}, and its tensors are {_names([dtype])}"
        if self.head_dims and call.head_dim not in self.head_dims:
            return f"{self.name} takes no head dim of {call.head_dim}"
        if not call.is_causal and isinstance(call.keys, int) and call.keys % self.key_multiple:
            return f"{self.name} takes key lengths that {self.key_multiple} divides, not {call.keys}"
        return None


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _gpu(capability: tuple[int, int] | None) -> str:
    return "a GPU" if capability is None else f"an NVIDIA GPU of compute capability {_version(capability)} or newer"


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _int8(suffix: str = "") -> Callable[[], Function]:
    def load() -> Function:
        import cachedit_fx.kernels.int8_attention  # noqa: F401 - registers the operators

        operator: Function = getattr(torch.ops.cachedit_fx, f"int8_attention{suffix}").default
        return operator

    return load


def _always(function: Function) -> Callable[[], Function]:
    return lambda: function


_HALF = (torch.float16, torch.bfloat16)
_AMPERE = (8, 0)
_ON_CUDA = Backend(
    "flash",
    "FlashAttention, as torch brings it",
    _always(functions.flash_on_cuda),
    device="cuda",
    capability=_AMPERE,
    dtypes=_HALF,
    head_dims=range(8, 257, 8),
    takes_gqa=True,
    causal="square",
    log_sum_exp=True,
)
_SAGE = Backend(
    "sage",
    "queries and keys in int8, values in float16, by sageattention 1",
    _always(sage_attention),
    device="cuda",
    capability=_AMPERE,
    package="sageattention",
    major=1,
    dtypes=(*_HALF, torch.float32),
    head_dims=(64, 96, 128),
    takes_gqa=True,
    causal="square",
    key_multiple=KEY_MULTIPLE,
    changes=("key",),
)
_INT8 = Backend(
    "int8",
    "queries and keys in int8, a scale for a query and for 64 keys, values in 16 bits",
    _int8(),
    device="cuda",
    capability=_AMPERE,
    package="cachedit_fx.kernels.int8_attention",
    dtypes=_HALF,
    head_dims=range(8, 129, 8),
    masks=REGULAR_MASKS,
    takes_gqa=True,
    causal="any",
    log_sum_exp=True,
)
_INT8_ON_CPU = replace(
    _INT8,
    meaning="torch's own attention, for what int8 takes",
    device="cpu",
    capability=None,
    dtypes=(*_HALF, torch.float32),
)
_EMULATED = replace(
    _INT8,
    name="int8_emulated",
    meaning="rounds queries and keys as int8 does, by torch's operators; all scores in memory",
    load=_int8("_emulated"),
    device=None,
    capability=None,
    log_sum_exp=False,
    stands_in_for="int8",
)


def _also_wide(backend: Backend) -> tuple[Backend, Backend]:
    """A back end, and itself for heads above 128, without masks."""
    return backend, replace(backend, head_dims=range(136, 257, 8), masks=())


_BACKENDS = (
    _ON_CUDA,
    Backend(
        "flash",
        "FlashAttention, as torch brings it",
        _always(functions.flash_on_cpu),
        device="cpu",
        masks=MASKS,
        causal="any",
        log_sum_exp=True,
    ),
    replace(
        _ON_CUDA,
        name="cudnn",
        meaning="the attention of cuDNN, as torch brings it",
        load=_always(functions.cudnn),
        head_dims=range(8, 129, 8),
    ),
    Backend(
        "math",
        "two products of matrices and a softmax; all scores in memory",
        _always(functions.math),
        masks=MASKS,
        takes_gqa=True,
        causal="any",
        is_general=True,
    ),
    Backend(
        "flex",
        "torch's flex_attention without a score function; inductor makes one kernel of it",
        _always(functions.flex),
        log_sum_exp=True,
    ),
    _SAGE,
    replace(
        _SAGE,
        meaning="queries and keys in int8, values in float16 or float8, by sageattention 2",
        major=2,
        dtypes=_HALF,
        key_multiple=1,
        changes=(),
    ),
    *_also_wide(_INT8),
    *_also_wide(_INT8_ON_CPU),
    *_also_wide(_EMULATED),
    *_also_wide(replace(_EMULATED, device="cpu", dtypes=(torch.float32,))),
)

NAMES = tuple(dict.fromkeys((OWN, *(backend.name for backend in _BACKENDS))))
"""Every name of a back end."""


def rows_of(name: str) -> list[Backend]:
    """The rows of a name: for each kind of device, version of a package, and dtypes that differ in what is taken."""
    return [backend for backend in _BACKENDS if backend.name == name]


def backends_of(title: str, value: Any) -> tuple[Backend, ...]:
    """The back ends that a user's word stands for; none for the model's own attention.

    Args:
        title: the setting, for errors.
        value: a name, or a function with the arguments of `scaled_dot_product_attention`.

    Raises:
        OptionError: on an unknown name; it names the nearest one.
    """
    if callable(value):
        name = getattr(value, "__name__", type(value).__name__)
        if not functions.takes_arguments(value):
            raise OptionError(
                f"{title}={name} cannot be called as scaled_dot_product_attention is: it must take query, key, value, "
                "and attn_mask, dropout_p, is_causal and scale by name"
            )
        load = _always(functions.of_callable(value))
        return (Backend(name, "a function", load, masks=MASKS, takes_gqa=True, causal="any", is_general=True),)
    if not isinstance(value, str):
        raise OptionError(
            f"{title}={value!r} is not allowed: it must be one of {', '.join(map(repr, NAMES))}, or a function with "
            "the arguments of scaled_dot_product_attention"
        )
    check(title, value, choice(*NAMES))
    return tuple(rows_of(value))


def check_machine(title: str, backends: Collection[Backend]) -> None:
    """Raise if none of a name's rows runs on this machine."""
    lacks = [backend.lack() for backend in backends]
    if lacks and None not in lacks:
        here = ", ".join(name for name in NAMES if name == OWN or any(row.lack() is None for row in rows_of(name)))
        name = next(iter(backends)).name
        raise OptionError(f"{title}={name!r} does not run here: {lacks[0]}; here run {here}")


def fitting(backends: Collection[Backend], call: AttentionCall) -> Backend | str:
    """The back end that takes a call, or why none does."""
    rows = [row for row in backends if row.lack() is None and row.device in (None, call.device)]
    if not rows:
        return f"{next(iter(backends)).name} does not run on {call.device!r}"
    rows = [row for row in rows if not row.dtypes or call.dtypes[0] in row.dtypes] or rows
    misfits = [row.misfit(call) for row in rows]
    return next((row for row, misfit in zip(rows, misfits, strict=True) if misfit is None), misfits[0] or "")
