"""Kernels that are not what their variants say, and one that is: for the tests of `cachedit kernels verify`."""

import triton
import triton.language as tl

from cachedit_fx.kernels.variants import Variant


@triton.jit
def _copy(x_ptr, out_ptr, n, BLOCK_SIZE: tl.constexpr):
    at = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at, at < n), at < n)


@triton.jit
def _reads_twice(x_ptr, out_ptr, n, BLOCK_SIZE: tl.constexpr):
    at = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + at, at < n)
    tl.debug_barrier()
    tl.store(out_ptr + at, x + tl.load(x_ptr + at, at < n, volatile=True), at < n)


@triton.jit
def _shifted(x_ptr, out_ptr, n, BLOCK_SIZE: tl.constexpr):
    at = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + 1 + at, at < n), at < n)


@triton.jit
def _every_other(x_ptr, out_ptr, n, BLOCK_SIZE: tl.constexpr):
    at = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + 2 * at, at < n), at < n)


@triton.jit
def _spilling(x_ptr, out_ptr, n, BLOCK_SIZE: tl.constexpr):
    at = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + at, at < n).to(tl.float32)
    tl.store(out_ptr + at, (x - tl.sum(x)).to(tl.bfloat16), at < n)


def variants():
    """As a module of the kernels has them: one that is good, and some that are not what they say."""

    def variant(kernel, name, size=2048, **more):
        types = {"x_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32", "BLOCK_SIZE": "constexpr"}
        given = {"read_bytes": 2 * size, "written_bytes": 2 * size, "multiples": frozenset({"n"})} | more
        return Variant(kernel, name, types, {"BLOCK_SIZE": size}, **given)

    yield variant(_copy, "good")
    yield variant(_copy, "unaligned", aligned=False)
    yield variant(_shifted, "shifted, and said to be aligned")
    yield variant(_copy, "a mask that is not known to be a multiple", multiples=frozenset())
    yield variant(_every_other, "every other element")
    yield variant(_reads_twice, "reads twice")
    yield variant(_copy, "writes less than it says", written_bytes=8192)
    yield variant(_spilling, "spills", size=16384, num_warps=1)
