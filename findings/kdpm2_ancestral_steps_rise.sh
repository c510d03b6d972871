#!/usr/bin/env bash
# KDPM2 ancestral with Karras sigmas: the timesteps of one generation go up again, and no midpoint is a midpoint.
#
# Versions: diffusers 0.42.1, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11.
#
# Expected: the timesteps of a generation never rise. For 10 steps a second-order scheduler adds 9 evaluations,
# each at a noise level strictly between two steps. `KDPM2DiscreteScheduler` does so: 999, 956.9, 913, 863.8, 812, ...
#
# Seen: `KDPM2AncestralDiscreteScheduler` gives 999, 913.1, 913, 811.9, 812, 689.4, 689, ... Some pairs rise.
# An ancestral step goes down to sigma_next squared / sigma. The geometric mean of that and sigma is sigma_next.
# So each "midpoint" is the next step's own noise level. Karras' timesteps are rounded, the midpoints' are not.
# The model is told two times for one noise level, and code that takes a rise for a new generation starts over.
#
# Output: 19 timesteps for 10 steps, rises at 811.94 -> 812, 353.69 -> 354, 8.66 -> 9; KDPM2Discrete: no rise
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile diffusers==0.42.1 torch==2.13.0 numpy==2.4.6

cat > "$folder/check.py" <<'PY'
from itertools import pairwise

import torch
from diffusers import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler


def rises(scheduler) -> list[tuple[float, float]]:
    """Neighbouring timesteps of which the later one is higher."""
    steps = scheduler.timesteps.tolist()
    return [(step, following) for step, following in pairwise(steps) if following > step]


ancestral, plain = (kind(use_karras_sigmas=True) for kind in (KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler))
for scheduler in (ancestral, plain):
    scheduler.set_timesteps(10)
print(f"{len(ancestral.timesteps)} timesteps for 10 steps, rises at",
      ", ".join(f"{step:.2f} -> {following:.0f}" for step, following in rises(ancestral)) + ";",
      "KDPM2Discrete:", rises(plain) or "no rise")
assert len(ancestral.timesteps) == len(plain.timesteps) == 19
assert len(rises(ancestral)) == 3 and not rises(plain)

# Every second sigma is a step's, in both lists. The midpoint after step i has the sigma of step i + 1, but at the end.
steps, midpoints = ancestral.sigmas[1:17:2], ancestral.sigmas_interpol[0:16:2]
torch.testing.assert_close(midpoints, steps, rtol=1e-5, atol=0)
PY
"$folder/venv/bin/python" -I "$folder/check.py"
