#!/usr/bin/env bash
# cache-dit's PSNR wraps around: a constant error of 16 scores as a perfect copy.
#
# Versions: cache_dit 1.5.3, numpy 2.4.6, opencv-python-headless 5.0.0.93, scikit-image 0.26.0, torch 2.13.0 (CPU),
# diffusers 0.42.1, transformers 5.23.0, Python 3.11.
#
# Expected: `compute_psnr` on two 8-bit picture files gives the PSNR over the range 0 to 255.
# The package's two settings, "custom" (the default) and "skimage", agree.
# A constant offset of 16 gives 20 log10(255 / 16) = 24.05 dB.
#
# Seen: the default subtracts and squares arrays of uint8. Both operations wrap modulo 256.
# The square of 16 is 256, so an offset of 16 gives inf, the score of identical pictures.
# Two pictures of independent noise score 28 dB instead of 8 dB.
#
# Output: offset 16: custom inf, skimage 24.05 dB; unrelated noise: custom 27.93 dB, skimage 7.96 dB
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --no-compile cache_dit==1.5.3 torch==2.13.0 numpy==2.4.6 \
    diffusers==0.42.1 transformers==5.23.0 opencv-python-headless==5.0.0.93 scikit-image==0.26.0

cat > "$folder/check.py" <<'PY'
import pathlib
import sys

import cv2
import numpy as np
from cache_dit.metrics import compute_psnr
from cache_dit.metrics.metrics import get_psnr_type, set_psnr_type

folder = pathlib.Path(sys.argv[1])
generator = np.random.default_rng(0)
picture = generator.integers(0, 240, (64, 64, 3), dtype=np.uint8)
noise = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
pictures = {"picture": picture, "offset": picture + 16, "noise": noise}
for name, pixels in pictures.items():
    cv2.imwrite(str(folder / f"{name}.png"), pixels)


def psnr(kind: str, name: str) -> float:
    set_psnr_type(kind)
    return float(compute_psnr(str(folder / "picture.png"), str(folder / f"{name}.png"))[0])


assert get_psnr_type() == "custom"
offset, true_offset = psnr("custom", "offset"), psnr("skimage", "offset")
noise, true_noise = psnr("custom", "noise"), psnr("skimage", "noise")
print(f"offset 16: custom {offset}, skimage {true_offset:.2f} dB; "
      f"unrelated noise: custom {noise:.2f} dB, skimage {true_noise:.2f} dB")
assert offset == float("inf")
assert abs(true_offset - 20 * np.log10(255 / 16)) < 1e-6
assert 27 < noise < 29 and 7 < true_noise < 9
PY
"$folder/venv/bin/python" -I "$folder/check.py" "$folder"
