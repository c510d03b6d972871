"""INT8 attention beside sageattention 1.0.6, without a GPU: errors in Triton's interpreter, instructions ahead of time.

sageattention's entry asserts CUDA, so that its kernels are called directly, as the entry calls them. Inputs are normal
and float16, which Triton's interpreter computes as hardware does. The interpreter and the compiler each take a process.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cachedit_fx.bench.kernels_assembly import PRODUCTS, product_loops, ptx_accesses
from cachedit_fx.bench.kernels_verify import TARGETS as GPUS
from cachedit_fx.bench.kernels_verify import compiled_for, triton_pool
from cachedit_fx.kernels.variants import Variant
from cachedit_fx.report.files import whole_files
from cachedit_fx.report.tables import Heading, Table, page

HEAD_DIMS = (64, 96, 128)
"""Those that sageattention takes."""
LENGTHS = (64, 128, 256, 65, 100, 200, 300)
TARGETS = ("sm80", "sm89", "sm90")
HEADS = 2


class Errors(NamedTuple):
    """Relative errors against float64."""

    head_dim: int
    length: int
    ours: float
    theirs: float


class Counts(NamedTuple):
    """Of a loop that takes 64 keys for 128 queries: machine instructions of a warp, bytes that a program reads."""

    instructions: int
    bytes: int


@dataclass(frozen=True)
class Compared:
    """Both loops at one head dim on one target."""

    head_dim: int
    target: str
    ours: Counts
    theirs: Counts


def errors(case: tuple[int, int]) -> Errors:
    """In a process with Triton's interpreter."""
    from cachedit_fx.kernels.int8_attention_triton import launch

    head_dim, length = case
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, length, head_dim, dtype=torch.float16) for _ in range(3))
    scores = query.double() @ key.double().mT * head_dim**-0.5
    exact = scores.softmax(-1) @ value.double()
    ours = launch(query, key, value)
    theirs = _sage(query, key, value)
    return Errors(head_dim, length, *(float((x.double() - exact).norm() / exact.norm()) for x in (ours, theirs)))


def _sage_modules(head_dim: int) -> tuple[Callable[..., Any], Any]:
    """Their quantization, and the module of their attention."""
    suffix, name = ("_h96", "_hd96") if head_dim == 96 else ("", "")
    quantization = importlib.import_module(f"sageattention.quant_per_block{name}")
    attention = importlib.import_module(f"sageattention.attn_qk_int8_per_block{suffix}")
    return getattr(quantization, f"per_block_int8{name}"), attention


def _sage(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    quantize, attention = _sage_modules(query.shape[-1])
    key = key - key.mean(2, keepdim=True)
    q_codes, q_scale, k_codes, k_scale = quantize(query, key)
    return attention.forward(q_codes, k_codes, value, q_scale, k_scale, output_dtype=query.dtype)


def _sage_variant(head_dim: int) -> Variant:
    """Their kernel as they launch it, with every stride known to be a multiple of 16."""
    kernel = _sage_modules(head_dim)[1]._attn_fwd
    pointers = {"Q": "*i8", "K": "*i8", "V": "*fp16", "Q_scale": "*fp32", "K_scale": "*fp32", "Out": "*fp16"}
    constexprs = {"HEAD_DIM": head_dim, "BLOCK_M": 128, "BLOCK_N": 64, "STAGE": 1, "num_kv_groups": 1}
    types = {name: pointers.get(name, "constexpr" if name in constexprs else "i32") for name in kernel.arg_names}
    strides = frozenset(name for name in types if name.startswith("stride"))
    return Variant(kernel, "sageattention", types, constexprs, 0, multiples=strides, num_stages=4)


def _our_variant(head_dim: int) -> Variant:
    from cachedit_fx.kernels.int8_attention_triton import variants

    return next(variant for variant in variants() if variant.name == f"int8_attention fp16, heads of {head_dim}")


def compared(case: tuple[int, str]) -> Compared:
    """In a process without Triton's interpreter."""
    head_dim, target = case
    return Compared(head_dim, target, *(_counts(make(head_dim), target) for make in (_our_variant, _sage_variant)))


def _counts(variant: Variant, target: str) -> Counts:
    binary, _, _ = compiled_for(variant, GPUS[target])
    reads = [
        sum(ptx_accesses(body).loads) for body in product_loops(binary.asm["ptx"], [PRODUCTS["int8"], PRODUCTS["fp16"]])
    ]
    return Counts(len(_machine_loops(binary.asm["cubin"])[0]), reads[0] * variant.num_warps * 32)


_MACHINE_PRODUCTS = [re.compile(r"\bIG?MMA\b"), re.compile(r"\bHG?MMA\b")]
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", re.MULTILINE)


def _machine_loops(cubin: bytes) -> list[list[str]]:
    """Instructions of each loop that has matrix instructions of both kinds, in order: whole tiles come first."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-c", file.name], check=True, capture_output=True, text=True).stdout
    # As PTX has them, so that one function finds loops in both.
    text = re.sub(r"`\(\.L_x_(\d+)\)", r" BB0_\1", re.sub(r"^\.L_x_(\d+):", r"BB0_\1:", text, flags=re.MULTILINE))
    text = re.sub(r"\bBRA\b\s+", "bra ", text)
    return [_INSTRUCTION.findall(body) for body in product_loops(text, _MACHINE_PRODUCTS)]


def measure() -> tuple[list[Errors], list[Compared]]:
    """Every row of both tables."""
    with triton_pool(1, is_interpreted=True) as pool:
        rows = pool.map(errors, [(head_dim, length) for head_dim in HEAD_DIMS for length in LENGTHS])
    with triton_pool(1, is_interpreted=False) as pool:
        loops = pool.map(compared, [(head_dim, target) for head_dim in HEAD_DIMS for target in TARGETS])
    return rows, loops


def errors_table(rows: Sequence[Errors]) -> Table:
    """A line for each head dim and length."""
    table = Table(("head dim", "length", "int8_attention", "sageattention", "ratio"))
    for row in rows:
        table.add(
            str(row.head_dim), str(row.length), f"{row.ours:.4f}", f"{row.theirs:.4f}", f"{row.ours / row.theirs:.2f}"
        )
    return table


def loops_table(rows: Sequence[Compared]) -> Table:
    """A line for each head dim and target."""
    headings = ("head dim", "target", "instructions", "theirs", "ratio", "bytes", "theirs", "ratio")
    table = Table(headings, texts=range(1, 2))
    for row in rows:
        cells = [str(row.head_dim), row.target]
        for ours, theirs in zip(row.ours, row.theirs, strict=True):
            cells += [str(ours), str(theirs), f"{ours / theirs:.2f}"]
        table.add(*cells)
    return table


MEANINGS = (
    "**int8_attention**, **sageattention**: relative errors against float64; normal inputs in float16, two heads, as "
    "many keys as queries.",
    "sageattention 1.0.6 counts the padding of a last tile of keys as keys: lengths that 64 does not divide.",
    "**instructions**: machine instructions in the loop over tiles of 128 queries and 64 keys, for one warp of eight.",
    "**bytes**: what a program reads in one pass of that loop.",
)


def save(rows: Sequence[Errors], loops: Sequence[Compared], made_by: str, folder: Path) -> None:
    """Write `attention.md`."""
    text = page(
        Heading("INT8 attention beside sageattention"), made_by, MEANINGS, errors_table(rows), loops_table(loops)
    )
    with whole_files(folder) as staging:
        (staging / "attention.md").write_text(text)
