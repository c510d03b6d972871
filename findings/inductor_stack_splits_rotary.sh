#!/usr/bin/env bash
# Rotary embeddings written by `stack` take inductor three kernels, and half as many bytes again as written by `flip`.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6, setuptools 80.9.0, Python 3.11.
#
# Expected: (-b, a) for each pair (a, b) of a row is a read in another order, so it is computed within the kernel that
# adds it up, as other element-wise operations are.
#
# Seen: `torch.stack([-b, a], -1)` is stored in memory, one kernel for each part. An RMS norm and the rotary embedding
# after it become three kernels. The same numbers by `flip` and two signs become two, and move a third fewer bytes. Both
# give equal results. Models of diffusers have the first form (FLUX, HunyuanVideo, LTX, CogVideoX).
#
# Output: stack: 3 kernels, 1449984 bytes; flip: 2 kernels, 925696 bytes; equal: True
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile torch==2.13.0 numpy==2.4.6 setuptools==80.9.0

cat > "$folder/check.py" <<'PY'
import logging

import torch
from torch._inductor import compile_fx, metrics

TOKENS, HEADS, HEAD = 256, 4, 64
compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # inductor counts bytes only if it logs them
compile_fx.inductor_metrics_log.propagate = False


def stacked(pairs):
    a, b = pairs.unbind(-1)
    return torch.stack([-b, a], -1)


def flipped(pairs):
    return pairs.flip(-1) * (2 * torch.arange(2, dtype=pairs.dtype) - 1)


def rotary(turn):
    def function(x, cos, sin):
        x = torch.nn.functional.rms_norm(x, (HEAD,), eps=1e-6)
        return x * cos + turn(x.unflatten(-1, (-1, 2))).flatten(-2) * sin

    return function


torch.manual_seed(0)
arguments = torch.randn(1, TOKENS, HEADS, HEAD), torch.randn(1, TOKENS, 1, HEAD), torch.randn(1, TOKENS, 1, HEAD)
found, results = {}, []
for name, turn in (("stack", stacked), ("flip", flipped)):
    torch._dynamo.reset()
    metrics.reset()
    results.append(torch.compile(rotary(turn), dynamic=False)(*arguments))
    found[name] = len(metrics.nodes_num_elem), metrics.num_bytes_accessed
equal = torch.equal(*results)
print("; ".join(f"{name}: {kernels} kernels, {size} bytes" for name, (kernels, size) in found.items()), end="")
print(f"; equal: {equal}")
assert found["stack"][0] == 3 and found["flip"][0] == 2 and equal
assert found["flip"][1] < 0.7 * found["stack"][1]
PY
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/check.py" 2>/dev/null
