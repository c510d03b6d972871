from preamble import tiny_pipeline

import cachedit_fx.compat as cache_dit
from cachedit_fx.compat import BlockAdapter, BlockAdapterRegister, ForwardPattern


@BlockAdapterRegister.register("TinyPipeline")
def tiny_adapter(pipe, **kwargs) -> BlockAdapter:
    from cachedit_fx.compat.caching.patch_functors import HiDreamPatchFunctor

    return BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=[pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks],
        forward_pattern=[ForwardPattern.Pattern_0, ForwardPattern.Pattern_3],
        patch_functor=HiDreamPatchFunctor(),
        check_forward_pattern=False,
        **kwargs,
    )


pipe = tiny_pipeline()
count, names = cache_dit.supported_pipelines()
cache_dit.enable_cache(
    pipe, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=0.5)
)
output = pipe("a cat")
stats = cache_dit.summary(pipe)
