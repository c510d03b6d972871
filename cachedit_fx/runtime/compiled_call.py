"""Replaces a compiled module's call: one transformer call, which may become several graphs.

It sets the flags with which dynamo keeps data-dependent lengths in one graph, for this call alone. It makes the `Call`
that the graphs share. If a call ran uncached, it finds the place at which the capture broke. Inputs that cannot be
captured at all go to the plain module.

An object that `torch.compile` made of the module calls it under dynamo's eye. Dynamo must not look inside: the call
compiles the model as it is.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._pytree import tree_leaves

from cachedit_fx.capture import CAPTURE_ERRORS, called_by_wrapper, capturing, first_break, isolated_compile
from cachedit_fx.config.rules import OptionError
from cachedit_fx.passes.block_loops import LoopNotFound
from cachedit_fx.runtime.awaited import arrived, take_arrived
from cachedit_fx.runtime.call import NO_LOOP, NOT_CAPTURED, Call, current_call
from cachedit_fx.runtime.guard import on_host
from cachedit_fx.runtime.host_tensor import HostWeightError
from cachedit_fx.runtime.model_state import ModelState
from cachedit_fx.runtime.presence import RanksDisagree
from cachedit_fx.runtime.progress import compiling
from cachedit_fx.runtime.shortcut import Route, look_of
from cachedit_fx.runtime.snapshot import call_snapshot, parameter_versions
from cachedit_fx.runtime.verification import VerificationError
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
        place: called before each call with the module and the inputs, to put weights on the host or the device.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        backend: Callable[..., Any],
        state: ModelState,
        torch_options: Mapping[str, Any],
        guards: Guards = "always",
        place: Callable[[torch.nn.Module, Sequence[Any], Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.guards, self.place = guards, place
        self.module, self.backend, self.state, self.torch_options = weakref.ref(module), backend, state, torch_options
        self.refused: set[Hashable] = set()
        """Shapes and dtypes of inputs that could not be captured."""
        self._compile_under(capturing())

    def _compile_under(self, flags: AbstractContextManager[None], is_settled: bool = False) -> None:
        module = self.module()
        assert module is not None
        self.capturing, self.settled = flags, is_settled
        self.compiled = isolated_compile(module._call_impl, self.backend, **self.torch_options)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._verified_result(args, kwargs)
        except BaseException as error:  # other ranks may wait for this one, and need not
            is_told = isinstance(error, RanksDisagree)
            self.state.leave_ranks(None if is_told else f"failed in its latest call, with {type(error).__name__}")
            raise

    def _verified_result(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        verifier, module = self.state.verifier, self.module()
        if self.state.ranks is not None:
            args, kwargs = tuple(map(arrived, args)), {name: arrived(value) for name, value in kwargs.items()}
            take_arrived(module)
        if verifier is None or module is None:
            return self._result(args, kwargs)
        try:
            return verifier.check(module, args, kwargs, lambda: self._result(args, kwargs))
        except VerificationError:
            self.state.set_options(self.state.asked)  # the next call starts a generation: wrong values are not reused
            raise

    def _result(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            if self.place is not None and (module := self.module()) is not None:
                self.place(module, args, kwargs)
            if self.settled:
                return self._settled_result(args, kwargs)
            with compiling(type(self.module()).__name__):
                return self._settle(args, kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, LoopNotFound):
                raise OptionError(f"loops: {error.inner_exception}") from None
            if isinstance(error.inner_exception, (OptionError, HostWeightError)):
                raise error.inner_exception from None
            raise

    def _settled_result(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], restore: Callable[[], None] | None = None
    ) -> Any:
        with current_call(self.state, lambda call: self._diagnose(call, args, kwargs)) as call:

            def guarded() -> Any:
                return self._guarded(call, args, kwargs, restore)

            return self._by_route(call, args, kwargs, guarded) if self.guards == "generation" else guarded()

    def _guarded(
        self,
        call: Call,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        restore: Callable[[], None] | None,
    ) -> Any:
        """The call's result, through dynamo's guards. Inputs that cannot be captured go to the plain module.

        An example is an operation that runs, and that torch's fake tensors refuse. If a graph of the call ran before
        the capture failed, its writes must be undone by `restore`; without it the error is raised.
        """
        if not self.refused or _kind_of(args, kwargs) not in self.refused:
            try:
                with self.capturing:
                    return self.compiled(*args, **kwargs)
            except CAPTURE_ERRORS as error:
                if self._must_raise(error) or (call.graphs and restore is None):
                    raise
                logger.info("not captured, the plain module runs: %s", error)
                call.abandon()
            if restore is not None:
                restore()
        module = self.module()
        assert module is not None
        result = module._call_impl(*args, **kwargs)
        self.refused.add(_kind_of(args, kwargs))
        return result

    def _must_raise(self, error: Exception) -> bool:
        return bool(self.torch_options.get("fullgraph")) or isinstance(error, BackendCompilerFailed)

    def _by_route(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any], guarded: Callable[[], Any]) -> Any:
        """The call's result: past dynamo's guards if this generation has learned a shortcut, else from `guarded`."""
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
        if called_by_wrapper(module):
            self.state.warn_once(
                f"torch.compile was called on {type(module).__name__}, whose cached call compiles the model already: "
                "the options of torch.compile have no effect; pass them to enable_cache (inner_backend, mode, dynamic)"
            )
        restore, versions = call_snapshot(module, args, kwargs), parameter_versions(module)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if tensors and all(map(on_host, tensors)):
            warm_up(self.state.options)
        failure: Exception | None = None
        try:
            with self.capturing, current_call(self.state, finish=False, expected=CAPTURE_ERRORS) as call:
                result = self.compiled(*args, **kwargs)
        except CAPTURE_ERRORS as error:
            if self._must_raise(error):
                raise
            failure = error
        lacks_loop = failure is not None or _lacks_loop(call)
        is_repeatable = parameter_versions(module) == versions  # parameters are not restored
        if lacks_loop:
            logger.info("captured again with breaks: %s", failure or "no graph held a loop")
            self._compile_under(nullcontext(), is_settled=True)
        if failure is None and not (lacks_loop and is_repeatable):
            self.settled = True
            call.finish(lambda call: self._diagnose(call, args, kwargs))
            return result
        restore()
        try:
            return self._settled_result(args, kwargs, restore)
        except Exception:  # nothing is learned from a call that the plain module refuses too
            self._compile_under(capturing())
            raise

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


def _kind_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """Shapes, dtypes and devices of a call's tensors."""
    tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
    return tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)


def _lacks_loop(call: Call) -> bool:
    """Whether the capture broke, and none of the graphs holds a loop."""
    return len(call.graphs) != 1 and call.uncached is not None and call.uncached.cause in (NO_LOOP, NOT_CAPTURED)
