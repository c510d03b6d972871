from preamble import tiny_pipeline

import cachedit_fx.compat as cache_dit
from cachedit_fx.compat import BlockAdapter, ForwardPattern

pipe = tiny_pipeline()
cache_dit.enable_cache(
    BlockAdapter(
        transformer=pipe.transformer,
        blocks=pipe.transformer.transformer_blocks,
        forward_pattern=ForwardPattern.Pattern_0,
        check_forward_pattern=False,
    ),
    **cache_dit.load_configs({"cache_config": {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.5}}),
)
for steps in (12, 20):
    settings = {"cache_config": {"num_inference_steps": steps, "max_warmup_steps": 2}}
    cache_dit.refresh_context(pipe.transformer, **cache_dit.load_configs(settings, reset=True), verbose=True)
    output = pipe("a cat", num_inference_steps=steps)
    stats = cache_dit.summary(pipe.transformer)
