"""Holds all code that touches dynamo: its flags, an isolated compile, the first break, numbers in the frame."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TorchDynamoException


def ends_at_break(gm: fx.GraphModule) -> bool:
    """Whether the capture broke after this graph, so that more graphs of the same call follow."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and bool(reason.graph_break)


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module of the same graph, for passes to change."""
    another: Any = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    another.compile_subgraph_reason = getattr(gm, "compile_subgraph_reason", None)  # dynamo's word on a break
    return another


def numbers_in_frame() -> dict[str, float]:
    """Arguments of the traced frame that are Python numbers. Dynamo makes them constants of its first graph."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        frame = InstructionTranslator.current_tx().output.root_tx.f_locals
    except (AttributeError, AssertionError):
        return {}
    arguments = dict(frame) | (frame["kwargs"] if isinstance(frame.get("kwargs"), dict) else {})
    return {k: float(v) for k, v in arguments.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def capturing() -> AbstractContextManager[None]:
    """Context manager for dynamo's flags to capture values read back and data-dependent lengths, in the present thread.

    One object may be entered repeatedly and in several threads. A hot path should reuse one object: every patch that
    torch 2.13 makes leaves a variable in the thread's context for good.
    """
    flags: AbstractContextManager[None] = torch._dynamo.config.patch(
        capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
    )
    return flags


def isolated_compile(function: Callable[..., Any], backend: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile` with a separate recompile limit. Dynamo counts per code object, which models of a class share."""
    isolated: dict[str, Any] = {"isolate_recompiles": True}  # missing from torch 2.13's overloads
    compiled: Callable[..., Any] = torch.compile(function, backend=backend, **isolated, **options)
    return compiled


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
