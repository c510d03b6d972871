#!/usr/bin/env bash
# Gloo's `all_reduce` of a slice adds up the elements beside the slice, and leaves the slice's end as it was.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11; two processes on one host.
#
# Expected: `dist.all_reduce(matrix[:, :2])` changes the first two columns and nothing else, as `add_` would.
# Or it raises: `send` does with "has to be contiguous", and so does `all_to_all_single`.
#
# Seen: as many elements as the slice has are taken from the start of its memory, gaps and all.
# Of a 4 x 4 matrix the first two rows are summed, columns 2 and 3 too. The last two rows are not reduced.
# `broadcast` does the same, so ranks differ afterwards. The functional `all_reduce` is right, and so is the very same
# line compiled, even by "aot_eager", which makes it functional.
# Reported upstream for scatter, broadcast and reduce (pytorch/pytorch issue 192920).
#
# Output: first columns of ones summed over 2 ranks: rows 2 2 1 1 (right 2 2 2 2); beside them 2 2 1 1; compiled right
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


def reduce_first_columns(matrix: torch.Tensor) -> torch.Tensor:
    matrix = matrix.clone()
    dist.all_reduce(matrix[:, :2])
    return matrix


def work(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    matrix = reduce_first_columns(torch.ones(4, 4))
    inside, beside = matrix[:, 0].int().tolist(), matrix[:, 2].int().tolist()

    sent = torch.full((4, 4), float(rank))
    dist.broadcast(sent[:, :2], src=1)

    compiled = torch.compile(reduce_first_columns, backend="aot_eager")(torch.ones(4, 4))
    is_right = torch.equal(compiled[:, :2], torch.full((4, 2), 2.0)) and torch.equal(compiled[:, 2:], torch.ones(4, 2))
    right = functional.all_reduce(torch.ones(4, 4)[:, :2], "sum", dist.group.WORLD)
    assert torch.equal(right, torch.full((4, 2), 2.0))
    if rank == 0:
        words = " ".join(map(str, inside)), " ".join(map(str, beside)), "right" if is_right else "wrong"
        print("first columns of ones summed over 2 ranks: rows {} (right 2 2 2 2); beside them {}; compiled {}"
              .format(*words))
    assert torch.equal(matrix[:, 0], matrix[:, 1]) and torch.equal(matrix[:, 2], matrix[:, 3])
    assert inside == [2, 2, 1, 1] and beside == [2, 2, 1, 1]
    assert sent[:, 0].tolist() == [1, 1, rank, rank]
    assert is_right
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
PY
"$folder/venv/bin/python" -I "$folder/check.py" "$folder/store"
