"""What the assembly of a compiled kernel says: loads and stores, registers and spills, loops, matrix instructions.

PTX and what ptxas says of it for NVIDIA, AMDGCN for AMD. Instructions are counted as they stand: a loop's body once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Accesses(NamedTuple):
    """Bytes of each load from global memory, and of each store to it, in a thread's program."""

    loads: tuple[int, ...]
    stores: tuple[int, ...]


_PTX = re.compile(
    r"\b(ld|st)((?:\.[\w:]+)+)|\bcp\.async\.\w+\.shared\.global(?:\.[\w:]+)*\s+\[[^]]*\],\s*\[[^]]*\],\s*(\w+)"
)


def ptx_accesses(ptx: str) -> Accesses:
    """Loads and stores of global memory in PTX, predicated or not; copies to shared memory are loads."""
    widths: dict[str, list[int]] = {"ld": [], "st": []}
    for match in _PTX.finditer(ptx):
        op, suffixes, copied = match.groups()
        if copied:
            widths["ld"].append(int(copied, 0))
            continue
        _, *parts = suffixes.split(".")
        if "global" in parts:
            vector = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d+", part)), 1)
            widths[op].append(vector * int(re.sub(r"\D", "", parts[-1])) // 8)
    return Accesses(tuple(widths["ld"]), tuple(widths["st"]))


_PTXAS = {
    "registers": re.compile(r"Used (\d+) registers"),
    "spills": re.compile(r"(\d+) bytes spill (?:stores|loads)"),
}


def ptxas_usage(log: str) -> tuple[int, int]:
    """Registers, and bytes of spills stored and loaded, that `ptxas -v` tells of."""
    registers, spills = (list(map(int, pattern.findall(log))) for pattern in _PTXAS.values())
    if not registers or not spills:
        raise ValueError(f"ptxas told nothing of registers: {log!r}")
    return max(registers), sum(spills)


_AMD = re.compile(r"^\s*(?:global|buffer|flat)_(load|store)_(\w+)", re.MULTILINE)
_AMD_UNIFORM = re.compile(r"^\s*s_load_dword\s+s\d+, s\[\d+:\d+\], 0x0\s*$", re.MULTILINE)
"""A value that a wavefront has in common. The first argument is a pointer, two words: this one is no argument."""
_AMD_WIDTHS = (
    (re.compile(r"(?:lds_)?dword(?:x(\d))?"), lambda n: 4 * int(n or 1)),
    (re.compile(r"(?:d16_)?(?:hi_)?[biu](\d+)"), lambda n: int(n) // 8),
    (re.compile(r"[us]?(?:short|byte)(?:_d16)?(?:_hi)?"), None),
)


def amdgcn_accesses(text: str) -> Accesses:
    """Loads and stores of global memory in AMDGCN."""
    widths: dict[str, list[int]] = {"load": [], "store": []}
    for op, kind in _AMD.findall(text):
        widths[op].append(_amd_width(kind))
    widths["load"] += [4 for _ in _AMD_UNIFORM.findall(text)]
    return Accesses(tuple(widths["load"]), tuple(widths["store"]))


def _amd_width(kind: str) -> int:
    for pattern, width in _AMD_WIDTHS:
        if match := pattern.fullmatch(kind):
            return width(match[1]) if width else (2 if "short" in kind else 1)
    raise ValueError(f"unknown width of an AMD instruction: {kind}")


def amdgcn_usage(text: str) -> tuple[int, int]:
    """Vector registers, and registers of both kinds that are spilled."""
    found = {name: int(value) for name, value in re.findall(r"\.([vs]gpr_(?:spill_)?count):\s*(\d+)", text)}
    return found["vgpr_count"], found["vgpr_spill_count"] + found["sgpr_spill_count"]


PRODUCTS = {
    "int8": re.compile(r"\.s8\.s8\b|kind::i8|v_mfma_i32_\w*i8"),
    "fp8": re.compile(r"\.e4m3\.e4m3\b|kind::f8f6f4"),
    "bf16": re.compile(r"\.bf16\.bf16\b|kind::f16|v_mfma_f32_\w*bf16"),
    "fp16": re.compile(r"\.f16\.f16\b|kind::f16|v_mfma_f32_\w*[x\d]f16|v_mfma_f32_\w+_f16"),
    "fp32": re.compile(r"\.tf32\.tf32\b|kind::tf32|v_mfma_f32_\w*f32\b"),
}
"""Matrix instructions by the dtype of their factors, in PTX and AMDGCN."""


_LABEL = re.compile(r"^\s*([$.]?\w*BB\d+_\d+):", re.MULTILINE)
_JUMP = re.compile(r"(@\S+\s+)?\b(?:bra(?:\.uni)?|s_(c?)branch\w*)\s+([$.]?\w*BB\d+_\d+)")


class _Jump(NamedTuple):
    """Places in a text. An unconditional jump never goes on to what follows it."""

    start: int
    end: int
    target: int
    is_conditional: bool


def product_loops(text: str, products: Sequence[re.Pattern[str]]) -> list[str]:
    """The loops of PTX or AMDGCN that match all of `products`, and have no other such loop inside.

    From a loop's label to the last jump there.
    """
    labels = {match[1]: match.start() for match in _LABEL.finditer(text)}
    jumps = [
        _Jump(*match.span(), labels.get(match[3], len(text)), bool(match[1] or match[2]))
        for match in _JUMP.finditer(text)
    ]
    ends = {jump.target: jump.end for jump in jumps if _closes_loop(jump, jumps)}
    spans = [span for span in ends.items() if all(product.search(text, *span) for product in products)]
    return [
        text[first:last]
        for first, last in spans
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in spans)
    ]


def _closes_loop(back: _Jump, jumps: Sequence[_Jump]) -> bool:
    """Whether the text from a jump's target comes to the jump. Blocks that are moved to the end also jump back."""
    starts, visited = [back.target], set()
    while starts:
        start = starts.pop()
        if start in visited or not back.target <= start <= back.start:
            continue
        visited.add(start)
        jump = next(jump for jump in jumps if jump.start >= start)
        if jump == back:
            return True
        starts += [jump.target, jump.end] if jump.is_conditional else [jump.target]
    return False
