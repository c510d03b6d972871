"""Numerics of the kernels against float64: every launcher, all dtypes, tensors as they lie in a model.

    numerics("residuals", launchers, device, shapes) ──► a `Check` for each dtype

`examples/gpu_check.py` runs it on a GPU. Nothing but torch is imported, and Triton for its launchers.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from cachedit_fx.bench.kernels_bandwidth import DTYPES, memory
from cachedit_fx.kernels import int8_attention, l1_sums, quant_fp8, residual_apply, residual_store

SHAPES: tuple[tuple[int, ...], ...] = ((1,), (5,), (3, 1), (1, 1, 1), (2, 7, 5), (1, 33, 129), (2, 9, 300))
LARGE: tuple[tuple[int, ...], ...] = ((1, 4097, 3072), (2, 1000, 1111))
LOOKS = ("contiguous", "sliced", "transposed", "every other", "unaligned")
EPSILON = 2.0**-24


class Launchers:
    """What is called: Triton's launchers, or the public functions, which take a CPU's paths there.

    Args:
        on_triton: whether Triton's launchers are called. Without a GPU they need its interpreter.
    """

    def __init__(self, on_triton: bool) -> None:
        self.on_triton = on_triton
        self.l1_sums: Callable[..., torch.Tensor] = l1_sums.l1_sums
        self.apply: Callable[..., None] = residual_apply.residual_apply
        self.store: Callable[..., None] = residual_store.residual_store
        self.quant: Callable[..., torch.Tensor] = quant_fp8.quant_fp8
        self.dequant: Callable[..., torch.Tensor] = quant_fp8.dequant_fp8
        if on_triton:
            from cachedit_fx.kernels import (
                l1_sums_triton,
                quant_fp8_triton,
                residual_apply_triton,
                residual_store_triton,
            )

            self.l1_sums = l1_sums_triton.launch
            self.apply, self.store = residual_apply_triton.launch, residual_store_triton.launch
            self.quant, self.dequant = quant_fp8_triton.launch_quant, quant_fp8_triton.launch_dequant


@dataclass
class Check:
    """What was tried of one thing, and what went wrong."""

    name: str
    tried: int = 0
    worst: float = 0.0
    """Largest error, of the one that is allowed."""
    problems: list[str] = field(default_factory=list)

    def take(self, what: str, error: torch.Tensor, allowed: torch.Tensor | float) -> None:
        """Errors and what is allowed of them, element by element."""
        self.tried += 1
        ratio = (error / allowed).max().item() if error.numel() else 0.0
        self.worst = max(self.worst, ratio if ratio == ratio else float("inf"))
        if not ratio <= 1:
            self.problems.append(f"{what}: {ratio:.3g} of the error that is allowed")

    def same(self, what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Equal to the bit."""
        self.tried += 1
        if found.shape != expected.shape or not torch.equal(found, expected):
            self.problems.append(f"{what}: not identical")


def lying(values: torch.Tensor, look: str) -> torch.Tensor:
    """`values`, as they may lie in a model: in a joint stream, permuted, at an odd address."""
    shape = values.shape
    if look == "contiguous":
        return values
    if look == "sliced":
        dim = max(values.ndim - 2, 0)
        whole = [size + 5 * (d == dim) for d, size in enumerate(shape)]
        found = values.new_full(whole, torch.nan).narrow(dim, 3, shape[dim])
    elif look == "transposed":
        found = values.new_empty(shape[::-1]).permute(*reversed(range(values.ndim)))
    elif look == "every other":
        found = values.new_full((*shape[:-1], 2 * shape[-1]), torch.nan)[..., ::2]
    else:
        found = values.new_empty(values.numel() + 1)[1:].view(shape)
    return found.copy_(values)


def numerics(
    kernel: str,
    launchers: Launchers,
    device: torch.device,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Collection[str] = tuple(DTYPES),
) -> Iterator[Check]:
    """A check for each dtype of the launchers that `kernel`, a name in `KERNELS`, stands for."""
    for name in dtypes:
        check = Check(f"{kernel}, {name}")
        try:
            for shape in shapes:
                for look in LOOKS:
                    KERNELS[kernel](check, launchers, shape, look, DTYPES[name], device)
        except Exception as error:
            traceback.print_exc()
            check.problems.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        yield check


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(tuple(shape), device=device).to(dtype)


def _l1_sums(
    check: Check, launchers: Launchers, shape: tuple[int, ...], look: str, dtype: torch.dtype, device: torch.device
) -> None:
    hidden, base = (lying(_random(shape, dtype, device), look) for _ in range(2))
    for count, has_base, per_sample in ((0, True, False), (1, True, False), (2, True, True), (2, False, False)):
        what = f"{shape} {look}, {count} previous, {'a' if has_base else 'no'} base"
        previous = [_random(shape, torch.float32, device) for _ in range(count)]
        out = torch.full(shape, torch.nan, device=device) if has_base else None
        found = launchers.l1_sums(hidden, base if has_base else None, previous, out, per_sample)
        r = hidden.double() - base.double() if has_base else hidden.double()
        if out is not None:
            check.take(what, (out.double() - r).abs(), r.abs() * EPSILON + 1e-45)
        for k, before in enumerate(previous):
            change, size = (before.double() - r.float()).abs(), before.double().abs()
            both = torch.stack([change, size]).reshape(2, shape[0] if per_sample else 1, -1).sum(2).T
            expected = both if per_sample else both[0]
            check.take(f"{what}, sums", (found[..., k, :].double() - expected).abs(), expected * 1e-5)


def _residuals(
    check: Check, launchers: Launchers, shape: tuple[int, ...], look: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Stored, added up, and given back, two results of a launch, of which the second is smaller."""
    shapes = [shape, (*shape[:-2], 1, shape[-1]) if len(shape) > 1 else (1,)]
    bases = [lying(_random(size, dtype, device), look) for size in shapes]
    # Far below their bases, results do not come back to the bit: see `residual_store`.
    values = [_random(size, dtype, device) for size in shapes]
    results = [lying(x.where(x.abs() > 2**-6, 1.0), look) for x in values]
    for kind in ("wider", "float32", "model"):
        stored = [residual_store.residual_like(result, kind) for result in results]
        launchers.store(results, bases, stored)
        unit = torch.finfo(stored[0].dtype).eps / 2
        for x, base, residual in zip(results, bases, stored, strict=True):
            exact = x.double() - base.double()
            check.take(f"{shape} {look}, store {kind}", (residual.double() - exact).abs(), exact.abs() * unit + 1e-45)
        if kind == "wider":
            outs = [torch.empty(size, dtype=dtype, device=device) for size in shapes]
            launchers.apply(bases, [[residual] for residual in stored], [1.0], outs)
            for x, out in zip(results, outs, strict=True):
                check.same(f"{shape} {look}, given back", out, x.contiguous())
        for count, has_base in ((1, False), (2, True), (residual_apply.MAX_TERMS, True)):
            terms = [[torch.randn_like(residual) for _ in range(count)] for residual in stored]
            weights = [(-1) ** j * (0.5 + j / 3) for j in range(count)]
            outs = [torch.empty(size, dtype=dtype, device=device) for size in shapes]
            launchers.apply([base if has_base else None for base in bases], terms, weights, outs)
            for base, residuals, out in zip(bases, terms, outs, strict=True):
                parts = [w * r.double() for w, r in zip(weights, residuals, strict=True)]
                parts += [base.double()] if has_base else []
                exact = sum(parts, torch.zeros_like(parts[0]))
                # The kernel sums in float32 or more, with weights in float32; torch's ops sum in the residuals' dtype.
                inner = EPSILON if launchers.on_triton else max(unit, EPSILON)
                most = sum((part.abs() for part in parts), torch.zeros_like(exact))
                allowed = exact.abs() * torch.finfo(dtype).eps / 2 + most * inner * (count + 2) + 1e-7
                check.take(f"{shape} {look}, {count} {kind} terms", (out.double() - exact).abs(), allowed)


def _eight_bits(
    check: Check, launchers: Launchers, shape: tuple[int, ...], look: str, dtype: torch.dtype, device: torch.device
) -> None:
    if len(shape) < 2:
        return
    heads, width = (4, 64) if shape[-1] >= 256 else (4, max(1, shape[-1] // 4))
    x = lying(_random((*shape[:-1], heads, width), dtype, device), look)
    packed = launchers.quant(x)
    what = f"{list(x.shape)} {look}"
    check.same(f"{what}, bytes", packed.cpu(), quant_fp8.quant_fp8(x.cpu()))
    back = launchers.dequant(packed, heads, torch.float32)
    scale = x.double().abs().amax(-1, keepdim=True) / quant_fp8.LARGEST
    check.take(what, (back.double() - x.double()).abs(), x.double().abs() / 16 * (1 + 1e-5) + scale * 2.0**-10 + 1e-30)
    check.same(f"{what}, dequantized", launchers.dequant(packed, heads, dtype), back.to(dtype))


KERNELS = {"l1_sums": _l1_sums, "residuals": _residuals, "fp8": _eight_bits}
"""Name -> the function that tries the launchers on one shape and dtype."""


def far_apart(launchers: Launchers, device: torch.device) -> Check:
    """Rows and samples whose distances do not fit 32 bits, where the memory allows."""
    check = Check("rows 2^31 elements apart, bf16")
    distance = 2**31 + 4096 if device.type == "cuda" and memory(device) > 3 * 2**32 else 4096
    if distance == 4096:
        check.name = "rows far apart, bf16"
    whole = torch.zeros(distance + 4 * 512, dtype=torch.bfloat16, device=device)
    for strides in ((distance, 512, 1), (512, distance // 3 // 16 * 16, 1)):
        shape = (2, 4, 256) if strides[0] == distance else (1, 4, 256)
        hidden = whole.as_strided(shape, strides).normal_()
        base, out = torch.zeros_like(hidden.contiguous()), torch.empty(shape, device=device)
        launchers.l1_sums(hidden, base, [], out, False)
        check.same(f"l1_sums {strides}", out, hidden.float())
        launchers.store([hidden], [base], [out])
        check.same(f"residual_store {strides}", out, hidden.float())
        result = torch.empty(shape, dtype=torch.bfloat16, device=device)
        launchers.apply([hidden], [[torch.zeros(shape, device=device)]], [1.0], [result])
        check.same(f"residual_apply {strides}", result, hidden.contiguous())
    return check


ATTENTION_ERROR = 0.03
"""Allowed of int8 attention: the norm of the error over that of the result."""


def attention(device: torch.device, lengths: Sequence[int]) -> Iterator[Check]:
    """A check of int8 attention for each 16-bit dtype: head dims, odd lengths, masks and grouped heads."""
    for name in ("bf16", "fp16"):
        check = Check(f"int8_attention, {name}")
        for length, head_dim, form in itertools.product(lengths, (40, 64, 96, 128), ("plain", "causal", "padding")):
            shape = (2, 4, length, head_dim)
            query, key, value = (_random(shape, DTYPES[name], device) for _ in range(3))
            key, value = key[:, ::2], value[:, ::2]
            mask = torch.arange(length, device=device) < max(1, length - 3) if form == "padding" else None
            options: dict[str, Any] = {
                "attn_mask": None if mask is None else mask[None, None, None],
                "enable_gqa": True,
            }
            options["is_causal"] = form == "causal"
            expected = scaled_dot_product_attention(query.double(), key.double(), value.double(), **options)
            found = int8_attention.int8_attention(query, key, value, **options)
            error = (found.double() - expected).norm() / expected.norm()
            check.take(f"{[*shape]}, {form}", error, ATTENTION_ERROR)
        yield check
