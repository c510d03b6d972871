"""Settings that only speed up: parallelism, attention, and torch's compilers, which have no effect."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from cachedit_fx.attention.backends import NAMES, OWN
from cachedit_fx.compat.members import member_of
from cachedit_fx.compat.ours import reject_other_package
from cachedit_fx.config.rules import OptionError, Rule, check, choice, optional, reject_unknown
from cachedit_fx.runtime.warning import SettingWarning, warn


class ParallelismBackend(Enum):
    """The library that shares the work out; accepted, without effect."""

    AUTO = "Auto"
    CACHE_DIT = "CACHE_DIT"
    NATIVE_DIFFUSER = "Native_Diffuser"
    NATIVE_PYTORCH = "Native_PyTorch"
    NATIVE_HYBRID = "Native_Hybrid"
    NONE = "None"

    @classmethod
    def from_str(cls, name: str) -> ParallelismBackend:
        """The backend of a name or a value, in any case.

        Raises:
            OptionError: on an unknown name.
        """
        return member_of(cls, name)

    def __str__(self) -> str:
        return self.value


@dataclass
class ParallelismConfig:
    """How `ring_size * ulysses_size` ranks of torch.distributed share the work on a sample, by their tokens.

    The script starts the ranks, by torchrun and `torch.distributed.init_process_group`. Lengths and heads may be of any
    size, with and without `ulysses_anything`. `ulysses_float8` and `ulysses_async` are the options of these names.
    `tp_size`, `extra_parallel_modules` and `use_ray` decide what a device must
    hold, so `enable_cache` raises NotImplementedError on them.
    """

    backend: ParallelismBackend | str = ParallelismBackend.AUTO
    ulysses_size: int | None = None
    ring_size: int | None = None
    tp_size: int | None = None
    use_ray: bool = False
    ray_num_workers: int | None = None
    ray_address: str | None = None
    ray_runtime_env: dict[str, Any] | None = None
    ray_init_kwargs: dict[str, Any] = field(default_factory=dict)
    ray_worker_options: dict[str, Any] = field(default_factory=dict)
    ray_master_port: int = 0
    ray_auto_shutdown: bool = True
    ray_transfer_backend: str = "auto"
    ray_transfer_custom_obj: bool = True
    ray_use_flashpack: bool = False
    ray_use_compile: bool = False
    ray_transfer_fn: Any = None
    cp_plan: Any = None
    attention_backend: str | None = None
    ulysses_anything: bool = False
    ulysses_float8: bool = False
    ulysses_async: bool = False
    extra_parallel_kwargs: dict[str, Any] = field(default_factory=dict)
    ring_rotate_method: str = "p2p"
    ring_convert_to_fp32: bool = True
    extra_parallel_modules: list[Any] = field(default_factory=list)
    parallel_kwargs: dict[str, Any] = field(default_factory=dict)
    """Fields in the style of older scripts; "experimental_ulysses_async" is `ulysses_async`, and so on."""

    def __post_init__(self) -> None:
        if not isinstance(self.backend, ParallelismBackend):
            self.backend = ParallelismBackend.from_str(str(self.backend))
        check("parallel_kwargs", self.parallel_kwargs, optional(Rule(lambda value: isinstance(value, dict), "a dict")))
        flat = {name.removeprefix("experimental_"): value for name, value in (self.parallel_kwargs or {}).items()}
        reject_unknown(flat, dict.fromkeys(self.__dataclass_fields__, "compat.ParallelismConfig"))
        for name, value in flat.items():
            setattr(self, name, value)
        for name in ("ulysses_size", "ring_size", "tp_size"):
            size = getattr(self, name)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise OptionError(f"{name}={size!r} is not allowed: it must be a number of devices >= 1, or None")

    def check(self) -> None:
        """Raise on settings that decide what a device holds; warn of those that have no effect.

        Raises:
            NotImplementedError: for tensor parallelism, further modules, and Ray.
        """
        absent = {
            f"tp_size={self.tp_size}": (self.tp_size or 1) > 1,
            "extra_parallel_modules": bool(self.extra_parallel_modules),
            "use_ray": self.use_ray,
        }
        for name, is_asked in absent.items():
            if is_asked:
                raise NotImplementedError(
                    f"ParallelismConfig({name}): cachedit_fx shares no weights out among devices, and would run out of "
                    "memory; use quantize, pipe.enable_model_cpu_offload() or diffusers' enable_group_offload"
                )
        if self.cp_plan is not None:
            warn("ParallelismConfig(cp_plan=...) is ignored: what to cut is found in the graph", SettingWarning)

    def strify(self, details: bool = False, text_encoder: bool = False, vae: bool = False) -> str:
        """A short name for logs and files such as "Ulysses2_TP2", with `details` a longer one."""
        names = {"Ulysses": self.ulysses_size, "Ring": self.ring_size, "TP": self.tp_size}
        if details:
            sizes = {"ulysses_size": self.ulysses_size, "ring_size": self.ring_size, "tp_size": self.tp_size}
            words = [f"{name}={size}" for name, size in sizes.items() if size is not None]
            return f"ParallelismConfig({', '.join([f'backend={self.backend}', *words])})"
        flags = {
            "UAA": self.ulysses_anything,
            "F8": self.ulysses_anything and self.ulysses_float8,
            "UF8": self.ulysses_float8 and not self.ulysses_anything,
            "UAS": self.ulysses_async,
        }
        tags = [f"{name}{size}" for name, size in names.items() if size is not None and name != "TP"]
        tags += [name for name, is_set in flags.items() if is_set]
        tags += [f"TP{self.tp_size}"] if self.tp_size is not None else []
        tags += [name for name, is_set in {"TEP": text_encoder, "VAEP": vae}.items() if is_set]
        return "_".join(tags)


_SPELLINGS: dict[str, str | None] = {
    **{name: name for name in NAMES},
    "native": OWN,
    "_native_math": "math",
    **dict.fromkeys(("_native_cudnn", "_sdpa_cudnn"), "cudnn"),
    **dict.fromkeys(("flash_hub", "flash_varlen", "flash_varlen_hub", "flash_4_hub", "_native_flash"), "flash"),
    **dict.fromkeys(("_flash_3", "_flash_varlen_3", "_flash_3_hub", "_flash_3_varlen_hub"), "flash"),
    **dict.fromkeys(("sage_hub", "sage_varlen", "sage_blackwell_hub"), "sage"),
    **dict.fromkeys(("_sage_qk_int8_pv_fp8_cuda", "_sage_qk_int8_pv_fp8_cuda_sm90"), "sage"),
    **dict.fromkeys(("_sage_qk_int8_pv_fp16_cuda", "_sage_qk_int8_pv_fp16_triton"), "sage"),
    **dict.fromkeys(("_native_efficient", "_native_npu", "_native_xla", "aiter_fa2_hub", "xformers")),
}
"""A back end's name, in diffusers' spelling or ours -> our name; None if there is no such one here."""


def checked_backend(name: Any) -> str | None:
    """The name of an attention backend, or None.

    Raises:
        OptionError: if it is no name of a back end, of diffusers or of ours.
    """
    reject_other_package(name, "attention_backend: ")
    check("attention_backend", name, optional(choice(*_SPELLINGS)))
    backend: str | None = name
    return backend


def attention_option(name: str | None) -> dict[str, Any]:
    """The option `attention` that the name of a back end stands for; nothing for None, and for one that we have not."""
    if name is None:
        return {}
    own = _SPELLINGS[name]
    if own is None:
        warn(
            f"attention_backend={name!r} has no effect: cachedit_fx has no such back end; diffusers can switch: "
            f"pipe.transformer.set_attention_backend({name!r})",
            SettingWarning,
        )
        return {}
    return {"attention": None if own == OWN else own}


def set_compile_configs(*_: Any, **settings: Any) -> None:
    """Accepted, without effect: the cached call sets what it needs for itself, and no global setting of torch."""
    warn(
        "set_compile_configs has no effect: cachedit_fx changes no global setting of torch; pass inner_options, mode "
        "or recompile_limit to enable_cache",
        SettingWarning,
    )
