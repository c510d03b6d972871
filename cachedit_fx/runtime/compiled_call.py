"""The call that stands in a compiled module's place: one transformer call, whatever number of graphs it becomes.

It switches on what dynamo needs to keep data-dependent lengths in one graph, for this call alone; it is where the
graphs of a call meet; and it finds out what broke the capture where a call ran uncached.
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

from cachedit_fx.capture import capturing, first_break
from cachedit_fx.config.rules import OptionError
from cachedit_fx.passes.block_loops import LoopNotFound
from cachedit_fx.runtime.call import NO_LOOP, NOT_CAPTURED, Call, NewGeneration, call_of
from cachedit_fx.runtime.guard import on_host
from cachedit_fx.runtime.model_state import ModelState
from cachedit_fx.runtime.shortcut import learn, look_of
from cachedit_fx.runtime.warm_up import warm_up

logger = logging.getLogger(__name__)

Guards = Literal["always", "generation"]
"""When a call passes dynamo's guards: always, or at the start of every generation (see `cachedit_fx.shortcut`)."""


class CompiledCall:
    """The module compiled, and called as one `Call` of `cache`.

    Under `capturing` at first. Where that breaks the capture inside the blocks, or fails, and leaving breaks to dynamo
    puts the blocks into one graph of several, the module is compiled again without, at the very same call.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        backend: Callable[..., Any],
        cache: ModelState,
        torch_options: Mapping[str, Any],
        guards: Guards = "always",
    ) -> None:
        self.guards = guards
        self.module, self.backend, self.cache, self.torch_options = weakref.ref(module), backend, cache, torch_options
        self.capturing: AbstractContextManager[None] = capturing()
        self.settled = False
        self.compiled = self._compile(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            if not self.settled:
                return self._settle(args, kwargs)
            with call_of(self.cache, lambda call: self._diagnose(call, args, kwargs)) as call:
                if self.guards == "generation":
                    return self._by_shortcut(call, args, kwargs)
                with self.capturing:
                    return self.compiled(*args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, LoopNotFound):
                raise OptionError(f"loops: {error.inner_exception}") from None
            if isinstance(error.inner_exception, OptionError):
                raise error.inner_exception from None
            raise

    def _by_shortcut(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Past dynamo where this generation has shown the way, else by way of its guards, and learn."""
        module, seen = self.module(), look_of(args, kwargs)
        if module is None or seen is None or _is_wrapped(module):
            with self.capturing:
                return self.compiled(*args, **kwargs)
        look, tensors = seen
        known = call.session.shortcuts.get(look)
        if known is not None and known.is_open:
            call.is_guarded = False
            try:
                return known(tensors)
            except NewGeneration:
                call.restart()
        call.ran = []
        with self.capturing:
            result = self.compiled(*args, **kwargs)
        found = learn(tensors, call.ran, result) if call.graphs == 1 else None
        known = call.session.shortcuts.get(look)
        if found is None:
            call.session.shortcuts.pop(look, None)
        elif known is not None and known.agrees(found):
            known.calls += 1
        else:
            call.session.shortcuts[look] = found
        return result

    def _compile(self, module: torch.nn.Module) -> Callable[..., Any]:
        isolated: dict[str, Any] = {"isolate_recompiles": True}  # missing from torch 2.13's overloads
        compiled: Callable[..., Any] = torch.compile(
            module._call_impl, backend=self.backend, **isolated, **self.torch_options
        )
        return compiled

    def _settle(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The first call, which finds out under which flags the blocks can be had."""
        module = self.module()
        assert module is not None
        restore = _snapshot((args, kwargs))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if tensors and all(map(on_host, tensors)):
            warm_up(self.cache.options)
        failure: Exception | None = None
        try:
            with self.capturing, call_of(self.cache, finish=False) as call:
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
        self.capturing, self.compiled = nullcontext(), self._compile(module)
        return self(*args, **kwargs)

    def _diagnose(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """What kept the blocks from being in one graph; None where that is not what the call lacked."""
        module = self.module()
        if module is None or not _lacks_loop(call):
            return None
        found = first_break(module, args, kwargs)
        if found is None:
            return (
                "no caching: dynamo captured no frame of this call. Either it gave up recompiling the model "
                "(TORCH_LOGS=recompiles tells why), or its forward is torch's own code, which dynamo skips: wrap it"
            )
        return f"no caching: no graph holds a block loop, since the capture breaks, first at {found}"


def _is_wrapped(module: torch.nn.Module) -> bool:
    """Whether something runs around the module's forward that is no part of any graph."""
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _lacks_loop(call: Call) -> bool:
    """Whether the capture broke, and no graph that came of it holds a loop."""
    return call.graphs != 1 and call.uncached is not None and call.uncached.cause in (NO_LOOP, NOT_CAPTURED)


def _snapshot(arguments: Any) -> Callable[[], None]:
    """Remembers what a call may change, its inputs and the random generators; the result puts it back."""
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
