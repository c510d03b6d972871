#!/usr/bin/env bash
# One call under `FlopCounterMode` makes a compiled function run eagerly from then on, without a word.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11.
#
# Expected: a FLOP count of one call ends with its `with` block. Calls after it run the compiled code again.
#
# Seen: under a dispatch mode dynamo marks the function's code as one to skip, and drops what it had compiled.
# The mark stays: later calls run eagerly, of other shapes too, and so does a new `torch.compile` of the function.
# There is no warning, and results are right, so only a benchmark shows it. `torch._dynamo.reset()` takes the mark away.
# With `fullgraph=True` the counted call raises, and so do the later ones, which are outside the mode.
#
# Output: graphs run by a call: before 1, counted 0, after 0, compiled anew 0, after a reset 1; fullgraph raises after
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile torch==2.13.0 numpy==2.4.6

cat > "$folder/check.py" <<'PY'
import torch
from torch.utils.flop_counter import FlopCounterMode

graphs_run = 0


def backend(graph: torch.fx.GraphModule, example_inputs):
    """Runs the captured graph as it is, and counts."""

    def run(*args):
        global graphs_run
        graphs_run += 1
        return graph(*args)

    return run


def square(x: torch.Tensor) -> torch.Tensor:
    return x @ x + 1


def graphs(function, size: int = 3) -> int:
    """Compiled graphs that a call runs."""
    before, x = graphs_run, torch.ones(size, size)
    assert torch.equal(function(x), square(x))
    return graphs_run - before


def raises(function) -> bool:
    try:
        function(torch.ones(3, 3))
    except RuntimeError as error:
        return "no compiled frames" in str(error)
    return False


compiled = torch.compile(square, backend=backend)
before = graphs(compiled)
with FlopCounterMode(display=False) as counter:
    compiled(torch.ones(3, 3))
counted = graphs_run - before
after, other_shape = graphs(compiled), graphs(compiled, size=4)
anew = graphs(torch.compile(square, backend=backend))
torch._dynamo.reset()
restored = graphs(compiled)

torch._dynamo.reset()
whole = torch.compile(square, backend=backend, fullgraph=True)
assert graphs(whole) == 1
with FlopCounterMode(display=False):
    assert raises(whole)
raises_after = raises(whole)
print(f"graphs run by a call: before {before}, counted {counted}, after {after}, compiled anew {anew}, "
      f"after a reset {restored}; fullgraph {'raises' if raises_after else 'runs'} after")
assert counter.get_total_flops() == 2 * 3**3
assert (before, counted, after, other_shape, anew, restored) == (1, 0, 0, 0, 0, 1)
assert raises_after
PY
"$folder/venv/bin/python" -I "$folder/check.py"
