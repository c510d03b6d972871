import torch
from preamble import WIDTH, tiny_transformer

import cachedit_fx.compat as cache_dit
from cachedit_fx.compat import BlockAdapter, DBCacheConfig, ForwardPattern

transformer = tiny_transformer()
cache_dit.enable_cache(
    BlockAdapter(
        transformer=transformer,
        blocks=transformer.transformer_blocks,
        forward_pattern=ForwardPattern.Pattern_0,
        check_forward_pattern=False,
    ),
    cache_config=DBCacheConfig(
        Fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=0.5, num_inference_steps=10
    ),
)
torch.manual_seed(0)
latents, text = torch.randn(1, 6, WIDTH), torch.randn(1, 3, WIDTH)
with torch.no_grad():
    for step in range(10):
        latents = latents - 0.1 * transformer(latents, text, torch.tensor([1000.0 - 100 * step]))
stats = cache_dit.summary(transformer)
