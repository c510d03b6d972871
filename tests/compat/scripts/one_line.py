from preamble import tiny_pipeline

import cachedit_fx.compat as cache_dit

pipe = tiny_pipeline()
cache_dit.enable_cache(pipe)  # F8: both lists of the tiny model are shorter, so nothing is bypassed
output = pipe("a cat")
cache_dit.disable_cache(pipe)

cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0.5))
output = pipe("a cat")
stats = cache_dit.summary(pipe)
