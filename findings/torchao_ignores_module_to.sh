#!/usr/bin/env bash
# `module.to(torch.bfloat16)` does nothing, nothing harmful, or the right thing, by torchao's kind of quantized weight.
#
# Versions: torchao 0.18.0, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11.
#
# Expected: a linear layer quantized by `quantize_` follows `module.to(torch.bfloat16)` as any layer does.
# Its weight then reports bfloat16 and the layer takes bfloat16 input. If the cast is impossible, `to` raises.
# Quantizing a layer that is already bfloat16 works for each kind.
#
# Seen: `to` casts the bias and raises nothing. The weight is another matter:
#   Float8WeightOnlyConfig  the weight stays float32; bfloat16 input raises at the next call, far from the cause
#   Int8WeightOnlyConfig    the weight stays float32; bfloat16 input works
#   IntxWeightOnlyConfig    the weight becomes bfloat16; bfloat16 input works
#
# Output: weight after to(bfloat16), next call: Float8 float32 raises, Int8 float32 works, Intx bfloat16 works
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile torchao==0.18.0 torch==2.13.0 numpy==2.4.6

cat > "$folder/check.py" <<'PY'
import torch
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_


def call(layer: nn.Module) -> str:
    """Whether the layer takes bfloat16 input and gives bfloat16."""
    try:
        output = layer(torch.ones(2, 64, dtype=torch.bfloat16))
    except RuntimeError as error:
        assert "same dtype" in str(error), error
        return "raises"
    assert output.dtype == torch.bfloat16
    return "works"


behaviour = {}
for config in (Float8WeightOnlyConfig(), Int8WeightOnlyConfig(), IntxWeightOnlyConfig()):
    late = nn.Sequential(nn.Linear(64, 64))
    quantize_(late, config)
    late.to(torch.bfloat16)
    assert late[0].bias.dtype == torch.bfloat16
    early = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    quantize_(early, config)
    assert call(early) == "works"
    name = type(config).__name__.removesuffix("WeightOnlyConfig")
    behaviour[name] = (str(late[0].weight.dtype).removeprefix("torch."), call(late))

print("weight after to(bfloat16), next call:", ", ".join(" ".join((name, *seen)) for name, seen in behaviour.items()))
assert behaviour == {
    "Float8": ("float32", "raises"), "Int8": ("float32", "works"), "Intx": ("bfloat16", "works"),
}
PY
TORCHAO_FORCE_SKIP_LOADING_SO_FILES=1 "$folder/venv/bin/python" -I "$folder/check.py"
