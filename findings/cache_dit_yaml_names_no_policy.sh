#!/usr/bin/env bash
# cache-dit: `cache_type` in a YAML file passes the loader and fails in `enable_cache`, so no file can ask for DBPrune.
#
# Versions: cache_dit 1.5.3, diffusers 0.42.1, transformers 5.23.0, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11.
#
# Expected: `load_configs` reads the policy's name from the field `cache_type`: it compares the name with "DBCache" and
# "DBPrune", makes a config of the class that is named, and refuses other names. `enable_cache` takes what it returns.
#
# Seen: the loader then writes the string over the enum that the class has. `enable_cache` compares with the enum alone
# and raises "Unsupported cache_type: DBCache", naming a type that is supported. "DBPrune" fails in the same way.
# The field may be left out for DBCache. Nothing else in a file selects DBPrune.
#
# Output: none: enabled; DBCache: "Unsupported cache_type: DBCache."; DBPrune: "Unsupported cache_type: DBPrune."
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile cache_dit==1.5.3 torch==2.13.0 numpy==2.4.6 \
    diffusers==0.42.1 transformers==5.23.0

cat > "$folder/check.py" <<'PY'
import logging
import pathlib
import sys

import cache_dit
from diffusers import FluxTransformer2DModel

logging.disable(logging.WARNING)

FILE = """
cache_config:
  max_warmup_steps: 4
  Fn_compute_blocks: 1
  residual_diff_threshold: 0.12
"""


def outcome(cache_type: str | None) -> str:
    """What `enable_cache` says to the file with this type."""
    path = pathlib.Path(sys.argv[1]) / "cache.yaml"
    path.write_text(FILE + (f"  cache_type: {cache_type}\n" if cache_type else ""))
    configs = cache_dit.load_configs(str(path))
    if cache_type is not None:
        assert isinstance(configs["cache_config"], getattr(cache_dit, f"{cache_type}Config"))
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )
    try:
        cache_dit.enable_cache(transformer, **configs)
    except ValueError as error:
        return str(error)
    return "enabled"


without, dbcache, dbprune = outcome(None), outcome("DBCache"), outcome("DBPrune")
print(f'none: {without}; DBCache: "{dbcache}"; DBPrune: "{dbprune}"')
assert without == "enabled"
assert dbcache == "Unsupported cache_type: DBCache." and dbprune == "Unsupported cache_type: DBPrune."
assert str(cache_dit.DBCacheConfig().cache_type) == "DBCache" and cache_dit.cache_type("DBPrune").name == "DBPrune"
PY
"$folder/venv/bin/python" -I "$folder/check.py" "$folder"
