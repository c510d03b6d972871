#!/usr/bin/env bash
# cache-dit: `refresh_context(transformer, enable_taylorseer=True)` fails unless TaylorSeer was on before.
#
# Versions: cache_dit 1.5.3, diffusers 0.42.1, transformers 5.23.0, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11.
#
# Expected: `refresh_context` takes "shorthand cache fields such as `num_inference_steps`" and starts a fresh context
# with them. The same field in a file that `load_configs` reads switches TaylorSeer on.
#
# Seen: the shorthand goes through `load_cache_config(..., reset=True)`: each field that is not named becomes None.
# A calibrator that is new to the context then copies its `calibrator_kwargs`, which is None: an AttributeError.
# `enable_dmd=True` fails too, and `enable_foca=True` works.
# If the calibrator was on before, the fields fall back to the earlier ones, and the same call works.
#
# Output: TaylorSeer by a refresh: AttributeError 'NoneType' object has no attribute 'copy'; on before: refreshed
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile cache_dit==1.5.3 torch==2.13.0 numpy==2.4.6 \
    diffusers==0.42.1 transformers==5.23.0

cat > "$folder/check.py" <<'PY'
import logging

import cache_dit
import torch
from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig
from diffusers import FluxTransformer2DModel

logging.disable(logging.WARNING)


def call(transformer: FluxTransformer2DModel) -> None:
    with torch.no_grad():
        transformer(
            hidden_states=torch.ones(1, 4, 4), encoder_hidden_states=torch.ones(1, 3, 32),
            pooled_projections=torch.ones(1, 32), timestep=torch.ones(1),
            img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(3, 3), return_dict=False,
        )


def outcome(calibrator: TaylorSeerCalibratorConfig | None, **fields) -> str:
    """What becomes of a refresh with these fields, and of the call after it."""
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )
    config = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=1)
    cache_dit.enable_cache(transformer, cache_config=config, calibrator_config=calibrator)
    call(transformer)
    try:
        cache_dit.refresh_context(transformer, **fields)
        call(transformer)
    except AttributeError as error:
        return f"AttributeError {error}"
    return "refreshed"


new = outcome(None, enable_taylorseer=True)
again = outcome(TaylorSeerCalibratorConfig(), enable_taylorseer=True)
print(f"TaylorSeer by a refresh: {new}; on before: {again}")
assert new == "AttributeError 'NoneType' object has no attribute 'copy'" and again == "refreshed"
assert outcome(None, num_inference_steps=6) == "refreshed"
configs = {"cache_config": DBCacheConfig(Fn_compute_blocks=1), "calibrator_config": TaylorSeerCalibratorConfig()}
assert outcome(None, **configs) == "refreshed"
assert outcome(None, enable_dmd=True) == new and outcome(None, enable_foca=True) == "refreshed"
PY
"$folder/venv/bin/python" -I "$folder/check.py"
