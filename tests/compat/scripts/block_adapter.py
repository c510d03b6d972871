from preamble import tiny_pipeline

import cachedit_fx.compat as cache_dit
from cachedit_fx.compat import BlockAdapter, DBCacheConfig, ForwardPattern

pipe = tiny_pipeline()
cache_dit.enable_cache(
    BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=pipe.transformer.transformer_blocks,
        forward_pattern=ForwardPattern.Pattern_0,
        check_forward_pattern=False,
    ),
    cache_config=DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=0.5),
)
output = pipe("a cat")
stats = cache_dit.summary(pipe)
