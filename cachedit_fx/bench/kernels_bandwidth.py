"""Bandwidth of the kernels over that of a copy that moves as many bytes, and their time over plain torch's.

Ours, the copy and the reference of the kernel's file take turns; medians count. The bytes moved are those that cannot
be avoided: each input read once, each output written once. On a GPU events take the time of a CUDA graph, so that no
Python is in it, and the L2 cache is flushed before each. On a CPU one thread runs, and its caches hold what fits.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from cachedit_fx.bench.progress import Tell, silent
from cachedit_fx.kernels.l1_sums import absolute_sums, l1_sums, residual
from cachedit_fx.kernels.residual_apply import residual_apply, weighted_sum
from cachedit_fx.kernels.residual_store import difference, residual_like, residual_store
from cachedit_fx.report.files import whole_files
from cachedit_fx.report.tables import Heading, Table, page

Shape = tuple[int, ...]
SMALL: Mapping[str, tuple[Shape, ...]] = {"small": ((1, 256, 512),)}
FLUX: Mapping[str, tuple[Shape, ...]] = {"FLUX": ((1, 4096, 3072), (1, 512, 3072))}
WAN: Mapping[str, tuple[Shape, ...]] = {"Wan": ((1, 32760, 5120),)}
SHORT_WAN: Mapping[str, tuple[Shape, ...]] = {"Wan / 5": ((1, 6552, 5120),)}
"""Of a model's hidden states; the text goes along where a kernel takes several results."""
HEAD_DIM = 128
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
L2_BYTES = 1 << 28
"""More than the L2 cache of any GPU."""


class Case(NamedTuple):
    """What is timed: a kernel's public function, and plain torch that does the same."""

    kernel: str
    moved: int
    ours: Callable[[], object]
    reference: Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """Medians of one kernel at one shape and dtype, in seconds."""

    kernel: str
    shape: str
    dtype: str
    moved: int
    ours: float
    copy: float
    reference: float

    @property
    def bandwidth(self) -> float:
        """GB/s."""
        return self.moved / self.ours / 1e9

    @property
    def share(self) -> float:
        """Of the copy's bandwidth."""
        return self.copy / self.ours

    @property
    def speedup(self) -> float:
        """Over plain torch."""
        return self.reference / self.ours


def _moved(*tensors: torch.Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def cases(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every kernel on tensors of these shapes; inputs are made one kernel at a time."""

    def random(shape: Shape, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float32, device=device).to(kind)

    for makers in (_sums, _applied, _stored, _eight_bits):
        yield from makers(random, shapes)


Random = Callable[..., torch.Tensor]


def _sums(random: Random, shapes: Sequence[Shape]) -> Iterator[Case]:
    hidden, base = random(shapes[0]), random(shapes[0])
    out, *previous = (random(shapes[0], torch.float32) for _ in range(3))
    for count in (1, 2):
        given = previous[:count]
        yield Case(
            f"l1_sums, {count} previous",
            _moved(hidden, base, out, *given),
            partial(l1_sums, hidden, base, given, out),
            partial(_plain_sums, hidden, base, given),
        )


def _plain_sums(hidden: torch.Tensor, base: torch.Tensor, previous: Sequence[torch.Tensor]) -> object:
    r = residual(hidden, base)
    return torch.stack([absolute_sums(before, r) for before in previous])


def _applied(random: Random, shapes: Sequence[Shape]) -> Iterator[Case]:
    bases, outs = [random(shape) for shape in shapes], [random(shape) for shape in shapes]
    stored = [[residual_like(base).normal_() for _ in range(4)] for base in bases]
    for count in (1, 2, 4):
        terms = [residuals[:count] for residuals in stored]
        weights = [1 + j / 4 for j in range(count)]
        yield Case(
            f"residual_apply, {count} term{'s' if count > 1 else ''}",
            _moved(*bases, *outs, *itertools.chain.from_iterable(terms)),
            partial(residual_apply, bases, terms, weights, outs),
            partial(_plain_results, bases, terms, weights),
        )


def _plain_results(
    bases: Sequence[torch.Tensor], stored: Sequence[Sequence[torch.Tensor]], weights: Sequence[float]
) -> object:
    return [weighted_sum(base, terms, weights).to(base.dtype) for base, terms in zip(bases, stored, strict=True)]


def _stored(random: Random, shapes: Sequence[Shape]) -> Iterator[Case]:
    bases, results = [random(shape) for shape in shapes], [random(shape) for shape in shapes]
    outs = [residual_like(result) for result in results]
    yield Case(
        "residual_store",
        _moved(*bases, *results, *outs),
        partial(residual_store, results, bases, outs),
        lambda: [difference(x, base, outs[0].dtype) for x, base in zip(results, bases, strict=True)],
    )


def _eight_bits(random: Random, shapes: Sequence[Shape]) -> Iterator[Case]:
    from cachedit_fx.kernels.quant_fp8 import dequant_fp8, dequantized, quant_fp8, quantized

    *leading, width = shapes[0]
    x = random((*leading, max(1, width // HEAD_DIM), min(HEAD_DIM, width)))
    packed = quant_fp8(x)
    values, scales = quantized(x)
    yield Case("quant_fp8", _moved(x, packed), partial(quant_fp8, x), partial(quantized, x))
    yield Case(
        "dequant_fp8",
        _moved(x, packed),
        partial(dequant_fp8, packed, x.shape[-2], x.dtype),
        lambda: dequantized(values, scales).to(x.dtype),
    )


def memory(device: torch.device) -> int:
    """Bytes that are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def shapes_for(device: torch.device) -> dict[str, tuple[Shape, ...]]:
    """The models' shapes that fit; Wan in full length on a GPU only."""
    wan = (WAN, SHORT_WAN) if device.type != "cpu" else (SHORT_WAN,)
    fitting = [shapes for shapes in (FLUX, next((s for s in wan if _fits(s, device)), {})) if _fits(shapes, device)]
    return {name: shape for shapes in (SMALL, *fitting) for name, shape in shapes.items()}


def _fits(shapes: Mapping[str, tuple[Shape, ...]], device: torch.device) -> bool:
    """Four terms in float64, and as much again for the copy and the reference."""
    elements = sum(math.prod(shape) for group in shapes.values() for shape in group)
    return 100 * elements < memory(device)


Timer = Callable[[], float]
"""Runs a call, and returns its seconds."""


def clock(device: torch.device) -> Callable[[Callable[[], object]], Timer]:
    """A function from a call to its timer. On a GPU the timer replays a CUDA graph of the call: Python is left out."""
    if device.type != "cuda":
        return lambda call: partial(_seconds_of, call)
    flushed = torch.empty(L2_BYTES, dtype=torch.int8, device=device)

    def timer(call: Callable[[], object]) -> Timer:
        graph = _graph_of(call, device)

        def replay() -> float:
            flushed.zero_()  # the device is busy with this while the host queues all that follows
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            return begun.elapsed_time(ended) / 1e3

        return replay

    return timer


def _seconds_of(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _graph_of(call: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the call, which runs twice before: Triton compiles, and cuBLAS and the allocator settle."""
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            call()
            call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return graph


def medians(
    case: Case, device: torch.device, rounds: int, clock_of: Callable[[Callable[[], object]], Timer]
) -> tuple[float, float, float]:
    """Seconds of ours, of the copy and of the reference."""
    source = torch.zeros(max(1, case.moved // 8), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    calls: list[Callable[[], object]] = [case.ours, lambda: target.copy_(source), case.reference]
    timers = [clock_of(call) for call in calls]
    seconds: list[list[float]] = [[], [], []]
    for number in range(-2, rounds):  # the first two compile, and touch memory
        for which in (0, 1, 2) if number % 2 else (2, 1, 0):
            taken = timers[which]()
            if number >= 0:
                seconds[which].append(taken)
    ours, copy, reference = map(median, seconds)
    return ours, copy, reference


def measure(
    shapes: Mapping[str, tuple[Shape, ...]],
    dtypes: Sequence[str],
    device: torch.device,
    rounds: int,
    tell: Tell = silent,
) -> Iterator[Timed]:
    """Time every kernel at every shape and dtype."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    tell(more=count(shapes, dtypes))
    clock_of = clock(device)
    for shape, sizes in shapes.items():
        for dtype in dtypes:
            with torch.no_grad():
                for case in cases(sizes, DTYPES[dtype], device):
                    tell(f"{case.kernel}, {shape}")
                    yield Timed(case.kernel, shape, dtype, case.moved, *medians(case, device, rounds, clock_of))
                    tell(done=1)


def count(shapes: Mapping[str, tuple[Shape, ...]], dtypes: Sequence[str]) -> int:
    """How many `measure` will give."""
    tiny: tuple[Shape, ...] = ((1, 1, 1),)
    return len(shapes) * len(dtypes) * sum(1 for _ in cases(tiny, torch.float32, torch.device("cpu")))


def table(rows: Sequence[Timed]) -> Table:
    """A line for each kernel, shape and dtype."""
    headings = ("kernel", "shape", "dtype", "MB", "ms", "GB/s", "of a copy", "over plain torch")
    result = Table(headings, texts=range(3))
    for row in rows:
        result.add(
            row.kernel,
            row.shape,
            row.dtype,
            f"{row.moved / 1e6:.1f}",
            f"{1e3 * row.ours:.3f}",
            f"{row.bandwidth:.1f}",
            f"{row.share:.0%}",
            f"{row.speedup:.2f} x",
        )
    return result


def markdown(rows: Sequence[Timed], shapes: Mapping[str, tuple[Shape, ...]], made_by: str) -> str:
    """The table as a file."""
    sizes = (f"{name} {' and '.join('x'.join(map(str, size)) for size in group)}" for name, group in shapes.items())
    explanation = (
        "MB: the bytes that must be read and written. Of a copy: the time of a `copy_` that reads and writes as many "
        f"bytes, over ours. Over plain torch: its time over ours. Medians by turns. Shapes: {'; '.join(sizes)}."
    )
    return page(Heading("Bandwidth of the kernels"), made_by, explanation, table(rows))


def as_csv(rows: Sequence[Timed]) -> str:
    """Every figure, unrounded."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ("kernel", "shape", "dtype", "bytes", "seconds", "copy_seconds", "torch_seconds", "of_copy", "over_torch")
    )
    for row in rows:
        writer.writerow(
            (row.kernel, row.shape, row.dtype, row.moved, row.ours, row.copy, row.reference, row.share, row.speedup)
        )
    return file.getvalue()


def save(rows: Sequence[Timed], shapes: Mapping[str, tuple[Shape, ...]], command: str, on: str, folder: Path) -> None:
    """Write `bandwidth.md`, `.csv` and `.png`, all of them or none; `on` is the hardware."""
    from cachedit_fx.report.plots import save_bandwidth

    with whole_files(folder) as staging:
        (staging / "bandwidth.md").write_text(markdown(rows, shapes, f"`{command}`, on {on}."))
        (staging / "bandwidth.csv").write_text(as_csv(rows))
        save_bandwidth(rows, f"Kernels on {on}", staging / "bandwidth.png")
