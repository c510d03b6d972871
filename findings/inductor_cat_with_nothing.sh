#!/usr/bin/env bash
# Inductor takes a concatenation with an empty tensor for the other tensor, with that tensor's strides.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6, setuptools 80.9.0, Python 3.11, g++ 12.
#
# Expected: `torch.compile` gives a result with the strides of eager mode, and compiles what eager mode runs. The
# backends "eager" and "aot_eager" do.
#
# Seen: `torch.cat([x.mT, empty], 1)` copies in eager mode, into a contiguous tensor. Inductor gives a tensor with the
# strides of `x.mT`. A `.view(-1)` of the concatenation is valid in eager mode, and cannot be compiled. Padding by zero
# rows is how this comes about: a model pads a sequence to a length that it has already.
#
# Output: strides (768, 24, 1) in eager mode and by aot_eager, (768, 1, 32) by inductor; a view of it: BackendCompilerFailed
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile torch==2.13.0 numpy==2.4.6 setuptools==80.9.0

cat > "$folder/check.py" <<'PY'
import torch


def padded(x):
    return torch.cat([x.mT, x.new_zeros(1, 0, x.shape[1])], 1)


def in_one_line(x):
    return padded(x).view(-1)


x = torch.randn(1, 24, 32)
strides = {"eager mode": padded(x).stride()}
for backend in ("aot_eager", "inductor"):
    result = torch.compile(padded, backend=backend)(x)
    assert torch.equal(result, padded(x))
    strides[backend] = result.stride()

assert torch.equal(torch.compile(in_one_line, backend="aot_eager")(x), in_one_line(x))
try:
    torch.compile(in_one_line)(x)
    error = "none"
except Exception as raised:
    error = type(raised).__name__

print(f"torch {torch.__version__}: strides {strides}; a view of it by inductor: {error}")
assert strides["eager mode"] == strides["aot_eager"] == (768, 24, 1) and strides["inductor"] == (768, 1, 32)
assert error == "BackendCompilerFailed"
PY
"$folder/venv/bin/python" "$folder/check.py" 2>/dev/null
