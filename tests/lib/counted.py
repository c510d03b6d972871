"""The work of the blocks of three large models, as `bench.links.counted` reads it off their graphs."""

from __future__ import annotations

from cachedit_fx.parallel_plan.descriptions import Blocks

COUNTED = {
    "FLUX.1-dev": (
        Blocks("transformer_blocks", 19, (512, 4096), 24, 128, 3072, 1043677052928, 0, 452984832),
        Blocks("single_transformer_blocks", 38, (512, 4096), 24, 128, 3072, 1043677052928, 347892350976, 226492416),
    ),
    "Qwen-Image": (Blocks("transformer_blocks", 60, (256, 4096), 24, 128, 3072, 985694994432, 0, 452984832),),
    "Wan 2.1 14B": (Blocks("blocks", 40, (75600,), 40, 128, 5120, 45977960448000, 0, 597688320),),
}
"""Model -> its blocks. A test of the part "parallel" counts them anew."""
