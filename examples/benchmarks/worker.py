"""One system under test, in a process of its own: requests come in as JSON lines, answers go out as JSON lines.

    compare_cache_dit.py ── {"prompt": ..., "seed": 3, "steps": 28} ──► worker.py --system cache-dit --threshold 0.12
                         ◄─ {"seconds": 0.41, "cached_steps": [10, 12], "picture": ...} ──

A process each, because cache-dit patches the pipeline's class. Everything but the line that enables the cache is the
same for all systems: model, pipeline, threads, clock. Not to be run by hand; runs in any environment that has
cachedit_fx's requirements (and, for `--system cache-dit`, cache-dit).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

FIRST_BLOCKS, LAST_BLOCKS, WARMUP_STEPS = 1, 0, 4
"""F, B and W of every cached row."""


def main() -> None:
    arguments = _parse()
    # Answers get the real standard output to themselves: whatever libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        system = System(arguments)
    except Exception as error:  # every cause is the driver's to report
        _answer(answers, {"error": repr(error), "traceback": traceback.format_exc()})
        return
    _answer(answers, {"ready": True, "versions": system.versions()})
    for line in sys.stdin:
        try:
            _answer(answers, system.generate(**json.loads(line)))
        except Exception as error:
            _answer(answers, {"error": repr(error), "traceback": traceback.format_exc()})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", choices=("uncached", "cachedit_fx", "cache-dit"), required=True)
    parser.add_argument("--threshold", type=float, default=0.0)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--peer-compile", choices=("transformer", "transformer-tuned", "blocks"), default="transformer")
    parser.add_argument("--granularity", choices=("block", "region"), default="block")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _answer(answers: Any, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


class System:
    """The bundled model's pipeline with one cache, or none, switched on in it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch

        torch.set_num_threads(arguments.threads)
        from cachedit_fx.shapes.pipeline import generate, load_pipeline

        self._generate = generate
        self.pipe = load_pipeline(torch.float32)
        enable: Callable[[argparse.Namespace], Callable[[], list[int]]] = {
            "uncached": self._enable_nothing,
            "cachedit_fx": self._enable_cachedit_fx,
            "cache-dit": self._enable_cache_dit,
        }[arguments.system]
        self._cached_steps = enable(arguments)

    def generate(self, prompt: str, seed: int, steps: int, count_flops: bool = False) -> dict[str, Any]:
        """Draw one picture. The clock runs from the prompt's encoding to the finished picture."""
        counter = _flop_counter() if count_flops else None
        wall, cpu = time.perf_counter(), time.process_time()
        if counter is not None:
            with counter:
                picture = self._generate(self.pipe, [prompt], num_inference_steps=steps, seed=seed)
        else:
            picture = self._generate(self.pipe, [prompt], num_inference_steps=steps, seed=seed)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {
            "seconds": wall,
            "cpu_seconds": cpu,
            "cached_steps": self._cached_steps(),
            "flops": counter.total if counter is not None else None,
            "picture": base64.b64encode(picture.numpy().tobytes()).decode(),
        }

    def versions(self) -> dict[str, str]:
        """What ran: the driver compares them between the environments."""
        from importlib.metadata import PackageNotFoundError, version

        found = {"python": platform.python_version()}
        for name in ("torch", "diffusers", "transformers", "cache_dit"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        return found

    def _enable_nothing(self, arguments: argparse.Namespace) -> Callable[[], list[int]]:
        if arguments.compiled:
            self.pipe.transformer.compile(dynamic=False)
        return list

    def _enable_cachedit_fx(self, arguments: argparse.Namespace) -> Callable[[], list[int]]:
        import cachedit_fx

        config = cachedit_fx.DBCacheConfig(
            Fn_compute_blocks=FIRST_BLOCKS,
            Bn_compute_blocks=LAST_BLOCKS,
            max_warmup_steps=WARMUP_STEPS,
            residual_diff_threshold=arguments.threshold,
        )
        inner = "inductor" if arguments.compiled else "eager"
        cachedit_fx.enable_cache(
            self.pipe, config, inner_backend=inner, granularity=arguments.granularity, dynamic=False
        )
        return lambda: cachedit_fx.summary(self.pipe)[0].cached_steps

    def _enable_cache_dit(self, arguments: argparse.Namespace) -> Callable[[], list[int]]:
        import cache_dit
        import torch

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=FIRST_BLOCKS,
            Bn_compute_blocks=LAST_BLOCKS,
            max_warmup_steps=WARMUP_STEPS,
            residual_diff_threshold=arguments.threshold,
        )
        cache_dit.enable_cache(self.pipe, cache_config=config)
        cached = self.pipe.transformer
        if arguments.compiled:
            if arguments.peer_compile == "transformer-tuned":
                cache_dit.set_compile_configs()
            else:
                # The limits that its README names: its graph breaks compile some functions many times over.
                torch._dynamo.config.recompile_limit = 96
                torch._dynamo.config.accumulated_recompile_limit = 2048
            if arguments.peer_compile == "blocks":
                self.pipe.transformer.compile_repeated_blocks(dynamic=False)
            else:
                self.pipe.transformer = torch.compile(self.pipe.transformer, dynamic=False)
        return lambda: list(cache_dit.summary(cached, logging=False)[0].cached_steps)


def _flop_counter() -> Any:
    """Sums the FLOPs of what runs below it. torch's own FlopCounterMode makes dynamo refuse to run compiled code."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):
        total = 0

        @classmethod
        def ignore_compile_internals(cls) -> bool:
            return True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            formula = flop_registry.get(getattr(func, "_overloadpacket", None))
            if formula is not None:
                self.total += formula(*args, **(kwargs or {}), out_val=result)
            return result

    with torch.no_grad():
        return Counter()


if __name__ == "__main__":
    main()
