"""Everything that wants a GPU, for the day one is at hand: numerics, bandwidth, a whole model.

  python examples/gpu_check.py                  # on the GPU; writes runs/gpu_check
  python examples/gpu_check.py --cpu-rehearsal  # the same code at tiny sizes on a CPU, which says nothing about a GPU

1. Every launcher of a Triton kernel against float64, all dtypes, odd, strided and unaligned inputs.
2. The kernels' bandwidth, as in `cachedit kernels bench`.
3. A FLUX of random weights, as large as FLUX.1 where the memory allows, compiled by `cachedit_fx.compile`: threshold 0
   against no cache to the bit, cached steps by a static mask, and times beside plain `torch.compile`.

The exit code is 1 if anything differs, 2 where there is no GPU.
"""

from __future__ import annotations

import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

import cachedit_fx
from cachedit_fx.bench import flux
from cachedit_fx.bench import kernels_bandwidth as kernel_bench
from cachedit_fx.cli.terminal import console, quiet, show
from cachedit_fx.kernels import l1_sums, quant_fp8, residual_apply, residual_store
from cachedit_fx.kernels.layout import HAS_TRITON
from cachedit_fx.report.files import check_folder, hardware, whole_files
from cachedit_fx.report.plots import save_bandwidth
from cachedit_fx.report.tables import Heading, Part, Table, page, titled_list

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES: tuple[tuple[int, ...], ...] = ((1,), (5,), (3, 1), (1, 1, 1), (2, 7, 5), (1, 33, 129), (2, 9, 300))
LARGE: tuple[tuple[int, ...], ...] = ((1, 4097, 3072), (2, 1000, 1111))
LOOKS = ("contiguous", "sliced", "transposed", "every other", "unaligned")
EPSILON = 2.0**-24


@dataclass
class Launchers:
    """What is called: Triton's launchers, or in the rehearsal the public functions, which take a CPU's paths."""

    is_rehearsal: bool

    def __post_init__(self) -> None:
        self.l1_sums: Callable[..., torch.Tensor] = l1_sums.l1_sums
        self.apply: Callable[..., None] = residual_apply.residual_apply
        self.store: Callable[..., None] = residual_store.residual_store
        self.quant: Callable[..., torch.Tensor] = quant_fp8.quant_fp8
        self.dequant: Callable[..., torch.Tensor] = quant_fp8.dequant_fp8
        if not self.is_rehearsal:
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


def numerics(launchers: Launchers, device: torch.device, shapes: Sequence[tuple[int, ...]]) -> Iterator[Check]:
    """A check for each launcher and dtype."""
    for kernel in (_l1_sums, _residuals, _eight_bits):
        for name, dtype in DTYPES.items():
            check = Check(f"{kernel.__name__.strip('_')}, {name}")
            try:
                for shape in shapes:
                    for look in LOOKS:
                        kernel(check, launchers, shape, look, dtype, device)
            except Exception as error:
                traceback.print_exc()
                check.problems.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            yield check
    yield far_apart(launchers, device)


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
                inner = max(unit, EPSILON) if launchers.is_rehearsal else EPSILON
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


def far_apart(launchers: Launchers, device: torch.device) -> Check:
    """Rows and samples whose distances do not fit 32 bits, where the memory allows."""
    check = Check("rows 2^31 elements apart, bf16")
    distance = 2**31 + 4096 if device.type == "cuda" and kernel_bench.memory(device) > 3 * 2**32 else 4096
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


@dataclass
class Model:
    """A model's figures: seconds of each kind of step, and what was looked at besides."""

    size: flux.Size
    dtype: str
    parameters: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)


PLAIN, UNCACHED, ZERO, COMPUTED, CACHED = (
    "torch.compile",
    "ours, no cache",
    "ours, threshold 0",
    "ours, computed step",
    "ours, cached step",
)


def size_for(device: torch.device, is_rehearsal: bool) -> flux.Size:
    """FLUX.1 where twice its weights fit, else as many of its blocks as do."""
    if is_rehearsal:
        return flux.Size(1, 2, width=128, side=4)
    width, whole = 3072, 57
    of_block = 2 * (19 * 36 + 38 * 15) * width**2 / whole  # bytes in bfloat16, on average
    blocks = min(whole, int(kernel_bench.memory(device) / 2 / of_block))
    return flux.size_of(max(3, blocks), width=width, side=64)


def model(device: torch.device, is_rehearsal: bool, steps: int, inner_backend: str) -> Model:
    """Build it, compile it in every way in turn, and run a generation each."""
    size, dtype = size_for(device, is_rehearsal), torch.float32 if is_rehearsal else torch.bfloat16
    torch.set_default_dtype(dtype)
    try:
        with quiet(), torch.device(device):
            module = flux.make(size)
            given = [_inputs(size, step, 16 if is_rehearsal else 512, dtype) for step in range(steps)]
    finally:
        torch.set_default_dtype(torch.float32)
    found = Model(size, str(dtype).removeprefix("torch."), sum(p.numel() for p in module.parameters()))
    first = Check("first outputs of a FLUX, ours against torch.compile")
    zero, cached = Check("threshold 0 against no cache, to the bit"), Check("cached steps by a static mask")
    found.checks += [first, zero, cached]

    options: dict[str, Any] = {"dynamic": False, "inner_backend": inner_backend}
    module.compile(backend=inner_backend, dynamic=False)
    plain = _generation(module, given, found.seconds, [PLAIN] * steps, device)
    module._compiled_call_impl = None
    torch._dynamo.reset()

    cachedit_fx.compile(module, cache=None, **options)
    uncached = _generation(module, given, found.seconds, [UNCACHED] * steps, device)
    scale = plain[0].double().abs().max()
    first.take("largest error, of 5 % of the largest value", (plain[0] - uncached[0]).double().abs(), 0.05 * scale)

    cachedit_fx.compile(module, Fn_compute_blocks=1, residual_diff_threshold=0.0, **options)
    for step, (a, b) in enumerate(
        zip(uncached, _generation(module, given, found.seconds, [ZERO] * steps, device), strict=True)
    ):
        zero.same(f"step {step}", b, a)

    mask = ("10" * steps)[:steps]
    static = {"steps_computation_mask": mask, "steps_computation_policy": "static"}
    cachedit_fx.compile(module, Fn_compute_blocks=1, **static, **options)
    kinds = [COMPUTED if digit == "1" else CACHED for digit in mask]
    outputs = _generation(module, given, found.seconds, kinds, device)
    (region,) = cachedit_fx.summary(module)
    cached.same("which steps are cached", torch.tensor(region.cached_steps), torch.arange(1, steps, 2))
    cached.take("not a number", torch.stack([(~x.isfinite()).sum() for x in outputs]).double(), 0.5)
    differs = torch.tensor([not torch.equal(a, b) for a, b in zip(outputs, uncached, strict=True)])
    cached.same("computed steps are the uncached ones, cached steps are not", differs, torch.arange(steps) % 2 == 1)
    return found


def _inputs(size: flux.Size, step: int, text: int, dtype: torch.dtype) -> dict[str, Any]:
    given = flux.inputs(size, step)
    given["encoder_hidden_states"] = torch.randn(1, text, given["encoder_hidden_states"].shape[-1])
    given["txt_ids"] = torch.zeros(text, 3)
    given["timestep"] = given["timestep"].float()
    return {name: value.to(dtype) if name.endswith("states") else value for name, value in given.items()}


def _generation(
    module: torch.nn.Module,
    given: Sequence[dict[str, Any]],
    seconds: dict[str, list[float]],
    kinds: Sequence[str],
    device: torch.device,
) -> list[torch.Tensor]:
    """The outputs of a generation, once to compile, and once with a clock on all steps but the first two."""
    outputs: list[torch.Tensor] = []
    with torch.no_grad():
        for is_timed in (False, True):
            outputs = []
            for step, (arguments, kind) in enumerate(zip(given, kinds, strict=True)):
                _wait(device)
                begun = time.perf_counter()
                outputs.append(module(**arguments)[0].clone())
                _wait(device)
                if is_timed and step > 1:
                    seconds.setdefault(kind, []).append(time.perf_counter() - begun)
    return outputs


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_table(checks: Sequence[Check]) -> Table:
    """A line for each check."""
    table = Table(("checked", "cases", "worst error, of the allowed", "holds"))
    for check in checks:
        worst = f"{check.worst:.2f}" if check.worst else ""
        table.add(check.name, str(check.tried), worst, "no" if check.problems else "yes")
    return table


def model_table(model: Model) -> Table:
    """A line for each kind of step."""
    plain = median(model.seconds[PLAIN])
    table = Table(("step", "ms", "of torch.compile"))
    for kind, seconds in model.seconds.items():
        table.add(kind, f"{1e3 * median(seconds):.2f}", f"{median(seconds) / plain:.1%}")
    return table


def main(
    cpu_rehearsal: Annotated[
        bool, typer.Option("--cpu-rehearsal", help="Run the same code at tiny sizes on the CPU: a test of this script.")
    ] = False,
    device: Annotated[str, typer.Option(metavar="NAME", help="The GPU.")] = "cuda",
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the report goes.")] = Path("runs/gpu_check"),
    steps: Annotated[int, typer.Option(min=4, help="Of the model's generations.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each kernel is timed.")] = 20,
    inner_backend: Annotated[str, typer.Option(metavar="NAME", help="What compiles the model's pieces.")] = "inductor",
) -> None:
    """Numerics, bandwidth and a whole model on a GPU; a table, and a report in Markdown."""
    obstacle = check_folder(out)
    if obstacle:
        raise typer.BadParameter(obstacle, param_hint="--out")
    where = torch.device("cpu" if cpu_rehearsal else device)
    if not cpu_rehearsal and not (torch.cuda.is_available() and HAS_TRITON):
        missing = "Triton is not installed" if torch.cuda.is_available() else "there is no GPU that torch can use"
        print(f"error: {missing}. To try this script on a CPU: --cpu-rehearsal", file=sys.stderr)
        raise typer.Exit(2)
    torch.manual_seed(0)
    what = "Rehearsal on a CPU: nothing here was run on a GPU" if cpu_rehearsal else "Checked on a GPU"
    console.print(f"[bold]{what}[/bold]: {hardware(where)}\n")
    if cpu_rehearsal:
        torch.set_num_threads(1)

    launchers = Launchers(cpu_rehearsal)
    checks: list[Check] = []
    for check in numerics(launchers, where, SHAPES if cpu_rehearsal else (*SHAPES, *LARGE)):
        checks.append(check)
        console.print(f"{check.name}: {check.tried} cases, {len(check.problems)} problems")

    shapes = {"tiny": ((1, 16, 128), (1, 4, 128))} if cpu_rehearsal else kernel_bench.shapes_for(where)
    dtypes = ["bf16", "fp32"] if cpu_rehearsal else list(DTYPES)
    timed = list(kernel_bench.measure(shapes, dtypes, where, rounds))
    bandwidth = kernel_bench.table(timed)

    whole: Model | None = None
    try:
        whole = model(where, cpu_rehearsal, steps, inner_backend)
        checks += whole.checks
    except Exception as error:
        traceback.print_exc()
        checks.append(Check("a whole model", problems=[f"{type(error).__name__}: {error}"]))

    problems = [f"{check.name}: {problem}" for check in checks for problem in check.problems]
    parts: list[Part] = [Heading("Checks", 2), check_table(checks), Heading("Bandwidth", 2), bandwidth]
    if whole is not None:
        about = (
            f"FLUX, {whole.size.double} + {whole.size.single} blocks of width {whole.size.width}, "
            f"{whole.parameters / 1e6:,.1f} million parameters in {whole.dtype}, {whole.size.side**2} image tokens; "
            f"inner backend {inner_backend}."
        )
        parts += [Heading("A whole model", 2), about, model_table(whole)]
    show(*parts)
    made_by = f"`{shlex.join(['python', *sys.argv])}`, on {hardware(where)}."
    with whole_files(out) as folder:
        text = page(Heading(what), made_by, *parts, *titled_list("Problems", problems), "![bandwidth](bandwidth.png)")
        (folder / "report.md").write_text(text)
        (folder / "bandwidth.csv").write_text(kernel_bench.as_csv(timed))
        title = f"{'Rehearsal' if cpu_rehearsal else 'Kernels'} on {hardware(where)}"
        save_bandwidth(timed, title, folder / "bandwidth.png")
    for problem in problems[:20]:
        console.print(f"[red]{escape(problem)}[/red]", soft_wrap=True)
    console.print(f"written: {out / 'report.md'}")
    if problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
