import torch
from preamble import tiny_pipeline

import cachedit_fx.compat as cache_dit

pipe = tiny_pipeline()
cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0.5))
pipe.transformer = cache_dit.quantize(
    pipe.transformer, quant_type="float8_weight_only", exclude_layers=["embedder", "embed"]
)
cache_dit.set_compile_configs()
torch._dynamo.config.recompile_limit = 96
torch._dynamo.config.accumulated_recompile_limit = 2048
pipe.transformer = torch.compile(pipe.transformer)
output = pipe("a cat")
stats = cache_dit.summary(pipe)
plain = cache_dit.disable_cache(pipe).transformer
