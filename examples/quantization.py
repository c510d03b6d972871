"""The ladder in pictures: without a cache, with a preset, and with fewer bits on top, at all steps or at some.

  python examples/quantization.py

It draws the bundled model's pictures, and prints PSNR against those without a cache. int8 gains no time at the bundled
model's width of 128: `cachedit bench quantized` has the times at width 1024. int4 is emulated, since no CPU holds it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

import cachedit_fx
from cachedit_fx.bench.demo import PROMPTS
from cachedit_fx.metrics.image import mean_psnr, psnr
from cachedit_fx.report.plots import Strip, save_grid
from cachedit_fx.shapes import generate, load_pipeline

STEPS = 28
PICTURE = Path("runs/quantization.png")
BY_STEP = cachedit_fx.PrecisionConfig("int4_emulated", full_first_steps=STEPS // 2)
RUNGS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "balanced + int8": {"precision": "int8"},
    "balanced + int4": {"precision": "int4_emulated"},
    "balanced + int4\nin the second half": {"precision": BY_STEP},
}


def main() -> None:
    warnings.simplefilter("ignore", cachedit_fx.CacheWarning)
    torch.set_num_threads(1)
    pipe = load_pipeline()
    plain = generate(pipe, PROMPTS, num_inference_steps=STEPS)
    strips = [Strip("without a cache", f"{STEPS} steps", plain, [""] * len(PROMPTS), is_quiet=True)]
    for name, options in RUNGS.items():
        cachedit_fx.enable_cache(pipe, preset="balanced", inner_backend="eager", **options)
        pictures = generate(pipe, PROMPTS, num_inference_steps=STEPS)
        (region,) = cachedit_fx.summary(pipe)
        values = psnr(pictures, plain)
        figures = f"{len(region.cached_steps)} steps reused, {len(region.low_steps)} in low precision"
        print(f"{name.replace(chr(10), ' '):36} {mean_psnr(values):5.1f} dB   {figures}")
        strips.append(Strip(name, figures.replace(", ", "\n"), pictures, [f"{value:.1f} dB" for value in values]))
    PICTURE.parent.mkdir(exist_ok=True)
    save_grid(strips, PROMPTS, PICTURE)
    print(PICTURE)


if __name__ == "__main__":
    main()
