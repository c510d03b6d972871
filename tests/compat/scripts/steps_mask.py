from preamble import tiny_pipeline

import cachedit_fx.compat as cache_dit
from cachedit_fx.compat import DBCacheConfig, FoCaCalibratorConfig

pipe = tiny_pipeline()
for policy, mask in (
    ("static", cache_dit.steps_mask(mask_policy="fast", total_steps=12)),
    ("dynamic", cache_dit.steps_mask(compute_bins=[4, 1, 1], cache_bins=[2, 2, 2])),
):
    cache_dit.enable_cache(
        pipe,
        cache_config=DBCacheConfig(
            Fn_compute_blocks=1,
            residual_diff_threshold=0.5,
            steps_computation_mask=mask,
            steps_computation_policy=policy,
        ),
        calibrator_config=FoCaCalibratorConfig(),
    )
    output = pipe("a cat", num_inference_steps=12)
    stats = cache_dit.summary(pipe)
    cache_dit.disable_cache(pipe)
