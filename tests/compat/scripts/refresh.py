from preamble import tiny_pipeline

import cachedit_fx.compat as cache_dit
from cachedit_fx.compat import BlockAdapter, DBCacheConfig, ForwardPattern

pipe = tiny_pipeline()
cache_dit.enable_cache(
    BlockAdapter(
        transformer=pipe.transformer,
        blocks=pipe.transformer.transformer_blocks,
        forward_pattern=ForwardPattern.Pattern_0,
        check_forward_pattern=False,
    ),
    cache_config=DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=3, num_inference_steps=None),
)
cache_dit.refresh_context(pipe.transformer, num_inference_steps=12, verbose=True)
output = pipe("a cat", num_inference_steps=12)
stats = cache_dit.summary(pipe.transformer)

cache_dit.refresh_context(
    pipe.transformer,
    cache_config=DBCacheConfig(
        Fn_compute_blocks=1,
        residual_diff_threshold=0.5,
        max_warmup_steps=2,
        max_cached_steps=20,
        max_continuous_cached_steps=4,
        num_inference_steps=20,
    ),
    verbose=True,
)
output = pipe("a cat", num_inference_steps=20)
stats = cache_dit.summary(pipe.transformer)
