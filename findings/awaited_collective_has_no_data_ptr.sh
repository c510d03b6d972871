#!/usr/bin/env bash
# A functional collective's result tells an address that is none, without waiting, and goes on to after the wait.
#
# Versions: torch 2.13.0 (CPU), one process of gloo, Python 3.11.
#
# Expected: `data_ptr()` of an AsyncCollectiveTensor waits for the collective, and is the address of its values. Or it
# raises, as `untyped_storage().data_ptr()` does. torch documents `data_ptr()` as the address of the first element.
#
# Seen: it is 0, and for a slice the slice's offset in bytes. It neither waits nor warns. It is the same after the tensor
# was waited for and read. So a test `data_ptr() % 16 == 0` for aligned memory passes, and code that compares addresses to
# see whether two tensors share memory takes the results of different collectives for one.
#
# Output: all_reduce 0, its rows from 1 16, after the wait 0, another collective's 0; the plain tensor's is not 0
#         untyped_storage().data_ptr(): Attempted to access the data pointer on an invalid python storage.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile torch==2.13.0 numpy==2.4.6

cat > "$folder/check.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

store = dist.FileStore(sys.argv[1], 1)
dist.init_process_group("gloo", rank=0, world_size=1, store=store)
values = torch.arange(12.0).reshape(3, 4)
result = functional.all_reduce(values, "sum", dist.group.WORLD)
other = functional.all_reduce(2 * values, "sum", dist.group.WORLD)
assert isinstance(result, functional.AsyncCollectiveTensor)

before = result.data_ptr(), result[1:].data_ptr()
assert result.tolist() == values.tolist()
plain = result.wait()
print(
    f"all_reduce {before[0]}, its rows from 1 {before[1]}, after the wait {result.data_ptr()}, "
    f"another collective's {other.data_ptr()}; the plain tensor's is {'' if plain.data_ptr() == 0 else 'not '}0"
)
assert (*before, result.data_ptr(), other.data_ptr()) == (0, 16, 0, 0) and plain.data_ptr() != 0
try:
    result.untyped_storage().data_ptr()
except RuntimeError as error:
    print(f"untyped_storage().data_ptr(): {error}")
else:
    raise AssertionError("untyped_storage().data_ptr() does not raise any more")
other.wait()
dist.destroy_process_group()
PY
"$folder/venv/bin/python" -W ignore "$folder/check.py" "$folder/store"
