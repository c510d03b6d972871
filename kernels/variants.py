"""The specialisations that a launcher can choose, for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .layout import NUM_WARPS

Type = str | None | tuple["Type", ...]
"""Triton's type of an argument, `*bf16` a pointer, `i64` a number; None of None; of a tuple, those of its members."""


@dataclass(frozen=True)
class Loop:
    """What one pass of a kernel's loops does, each around matrix instructions. A loop may take half the tiles.

    Attributes:
        tiles: bytes of each tile that it reads.
        common: bytes that it reads besides, however its threads share them.
        scalars: bytes that all threads read.
        products: names of the matrix instructions, of `bench.kernels_assembly.PRODUCTS`.
    """

    tiles: tuple[int, ...]
    common: int
    scalars: int
    products: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """A specialisation that a launcher can choose (`cachedit kernels verify` compiles it).

    Attributes:
        kernel: the function that `jit` made.
        name: the dtypes and numbers that set it apart.
        signature: the type of each argument, by name: None stands for itself, "constexpr" for one of `constexprs`.
        constexprs: the values of these.
        read_bytes, written_bytes: of global memory, the least that the threads of a program can do with on a full tile.
        written_once: bytes that one of them writes for all.
        aligned: whether pointers, and the numbers in `multiples`, are known to be multiples of 16.
        multiples: arguments that are, when `aligned`, and are no pointers.
        unaligned: pointers that are not, whatever the others are.
        num_warps: warps (wavefronts on AMD) of a program.
        num_stages: tiles that its loop has under way; Triton's default unless given.
        loop: of a kernel that reads most in a loop, which Triton may unroll in part; `read_bytes` are not counted then.
        targets: names of the GPUs it is for, of `bench.kernels_verify.TARGETS`; all unless given.
    """

    kernel: Any
    name: str
    signature: Mapping[str, Type]
    constexprs: Mapping[str, Any]
    read_bytes: int
    written_bytes: int = 0
    written_once: int = 0
    aligned: bool = True
    multiples: frozenset[str] = field(default_factory=frozenset)
    unaligned: frozenset[str] = field(default_factory=frozenset)
    num_warps: int = NUM_WARPS
    num_stages: int | None = None
    loop: Loop | None = None
    targets: frozenset[str] | None = None


TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
}
"""Triton's names of the dtypes that the kernels take."""


KEPT_DTYPES = (
    *((value, kept) for value in (torch.bfloat16, torch.float16) for kept in (torch.float32, value)),
    *((torch.float32, kept) for kept in (torch.float64, torch.float32)),
)
"""Dtypes of values, and of their residuals, that there are variants for: those of `residual_store.residual_dtype`."""
