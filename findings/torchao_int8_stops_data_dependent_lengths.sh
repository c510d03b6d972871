#!/usr/bin/env bash
# A layer that torchao quantized to dynamic int8 cannot be traced on rows whose number depends on data.
#
# Versions: torch 2.13.0 (CPU), torchao 0.18.0, numpy 2.4.6, setuptools 80.9.0, Python 3.11.
#
# Expected: with `capture_dynamic_output_shape_ops`, `torch.compile(fullgraph=True)` traces a linear layer on the rows that
# a mask selects, quantized or not. Models that drop the padding of a text do so.
#
# Seen: the plain layer and the one with int8 weights alone are traced. The one with dynamic int8 raises a UserError: the
# quantization of activations compares the number of rows with the size of a block, and the number is not known.
#
# Output: plain: traced; weights alone: traced; dynamic: UserError, data-dependent
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile torch==2.13.0 torchao==0.18.0 numpy==2.4.6 setuptools==80.9.0

cat > "$folder/check.py" <<'PY'
import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

CONFIGS = {"plain": None, "weights alone": Int8WeightOnlyConfig(), "dynamic": Int8DynamicActivationInt8WeightConfig()}
tokens, mask = torch.randn(9, 64), torch.arange(9) < 5
words = []
for name, config in CONFIGS.items():
    layer = torch.nn.Sequential(torch.nn.Linear(64, 48)).requires_grad_(False)
    if config is not None:
        quantize_(layer, config)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        try:
            torch.compile(lambda x, chosen: layer(x[chosen][None]), backend="eager", fullgraph=True)(tokens, mask)
            words.append(f"{name}: traced")
        except torch._dynamo.exc.UserError as error:
            reason = "data-dependent" if "data-dependent" in str(error) else "another reason"
            words.append(f"{name}: {type(error).__name__}, {reason}")
print("; ".join(words))
assert words == ["plain: traced", "weights alone: traced", "dynamic: UserError, data-dependent"]
PY
"$folder/venv/bin/python" "$folder/check.py" 2>/dev/null
