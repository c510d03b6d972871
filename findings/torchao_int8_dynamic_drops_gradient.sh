#!/usr/bin/env bash
# The gradient stops at a layer with torchao's dynamic int8 quantization, without an error.
#
# Versions: torchao 0.18.0, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11.
#
# Expected: a layer quantized by `quantize_` has a frozen weight, and the gradient passes through it to its input.
# Adapters (LoRA) in front of it are trained so, and guidance by a gradient needs it. If it cannot, backward raises.
#
# Seen: Float8, Int8 and Intx weight-only layers pass the gradient on, within the quantization's error.
# `Int8DynamicActivationInt8WeightConfig` does not: its result has no history but that of the bias.
# In a residual network, x + layer(x), backward then succeeds with the layer's share missing: here 47 % off.
# A layer in front of it, in a plain sequence, gets no gradient at all (None).
#
# Output: error of d/dx (x + layer(x))^2: Float8 1.5%, Int8 0.2%, Intx 0.2%, Int8Dynamic 46.6% (layer left out: equal)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile torchao==0.18.0 torch==2.13.0 numpy==2.4.6

cat > "$folder/check.py" <<'PY'
import torch
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)

torch.manual_seed(0)
x = torch.randn(3, 64, requires_grad=True)


def gradient(residual) -> torch.Tensor:
    return torch.autograd.grad((x + residual(x)).square().sum(), x)[0]


def error(config) -> tuple[float, bool]:
    """The relative error of the gradient, and whether it is the one of a layer that is no function of x."""
    torch.manual_seed(1)
    layer = nn.Sequential(nn.Linear(64, 64))
    exact = gradient(layer)
    quantize_(layer, config)
    quantized, without = gradient(layer), gradient(lambda inputs: layer(inputs).detach())
    return float((quantized - exact).norm() / exact.norm()), torch.equal(quantized, without)


def front_gradient(config) -> torch.Tensor | None:
    """The gradient of a bias in front of a quantized layer."""
    first, second = nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64))
    quantize_(second, config)
    second(first(x)).sum().backward()
    return first.bias.grad


kinds = {
    "Float8": Float8WeightOnlyConfig(), "Int8": Int8WeightOnlyConfig(), "Intx": IntxWeightOnlyConfig(),
    "Int8Dynamic": Int8DynamicActivationInt8WeightConfig(),
}
errors = {name: error(config) for name, config in kinds.items()}
print("error of d/dx (x + layer(x))^2:", ", ".join(f"{name} {value:.1%}" for name, (value, _) in errors.items()),
      f"(layer left out: {'equal' if errors['Int8Dynamic'][1] else 'different'})")
*weight_only, (wrong, is_left_out) = errors.values()
assert all(value < 0.03 and not left_out for value, left_out in weight_only)
assert wrong > 0.3 and is_left_out
assert [front_gradient(config) is None for config in kinds.values()] == [False, False, False, True]
PY
TORCHAO_FORCE_SKIP_LOADING_SO_FILES=1 "$folder/venv/bin/python" -I "$folder/check.py"
