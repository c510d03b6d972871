"""Names of cache-dit that have no counterpart here: they raise, and say what to use."""

from __future__ import annotations

from typing import Any, NoReturn

_OFFLOAD = (
    "layerwise offloading decides which weights are on the device, and cachedit_fx has none; use "
    "pipe.enable_model_cpu_offload(), pipe.enable_sequential_cpu_offload() or diffusers' enable_group_offload"
)
_PROFILER = "cachedit_fx has no profiler of its own; use torch.profiler around the call of the pipeline"


class _Absent:
    """A name that raises NotImplementedError when it is called."""

    def __init__(self, name: str, words: str) -> None:
        self.name, self.words = name, words

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{self.name}: {self.words}")

    def __repr__(self) -> str:
        return f"<{self.name}: not in cachedit_fx>"


LayerwiseOffloadHandle = _Absent("LayerwiseOffloadHandle", _OFFLOAD)
LayerwiseOffloadHandleGroup = _Absent("LayerwiseOffloadHandleGroup", _OFFLOAD)
get_layerwise_offload_handles = _Absent("get_layerwise_offload_handles", _OFFLOAD)
layerwise_cpu_offload = _Absent("layerwise_cpu_offload", _OFFLOAD)
layerwise_offload = _Absent("layerwise_offload", _OFFLOAD)
remove_layerwise_offload = _Absent("remove_layerwise_offload", _OFFLOAD)
ProfilerContext = _Absent("ProfilerContext", _PROFILER)
create_profiler_context = _Absent("create_profiler_context", _PROFILER)
get_profiler_output_dir = _Absent("get_profiler_output_dir", _PROFILER)
profile_function = _Absent("profile_function", _PROFILER)
set_profiler_output_dir = _Absent("set_profiler_output_dir", _PROFILER)
