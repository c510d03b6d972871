#!/usr/bin/env bash
# Compiled attention turns the NaN of a fully masked row into zeros, if scores are divided, and not if multiplied.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11; g++ to compile.
#
# Expected: softmax of a row of -inf is NaN, so softmax(q k^T / 4 + mask) v is NaN where the mask removes all keys.
# Compiled code gives NaN in the same places, whichever way the scale is written.
#
# Seen: inductor recognises softmax(q k^T / 4 + mask) v and puts its own attention in its place, which gives 0 there.
# The other rows are right. With q k^T * 0.25, with `masked_fill`, or if the weights are returned too, NaN stays.
# The "aot_eager" backend keeps NaN. So a padding fault that eager mode shows is gone once the model is compiled.
#
# Output: NaN of 256 results: eager 32, aot_eager 32; inductor: divided 0, multiplied 32, masked_fill 32, with weights 32
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile torch==2.13.0 numpy==2.4.6

cat > "$folder/check.py" <<'PY'
import torch


def divided(q, k, v, mask):
    return torch.softmax(q @ k.transpose(-2, -1) / 4.0 + mask, dim=-1) @ v


def multiplied(q, k, v, mask):
    return torch.softmax(q @ k.transpose(-2, -1) * 0.25 + mask, dim=-1) @ v


def filled(q, k, v, mask):
    return torch.softmax((q @ k.transpose(-2, -1) / 4.0).masked_fill(mask < 0, -torch.inf), dim=-1) @ v


def with_weights(q, k, v, mask):
    weights = torch.softmax(q @ k.transpose(-2, -1) / 4.0 + mask, dim=-1)
    return weights @ v, weights


torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
mask = torch.zeros(1, 1, 8, 8)
mask[..., 3, :] = -torch.inf  # query 3 sees no key


@torch.no_grad()
def result(function) -> torch.Tensor:
    attention = function(q, k, v, mask)
    return attention[0] if isinstance(attention, tuple) else attention


forms = [divided, multiplied, filled, with_weights]
eager = [result(form) for form in forms]
compiled = [result(torch.compile(form)) for form in forms]
traced = result(torch.compile(divided, backend="aot_eager"))
counts = [int(values.isnan().sum()) for values in (eager[0], traced, *compiled)]
print("NaN of {} results: eager {}, aot_eager {}; inductor: divided {}, multiplied {}, masked_fill {}, with weights {}"
      .format(q.numel(), *counts))
assert counts == [32, 32, 0, 32, 32, 32]
assert all(torch.equal(values.isnan(), eager[0].isnan()) for values in eager)
assert torch.equal(compiled[0][:, :, 3], torch.zeros(1, 2, 16))
rows = [row for row in range(8) if row != 3]
torch.testing.assert_close(compiled[0][:, :, rows], eager[0][:, :, rows])
PY
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -I "$folder/check.py"
