#!/usr/bin/env bash
# A copy of a model compiled in place runs eagerly, with no warning; a copy of `torch.compile(model)` stays compiled.
#
# Versions: torch 2.13.0 (CPU), diffusers 0.42.1, numpy 2.4.6, Python 3.11.
#
# Expected: `model.compile()` and `torch.compile(model)` differ in form only, so copies of both behave the same.
# `model.compile_repeated_blocks()`, which diffusers recommends, is a loop of `block.compile()`.
#
# Seen: `copy.deepcopy` and `pickle` drop the compiled call of `model.compile()` and `compile_repeated_blocks()`.
# The copy gives the same pictures at eager speed. The copy of `torch.compile(model)` runs the compiled code.
# So an averaged copy of the weights (EMA) or a worker's copy silently loses the compiler.
#
# Output: compiled graphs run by original / copy: torch.compile 1 / 1, compile 1 / 0, compile_repeated_blocks 2 / 0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile torch==2.13.0 diffusers==0.42.1 numpy==2.4.6

cat > "$folder/check.py" <<'PY'
import copy
import pickle

import torch
from diffusers import FluxTransformer2DModel

graphs_run = 0


def backend(graph: torch.fx.GraphModule, example_inputs):
    """Runs the captured graph as it is, and counts."""

    def run(*args):
        global graphs_run
        graphs_run += 1
        return graph(*args)

    return run


def model() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()


@torch.no_grad()
def count(transformer: torch.nn.Module) -> int:
    """Compiled graphs that a call runs, after one that compiles."""
    for _ in range(2):
        before = graphs_run
        transformer(
            hidden_states=torch.zeros(1, 4, 4), encoder_hidden_states=torch.zeros(1, 3, 32),
            pooled_projections=torch.zeros(1, 32), timestep=torch.ones(1),
            img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(3, 3),
        )
    return graphs_run - before


wrapped = torch.compile(model(), backend=backend)
in_place, blocks = model(), model()
in_place.compile(backend=backend)
blocks.compile_repeated_blocks(backend=backend)
kinds = {"torch.compile": wrapped, "compile": in_place, "compile_repeated_blocks": blocks}
counts = {name: (count(original), count(copy.deepcopy(original))) for name, original in kinds.items()}
print("compiled graphs run by original / copy:",
      ", ".join(f"{name} {original} / {duplicate}" for name, (original, duplicate) in counts.items()))
assert counts == {"torch.compile": (1, 1), "compile": (1, 0), "compile_repeated_blocks": (2, 0)}
assert count(pickle.loads(pickle.dumps(in_place))) == 0
PY
"$folder/venv/bin/python" -I "$folder/check.py"
