"""Work that a first compilation on a CPU would wait for, done in a thread while dynamo captures."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cachedit_fx.config.options import Options
from cachedit_fx.kernels import cpu


def warm_up(options: Options) -> None:
    """Begin, while dynamo captures, what the first steps on a CPU would otherwise wait for: inductor finds out what the
    C++ compiler and the processor can do (10 s with an empty cache folder), and the kernels' loops are compiled."""
    tasks: list[Callable[[], Any]] = [cpu.library]
    if options.inner_backend == "inductor":
        importlib.import_module("torch._inductor.compile_fx")  # two threads importing at once may meet half a module
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        tasks.insert(0, pick_vec_isa)

    def run() -> None:
        for task in tasks:
            with suppress(Exception):  # whoever needs it meets the same error, and says so
                task()

    threading.Thread(target=run, name="cachedit_fx.warm_up").start()
