"""Many generations hold no more than a few: neither tensors nor memory of the process."""

import gc
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.marks import only_in
from lib.toys import denoise, make, noise

from cachedit_fx import DBCacheConfig, DBPruneConfig, enable_cache, summary

ROOT = Path(__file__).resolve().parents[2]
SETTLED = 60
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


def soak(mode: str, guards: str, generations: int) -> tuple[list[int], list[int], bool]:
    """Two prompts and two batch sizes by turns, so that buffers are made anew now and then.

    Returns the tensors held and the bytes in memory (once settled, halfway, at the end), and whether a step was cached.
    """
    torch.set_num_threads(1)
    model = enable_cache(make(blocks=4, width=64), inner_backend="eager", guards=guards, **MODES[mode])

    def generation(number: int) -> None:
        texts = (noise(1 + number % 2, 3, 64, seed=2), noise(1 + number % 2, 4, 64, seed=3))[: 1 + number % 3 // 2]
        denoise(model, texts=texts, start=noise(1 + number % 2, 64, 64, seed=number))

    held, memory = [], []
    for number in range(SETTLED + generations + 1):
        if number >= SETTLED and not (number - SETTLED) % (generations // 2):
            held.append(tensors())
            memory.append(resident())
        generation(number)
    return held, memory, any(region.cached_steps for region in summary(model))


def check(mode: str, guards: str, generations: int) -> None:
    """In a process of its own: what a thousand earlier tests left to the allocator says nothing about ours."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        held, memory, cached = process.submit(soak, mode, guards, generations).result()
    assert cached
    assert held[0] == held[1] == held[2]
    assert memory[-1] - memory[0] < 2 << 20, memory


@pytest.mark.parametrize(
    ("mode", "guards"),
    only_in("soak", [("dbcache", "always"), ("lagrange", "generation")], but=[("dbcache", "always")]),
)
def test_nothing_grows(mode, guards):
    check(mode, guards, 30)


@pytest.mark.full("soak")
@pytest.mark.parametrize("guards", ["always", "generation"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_grows_in_200_generations(mode, guards):
    check(mode, guards, 200)


@pytest.mark.full("soak")
@pytest.mark.budget(200, "a server of 200 requests")
def test_nothing_grows_in_a_server():
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "server.py"), "--requests", "200"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 requests, 1600 steps, 600 of them cached, 0 calls uncached" in " ".join(done.stdout.split())
