from preamble import tiny_pipeline

import cachedit_fx.compat as cache_dit
from cachedit_fx.compat import DBPruneConfig

pipe = tiny_pipeline()
cache_dit.enable_cache(
    pipe,
    cache_config=DBPruneConfig(
        max_warmup_steps=3,
        Fn_compute_blocks=1,
        Bn_compute_blocks=1,
        residual_diff_threshold=0.5,
        enable_dynamic_prune_threshold=True,
        non_prune_block_ids=list(range(1, 2)),
    ),
)
output = pipe("a cat")
stats = cache_dit.summary(pipe)
ratio = stats[0].pruned_ratio
