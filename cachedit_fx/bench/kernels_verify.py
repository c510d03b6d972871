"""What the compilers make of the kernels, without a GPU: registers, spills, widths of loads and stores, bytes.

Every `Variant` is compiled ahead of time by Triton, and the assembly read: PTX and what ptxas says of it for NVIDIA,
AMDGCN for AMD. Instructions are counted as they stand: a loop's body once. Triton's interpreter and its compiler cannot
share a process, so that the work is done in processes of its own, `checker`, whatever the environment says.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import math
import multiprocessing
import os
import re
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cachedit_fx.bench.kernels_assembly import (
    PRODUCTS,
    Accesses,
    amdgcn_accesses,
    amdgcn_usage,
    product_loops,
    ptx_accesses,
    ptxas_usage,
)
from cachedit_fx.kernels.layout import HAS_TRITON
from cachedit_fx.kernels.variants import Loop, Type, Variant
from cachedit_fx.report.files import whole_files
from cachedit_fx.report.tables import Heading, Table, page, titled_list

KERNELS = ("l1_sums", "residual_apply", "residual_store", "quant_fp8", "int8_keys", "int8_attention")
"""Families of `cachedit_fx.kernels` that have Triton kernels."""
WIDE = 16
"""Bytes of the widest load or store that every target has."""


class Target(NamedTuple):
    """A GPU to compile for, as Triton's `GPUTarget` names it."""

    backend: str
    arch: int | str
    warp_size: int


TARGETS = {
    "sm80": Target("cuda", 80, 32),
    "sm89": Target("cuda", 89, 32),
    "sm90": Target("cuda", 90, 32),
    "sm100": Target("cuda", 100, 32),
    "gfx942": Target("hip", "gfx942", 64),
}
SHARED = {"sm80": 163 << 10, "sm89": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that a program may have."""


@dataclass(frozen=True)
class Checked:
    """A variant on a target.

    Attributes:
        kernel, variant, target: names.
        registers: of a thread; vector registers on AMD.
        spills: bytes that are spilled and read back (NVIDIA), registers spilled (AMD).
        accesses: of a thread.
        problems: what is wrong with it, in words.
        is_wide, is_exact: whether loads and stores are as wide as they can be (None where pointers are not aligned),
            and whether the bytes are the least.
        seconds: the time of the compilation.
    """

    kernel: str
    variant: str
    target: str
    registers: int
    spills: int
    accesses: Accesses
    problems: tuple[str, ...]
    is_wide: bool | None
    is_exact: bool
    seconds: float

    @property
    def is_good(self) -> bool:
        return not self.problems


class Task(NamedTuple):
    """A variant of a module, by its place, for one of `TARGETS`. Kernels do not pickle; this does."""

    module: str
    place: int
    target: str


_TRITON = "_triton"


def module_of(kernel: str) -> str:
    """The module that holds the Triton kernels of one of `KERNELS`, and its `variants`."""
    return f"cachedit_fx.kernels.{kernel}{_TRITON}"


def tasks(targets: Sequence[str], texts: Sequence[str] = ()) -> list[Task]:
    """Every variant whose name contains one of `texts`, on each of these targets."""
    return [
        Task(module, place, target)
        for module in map(module_of, KERNELS)
        for place, variant in enumerate(importlib.import_module(module).variants())
        if not texts or any(text in variant.name for text in texts)
        for target in targets
        if variant.targets is None or target in variant.targets
    ]


def leaves(given: Any, *path: int) -> Iterator[tuple[tuple[int, ...], Any]]:
    """What a nested tuple holds, with the indices that lead there."""
    if isinstance(given, tuple):
        for index, part in enumerate(given):
            yield from leaves(part, *path, index)
    else:
        yield path, given


class Specialization(NamedTuple):
    """A variant as `triton.compiler.ASTSource` takes it: values and hints by paths of argument and tuple indices."""

    signature: Mapping[str, Type]
    constexprs: Mapping[tuple[int, ...], Any]
    attrs: Mapping[tuple[int, ...], list[list[Any]]]


def specialization(variant: Variant) -> Specialization:
    """None is a constant for Triton; whatever is aligned is said to be a multiple of 16."""
    names = list(variant.signature)
    constexprs: dict[tuple[int, ...], Any] = {(names.index(name),): value for name, value in variant.constexprs.items()}
    attrs = {}
    for number, name in enumerate(names):
        for path, kind in leaves(variant.signature[name], number):
            if kind is None:
                constexprs[path] = None
            elif (
                variant.aligned
                and name not in variant.unaligned
                and (kind.startswith("*") or name in variant.multiples)
            ):
                attrs[path] = [["tt.divisibility", 16]]
    return Specialization({name: _typed(kind) for name, kind in variant.signature.items()}, constexprs, attrs)


def _typed(kind: Type | None) -> Type:
    if isinstance(kind, tuple):
        return tuple(map(_typed, kind))
    return "constexpr" if kind is None else kind


def check(variant: Variant, target: str) -> Checked:
    """Compile `variant`, read what came out, and judge it. In a process without Triton's interpreter."""
    compiled, log, seconds = compiled_for(variant, TARGETS[target])
    read: Callable[[str], Accesses]
    if TARGETS[target].backend == "cuda":
        text, read = compiled.asm["ptx"], ptx_accesses
        registers, spills = ptxas_usage(log)
    else:
        text, read = compiled.asm["amdgcn"], amdgcn_accesses
        registers, spills = amdgcn_usage(text)
    accesses = read(text)
    threads = variant.num_warps * TARGETS[target].warp_size
    if variant.loop is None:
        narrow, bytes_off = too_narrow(variant, accesses, threads), not_minimal(variant, accesses, threads)
    else:
        bodies = product_loops(text, [PRODUCTS[name] for name in variant.loop.products])
        narrow, bytes_off = judge_loops(variant.loop, [read(body).loads for body in bodies], threads)
        bytes_off += not_minimal(variant, Accesses((), accesses.stores), threads)
    problems = [f"{spills} spilled"] if spills else []
    memory = SHARED[target]
    if compiled.metadata.shared > memory:
        problems.append(f"{compiled.metadata.shared} bytes of shared memory, there are {memory}")
    if variant.aligned:
        problems += narrow
    return Checked(
        kernel=variant.kernel.__module__.rpartition(".")[2].removesuffix(_TRITON),
        variant=variant.name,
        target=target,
        registers=registers,
        spills=spills,
        accesses=accesses,
        problems=(*problems, *bytes_off),
        is_wide=not narrow if variant.aligned else None,
        is_exact=not bytes_off,
        seconds=seconds,
    )


def compiled_for(variant: Variant, target: Target) -> tuple[Any, str, float]:
    """What Triton made, what ptxas said, and the seconds it took. Nothing is taken from a cache, nor left in one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    told = io.StringIO()
    options = {"num_warps": variant.num_warps}
    if variant.num_stages is not None:
        options["num_stages"] = variant.num_stages
    with tempfile.TemporaryDirectory(prefix="cachedit-kernels-") as folder, contextlib.ExitStack() as stack:
        for knobs in (triton.knobs.cache, triton.knobs.compilation, triton.knobs.nvidia):
            stack.enter_context(knobs.scope())
        triton.knobs.cache.dir = folder
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        begun = time.perf_counter()
        with contextlib.redirect_stdout(told):
            source = ASTSource(variant.kernel, *specialization(variant))
            compiled = triton.compile(source, GPUTarget(*target), options)
        return compiled, told.getvalue(), time.perf_counter() - begun


def judge_loops(loop: Loop, found: Sequence[tuple[int, ...]], threads: int) -> tuple[list[str], list[str]]:
    """Loads that could be wider, and bytes that are not the least, in what each of a kernel's loops loads.

    A tile, or a half of each, is read in loads of 128 bits or of a thread's share. What a wavefront has in common goes
    through scalar registers on AMD, which are not seen.
    """
    if not found:
        return [], [f"no loop with matrix instructions for {' and '.join(loop.products)}"]
    judged = [min((_judge_loop(loop, loads, threads, part) for part in (1, 2)), key=_shortcomings) for loads in found]
    return [text for narrow, _ in judged for text in narrow], [text for _, wrong in judged for text in wrong]


def _shortcomings(judged: tuple[list[str], list[str]]) -> int:
    return 2 * len(judged[1]) + len(judged[0])


def _judge_loop(loop: Loop, loads: tuple[int, ...], threads: int, part: int) -> tuple[list[str], list[str]]:
    expected: Counter[int] = Counter()
    for share in (tile // threads // part for tile in loop.tiles):
        expected[min(share, WIDE)] += max(1, share // WIDE)
    missing = expected - Counter(loads)
    narrow = [f"{n} loads of {width} bytes missing in a loop" for width, n in missing.items()]
    least, common = sum(loop.tiles) // part, loop.common // part
    more = sum(loads) - least // threads
    is_least = common <= threads * more and more <= common + loop.scalars
    return narrow, [] if is_least else [f"{threads * sum(loads)} bytes read in a loop, {least + common} would do"]


class Shares(NamedTuple):
    """A thread's loads, or its stores, in bytes: those of its own share of the tile, and those in common with others.

    All threads of a row read the row's scale. One thread writes a sum.
    """

    own: list[int]
    common: list[int]


def shares(widths: Iterable[int], least: int, threads: int) -> Shares:
    """What is in common has one width, and leaves more bytes to do than one thread's and fewer than all threads'."""
    every = sorted(widths)
    for width in sorted(set(every)):
        own, common = list(every), []
        while width in own and threads * sum(own) > least:
            own.remove(width)
            common.append(width)
        if is_minimal(Shares(own, common), least, threads):
            return Shares(own, common)
    return Shares(every, [])


def is_minimal(found: Shares, least: int, threads: int) -> bool:
    """Whether no byte is read, or written, again."""
    return sum(found.common) <= least - threads * sum(found.own) <= threads * sum(found.common)


def _both_shares(variant: Variant, accesses: Accesses, threads: int) -> tuple[tuple[str, int, Shares], ...]:
    read, written = variant.read_bytes, variant.written_bytes + variant.written_once
    loads, stores = shares(accesses.loads, read, threads), shares(accesses.stores, written, threads)
    return ("read", read, loads), ("written", written, stores)


def too_narrow(variant: Variant, accesses: Accesses, threads: int) -> list[str]:
    """Loads and stores below 128 bits that could be wider.

    A thread's share of a tensor is its share of the tile, the product of the constants named BLOCK_*. If a share has
    less than 128 bits, one instruction of its size takes it. So does one for a share of what is written once.
    """
    elements = math.prod(value for name, value in variant.constexprs.items() if name.startswith("BLOCK_")) // threads
    pointers = [kind for _, kind in leaves(tuple(variant.signature.values())) if kind and kind.startswith("*")]
    may = Counter([*(elements * _size(kind) for kind in pointers), variant.written_once // threads])
    both = _both_shares(variant, accesses, threads)
    found = Counter(width for _, _, share in both for width in share.own if width < WIDE)
    return [f"{n} accesses of {width} bytes" for width, n in sorted(found.items()) if n > may[width]]


def _size(pointer: str) -> int:
    return max(1, int(re.findall(r"\d+", pointer)[0]) // 8)


def not_minimal(variant: Variant, accesses: Accesses, threads: int) -> list[str]:
    """Bytes that the threads read or write, where these are not the least."""
    return [
        f"{threads * sum(found.own)} bytes {what}, {least} would do"
        for what, least, found in _both_shares(variant, accesses, threads)
        if not is_minimal(found, least, threads)
    ]


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    warnings.simplefilter("ignore")  # Triton 3.9 on a default of 3.10


def _run(task: Task) -> Checked:
    for place, variant in enumerate(importlib.import_module(task.module).variants()):
        if place == task.place:
            return check(variant, task.target)
    raise IndexError(f"{task.module} has no variant {task.place}")


@contextlib.contextmanager
def checker(processes: int | None = None) -> Iterator[Callable[[Sequence[Task]], Iterator[Checked]]]:
    """A function that checks tasks, in order, in processes of its own: as many as there are cores unless given."""
    if not HAS_TRITON:
        raise ModuleNotFoundError("Triton is not installed")
    with triton_pool(processes or cores(), is_interpreted=False) as pool:
        yield lambda todo: pool.imap(_run, todo)


@contextlib.contextmanager
def triton_pool(processes: int, is_interpreted: bool) -> Iterator[Any]:
    """A pool of processes that either interpret Triton's kernels or compile them, whatever the environment says."""
    before = os.environ.pop("TRITON_INTERPRET", None)  # inherited by the processes below
    if is_interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = multiprocessing.get_context("spawn").Pool(processes, _prepare)
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    with pool:
        yield pool


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Total:
    """What the variants of a kernel on a target have in common."""

    kernel: str
    target: str
    variants: int
    registers: int
    spills: int
    wide: int
    aligned: int
    exact: int
    failed: int


def totals(found: Iterable[Checked]) -> list[Total]:
    """A row for each kernel and target, in the order of `KERNELS` and `TARGETS`."""
    groups: dict[tuple[str, str], list[Checked]] = {}
    for row in found:
        groups.setdefault((row.kernel, row.target), []).append(row)

    def order(key: tuple[str, str]) -> tuple[int, int]:
        kernel, target = key
        return KERNELS.index(kernel) if kernel in KERNELS else len(KERNELS), list(TARGETS).index(target)

    return [
        Total(
            *key,
            variants=len(rows),
            registers=max(row.registers for row in rows),
            spills=sum(row.spills for row in rows),
            wide=sum(row.is_wide is True for row in rows),
            aligned=sum(row.is_wide is not None for row in rows),
            exact=sum(row.is_exact for row in rows),
            failed=sum(not row.is_good for row in rows),
        )
        for key, rows in sorted(groups.items(), key=lambda item: order(item[0]))
    ]


def totals_table(sums: Iterable[Total]) -> Table:
    """A line for each kernel and target."""
    headings = ("kernel", "target", "variants", "most registers", "spills", "wide", "bytes exact")
    table = Table(headings, texts=range(2))
    for row in sums:
        table.add(
            row.kernel,
            row.target,
            str(row.variants),
            str(row.registers),
            str(row.spills),
            f"{row.wide} of {row.aligned}",
            f"{row.exact} of {row.variants}",
        )
    return table


def variants_table(rows: Iterable[Checked]) -> Table:
    """A line for each variant and target; widths of loads and stores in bytes."""
    headings = ("variant", "target", "registers", "spills", "loads", "stores", "wide", "bytes exact")
    table = Table(headings, texts=range(2))
    for row in rows:
        table.add(
            row.variant,
            row.target,
            str(row.registers),
            str(row.spills),
            _widths(row.accesses.loads),
            _widths(row.accesses.stores),
            {True: "yes", False: "no", None: "not aligned"}[row.is_wide],
            "yes" if row.is_exact else "no",
        )
    return table


def _widths(widths: Iterable[int]) -> str:
    """`4 x 16 + 2 x 4`."""
    return " + ".join(f"{n} x {width}" for width, n in sorted(Counter(widths).items(), reverse=True))


def summary(rows: Sequence[Checked]) -> str:
    """How many hold."""
    return f"{sum(row.is_good for row in rows)} of {len(rows)} hold: no spills, wide where aligned, no byte twice."


MEANINGS = (
    "**variants**: specialisations that the launchers can choose.",
    "**most registers**: of a thread, in any variant; vector registers on AMD.",
    "**spills**: bytes spilled and read back (NVIDIA), registers spilled (AMD), of all variants.",
    "**wide**: variants with aligned pointers whose loads and stores have 128 bits, or all that a thread has of the "
    "tensor.",
    "**bytes exact**: variants whose instructions read and write each byte once.",
)


def problems(rows: Iterable[Checked]) -> list[str]:
    """A line for each variant that falls short."""
    return [f"{row.variant}, {row.target}: {'; '.join(row.problems)}" for row in rows if not row.is_good]


def save(rows: Sequence[Checked], made_by: str, folder: Path) -> None:
    """Write `kernels.md`, and `kernels.csv` with every variant, both or neither."""
    text = page(
        Heading("What the compilers make of the kernels"),
        made_by,
        summary(rows),
        MEANINGS,
        totals_table(totals(rows)),
        *titled_list("Variants that fall short", problems(rows)),
    )
    variants = variants_table(rows)
    with whole_files(folder) as staging:
        (staging / "kernels.md").write_text(text)
        with (staging / "kernels.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow((*variants.headings, "problems"))
            for line, row in zip(variants.lines, rows, strict=True):
                writer.writerow((*line.cells, "; ".join(row.problems)))
