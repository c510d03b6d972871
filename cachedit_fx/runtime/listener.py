"""Learns from diffusers the CFG branch and the step of a call, if the pipeline passes them on, and a pipeline's end.

Pipelines wrap each transformer call in `transformer.cache_context("cond")`. The context passes its name, and perhaps a
step index or sigma, to every stateful hook registered on the module. At its end a pipeline resets these hooks. The
listener is a hook of this kind. It is entered into the registry's list without wrapping `forward`, so the module stays
unpatched, and dynamo traces no code of it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_NAME = "cachedit_fx"
JOINED = "cond_uncond"
"""Name of a call whose batch holds both branches of guidance."""


@dataclass(frozen=True)
class Hint:
    """Facts about a transformer call that the caller gives before the call.

    Attributes:
        branch: name of the CFG branch.
        time: a number that is equal within a step and runs one way within a generation: step index, sigma, timestep.
    """

    branch: str | None = None
    time: float | torch.Tensor | None = None

    @property
    def is_branch(self) -> bool:
        """Whether the call is named, as one branch."""
        return self.branch not in (None, JOINED)


def _make_listener(on_reset: Callable[[], None] = lambda: None, on_context: Callable[[], None] = lambda: None) -> Any:
    """A listener that calls `on_reset` at each reset, and `on_context` before each named call.

    None if diffusers' hooks cannot be imported.
    """
    try:
        from diffusers.hooks.hooks import BaseState, ModelHook, StateManager
    except ImportError:
        return None

    class ContextOfThread(StateManager):
        """Stores a separate context for each thread; diffusers' class stores one context for all threads."""

        def __init__(self) -> None:
            super().__init__(BaseState)
            self.local = threading.local()

        def set_context(self, context: Any) -> None:
            self.local.context = context
            on_context()

    class Listener(ModelHook):
        """Holds the latest context. Diffusers sets the context on every `StateManager` of a stateful hook."""

        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.state_manager = ContextOfThread()
            self.on_reset = on_reset

        def hint(self) -> Hint:
            """The caller's hint about the present call."""
            context = getattr(self.state_manager.local, "context", None)
            if context is None:
                return Hint()
            times = (context.step_index, context.sigma, context.timestep)
            return Hint(context.name, next((time for time in times if time is not None), None))

        def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
            self.on_reset()
            return module

        def __reduce__(self) -> tuple[Any, ...]:
            return _make_listener, ()  # the class is local, and modules that carry it must pickle

    return Listener()


def listen(module: torch.nn.Module, on_reset: Callable[[], None], on_context: Callable[[torch.nn.Module], None]) -> Any:
    """Register a listener on `module` and return it; None if the module or diffusers has no hooks.

    Args:
        on_reset: called when diffusers resets the module's hooks, as a pipeline does at its end.
        on_context: called with the module when a pipeline enters or leaves `cache_context`.
    """
    reference = weakref.ref(module)

    def enter() -> None:
        module = reference()
        if module is not None:
            on_context(module)

    listener = _make_listener(on_reset, enter) if hasattr(module, "cache_context") else None
    if listener is None:
        return None
    from diffusers.hooks.hooks import HookRegistry

    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.hooks[_NAME] = listener
    if _NAME not in registry._hook_order:
        registry._hook_order.append(_NAME)
    return listener


def stop_listening(module: torch.nn.Module) -> None:
    """Remove the listener from `module`, if there is one."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None and _NAME in registry.hooks:
        del registry.hooks[_NAME]
        registry._hook_order.remove(_NAME)
