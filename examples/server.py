"""A server of many requests on one cached model: asyncio, threads, sessions, and a reader of metrics.

  python examples/server.py --requests 500

Each request is a session. Its steps run in whatever thread is free, in turn with the steps of other requests, as in a
server that keeps one device busy. The reader looks on from a thread of its own. At the end the statistics of all
requests are added up, and compared with what they must be.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import warnings
from collections import Counter
from typing import Annotated, Any

import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler
from rich.console import Console

import cachedit_fx
from cachedit_fx.shapes import load_pipeline
from cachedit_fx.shapes.pipeline import encode_prompts, image_ids

STEPS = 8
MASK = [1, 1, 0, 1, 0, 1, 0, 1]
PROMPTS = ("a small red circle on navy", "a large blue square on white", "a large green triangle on black")
MOST_GROWTH = 30
"""In MB, after the first fifth of the requests: what the allocator may still come to hold."""
console = Console()


class Server:
    """Denoises requests on one model.

    Args:
        transformer: the bundled one, enabled.
        conditions: the transformer's inputs but latents and timestep, one entry for each prompt.
        at_once: requests that are in the middle of their steps at a time.
    """

    def __init__(self, transformer: Any, conditions: list[dict[str, torch.Tensor]], at_once: int) -> None:
        self.transformer, self.conditions = transformer, conditions
        self.slots = asyncio.Semaphore(at_once)
        self.counts: Counter[str] = Counter()

    async def request(self, number: int) -> torch.Tensor:
        """The latents of one request, [1, 64, channels]."""
        async with self.slots:
            with cachedit_fx.session(f"request {number}", ends=True):
                scheduler = FlowMatchEulerDiscreteScheduler()
                scheduler.set_timesteps(STEPS)
                shape = (1, 64, self.transformer.config.in_channels)
                latents = torch.randn(shape, generator=torch.Generator().manual_seed(number))
                for timestep in scheduler.timesteps:
                    latents = await asyncio.to_thread(self.step, number, latents, timestep, scheduler)
                (region,) = cachedit_fx.summary(self.transformer)
        self.counts += Counter(
            requests=1, steps=region.executed_steps, cached=len(region.cached_steps), uncached=region.uncached_calls
        )
        return latents

    @torch.no_grad()
    def step(self, number: int, latents: torch.Tensor, timestep: torch.Tensor, scheduler: Any) -> torch.Tensor:
        condition = self.conditions[number % len(self.conditions)]
        prediction = self.transformer(hidden_states=latents, timestep=timestep.expand(1) / 1000, **condition)
        moved: torch.Tensor = scheduler.step(prediction.sample, timestep, latents).prev_sample
        return moved


class MetricsReader(threading.Thread):
    """Reads the statistics of all sessions until `done` is set."""

    def __init__(self, transformer: Any) -> None:
        super().__init__(name="metrics")
        self.transformer, self.done = transformer, threading.Event()
        self.readings, self.most_sessions, self.most_bytes = 0, 0, 0

    def run(self) -> None:
        while not self.done.wait(0.05):
            regions = cachedit_fx.summary(self.transformer, all_sessions=True)
            self.readings += 1
            self.most_sessions = max(self.most_sessions, len(regions))
            self.most_bytes = max([self.most_bytes, *(region.bytes_of_all_sessions for region in regions)])


def main(
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 500,
    at_once: Annotated[int, typer.Option(min=1, help="Requests in the middle of their steps at a time.")] = 8,
) -> None:
    """Serve requests, and check that statistics add up and that memory does not grow."""
    warnings.simplefilter("error", cachedit_fx.CacheWarning)
    torch.set_num_threads(1)
    pipe = load_pipeline()
    conditions = []
    for prompt in PROMPTS:
        embeds, pooled = encode_prompts(pipe, [prompt])
        ids = {"txt_ids": torch.zeros(embeds.shape[1], 3), "img_ids": image_ids()}
        conditions.append({"encoder_hidden_states": embeds, "pooled_projections": pooled, **ids})
    policy = cachedit_fx.DBCacheConfig(1, steps_computation_mask=MASK, steps_computation_policy="static")
    cachedit_fx.enable_cache(pipe, policy, inner_backend="eager", guards="generation")

    async def serve(first: int, last: int) -> Counter[str]:
        server = Server(pipe.transformer, conditions, at_once)
        await asyncio.gather(*map(server.request, range(first, last)))
        return server.counts

    asyncio.run(serve(0, at_once))  # compiles
    reader = MetricsReader(pipe.transformer)
    reader.start()
    try:
        first = max(1, requests // 5)  # the allocator settles
        counts = asyncio.run(serve(at_once, at_once + first))
        before = megabytes()
        if requests > first:
            counts += asyncio.run(serve(at_once + first, at_once + requests))
    finally:
        reader.done.set()
        reader.join()
    gc.collect()
    left = sum(region.bytes_held for region in cachedit_fx.summary(pipe, all_sessions=True))
    after = megabytes()
    console.print(
        f"{counts['requests']} requests, {counts['steps']} steps, {counts['cached']} of them cached, "
        f"{counts['uncached']} calls uncached; {reader.readings} readings of the metrics saw at most "
        f"{reader.most_sessions} sessions with {reader.most_bytes / 2**20:.1f} MiB; {left} bytes left; "
        f"{before:.0f} MB of memory after {first} requests, {after:.0f} MB after all"
    )
    expected = Counter(requests=requests, steps=requests * STEPS, cached=requests * MASK.count(0))
    if counts != expected or left or after - before > MOST_GROWTH:
        raise typer.Exit(1)


def megabytes() -> float:
    """The memory that the process holds, in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    typer.run(main)
