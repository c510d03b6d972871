from preamble import tiny_pipeline

import cachedit_fx.compat as cache_dit

pipe = tiny_pipeline()
cache_dit.enable_cache(
    pipe,
    Fn_compute_blocks=1,
    max_warmup_steps=3,
    residual_diff_threshold=0.5,
    enable_taylorseer=True,
    enable_encoder_taylorseer=True,
    taylorseer_cache_type="residual",
    taylorseer_order=2,
)
output = pipe("a cat")
stats = cache_dit.summary(pipe)
