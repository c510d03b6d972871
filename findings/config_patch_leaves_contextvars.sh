#!/usr/bin/env bash
# Each `torch._dynamo.config.patch(...)` leaves a context variable in the thread's context for good.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11.
#
# Expected: `with torch._dynamo.config.patch(...)` restores the settings on exit and leaves nothing behind.
#
# Seen: every patch object makes a `ContextVar` of its own and sets it. Leaving the block does not remove it.
# The thread's context, and each copy that asyncio makes of it, grows by one entry for each block. Nothing frees one.
# Patches of `torch._inductor.config` and `torch._functorch.config` do the same.
# Compiling does it too: `torch.compile` patches settings itself, so a process that keeps recompiling keeps growing.
# A patch object that is used again adds no second entry.
#
# Output: entries added: 1000 patches 1000, one patch entered 1000 times 1, 5 compilations 10
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile torch==2.13.0 numpy==2.4.6

cat > "$folder/check.py" <<'PY'
import contextvars
import gc
from collections.abc import Callable

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config


def growth(action: Callable[[], None], times: int) -> int:
    """Entries that `times` runs of `action` add to the context, after one run that is not counted."""
    action()
    before = len(contextvars.copy_context())
    for _ in range(times):
        action()
    gc.collect()
    return len(contextvars.copy_context()) - before


def patch(config, name: str) -> None:
    with config.patch({name: getattr(config, name)}):
        pass


def enter(shared) -> None:
    with shared:
        pass


def compile_anew() -> None:
    torch._dynamo.reset()
    function(torch.ones(3))


function = torch.compile(lambda x: x + 1, backend="eager")
patches = growth(lambda: patch(torch._dynamo.config, "suppress_errors"), 1000)
others = [growth(lambda: patch(torch._inductor.config, "debug"), 1000),
          growth(lambda: patch(torch._functorch.config, "debug_assert"), 1000)]
shared = torch._dynamo.config.patch(suppress_errors=torch._dynamo.config.suppress_errors)
before = len(contextvars.copy_context())
for _ in range(1000):
    enter(shared)
repeated = len(contextvars.copy_context()) - before
compilations = growth(compile_anew, 5)
print(f"entries added: 1000 patches {patches}, one patch entered 1000 times {repeated}, 5 compilations {compilations}")
assert patches == 1000 and others == [1000, 1000]
assert repeated == 1
assert compilations >= 5
PY
"$folder/venv/bin/python" -I "$folder/check.py"
