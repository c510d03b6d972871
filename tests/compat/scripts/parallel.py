import torch.distributed as dist
from preamble import tiny_pipeline

import cachedit_fx.compat as cache_dit
from cachedit_fx.compat import DBCacheConfig, ParallelismConfig

# torchrun --nproc_per_node=2 parallel.py
if not dist.is_initialized():
    dist.init_process_group(backend="gloo")
pipe = tiny_pipeline()
cache_dit.enable_cache(
    pipe,
    cache_config=DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=0.5),
    parallelism_config=ParallelismConfig(
        ulysses_size=2,
        parallel_kwargs={"experimental_ulysses_anything": True, "attention_backend": "_native_math"},
    ),
)
cache_dit.set_attn_backend(pipe, "flash")
output = pipe("a cat")
stats = cache_dit.summary(pipe)
