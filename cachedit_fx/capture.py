"""Holds all code that touches dynamo: its flags, an isolated compile, the first break, numbers in the frame.

Tested with torch 2.13.0 and 2.14.1. They differ in one place: how the tracer records `x.data = y`, for which
`graph_aliases.is_assignment` has the words.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import TorchDynamoException
from torch._guards import Guard
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from cachedit_fx.passes.graph_aliases import is_assignment, memory_of, written_by

CAPTURE_ERRORS = (TorchDynamoException, GuardOnDataDependentSymNode)
"""Errors with which a capture fails."""


def ends_at_break(gm: fx.GraphModule) -> bool:
    """Whether the capture broke after this graph, so that more graphs of the same call follow."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and bool(reason.graph_break)


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module of the same graph, for passes to change."""
    another: Any = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    another.compile_subgraph_reason = getattr(gm, "compile_subgraph_reason", None)  # dynamo's word on a break
    return another


def _output_graph() -> Any:
    """Dynamo's record of the capture under way; None outside a capture."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output
    except (AttributeError, AssertionError):
        return None


def _traced_frame() -> Mapping[str, Any]:
    """The local variables of the frame that is traced; none outside a capture."""
    output = _output_graph()
    frame: Mapping[str, Any] = {} if output is None or output.root_tx is None else output.root_tx.f_locals
    return frame


def numbers_in_frame() -> dict[str, float]:
    """Arguments of the traced frame that are Python numbers. Dynamo makes them constants of its first graph."""
    frame = _traced_frame()
    arguments = dict(frame) | (frame["kwargs"] if isinstance(frame.get("kwargs"), dict) else {})
    return {k: float(v) for k, v in arguments.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def model_in_frame() -> str:
    """Name of the class whose method is traced; empty if there is none."""
    owner = _traced_frame().get("self")
    return type(owner).__name__ if owner is not None else ""


def has_side_effects() -> bool:
    """Whether the frame that is being captured changes attributes or containers from outside. The graph does not."""
    return bool(_changed_outside())


def _changed_outside() -> list[Any]:
    """Dynamo's variables of the attributes and containers from outside the frame that it changes.

    The frame's own `**kwargs` is a new dict at each call, which some models change (LoRA's scale).
    """
    from torch._dynamo.source import LocalSource
    from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew

    output, new = _output_graph(), (AttributeMutationNew, ValueMutationNew)
    if output is None:
        return []
    code = output.root_tx.f_code
    places = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    own = code.co_varnames[places] if code.co_flags & inspect.CO_VARKEYWORDS else None

    def is_own(source: Any) -> bool:
        return isinstance(source, LocalSource) and source.local_name == own

    modified = output.side_effects._get_modified_vars()
    return [var for var in modified if not isinstance(var.mutation_type, new) and not is_own(var.source)]


def kept_results(gm: fx.GraphModule) -> frozenset[int]:
    """Indices of the graph's results that dynamo puts into attributes and containers from outside the frame."""
    output = _output_graph()
    if output is None:
        return frozenset()
    from torch._dynamo.variables import TensorVariable
    from torch._dynamo.variables.base import VariableTracker

    effects, pending = output.side_effects, _changed_outside()
    visited: set[int] = set()
    names: set[str] = set()

    def visit(var: Any) -> None:
        if id(var) not in visited:
            visited.add(id(var))
            pending.extend(effects.store_attr_mutations.get(var, {}).values())
        if isinstance(var, TensorVariable):
            names.add(var.as_proxy().node.name)

    while pending:
        VariableTracker.visit(visit, pending.pop())
    (results,) = next(node for node in reversed(gm.graph.nodes) if node.op == "output").args
    return frozenset(index for index, value in enumerate(results) if getattr(value, "name", None) in names)


def guard_storages(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Let dynamo capture anew for inputs that share storages otherwise, if the graph writes to an input in place.

    A graph that writes to an input is right only for inputs that share storages as those of the capture do. Dynamo has
    no guard for that.
    """
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    memory = {each for node in inputs for each in memory_of(node)}
    output = _output_graph()
    targets = [target for node in gm.graph.nodes if not is_assignment(node) for target in written_by(node)]
    if output is None or all(memory.isdisjoint(memory_of(target)) for target in targets):
        return
    arguments = ((node.meta.get("grapharg"), value) for node, value in zip(inputs, example_inputs, strict=True))
    sources = {
        argument.source: value
        for argument, value in arguments
        if type(value) is torch.Tensor and value.layout is torch.strided
        if argument is not None and not argument.pass_arg_as_tensor  # a number, which only the graph has as a tensor
    }
    pattern = _shared_storages(*sources.values())

    def install(builder: Any, guard: Any) -> None:
        from torch._dynamo.guards import _get_closure_vars

        names = ", ".join(source.name for source in sources)
        functions = _get_closure_vars() | {_shared_storages.__name__: _shared_storages}
        code = [f"{_shared_storages.__name__}({names}) == {pattern!r}"]
        builder.add_python_lambda_leaf_guard_to_root(code, code, closure_vars=functions)

    if len(sources) > 1:
        output.guards.add(Guard(next(iter(sources)), install))


def _shared_storages(*tensors: torch.Tensor) -> tuple[int, ...]:
    """For each tensor, the index of the first one that has its storage."""
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    return tuple(map(storages.index, storages))


def capturing() -> AbstractContextManager[None]:
    """Context manager for dynamo's flags to capture values read back and data-dependent lengths, in the present thread.

    One object may be entered repeatedly and in several threads. A hot path should reuse one object: every patch of
    torch 2.13 and 2.14 leaves a variable in the thread's context for good.
    """
    flags: AbstractContextManager[None] = torch._dynamo.config.patch(
        capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
    )
    return flags


RECOMPILE_LIMIT = 64
"""Graphs of one model. Dynamo's default of eight is soon used up: every loaded adapter makes a graph, as do autocast,
grad modes, a batch of one, other inputs. Calls beyond the limit run eager, uncached."""


def isolated_compile(function: Callable[..., Any], backend: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile` with a separate recompile limit. Dynamo counts per code object, which models of a class share."""
    isolated: dict[str, Any] = {"isolate_recompiles": True}  # missing from the overloads of 2.13 and 2.14
    compiled: Callable[..., Any] = torch.compile(function, backend=backend, **isolated, **options)
    return compiled


def on_compile(callback: Callable[[], None]) -> None:
    """Have `callback` called whenever dynamo begins to compile something. Passing it again has no effect."""
    from torch._dynamo.callback import callback_handler

    if all(getattr(other, "callback", None) is not callback for other in callback_handler.start_callbacks):

        def start(_: Any) -> None:
            callback()

        start.callback = callback  # type: ignore[attr-defined]
        callback_handler.register_start_callback(start)


def is_wrapper(module: torch.nn.Module) -> bool:
    """Whether `torch.compile` returned the module, with this package's backend."""
    if "_orig_mod" not in module._modules or not hasattr(module, "dynamo_ctx"):
        return False
    context: Any = module.dynamo_ctx
    backend: Any = context.callback
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    backend = getattr(backend, "compiler_fn", backend)
    return str(getattr(backend, "__module__", "")).startswith("cachedit_fx.")


def called_by_wrapper(module: torch.nn.Module) -> bool:
    """Whether the present call came through an object that `torch.compile` returned for the module."""
    code = OptimizedModule.__call__.__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals["self"] if frame.f_code is code else None
        if isinstance(caller, OptimizedModule) and caller._orig_mod is module:
            return True
        frame = frame.f_back
    return False


def unwrap_call(module: torch.nn.Module) -> None:
    """Let an object that `torch.compile` returned call its module, uncompiled."""
    inner: Any = module._orig_mod
    module.forward = inner.__call__


class _Whole(Exception):
    """Ends a capture that gave one whole graph, before anything runs."""


def first_break(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The first break in the capture of `module(*args, **kwargs)`: file, line, code, dynamo's reason.

    None if the capture does not break. Traces anew and runs nothing.
    """

    def stop(*_: Any) -> Any:
        raise _Whole

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return stop

    with capturing():
        try:
            isolated_compile(module._call_impl, backend, fullgraph=True)(*args, **kwargs)
        except _Whole:
            return None
        except TorchDynamoException as error:
            return _describe(error)
        except RuntimeError as error:  # dynamo captures nothing of the forward
            return f"{type(module).__name__}.forward ({str(error).splitlines()[0]})"
    return "a place that a capture for this message did not come to"


def _describe(error: TorchDynamoException) -> str:
    """The innermost line outside torch, and dynamo's reason."""
    reason, *details = [line.strip() for line in str(getattr(error, "msg", error)).splitlines() if line.strip()]
    about = next(filter(None, (_after(label, details) for label in ("Developer debug context:", "Explanation:"))), "")
    reason += f": {about}" if about else ""
    stack = list(getattr(error, "real_stack", None) or ())
    inside = str(Path(torch.__file__).parent)
    frame = next((entry for entry in reversed(stack) if not entry.filename.startswith(inside)), None)
    if frame is None:
        return f"a place that dynamo does not name ({reason})"
    return f"{frame.filename}:{frame.lineno}, in {frame.name}, `{frame.line}` ({reason})"


def _after(label: str, lines: Sequence[str]) -> str:
    """The rest of the line that begins with `label`; "" if there is none."""
    return next((line.removeprefix(label).strip() for line in lines if line.startswith(label)), "")


@contextlib.contextmanager
def uncompiled(module: torch.nn.Module) -> Iterator[None]:
    """Context manager under which the module has no compiled call."""
    compiled, module._compiled_call_impl = module._compiled_call_impl, None
    try:
        yield
    finally:
        module._compiled_call_impl = compiled
