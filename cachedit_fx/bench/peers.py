"""Peers on the FLUX of `cachedit_fx.bench.flux`: what start-up, overhead and shared samples are compared with."""

from __future__ import annotations

from typing import Any


def cache_dit(module: Any, steps: int, first: int) -> None:
    """Let cache-dit 1.5.3 reuse at every step of `steps` but the first, `first` blocks being computed at each. It
    patches the module, which is still to be compiled."""
    import cache_dit as peer

    patterns = [peer.ForwardPattern.Pattern_1, peer.ForwardPattern.Pattern_1]
    adapter = peer.BlockAdapter(
        transformer=module,
        blocks=[module.transformer_blocks, module.single_transformer_blocks],
        forward_pattern=patterns,
    )
    config = peer.DBCacheConfig(
        Fn_compute_blocks=first, max_warmup_steps=1, residual_diff_threshold=10.0, num_inference_steps=steps
    )
    peer.enable_cache(adapter, cache_config=config)


def cache_dit_ulysses(module: Any, ranks: int) -> None:
    """Let all ranks share each sample by cache-dit 1.5.3's Ulysses, without a cache. It patches the module, which is
    still to be compiled."""
    import cache_dit as peer
    import einops  # noqa: F401 - without it cache-dit says that it does not know the model

    peer.enable_cache(module, parallelism_config=peer.ParallelismConfig(ulysses_size=ranks))
