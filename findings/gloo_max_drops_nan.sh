#!/usr/bin/env bash
# Gloo's MAX and MIN keep or drop a NaN by the rank that holds it and by its place in the tensor.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11; two processes on one host.
#
# Expected: `all_reduce` with MAX follows `torch.maximum`: if one rank holds NaN, every rank gets NaN.
# At least, the result does not depend on the rank. A job that reduces a loss or a norm with MAX can then see the NaN.
#
# Seen: a scalar NaN on rank 0 reaches both ranks; the same NaN on rank 1 disappears and both ranks get a normal number.
# If all 1000 elements of one rank are NaN, 500 elements of the result are NaN. MIN does the same.
# SUM gives 1000. All ranks agree on the result, so a comparison between ranks shows nothing.
#
# Output: scalar MAX: NaN on rank 0 gives nan, NaN on rank 1 gives 1.0; NaN left of 1000: MAX 500, MIN 500, SUM 1000
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile torch==2.13.0 numpy==2.4.6

cat > "$folder/check.py" <<'PY'
import math
import sys

import torch
import torch.distributed as dist
from torch.distributed import ReduceOp


def reduced(rank: int, holder: int, elements: int, operation: ReduceOp) -> torch.Tensor:
    """The reduction of ones on one rank and NaN on the rank `holder`."""
    values = torch.full((elements,), math.nan if rank == holder else 1.0)
    dist.all_reduce(values, op=operation)
    return values


def work(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    first, second = (reduced(rank, holder, 1, ReduceOp.MAX).item() for holder in (0, 1))
    operations = (ReduceOp.MAX, ReduceOp.MIN, ReduceOp.SUM)
    counts = [
        [int(reduced(rank, holder, 1000, operation).isnan().sum()) for operation in operations] for holder in (0, 1)
    ]
    if rank == 0:
        print(f"scalar MAX: NaN on rank 0 gives {first}, NaN on rank 1 gives {second}; "
              "NaN left of 1000: MAX {}, MIN {}, SUM {}".format(*counts[0]))
    assert math.isnan(first) and second == 1.0
    assert counts == [[500, 500, 1000], [500, 500, 1000]]
    assert torch.maximum(torch.tensor([math.nan, 1.0]), torch.tensor([1.0, math.nan])).isnan().all()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
PY
"$folder/venv/bin/python" -I "$folder/check.py" "$folder/store"
