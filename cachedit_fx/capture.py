"""All that touches dynamo: its flags, a compile isolated from others, the first break, numbers in the frame."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TorchDynamoException


def ends_at_break(gm: fx.GraphModule) -> bool:
    """Whether more graphs of the same call follow, since something broke the capture behind this one."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and bool(reason.graph_break)


def numbers_in_frame() -> dict[str, float]:
    """Arguments of the frame being traced that are Python numbers: dynamo makes them constants of its first graph."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        frame = InstructionTranslator.current_tx().output.root_tx.f_locals
    except (AttributeError, AssertionError):
        return {}
    named = dict(frame) | (frame["kwargs"] if isinstance(frame.get("kwargs"), dict) else {})
    return {k: float(v) for k, v in named.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def capturing() -> AbstractContextManager[None]:
    """Dynamo's two flags for values read back and lengths that depend on data, in the present thread, for the block.

    May be entered again and again, in several threads, and on a hot path should be: every patch that torch 2.13 makes
    leaves a variable in the thread's context for good.
    """
    flags: AbstractContextManager[None] = torch._dynamo.config.patch(
        capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
    )
    return flags


def isolated_compile(function: Callable[..., Any], backend: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile`, with a recompile limit of its own: dynamo's counts per code object, which models of a class
    share."""
    isolated: dict[str, Any] = {"isolate_recompiles": True}  # missing from torch 2.13's overloads
    compiled: Callable[..., Any] = torch.compile(function, backend=backend, **isolated, **options)
    return compiled


class _Whole(Exception):
    """Ends a capture that came through in one piece, before anything is run."""


def first_break(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Where and why the capture of `module(*args, **kwargs)` breaks first: file, line, code, dynamo's reason.

    None where it does not. Traces anew and runs nothing.
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
        except RuntimeError as error:  # there is nothing that dynamo would capture
            return f"{type(module).__name__}.forward ({str(error).splitlines()[0]})"
    return "a place that a capture for this message did not come to"


def _describe(error: TorchDynamoException) -> str:
    """The innermost line outside torch, and dynamo's reason."""
    reason, *details = [line.strip() for line in str(getattr(error, "msg", error)).splitlines() if line.strip()]
    context = next((line for line in details if line.startswith("Developer debug context:")), "")
    about = context.removeprefix("Developer debug context:").strip()
    reason += f": {about}" if about else ""
    stack = list(getattr(error, "real_stack", None) or ())
    inside = str(Path(torch.__file__).parent)
    frame = next((item for item in reversed(stack) if not item.filename.startswith(inside)), None)
    if frame is None:
        return f"a place that dynamo does not name ({reason})"
    return f"{frame.filename}:{frame.lineno}, in {frame.name}, `{frame.line}` ({reason})"


@contextlib.contextmanager
def uncompiled(module: torch.nn.Module) -> Iterator[None]:
    """Take the compiled call off the module for a while."""
    compiled, module._compiled_call_impl = module._compiled_call_impl, None
    try:
        yield
    finally:
        module._compiled_call_impl = compiled
