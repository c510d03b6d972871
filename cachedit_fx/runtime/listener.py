"""Learns from diffusers which CFG branch a call belongs to.

Pipelines wrap each transformer call in `transformer.cache_context("cond")`, which tells the name to every stateful hook
registered on the module. The listener is such a hook and nothing more: it is entered into the registry's list without
wrapping `forward`, so the module stays unpatched and dynamo traces nothing of it.
"""

from __future__ import annotations

from typing import Any

import torch

_NAME = "cachedit_fx"


def listen(module: torch.nn.Module) -> Any:
    """Register a listener on `module` and return it; None where diffusers' hooks are not to be had."""
    if not hasattr(module, "cache_context"):
        return None
    try:
        from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
    except ImportError:
        return None

    class Listener(ModelHook):  # type: ignore[misc]
        """Holds the context that was set last; `state_manager` is what diffusers sets it on."""

        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.state_manager = StateManager(BaseState)

        @property
        def name(self) -> str | None:
            context = self.state_manager._context
            return None if context is None else context.name

        def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
            return module

    registry = HookRegistry.check_if_exists_or_initialize(module)
    listener = Listener()
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
