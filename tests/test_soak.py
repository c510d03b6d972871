"""Two hundred generations hold no more than a few: neither tensors nor memory of the process."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import denoise, make, noise

from cachedit_fx import DBCacheConfig, DBPruneConfig, enable_cache, summary

pytestmark = pytest.mark.filterwarnings("ignore:.*inert threshold")
GENERATIONS, SETTLED = 200, 20
MODES: dict[str, dict[str, Any]] = {
    "dbcache": {"cache_config": DBCacheConfig(1, max_warmup_steps=2, residual_diff_threshold=0.1)},
    "dbprune": {"cache_config": DBPruneConfig(1, max_warmup_steps=2, residual_diff_threshold=0.1)},
    "lagrange": {"preset": "balanced", "steps": 10},
}


def tensors() -> int:
    gc.collect()
    return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())


def resident() -> int:
    """Bytes of the process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.slow
@pytest.mark.parametrize("guards", ["always", "generation"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_grows(mode, guards):
    """Two prompts and two batch sizes by turns, so that buffers are made anew now and then."""
    model = enable_cache(make(blocks=4, width=64), inner_backend="eager", guards=guards, **MODES[mode])

    def generation(number):
        texts = (noise(1 + number % 2, 3, 64, seed=2), noise(1 + number % 2, 4, 64, seed=3))[: 1 + number % 3 // 2]
        denoise(model, texts=texts, start=noise(1 + number % 2, 64, 64, seed=number))

    held, memory = [], []
    for number in range(SETTLED + GENERATIONS + 1):
        if number >= SETTLED and not (number - SETTLED) % 100:
            held.append(tensors())
            memory.append(resident())
        generation(number)
    assert any(region.executed_steps for region in summary(model))
    first, middle, last = held  # what earlier tests left behind may still go
    assert first >= middle >= last
    assert memory[-1] - memory[0] < 2 << 20
