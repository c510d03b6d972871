from preamble import tiny_pipeline

import cachedit_fx.compat as cache_dit

pipe = tiny_pipeline()
for path in ("flat.yaml", "prune.yaml", "whole.yaml"):
    cache_dit.enable_cache(pipe, **cache_dit.load_configs(path))
    output = pipe("a cat", num_inference_steps=12)
    stats = cache_dit.summary(pipe)
    cache_dit.disable_cache(pipe)

cache_config, calibrator_config, *_ = cache_dit.load_configs("whole.yaml", return_dict=False)
