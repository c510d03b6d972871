"""Triton's interpreter as hardware computes: that of Triton 3.9 truncates where hardware rounds, and multiplies
bfloat16 tiles as whole numbers. Needs TRITON_INTERPRET=1."""

import numpy as np
import torch
from triton.runtime import interpreter

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_torch(values, dtype):
    """The interpreter's array of bits as a tensor of `dtype`."""
    bits = np.ascontiguousarray(values)
    return torch.from_numpy(bits.view("u1" if bits.itemsize == 1 else f"i{bits.itemsize}")).view(dtype)


def _convert(values, source, target, rounding_mode):
    target = DTYPES[target.name]
    found = as_torch(values, DTYPES[source.name]).to(target).view(BITS[target.itemsize])
    return found.numpy().view(f"u{target.itemsize}").reshape(values.shape)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    factors = [
        as_torch(x.data, DTYPES[x.dtype.name]).float().numpy() if x.dtype.name in DTYPES else x.data for x in (a, b)
    ]
    return interpreter.TensorHandle(np.matmul(*factors, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def compute_as_hardware(monkeypatch):
    """Let torch convert, and matrices be multiplied in float32."""
    monkeypatch.setattr(interpreter, "_convert_float", _convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
