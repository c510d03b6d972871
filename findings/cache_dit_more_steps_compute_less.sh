#!/usr/bin/env bash
# cache-dit's preset masks: one step more can halve the number of computed steps.
#
# Versions: cache_dit 1.5.3, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11.
#
# Expected: if a user asks for more steps under one policy, at least as many of them are computed.
#
# Seen: "ultra" computes 6 of 15 steps but 3 of 16, fewer than the 4 that it computes of 8 steps.
# From 17 to 28 steps the count climbs back to 8. "fast" drops at the same place, from 7 to 6.
# All four policies lose computed steps from 55 to 56 ("slow" 39 to 36).
# The mask of 16 steps leaves 13 steps in a row to the cache: 1100000000000001.
#
# Output: ultra computes 4 of 8, 6 of 15, 3 of 16, 8 of 28 steps; drops: slow 1, medium 1, fast 2, ultra 3
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile cache_dit==1.5.3 torch==2.13.0 numpy==2.4.6 \
    diffusers==0.42.1 transformers==5.23.0

cat > "$folder/check.py" <<'PY'
from cache_dit import steps_mask

counts = {
    policy: {total: sum(steps_mask(mask_policy=policy, total_steps=total)) for total in range(8, 61)}
    for policy in ("slow", "medium", "fast", "ultra")
}
drops = {
    policy: [total for total in range(9, 61) if computed[total] < computed[total - 1]]
    for policy, computed in counts.items()
}
ultra = counts["ultra"]
print("ultra computes", ", ".join(f"{ultra[total]} of {total}" for total in (8, 15, 16, 28)), "steps; drops:",
      ", ".join(f"{policy} {len(totals)}" for policy, totals in drops.items()))
assert (ultra[8], ultra[15], ultra[16], ultra[28]) == (4, 6, 3, 8)
assert (counts["fast"][15], counts["fast"][16]) == (7, 6)
assert (counts["slow"][55], counts["slow"][56]) == (39, 36)
assert all(56 in totals for totals in drops.values())
assert [len(totals) for totals in drops.values()] == [1, 1, 2, 3]
assert "".join(map(str, steps_mask(mask_policy="ultra", total_steps=16))) == "1100000000000001"
PY
"$folder/venv/bin/python" -I "$folder/check.py"
