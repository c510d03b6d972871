"""Replaces a compiled module's call: one transformer call, which may become several graphs.

It sets the flags with which dynamo keeps data-dependent lengths in one graph, for this call alone. It makes the `Call`
that the graphs share. If a call ran uncached, it finds the place at which the capture broke.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_leaves

from cachedit_fx.capture import capturing, first_break, isolated_compile
from cachedit_fx.config.rules import OptionError
from cachedit_fx.passes.block_loops import LoopNotFound
from cachedit_fx.runtime.call import NO_LOOP, NOT_CAPTURED, Call, current_call
from cachedit_fx.runtime.guard import on_host
from cachedit_fx.runtime.model_state import ModelState
from cachedit_fx.runtime.shortcut import Route, look_of
from cachedit_fx.runtime.warm_up import warm_up

logger = logging.getLogger(__name__)

Guards = Literal["always", "generation"]
"""When a call passes dynamo's guards: always, or at the start of every generation (`cachedit_fx.runtime.shortcut`)."""


class CompiledCall:
    """The compiled module, called as one `Call`.

    The first call is captured under the flags of `capturing`. The capture may fail under these flags, or break inside
    the blocks. The same call then compiles the module again without the flags: dynamo places the breaks, and the blocks
    may all lie in one of several graphs.

    Args:
        module: the module; only a weak reference is kept.
        backend: from a captured graph and example inputs to a callable.
        state: the module's state.
        torch_options: keywords of `torch.compile`.
        guards: when a call passes dynamo's guards.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        backend: Callable[..., Any],
        state: ModelState,
        torch_options: Mapping[str, Any],
        guards: Guards = "always",
    ) -> None:
        self.guards = guards
        self.module, self.backend, self.state, self.torch_options = weakref.ref(module), backend, state, torch_options
        self.capturing: AbstractContextManager[None] = capturing()
        self.settled = False
        self.compiled = isolated_compile(module._call_impl, self.backend, **self.torch_options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            if not self.settled:
                return self._settle(args, kwargs)
            with current_call(self.state, lambda call: self._diagnose(call, args, kwargs)) as call:
                if self.guards == "generation":
                    return self._by_route(call, args, kwargs)
                with self.capturing:
                    return self.compiled(*args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, LoopNotFound):
                raise OptionError(f"loops: {error.inner_exception}") from None
            if isinstance(error.inner_exception, OptionError):
                raise error.inner_exception from None
            raise

    def _by_route(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The call's result: past dynamo's guards if this generation has learned a shortcut, else through them."""

        def guarded() -> Any:
            with self.capturing:
                return self.compiled(*args, **kwargs)

        module, look_and_tensors = self.module(), look_of(args, kwargs)
        if module is None or look_and_tensors is None or _is_wrapped(module):
            return guarded()
        look, tensors = look_and_tensors
        call.route = Route(call)
        return call.route.result(look, tensors, guarded)

    def _settle(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The first call's result. The call settles whether the module is captured under the flags of `capturing`."""
        module = self.module()
        assert module is not None
        restore = _snapshot((args, kwargs, list(module.buffers())))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if tensors and all(map(on_host, tensors)):
            warm_up(self.state.options)
        failure: Exception | None = None
        try:
            with self.capturing, current_call(self.state, finish=False) as call:
                result = self.compiled(*args, **kwargs)
        except (TorchDynamoException, GuardOnDataDependentSymNode) as error:
            if self.torch_options.get("fullgraph") or isinstance(error, BackendCompilerFailed):
                raise
            failure = error
        self.settled = True
        if failure is None and not _lacks_loop(call):
            call.finish(lambda call: self._diagnose(call, args, kwargs))
            return result
        restore()
        logger.info("captured again with breaks: %s", failure or "no graph held a loop")
        self.capturing = nullcontext()
        self.compiled = isolated_compile(module._call_impl, self.backend, **self.torch_options)
        return self(*args, **kwargs)

    def _diagnose(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """The reason why the blocks are not in one graph; None if the call ran uncached for another reason."""
        module = self.module()
        if module is None or not _lacks_loop(call):
            return None
        place = first_break(module, args, kwargs)
        if place is None:
            return (
                "no caching: dynamo captured no frame of this call. Either it gave up recompiling the model "
                "(TORCH_LOGS=recompiles tells why), or its forward is torch's own code, which dynamo skips: wrap it"
            )
        return f"no caching: no graph holds a block loop, since the capture breaks, first at {place}"


def _is_wrapped(module: torch.nn.Module) -> bool:
    """Whether code outside all graphs runs around the module's forward."""
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _lacks_loop(call: Call) -> bool:
    """Whether the capture broke, and none of the graphs holds a loop."""
    return call.graphs != 1 and call.uncached is not None and call.uncached.cause in (NO_LOOP, NOT_CAPTURED)


def _snapshot(arguments: Any) -> Callable[[], None]:
    """Copy the state that a call may change: inputs, buffers, random generators. The result restores that state."""
    copies = [(leaf, leaf.detach().clone()) for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    generator = torch.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        for leaf, copy in copies:
            if not torch.equal(leaf, copy):
                leaf.detach().copy_(copy)
        torch.set_rng_state(generator)
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)

    return restore
