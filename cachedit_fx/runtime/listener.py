"""Learns from diffusers which CFG branch a call belongs to, and at which step, where the pipeline says so.

Pipelines wrap each transformer call in `transformer.cache_context("cond")`, which tells the name, and perhaps a step
index or sigma, to every stateful hook registered on the module. The listener is such a hook and nothing more: it is
entered into the registry's list without wrapping `forward`, so the module stays unpatched and dynamo traces nothing of
it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

_NAME = "cachedit_fx"


@dataclass(frozen=True)
class Hint:
    """What a caller may say of a transformer call ahead of it.

    `time` is anything that is equal within a step and runs one way within a generation: step index, sigma, timestep.
    """

    branch: str | None = None
    time: float | torch.Tensor | None = None


def _make_listener() -> Any:
    """A listener; None where diffusers' hooks are not to be had."""
    try:
        from diffusers.hooks.hooks import BaseState, ModelHook, StateManager
    except ImportError:
        return None

    class ContextOfThread(StateManager):
        """Keeps what each thread set to itself; diffusers' own keeps one context for all."""

        def __init__(self) -> None:
            super().__init__(BaseState)
            self.local = threading.local()

        def set_context(self, context: Any) -> None:
            self.local.context = context

    class Listener(ModelHook):
        """Holds the context that was set last; diffusers sets it on every `StateManager` of a stateful hook."""

        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.state_manager = ContextOfThread()

        def hint(self) -> Hint:
            """What the caller said of the present call."""
            context = getattr(self.state_manager.local, "context", None)
            if context is None:
                return Hint()
            times = (context.step_index, context.sigma, context.timestep)
            return Hint(context.name, next((time for time in times if time is not None), None))

        def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
            return module

        def __reduce__(self) -> tuple[Any, ...]:
            return _make_listener, ()  # the class is local, and modules that carry it must pickle

    return Listener()


def listen(module: torch.nn.Module) -> Any:
    """Register a listener on `module` and return it; None where diffusers' hooks are not to be had."""
    listener = _make_listener() if hasattr(module, "cache_context") else None
    if listener is None:
        return None
    from diffusers.hooks.hooks import HookRegistry

    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.hooks[_NAME] = listener
    if _NAME not in registry._hook_order:
        registry._hook_order.append(_NAME)
    return listener


def stop_listening(module: torch.nn.Module) -> None:
    """Take the listener out again; nothing happens where there is none."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None and _NAME in registry.hooks:
        del registry.hooks[_NAME]
        registry._hook_order.remove(_NAME)
