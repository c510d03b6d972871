#!/usr/bin/env bash
# torch.compile's cache on disk takes a graph whose inputs share memory for one whose inputs share none: wrong values.
#
# Versions: torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, the system's g++. The cache is on by default.
#
# Expected: a function that writes to its second argument, and then reads the first one, returns the same number with and
# without torch.compile, whether or not the second argument is a view of the first one.
#
# Seen: AOTAutograd makes another program where a written input and another input share memory, but the key of its cache
# does not tell the two cases apart. Whichever was compiled first is taken for both, also by later processes:
#   - first separate memory, then a view: the read misses the write. The result is wrong, without an error or a warning.
#   - first a view, then separate memory: the program's check of its inputs fails.
# With another cache folder for each, or with TORCHINDUCTOR_AUTOGRAD_CACHE=0, both are right.
#
# Output: separate, then view:  plain 42.0, compiled 24.0
#         view, then separate:  AssertionError: wrong number of dimensions1 for op: input
#         view, cache off:      plain 42.0, compiled 42.0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile torch==2.13.0 numpy==2.4.6

cat > "$folder/call.py" <<'PY'
import sys

import torch


def read_after_write(x, rows):
    rows.mul_(2.0)
    return x.sum()


def arguments(kind):
    x = torch.ones(4, 6)
    return x, x[1:] if kind == "view" else torch.ones(3, 6)


kind = sys.argv[1]
plain = read_after_write(*arguments(kind)).item()
try:
    with torch.no_grad():
        compiled = torch.compile(read_after_write)(*arguments(kind)).item()
    print(f"plain {plain}, compiled {compiled}")
except AssertionError as error:
    print(f"AssertionError: {error}")
PY

call() { # folder of the cache, kind of arguments
    TORCHINDUCTOR_CACHE_DIR="$folder/$1" "$folder/venv/bin/python" -W ignore "$folder/call.py" "$2" 2>/dev/null
}

[ "$(call first separate)" = "plain 24.0, compiled 24.0" ]
wrong=$(call first view)
[ "$(call second view)" = "plain 42.0, compiled 42.0" ]
refused=$(call second separate)
off=$(TORCHINDUCTOR_AUTOGRAD_CACHE=0 call first view)
echo "separate, then view:  $wrong"
echo "view, then separate:  $refused"
echo "view, cache off:      $off"
[ "$wrong" = "plain 42.0, compiled 24.0" ]
[[ "$refused" == "AssertionError: wrong number of dimensions1 for op: input"* ]]
[ "$off" = "plain 42.0, compiled 42.0" ]
