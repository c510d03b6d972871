"""The modules of `cache_dit.caching` that scripts import from."""
