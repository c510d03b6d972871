"""What the tests of `cachedit bench` and `cachedit demo` share: compiled pipelines, a small pipeline, made-up rows."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lib.command_line import invoke

from cachedit_fx.bench.measure import Measured, Settings
from cachedit_fx.bench.record import FILE, Record
from cachedit_fx.bench.rows import CACHE_DIT, OURS, UNCACHED
from cachedit_fx.bench.systems import Drawing, Setup, System

SHARES_SYSTEMS = [
    pytest.mark.keep_compiled,
    pytest.mark.xdist_group("bench"),
    pytest.mark.usefixtures("bench_systems"),
]
"""For modules whose runs of the bench take their systems from `shared_system`: one worker of xdist runs them all."""

ROWS = """
["never"]
Fn_compute_blocks = 1
residual_diff_threshold = 0

["mask"]
Fn_compute_blocks = 1
steps_computation_mask = "1101"
steps_computation_policy = "static"

["mask, TaylorSeer"]
Fn_compute_blocks = 1
steps_computation_mask = "1101"
steps_computation_policy = "static"
calibrator = "taylorseer"
"""
"""A file of rows for four steps."""

ENTRY = """
import torch
from cachedit_fx.shapes.pipeline import build_models, generate, make_pipeline

SMALL = {"patch_size": 1, "in_channels": 48, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8, "guidance_embeds": False,
         "axes_dims_rope": [4, 2, 2]}

class Entry:
    def __init__(self):
        torch.manual_seed(0)
        self.pipe = make_pipeline(*build_models(SMALL, {"width": 8, "layers": 1, "heads": 1}))
    def generate(self, pipe, prompts, steps, seed):
        return generate(pipe, prompts, steps, seed)

def hungry(prompt):
    return prompt

def nothing():
    return 3
"""
"""A module with a pipeline of three blocks, as a user would write it."""

_SYSTEMS: dict[tuple[Any, ...], System] = {}


def shared_system(setup: Setup) -> System:
    """A system whose pipeline earlier tests have compiled: other policies change it, and compile nothing."""
    if setup.system not in (OURS, UNCACHED):
        return System(setup)
    key = (setup.system, setup.entry, setup.guidance, setup.inner_backend, setup.granularity)
    assert setup.inner_backend == "eager", "or the uncached pipeline would be compiled in two ways"
    if key not in _SYSTEMS:
        _SYSTEMS[key] = System(setup)
    else:
        _SYSTEMS[key].setup = setup
        _SYSTEMS[key].enable(setup.arguments)
    return _SYSTEMS[key]


@contextmanager
def shared_systems() -> Iterator[None]:
    """Runs of the bench take their systems from `shared_system`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cachedit_fx.bench.measure.System", shared_system)
        yield


class WorkerHere:
    """In the place of a `Worker`: draws in this process. cache-dit's rows are drawn by ours."""

    def __init__(self, key: str, python: str, setup: Setup) -> None:
        self.key, self.versions = key, {"torch": "2"}
        self.setup = replace(setup, system=OURS) if setup.system == CACHE_DIT else setup

    def wait_until_ready(self) -> None:
        pass

    def draw(self, *arguments: Any, **more: Any) -> Drawing:
        return replace(shared_system(self.setup).draw(*arguments, **more), stats=None)

    def stop(self) -> None:
        pass


def stub_python(folder: Path, line: str) -> str:
    """An "interpreter" that runs a line of shell."""
    path = folder / f"python{len(list(folder.iterdir()))}"
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def measured(name: str, work: float, psnr: list[float | None], system: str = OURS, **more: Any) -> Measured:
    """A row, made up."""
    values: dict[str, Any] = {"steps": 28, "arguments": {}, "cached_steps": 10.0} | more
    return Measured(name, system, work=work, psnr=psnr, **values)


def record_of(rows: list[Measured], **more: Any) -> Record:
    """A run with these rows."""
    return Record(Settings(("a red circle",), **more), "cachedit bench", "a machine", {"torch": "2"}, rows)


def bench(*arguments: Any) -> Any:
    """Run `cachedit bench`."""
    return invoke("bench", *arguments, columns=200)


def page_of(folder: Path) -> Any:
    """What a run has written."""
    return json.loads((folder / FILE).read_text())
