from preamble import tiny_pipeline

import cachedit_fx.compat as cache_dit
from cachedit_fx.compat import BlockAdapter, DBCacheConfig, ForwardPattern, ParamsModifier

pipe = tiny_pipeline()
cache_dit.enable_cache(
    BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=[pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks],
        forward_pattern=[ForwardPattern.Pattern_0, ForwardPattern.Pattern_3],
        check_forward_pattern=False,
    ),
    cache_config=DBCacheConfig(max_warmup_steps=3, Fn_compute_blocks=1),
    params_modifiers=[
        ParamsModifier(cache_config=DBCacheConfig().reset(Fn_compute_blocks=2, residual_diff_threshold=0.4)),
        ParamsModifier(cache_config=DBCacheConfig().reset(Fn_compute_blocks=1, residual_diff_threshold=0.8)),
    ],
)
output = pipe("a cat")
stats = cache_dit.summary(pipe)
