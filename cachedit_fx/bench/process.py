"""A `System` in a process of its own, driven from here; see worker.py, which runs over there."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cachedit_fx.bench.errors import BenchmarkError
from cachedit_fx.bench.systems import Drawing, Setup

CHECKOUT = Path(__file__).resolve().parents[2]
PEER_VERSION = "1.5.3"
"""Of cache-dit: what the comparisons were written for."""


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block ends: a process is started and known, or not started."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pending: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: pending.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pending:
            handler(*pending[0])


class Worker:
    """A started process; `python` is the interpreter of the environment that it runs in.

    Every method raises `BenchmarkError` if the process failed or ended.
    """

    def __init__(self, key: str, python: str, setup: Setup) -> None:
        self.key = key
        threads = str(setup.threads)
        environment = _environment() | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        command = [python, "-m", "cachedit_fx.bench.worker", json.dumps(asdict(setup))]
        # A session of its own: Ctrl-C reaches the driver alone, and stopping it takes its compile helpers along.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.versions: dict[str, str] = {}

    def wait_until_ready(self) -> None:
        self.versions = self._read()["versions"]

    def draw(self, prompts: Sequence[str], steps: int, seed: int, count: bool = False) -> Drawing:
        """As `System.draw`, over there."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its last words can still be read
            request = {"prompts": list(prompts), "steps": steps, "seed": seed, "count": count}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return unpack(self._read())

    def stop(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(3)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BenchmarkError(
                f"the process of {self.key} ended with exit code {self.process.wait()}; see for yourself: "
                f"{' '.join(map(repr, self.process.args))}"  # type: ignore[arg-type]
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(f"{self.key}: {answer['error']}\n\n{answer['traceback']}")
        return answer


def _environment() -> dict[str, str]:
    """Variables of a process that may run in another environment: that one need not have cachedit_fx installed."""
    paths = [str(CHECKOUT)] if (CHECKOUT / "pyproject.toml").is_file() else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})


def answer_of(command: Sequence[str], key: str, python: str | None = None, **environment: str) -> Any:
    """What a module, run on one thread, prints as its last line, which is JSON.

    Args:
        command: the module's name, and its arguments.
        key: what a failure calls it.
        python: the interpreter; None = this one.
        environment: variables of the process, in addition to those of this one.

    Raises:
        BenchmarkError: if it fails, with the last line of its complaint.
    """
    settings = _environment() | {"OMP_NUM_THREADS": "1"} | environment
    arguments = [python or sys.executable, "-W", "ignore", "-m", *command]
    done = subprocess.run(arguments, capture_output=True, text=True, env=settings)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BenchmarkError(f"{key} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def pack(drawing: Drawing) -> dict[str, Any]:
    """A drawing as JSON's values; its statistics stay behind."""
    pictures = drawing.pictures.contiguous().numpy()
    data = {"shape": list(pictures.shape), "data": base64.b64encode(pictures.tobytes()).decode()}
    return vars(drawing) | {"pictures": data, "stats": None}


def unpack(answer: dict[str, Any]) -> Drawing:
    """The drawing that `pack` packed."""
    packed = answer["pictures"]
    values = np.frombuffer(base64.b64decode(packed["data"]), np.float32).reshape(packed["shape"])
    return Drawing(**(answer | {"pictures": torch.from_numpy(values.copy())}))


def check_peer(python: str = sys.executable) -> str:
    """The version of cache-dit that `python` has.

    Raises:
        BenchmarkError: if it has none, or there is no such interpreter; before anything slow begins.
    """
    code = "import importlib.metadata as m; print(m.version('cache_dit'))"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    except FileNotFoundError:
        raise BenchmarkError(f"no such interpreter: {python} (--peer-python)") from None
    except subprocess.CalledProcessError:
        raise BenchmarkError(
            f'cache-dit is not installed in {python}\n  pip install "cachedit-fx[peers]"\n'
            "or let it live in another environment, and name that one's interpreter with --peer-python"
        ) from None
