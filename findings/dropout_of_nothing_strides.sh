#!/usr/bin/env bash
# A dropout with p=0 in training returns its input, and the tracer records a dense copy: compiled code reads elsewhere.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11. torch 2.14.1 is right.
#
# Expected: `torch.compile(function, backend="eager")` gives the function's own result.
#
# Seen: `F.dropout(x, 0.0, training=True)` returns x itself in eager mode, a view with its strides. While tracing, the
# result has the strides of a dense tensor. A stride that the function asks for becomes a constant of the graph, so
# `as_strided` with it writes to other elements than in eager mode. No error, no warning, whatever the backend.
#
# Output: stride in eager mode (4, 1), traced (2, 1); sum 48.0 in eager mode, 39.0 compiled
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile torch==2.13.0 numpy==2.4.6

cat > "$folder/check.py" <<'PY'
import torch
import torch.nn.functional as F


def double_first_column(x):
    y = F.dropout(x, 0.0, training=True)
    y.as_strided((y.shape[0], 1), (y.stride(0), 1)).mul_(2)
    return x.sum(), y.stride()


def run(function):
    base = torch.arange(12.0).view(3, 4)
    with torch.no_grad():
        return function(base[:, 1:3])


(eager, stride), (compiled, traced) = run(double_first_column), run(torch.compile(double_first_column, backend="eager"))
print(
    f"torch {torch.__version__}: stride in eager mode {stride}, traced {traced}; "
    f"sum {eager.item()} in eager mode, {compiled.item()} compiled"
)
assert stride == (4, 1) and traced == (2, 1)
assert eager.item() == 48.0 and compiled.item() == 39.0
PY
"$folder/venv/bin/python" "$folder/check.py"
