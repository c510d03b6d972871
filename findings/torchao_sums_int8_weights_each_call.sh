#!/usr/bin/env bash
# On a CPU with VNNI and without AMX, torchao adds up every int8 weight again at each call of a layer.
#
# Versions: torch 2.13.0 (CPU), torchao 0.18.0, numpy 2.4.6, setuptools 80.9.0, Python 3.11.
#
# Expected: what follows from a weight alone is computed when the layer is quantized, as its scale is.
#
# Seen: dynamic int8 shifts activations to unsigned numbers, and takes 128 times the sums of the weight's columns off the
# product. Each call computes these sums anew, from the whole weight: a second pass over it, besides the product's. A
# compiled layer does too, since its weight is an input of the graph: the sum stands in the graph that inductor compiles.
# A CPU with AMX, or without VNNI, multiplies signed numbers and needs no sums; there this script has nothing to show.
#
# Output: sums of int8 weights in three eager calls: 3; in the compiled graph: 1
set -euo pipefail

if ! grep -qw avx512_vnni /proc/cpuinfo || grep -qw amx_tile /proc/cpuinfo; then
    echo "this CPU has no VNNI, or has AMX: torchao takes another way" >&2
    exit 77
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile torch==2.13.0 torchao==0.18.0 numpy==2.4.6 setuptools==80.9.0

cat > "$folder/check.py" <<'PY'
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_


class Sums(TorchDispatchMode):
    """Counts sums over int8 tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_sum = function is torch.ops.aten.sum.dim_IntList
        self.count += is_sum and args[0].dtype is torch.int8
        return function(*args, **kwargs or {})


layer = torch.nn.Linear(256, 512, bias=False).requires_grad_(False)
model = torch.nn.Sequential(layer)
quantize_(model, Int8DynamicActivationInt8WeightConfig())
tokens = torch.randn(8, 256)
with torch.no_grad():
    model(tokens)
    with Sums() as sums:
        for _ in range(3):
            model(tokens)


def count_sums(graph, inputs):
    """A backend: the sums over int8 tensors in the graph of ATen operations."""
    from torch._dynamo.backends.common import aot_autograd

    def counted(gm, example_inputs):
        found.append(sum(node.target is torch.ops.aten.sum.dim_IntList for node in gm.graph.nodes))
        return gm

    return aot_autograd(fw_compiler=counted)(graph, inputs)


found = []
with torch.no_grad():
    torch.compile(model, backend=count_sums)(tokens)
print(f"sums of int8 weights in three eager calls: {sums.count}; in the compiled graph: {found[0]}")
assert (sums.count, found) == (3, [1])
PY
"$folder/venv/bin/python" "$folder/check.py" 2>/dev/null
