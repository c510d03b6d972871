from preamble import tiny_pipeline

import cachedit_fx.compat as cache_dit
from cachedit_fx.compat import DBCacheConfig, TaylorSeerCalibratorConfig

pipe = tiny_pipeline()
cache_dit.enable_cache(
    pipe,
    cache_config=DBCacheConfig(
        max_warmup_steps=3,
        max_cached_steps=-1,
        Fn_compute_blocks=1,
        Bn_compute_blocks=1,
        residual_diff_threshold=0.5,
    ),
    calibrator_config=TaylorSeerCalibratorConfig(taylorseer_order=1),
)
output = pipe("a cat")
stats = cache_dit.summary(pipe, details=True)
name = f"cat.{cache_dit.strify(pipe)}.png"
