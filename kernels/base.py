"""What the kernels share: Triton where there is one, and how a launcher tells which specialisations it can choose.

The CPU build of torch comes without Triton; then a kernel below is its plain Python function, which nobody launches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover
    triton = tl = None

HAS_TRITON = triton is not None


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`, where there is a Triton."""
    return triton.jit(kernel) if HAS_TRITON else kernel


@dataclass(frozen=True)
class Variant:
    """A specialisation that a launcher can choose, as ahead-of-time compilation wants it (`cachedit kernels verify`).

    Attributes:
        kernel: the function that `jit` made.
        name: the dtypes and numbers that set it apart.
        signature: Triton's type of each argument that is no constexpr, by name: `*bf16` a pointer, `i64` a number.
        constexprs: the values of the others.
        num_warps: warps (wavefronts on AMD) of a program.
        read_bytes, written_bytes: of global memory, the least that a program on a full block can do with.
        unaligned: arguments that are not known to be multiples of 16; all other pointers and numbers are.
        min_sm: the least compute capability, times ten, of an NVIDIA GPU that has the instructions.
    """

    kernel: Any
    name: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    read_bytes: int
    written_bytes: int
    unaligned: frozenset[str] = frozenset()
    min_sm: int = 80
