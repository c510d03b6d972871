"""Does work that a first compilation on a CPU would wait for, in a thread while dynamo captures."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cachedit_fx.config.options import Options
from cachedit_fx.kernels import cpu


def warm_up(options: Options) -> None:
    """Start the work that the first steps on a CPU would otherwise wait for, in a thread.

    Inductor probes the C++ compiler and the processor (10 s with an empty cache folder), and the kernels' loops are
    compiled.
    """
    tasks: list[Callable[[], Any]] = [cpu.library]
    if options.inner_backend == "inductor":
        # Two threads that import at once can see a partially initialised module.
        importlib.import_module("torch._inductor.compile_fx")
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        tasks.insert(0, pick_vec_isa)

    def run() -> None:
        for task in tasks:
            with suppress(Exception):  # the later use of the work raises the same error
                task()

    threading.Thread(target=run, name="cachedit_fx.warm_up").start()
