"""A pipeline with one cache switched on in it, or none. Everything but the lines that switch it on is the same for all.

Four systems: `uncached`; `cachedit_fx`; `cache-dit`, which patches the pipeline's class, so that a process can try one
configuration only; and `diffusers`, the caches that diffusers brings along itself.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import cachedit_fx
from cachedit_fx.bench.errors import RequestError
from cachedit_fx.bench.rows import CACHE_DIT, DIFFUSERS, OURS, UNCACHED
from cachedit_fx.config.precision import as_precision
from cachedit_fx.metrics.flops import FlopCounter
from cachedit_fx.passes.graph_cost import bytes_of_tensors
from cachedit_fx.quantization.kinds import kind_of
from cachedit_fx.runtime.registry import states_of
from cachedit_fx.runtime.stats import CacheStats

Generate = Callable[[Any, Sequence[str], int, int], torch.Tensor]
"""(pipe, prompts, steps, seed) -> pictures, float [B, 3, H, W] in 0..1; picture i from the noise of seed + i."""

LIBRARIES = ("torch", "diffusers", "transformers")
"""Whose versions must agree between processes for a fair comparison."""


class EntryError(RequestError):
    """A pipeline's `module:function` cannot be used; the message says why."""


@dataclass(frozen=True)
class Setup:
    """What one process is told: plain values, so that it travels as JSON."""

    system: str = UNCACHED
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the system's cache, in the system's own words; see `System`."""
    steps: int = 28
    """Denoising steps of a cached generation, for caches that must be told."""
    entry: str | None = None
    """`module:function` that returns the pipeline; None: the bundled model."""
    guidance: float = 1.0
    """`true_cfg_scale` of the bundled model; an entry's `generate` has its own."""
    inner_backend: str = "eager"
    """What compiles: "eager" (nothing) or "inductor". Peers are compiled by torch.compile."""
    plain: str = "whole"
    """How the uncached model is compiled: "whole", by torch.compile; "pieces", cut as ours is, so that a cache that
    never reuses equals it bit for bit."""
    granularity: str = "block"
    """Ours: what is compiled as one piece."""
    peer_compile: str = "transformer"
    """How cache-dit is compiled: the transformer, as its README says; "transformer-tuned": after its own
    `set_compile_configs`; "blocks": diffusers' `compile_repeated_blocks`."""
    threads: int = 1
    calibration: Sequence[str] = ()
    """Prompts, not among those drawn, for caches that are calibrated first (MagCache)."""


@dataclass
class Drawing:
    """What one call of the pipeline gave."""

    pictures: torch.Tensor
    """float32 [B, 3, H, W] in 0..1."""
    seconds: float
    """Wall time from the prompts to the finished pictures."""
    cpu_seconds: float
    flops: list[int]
    """Of each call of a transformer; empty if they were not counted."""
    cached_steps: list[int] | None = None
    """As the system itself tells them; None if it does not."""
    bytes_held: int | None = None
    """Of stored values, as the system itself tells it; None if it does not."""
    weight_bytes: int | None = None
    """Of the transformers' weights and their quantized copies; None for others than ours and the uncached ones."""
    stats: CacheStats | None = None
    """Ours, of the generation; None for others, and from a process of its own."""


class System:
    """The pipeline of a `Setup`, ready to draw.

    The arguments of `cachedit_fx` are those of `cachedit_fx.enable_cache`; `mask_policy`, for `steps_mask`; and
    `quantize`, a kind or a mapping of the arguments of `cachedit_fx.quantize`. Those of `cache-dit` are the fields of
    its `DBCacheConfig`; `mask_policy` too; and `calibrator`, a name or a mapping of a name and the fields of that
    calibrator's config. Those of `diffusers` are `config`, the name of a class such as `FirstBlockCacheConfig`, and its
    fields.
    """

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self.setup = setup
        self.pipe, self._generate = load_entry(setup.entry, setup.guidance)
        self._quantization: dict[str, Any] = {}
        self._told: Callable[[], dict[str, Any]] = dict
        """The last fields of a `Drawing`."""
        self.enable(setup.arguments)

    def enable(self, arguments: Mapping[str, Any]) -> None:
        """Switch the cache on. Again, with other arguments: ours alone.

        Raises:
            cachedit_fx.OptionError: for arguments that ours does not take; nothing is compiled before.
        """
        switch = {
            UNCACHED: self._enable_nothing,
            OURS: self._enable_cachedit_fx,
            CACHE_DIT: self._enable_cache_dit,
            DIFFUSERS: self._enable_diffusers,
        }[self.setup.system]
        switch(dict(arguments))

    def draw(self, prompts: Sequence[str], steps: int, seed: int, count: bool = False) -> Drawing:
        """Draw a picture for each prompt; `count` the FLOPs of the transformers' calls too, which takes time."""
        calls: list[int] = []
        with _counted(self.pipe, calls) if count else contextlib.nullcontext():
            wall, cpu = time.perf_counter(), time.process_time()
            pictures = self._generate(self.pipe, prompts, steps, seed)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Drawing(pictures.detach().float().cpu(), wall, cpu, calls, **self._told())

    def _enable_nothing(self, arguments: dict[str, Any]) -> None:
        if self.setup.inner_backend != "eager":
            if self.setup.plain == "pieces":
                cachedit_fx.enable_cache(self.pipe, cache=None, **self._own_options())
            else:
                for module in _transformers(self.pipe):
                    module.compile(backend=self.setup.inner_backend, dynamic=False)
        self._told = lambda: {"cached_steps": [], "bytes_held": 0, "weight_bytes": self._weight_bytes()}

    def _weight_bytes(self) -> int:
        modules = _transformers(self.pipe)
        copies = [state.copies for module in modules for state in states_of(module) if state.copies is not None]
        weights = sum(bytes_of_tensors([*module.parameters(), *module.buffers()]) for module in modules)
        return weights + sum(each.bytes_held for each in copies)

    def _quantize(self, wanted: dict[str, Any]) -> None:
        """Quantize a pipeline that is loaded anew: quantized layers have lost their weights."""
        if wanted == self._quantization:
            return
        self.pipe, self._generate = load_entry(self.setup.entry, self.setup.guidance)
        if wanted:
            cachedit_fx.quantize(self.pipe, **wanted)
        self._quantization = wanted

    def _own_options(self) -> dict[str, Any]:
        return {
            "inner_backend": self.setup.inner_backend,
            "granularity": self.setup.granularity,
            "dynamic": False,
        }

    def _enable_cachedit_fx(self, arguments: dict[str, Any]) -> None:
        self._quantize(_quantization_in(arguments))
        cachedit_fx.enable_cache(self.pipe, **(self._own_options() | _with_mask(arguments, self.setup.steps)))

        def told() -> dict[str, Any]:
            regions = cachedit_fx.summary(self.pipe)
            stats = regions[0] if regions else None
            held = sum(region.bytes_held for region in regions)
            cached = stats.cached_steps if stats else []
            return {"cached_steps": cached, "bytes_held": held, "weight_bytes": self._weight_bytes(), "stats": stats}

        self._told = told

    def _enable_cache_dit(self, arguments: dict[str, Any]) -> None:
        import cache_dit

        calibrator = arguments.pop("calibrator", None)
        if "mask_policy" in arguments:
            policy = arguments.pop("mask_policy")
            arguments["steps_computation_mask"] = cache_dit.steps_mask(mask_policy=policy, total_steps=self.setup.steps)
        if calibrator is not None:
            fields = {"name": calibrator} if isinstance(calibrator, str) else dict(calibrator)
            kinds = {"taylorseer": "TaylorSeer", "foca": "FoCa", "dmd": "DMD"}
            made = getattr(cache_dit, f"{kinds[fields.pop('name')]}CalibratorConfig")
            calibrator = made(**fields)
        if self.setup.guidance > 1:  # the bundled model is called twice a step, which cache-dit must be told
            arguments.setdefault("enable_separate_cfg", True)
        config = cache_dit.DBCacheConfig(**arguments)
        cache_dit.enable_cache(self.pipe, cache_config=config, calibrator_config=calibrator)
        cached = self.pipe.transformer
        if self.setup.inner_backend != "eager":
            if self.setup.peer_compile == "transformer-tuned":
                cache_dit.set_compile_configs()
            else:
                # The limits that its README names: its graph breaks compile some functions many times over.
                torch._dynamo.config.recompile_limit = 96
                torch._dynamo.config.accumulated_recompile_limit = 2048
            if self.setup.peer_compile == "blocks":
                self.pipe.transformer.compile_repeated_blocks(dynamic=False)
            else:
                self.pipe.transformer = torch.compile(self.pipe.transformer, dynamic=False)
        self._told = lambda: {"cached_steps": list(cache_dit.summary(cached, logging=False)[0].cached_steps)}

    def _enable_diffusers(self, arguments: dict[str, Any]) -> None:
        from diffusers import hooks

        make = getattr(hooks, arguments.pop("config"))
        if make is hooks.MagCacheConfig:
            arguments |= {"num_inference_steps": self.setup.steps, "mag_ratios": self._magnitude_ratios(make)}
        if make is hooks.TaylorSeerCacheConfig:
            arguments.setdefault("taylor_factors_dtype", torch.float32)
        for module in _transformers(self.pipe):
            module.enable_cache(make(**arguments))
            if self.setup.inner_backend != "eager":
                module.compile(backend=self.setup.inner_backend, dynamic=False)

    def _magnitude_ratios(self, make: Callable[..., Any]) -> list[float]:
        """MagCache's ratios by its own calibration mode, the mean over `Setup.calibration`; it prints them."""
        printed = io.StringIO()
        for seed, prompt in enumerate(self.setup.calibration):
            for module in _transformers(self.pipe):
                module.enable_cache(make(calibrate=True, num_inference_steps=self.setup.steps))
            with contextlib.redirect_stdout(printed):
                self._generate(self.pipe, [prompt], self.setup.steps, CALIBRATION_SEED + seed)
            for module in _transformers(self.pipe):
                module.disable_cache()
        found = [json.loads(line) for line in printed.getvalue().splitlines() if line.startswith("[1.0")]
        return [sum(step) / len(step) for step in zip(*found, strict=True)]


def check_arguments(arguments: Mapping[str, Any], steps: int) -> None:
    """Check a row of ours without a pipeline.

    Raises:
        cachedit_fx.OptionError: as `enable_cache` and `quantize` do. What depends on the model is not checked.
    """
    arguments = dict(arguments)
    kind = _quantization_in(arguments).get("quant_type")
    if kind is not None:
        kind_of(kind)
    as_precision(arguments.pop("precision", None))  # its layers are the model's
    cachedit_fx.enable_cache(_AnyModel(), **({"inner_backend": "eager"} | _with_mask(arguments, steps)))


class _AnyModel(torch.nn.Module):
    """A model that may have any input."""

    def forward(self, **inputs: Any) -> None:
        """Is never called."""


def _quantization_in(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of `cachedit_fx.quantize` out of a row's; empty if nothing is quantized."""
    wanted = arguments.pop("quantize", {})
    if not isinstance(wanted, Mapping):
        return {"quant_type": wanted}
    return {"quant_type": None, **wanted} if wanted else {}


def _with_mask(arguments: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The arguments, with the mask that `mask_policy` stands for."""
    result = dict(arguments)
    if "mask_policy" in result:
        result["steps_computation_mask"] = cachedit_fx.steps_mask(result.pop("mask_policy"), steps)
    return result


CALIBRATION_SEED = 1_000_000
"""Of the noise that peers are calibrated on: never that of a picture that counts."""


def load_entry(entry: str | None, guidance: float = 1.0) -> tuple[Any, Generate]:
    """The pipeline that `module:function` returns, and how it draws; for None the bundled model.

    The function returns a pipeline, or an object with `pipe` and `generate` (see `Generate`). A pipeline by itself is
    called as `pipe(prompt=..., num_inference_steps=..., generator=[...], output_type="pt").images`.

    Raises:
        EntryError: if there is no such module or function, or it returned something else.
    """
    if entry is None:
        from cachedit_fx.shapes import generate, load_pipeline

        def draw(pipe: Any, prompts: Sequence[str], steps: int, seed: int) -> torch.Tensor:
            return generate(pipe, prompts, steps, seed, true_cfg_scale=guidance)

        return load_pipeline(), draw
    module, name = _parts_of(entry)
    try:
        function = getattr(importlib.import_module(module), name)
        if not callable(function):
            raise ValueError(f"{name} is a {type(function).__name__}")
        made = function()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise _no_pipeline(entry, error) from error
    if hasattr(made, "pipe") and callable(getattr(made, "generate", None)):
        return made.pipe, made.generate
    if hasattr(made, "components") and callable(made):
        obstacle = _obstacle_to_prompts(made)
        if obstacle:
            raise EntryError(f"the pipeline of {entry!r} {obstacle}, so it cannot draw prompts. {OWN_WAY}")
        return made, _call_pipeline
    raise EntryError(
        f"{entry!r} returned a {type(made).__name__}: return a diffusers pipeline, or an object with `pipe` and "
        "`generate(pipe, prompts, steps, seed)`, which returns float pictures [B, 3, H, W] in 0..1"
    )


def check_entry(entry: str) -> None:
    """Raise `EntryError` if there is no module that `load_entry` could import. The module itself is not imported."""
    module, name = _parts_of(entry)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, AttributeError, ValueError) as error:
        raise _no_pipeline(entry, error) from error
    if spec is None or not name:
        raise _no_pipeline(entry, f"no module named {module!r}" if spec is None else "no function is named")


def _parts_of(entry: str) -> tuple[str, str]:
    """The names of module and function. Modules are found in the current folder too, as under `python -m`."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, name = entry.partition(":")
    return module, name


def _no_pipeline(entry: str, reason: object) -> EntryError:
    return EntryError(
        f"{entry!r} gives no pipeline ({reason}): name a function as MODULE:FUNCTION, in the current folder or "
        "installed, that takes no arguments and returns a pipeline"
    )


OWN_WAY = (
    "Return an object with `pipe` and `generate(pipe, prompts, steps, seed)` instead. `generate` calls the pipeline in "
    "its own way, such as with prompt_embeds that were made before, and returns float pictures [B, 3, H, W] in 0..1. "
    "--prompts then only sets the number of pictures and their names"
)


def _obstacle_to_prompts(pipe: Any) -> str | None:
    """Why the pipeline cannot be called with prompts; None if nothing is known against it."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "prompt" not in parameters and all(x.kind is not inspect.Parameter.VAR_KEYWORD for x in parameters.values()):
        return "takes no `prompt`"
    encoders = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
    if encoders and all(part is None for part in encoders.values()):
        return f"has no text encoder ({', '.join(encoders)}: None)"
    return None


def _call_pipeline(pipe: Any, prompts: Sequence[str], steps: int, seed: int) -> torch.Tensor:
    noises = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    pictures: torch.Tensor = pipe(
        prompt=list(prompts), num_inference_steps=steps, generator=noises, output_type="pt"
    ).images
    return pictures


def _transformers(pipe: Any) -> list[Any]:
    from cachedit_fx.runtime.registry import transformers_of

    return transformers_of(pipe)


class _CountedCall:
    """Makes a call, and appends its FLOPs to `flops`."""

    def __init__(self, call: Callable[..., Any], flops: list[int]) -> None:
        self._call, self._flops = call, flops
        self.state = getattr(call, "state", None)
        """The cached call's. Without it `registry.put_back` would take this call for one that replaces ours."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with FlopCounter() as counter:
            result = self._call(*args, **kwargs)
        self._flops.append(counter.flops)
        return result


@contextlib.contextmanager
def _counted(pipe: Any, calls: list[int]) -> Iterator[None]:
    """Append the FLOPs of every call of the pipeline's transformers; what runs around them is not counted."""
    modules = _transformers(pipe)
    before = [module._compiled_call_impl for module in modules]

    # The one place that `Module.__call__` looks at first, whatever hooks or patched forwards come behind it.
    for module in modules:
        module._compiled_call_impl = _CountedCall(module._compiled_call_impl or module._call_impl, calls)
    try:
        yield
    finally:
        for module, call in zip(modules, before, strict=True):
            module._compiled_call_impl = call
