from preamble import tiny_experts

import cachedit_fx.compat as cache_dit
from cachedit_fx.compat import BlockAdapter, DBCacheConfig, ForwardPattern, ParamsModifier

pipe = tiny_experts()
cache_dit.enable_cache(
    BlockAdapter(
        pipe=pipe,
        transformer=[pipe.transformer, pipe.transformer_2],
        blocks=[pipe.transformer.transformer_blocks, pipe.transformer_2.transformer_blocks],
        forward_pattern=[ForwardPattern.Pattern_0, ForwardPattern.Pattern_0],
        params_modifiers=[
            ParamsModifier(cache_config=DBCacheConfig().reset(max_warmup_steps=2, max_cached_steps=8)),
            ParamsModifier(cache_config=DBCacheConfig().reset(max_warmup_steps=1, max_cached_steps=20)),
        ],
        has_separate_cfg=False,
        check_forward_pattern=False,
    ),
    cache_config=DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0.5),
)
output = pipe("a cat")
stats = cache_dit.summary(pipe)
