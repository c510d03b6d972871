"""The shortest use: a pipeline, one line, a picture, and what the cache did.

  python examples/quickstart.py

A pipeline of your own takes the same line, and no adapter for its model:

  pipe = DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")
  cachedit_fx.enable_cache(pipe)
  image = pipe("a lighthouse in a storm", num_inference_steps=28).images[0]
  cachedit_fx.summary(pipe, details=True)

Without arguments the first 8 blocks decide, 8 steps warm up, the threshold is 0.08, and a cached step repeats what was
stored: cautious values for models of some 57 blocks. The bundled model has 18, so here the first one decides; and a
cached step continues the trend of the computed ones (TaylorSeer), which is nearly always the better thing to do.
"""

from pathlib import Path

from PIL import Image

import cachedit_fx
from cachedit_fx.shapes import generate, load_pipeline, to_uint8

PROMPT = "a large red circle at the center on white"
PICTURE = Path("runs/quickstart.png")


def main() -> None:
    pipe = load_pipeline()
    policy = cachedit_fx.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=0.12)
    cachedit_fx.enable_cache(pipe, policy, cachedit_fx.TaylorSeerCalibratorConfig())

    pictures = generate(pipe, [PROMPT], num_inference_steps=28)

    (region,) = cachedit_fx.summary(pipe, details=True)
    PICTURE.parent.mkdir(exist_ok=True)
    pixels = to_uint8(pictures[0]).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).resize((256, 256), Image.Resampling.NEAREST).save(PICTURE)
    print(f"{PICTURE}: {PROMPT}; cached steps: {region.cached_steps}")


if __name__ == "__main__":
    main()
