"""What a compiler makes of the neighbours of attention and of linear layers: kernels, and the bytes that they move.

    norm, rotary ──► attention        queries and keys, as the model writes them and after the pass `fuse_rotary`
    norm, modulation ──► int8         the input of a quantized linear layer
    int8 product ──► gate, residual   the output of one

Inductor's scheduler counts kernels and bytes. The least is each input and each result once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.nn.functional import layer_norm, rms_norm

from cachedit_fx.passes.fuse_rotary import turned_pairs
from cachedit_fx.report.tables import Table

HEAD = 128
EPS = 1e-6


@dataclass(frozen=True)
class Fused:
    """A neighbour, compiled.

    Attributes:
        neighbour, form: in words.
        kernels: launches.
        bytes: that they read and write.
        least: bytes of its inputs and results.
        seconds: median of its calls on a CPU, one thread.
    """

    neighbour: str
    form: str
    kernels: int
    bytes: int
    least: int
    seconds: float


def _stacked(pairs: torch.Tensor) -> torch.Tensor:
    real, imaginary = pairs.unbind(-1)
    return torch.stack([-imaginary, real], dim=-1)


def _rotary(turn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def norm_and_rotary(x: Any, weight: Any, cos: Any, sin: Any) -> Any:
        x = rms_norm(x.unflatten(-1, (-1, HEAD)), (HEAD,), weight, EPS)
        turned = turn(x.unflatten(-1, (-1, 2))).flatten(-2)
        return (x.float() * cos + turned.float() * sin).to(x.dtype)

    return norm_and_rotary


def _in_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as dynamic int8 takes them: codes, and a scale each."""
    scale = (x.abs().amax(-1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps).float()
    return (x * (1.0 / scale)).round().clamp(-128, 127).to(torch.int8), scale


def _rotary_in_int8(x: Any, weight: Any, cos: Any, sin: Any) -> Any:
    return _in_int8(_rotary(turned_pairs)(x, weight, cos, sin))


def _modulated(x: Any, shift: Any, scale: Any) -> Any:
    return layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def _modulated_in_int8(x: Any, shift: Any, scale: Any) -> Any:
    return _in_int8(_modulated(x, shift, scale))


def _gated(hidden: Any, gate: Any, product: Any, row_scale: Any, scale: Any, bias: Any) -> Any:
    return hidden + gate[:, None] * ((product.float() * row_scale).to(hidden.dtype) * scale + bias)


ROTARY, MODULATION, GATE = "norm, rotary", "norm, modulation", "int8 product, gate, residual"
FORMS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    (ROTARY, "as models write it", _rotary(_stacked)),
    (ROTARY, "fuse_rotary", _rotary(turned_pairs)),
    (ROTARY, "fuse_rotary, codes in int8", _rotary_in_int8),
    (MODULATION, "in the model's dtype", _modulated),
    (MODULATION, "codes in int8", _modulated_in_int8),
    (GATE, "as the graph has it", _gated),
)
"""Neighbour, form, function."""


def inputs_of(neighbour: str, tokens: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Inputs of a neighbour's forms: one sample of so many tokens."""
    torch.manual_seed(0)
    x, row = torch.randn(1, tokens, width, dtype=dtype), torch.randn(1, width, dtype=dtype)
    if neighbour == ROTARY:
        angles = torch.randn(2, 1, tokens, 1, HEAD)
        return [x, torch.randn(HEAD, dtype=dtype), *angles]
    if neighbour == MODULATION:
        return [x, row, row + 1]
    product = torch.randint(-1000, 1000, (1, tokens, width), dtype=torch.int32)
    return [x, row, product, torch.rand(1, tokens, 1), torch.rand(width), row[0] + 1]


def measure(tokens: int, width: int, dtype: torch.dtype, rounds: int) -> Iterator[Fused]:
    """Compile every form by inductor, and time it.

    Args:
        tokens: rows.
        width: their size, a multiple of 128.
        dtype: of the model.
        rounds: calls that are timed, by turns.
    """
    torch.set_num_threads(1)
    for neighbour in (ROTARY, MODULATION, GATE):
        arguments = inputs_of(neighbour, tokens, width, dtype)
        forms = [(form, function) for name, form, function in FORMS if name == neighbour]
        compiled = {form: counted(function, arguments) for form, function in forms}
        seconds: dict[str, list[float]] = {form: [] for form, _ in forms}
        for _ in range(rounds):
            for form, counts in compiled.items():
                begun = time.process_time()
                counts.function(*arguments)
                seconds[form].append(time.process_time() - begun)
        for form, counts in compiled.items():
            yield Fused(neighbour, form, counts.kernels, counts.bytes, counts.least, median(seconds[form]))


@dataclass(frozen=True)
class Counts:
    """A compiled function, and what inductor's scheduler says of it: launches, bytes, and the least bytes."""

    function: Callable[..., Any]
    kernels: int
    bytes: int
    least: int


def counted(function: Callable[..., Any], arguments: Sequence[torch.Tensor]) -> Counts:
    """Compile a function by inductor without its caches, and count."""
    from torch._inductor import compile_fx, metrics
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    metrics.reset()
    with torch.no_grad(), fresh_cache(), _counting(compile_fx.inductor_metrics_log):
        compiled = torch.compile(function, dynamic=False)
        result = compiled(*arguments)
    results = result if isinstance(result, tuple) else (result,)
    least = sum(tensor.nbytes for tensor in (*arguments, *results))
    return Counts(compiled, len(metrics.nodes_num_elem), metrics.num_bytes_accessed, least)


@contextlib.contextmanager
def _counting(logger: Any) -> Iterator[None]:
    """Inductor counts bytes only if it logs them."""
    level, propagate = logger.level, logger.propagate
    logger.setLevel("INFO")
    logger.propagate = False
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate


def table(rows: Sequence[Fused]) -> Table:
    """A line for each form."""
    result = Table(("neighbour", "form", "kernels", "MiB", "over the least", "ms"), texts=(0, 1))
    for row in rows:
        moved = f"{row.bytes / 2**20:.1f}"
        result.add(
            row.neighbour, row.form, str(row.kernels), moved, f"{row.bytes / row.least:.2f}", f"{1e3 * row.seconds:.1f}"
        )
    return result
