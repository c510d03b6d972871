"""Ours against cache-dit 1.5.3, on the bundled model: same pictures, same steps cached, in less time?

`pip install "cachedit-fx[peers]"`

`python examples/benchmarks/compare_cache_dit.py`

`python examples/benchmarks/compare_cache_dit.py --mode eager --rounds 1` (a quick look, some two minutes)

Every system draws the same prompts one by one (batch 1) through diffusers' FluxPipeline, in float32, and lives in a
process of its own, since cache-dit patches the pipeline's class. Requests go round: within one prompt each system takes
its turn before anybody gets the next prompt, so that a busy machine disturbs all alike; times are compared prompt by
prompt and the medians reported. Rows:

- uncached: the plain pipeline; its pictures are what PSNR compares with, its wall time is 1;
- cache-dit and cachedit_fx: F1 B0 W4 (first block measured, none recomputed at the end, four warm-up steps) at each
  threshold R;
- fewer steps: the plain pipeline with as many steps as cost the same work. A cache that loses
  to this row is no use.

Eager means no inductor anywhere; compiled means inner_backend="inductor" for ours and torch.compile(pipe.transformer)
after enable_cache for cache-dit, which is what its README says.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cachedit_fx.bench.process import PEER_VERSION, BenchmarkError, Worker, check_peer
from cachedit_fx.bench.systems import Drawing, Setup

POLICY = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 4}
"""Of every cached row, but for its threshold."""
STEPS_TOLERANCE = 1
"""Cached steps of a picture may differ from cache-dit's by this many."""
PSNR_TOLERANCE = 0.5
"""dB by which the PSNR may lie below cache-dit's."""

PROMPTS = (
    "a large red circle at the center on white",
    "a small blue square at the top left on black",
    "a large green triangle at the bottom right on gray",
    "a large yellow cross at the left on navy",
    "a small orange diamond at the right on white",
    "a large purple square at the top on gray",
    "a small red circle left of a large blue square on navy",
    "a large green circle below a large purple diamond on white",
)

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
console = Console()


class Mode(StrEnum):
    eager = "eager"
    compiled = "compiled"
    both = "both"


class Granularity(StrEnum):
    """What our compiled rows compile as one piece."""

    block = "block"
    region = "region"


class PeerCompile(StrEnum):
    transformer = "transformer"
    tuned = "transformer-tuned"
    blocks = "blocks"


@dataclass
class Row:
    """One line of the table: a system with its settings, and what was seen of it."""

    name: str
    system: str
    steps: int
    compiled: bool = False
    threshold: float | None = None
    worker: str = ""
    """Key of the process that serves it; rows of the plain pipeline share one."""
    first_request_seconds: float | None = None
    cached_steps: list[list[int]] = field(default_factory=list)
    """By prompt, as are pictures, flops, and the times within each round."""
    pictures: list[np.ndarray[Any, Any]] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    cpu_seconds: list[list[float]] = field(default_factory=list)

    def take_first(self, drawing: Drawing) -> None:
        """Take down the untimed request that shows what the system does."""
        self.pictures.append(drawing.pictures.numpy())
        self.cached_steps.append(drawing.cached_steps or [])
        self.flops.append(sum(drawing.flops))

    def setup(self, peer_compile: str, granularity: str, threads: int) -> Setup:
        """What its process is told."""
        arguments = {} if self.threshold is None else POLICY | {"residual_diff_threshold": self.threshold}
        inner = "inductor" if self.compiled else "eager"
        shared = {"peer_compile": peer_compile, "granularity": granularity, "threads": threads}
        return Setup(self.system, arguments, inner_backend=inner, **shared)  # type: ignore[arg-type]

    def psnr(self, reference: Row) -> float:
        """Of all pictures taken together, in dB; infinite where they are equal."""
        pairs = zip(self.pictures, reference.pictures, strict=True)
        error = statistics.fmean(float(np.mean((ours.astype(float) - theirs) ** 2)) for ours, theirs in pairs)
        return -10 * math.log10(error) if error else math.inf

    def work(self, reference: Row) -> float:
        """FLOPs over the uncached run's."""
        return sum(self.flops) / sum(reference.flops)


@contextlib.contextmanager
def workers_for(
    rows: Sequence[Row], pythons: dict[str, str], peer_compile: str, granularity: str, threads: int
) -> Iterator[dict[str, Worker]]:
    """A started worker for each key among `rows`; all are stopped at the end, whatever happens."""
    started: dict[str, Worker] = {}
    try:
        for row in rows:
            if row.worker not in started:
                setup = row.setup(peer_compile, granularity, threads)
                started[row.worker] = Worker(row.worker, pythons[row.system], setup)
        for worker in started.values():
            worker.wait_until_ready()
        yield started
    finally:
        for worker in started.values():
            worker.stop()


class Comparison:
    """One table: all rows of one mode, measured together."""

    def __init__(self, compiled: bool, thresholds: Sequence[float], steps: int, prompts: Sequence[str]) -> None:
        self.compiled, self.steps, self.prompts = compiled, steps, prompts
        self.mode = "compiled" if compiled else "eager"
        self.reference = Row("uncached, eager", "uncached", steps, worker="uncached, eager")
        self.plain = self.reference
        self.rows = [self.reference]
        if compiled:
            self.plain = Row("uncached, compiled", "uncached", steps, True, worker="uncached, compiled")
            self.rows.append(self.plain)
        self.triples: list[tuple[Row, Row, Row]] = []
        for threshold in thresholds:
            peer, ours = (
                Row(f"{system} R{threshold:g}", system, steps, compiled, threshold, f"{system} R{threshold:g}")
                for system in ("cache-dit", "cachedit_fx")
            )
            fewer = Row("fewer steps", "uncached", steps, compiled, worker=self.plain.worker)
            self.triples.append((peer, ours, fewer))
            self.rows += [peer, ours, fewer]
        self.versions: dict[str, dict[str, str]] = {}

    def run(self, workers: dict[str, Worker], rounds: int, progress: Progress) -> None:
        """Measure everything."""
        self.versions = {row.system: workers[row.worker].versions for row in self.rows}
        fewer_rows = [fewer for _, _, fewer in self.triples]
        requests = (len(self.rows) - len(fewer_rows)) * (1 + len(self.prompts)) + len(fewer_rows) * len(self.prompts)
        task = progress.add_task(self.mode, total=requests + rounds * len(self.rows) * len(self.prompts))

        def ask(row: Row, prompt: int, count: bool = False) -> Drawing:
            progress.update(task, description=f"{self.mode}: {row.name}")
            drawing = workers[row.worker].draw([self.prompts[prompt]], row.steps, seed=prompt, count=count)
            progress.advance(task)
            return drawing

        for row in self.rows:
            if row not in fewer_rows:
                row.first_request_seconds = ask(row, 0).seconds
                for prompt in range(len(self.prompts)):
                    row.take_first(ask(row, prompt, count=True))
        for _, ours, fewer in self.triples:
            fewer.steps = max(round(self.steps * ours.work(self.plain)), 1)
            fewer.name = f"fewer steps: {fewer.steps}"
            for prompt in range(len(self.prompts)):
                fewer.take_first(ask(fewer, prompt, count=True))
        for number in range(rounds):
            for row in self.rows:
                row.seconds.append([])
                row.cpu_seconds.append([])
            for prompt in range(len(self.prompts)):
                # Neither of a pair always comes first, nor always after the same neighbour.
                for row in self.rows if (number + prompt) % 2 == 0 else reversed(self.rows):
                    drawing = ask(row, prompt)
                    row.seconds[-1].append(drawing.seconds)
                    row.cpu_seconds[-1].append(drawing.cpu_seconds)
                    if drawing.cached_steps != row.cached_steps[prompt]:
                        raise BenchmarkError(
                            f"{row.name} cached steps {drawing.cached_steps} of {self.prompts[prompt]!r}, "
                            f"and {row.cached_steps[prompt]} before: it is not deterministic"
                        )


def ratios(row: Row, other: Row, measure: str = "seconds") -> list[float]:
    """Times of `row` over those of `other`, request by request, sorted."""
    pairs = zip(getattr(row, measure), getattr(other, measure), strict=True)
    return sorted(a / b for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))


def spread(values: Sequence[float]) -> str:
    """The median, and the quartiles behind it."""
    middle = f"{statistics.median(values):.2f}"
    if len(values) < 4:
        return middle
    low, _, high = statistics.quantiles(values, n=4)
    return f"{middle} ({low:.2f}-{high:.2f})"


COLUMNS = ("row", "cached", "diff", "PSNR", "work", "wall", "CPU", "wall/peer", "CPU/peer")
LEGEND = (
    "cached: cached steps, mean over the prompts. diff: by how many they differ from cache-dit's, at most, over the "
    "prompts; = where they are the very same steps. PSNR: in dB, against the uncached eager pictures, all prompts' "
    "errors taken together. work: FLOPs over the uncached run's. wall, CPU: time of a request over that of the "
    "uncached eager one. wall/peer, CPU/peer: ours over cache-dit's, with quartiles in the files. Times are compared "
    "request by request, and the median is given. CPU time leaves out waiting for a core: the better guide on a busy "
    "machine."
)


def table_of(comparison: Comparison) -> list[tuple[str, ...]]:
    """The cells below `COLUMNS`."""
    peers = {id(ours): peer for peer, ours, _ in comparison.triples}
    found: list[tuple[str, ...]] = []
    for row in comparison.rows:
        peer = peers.get(id(row))
        counts = [len(steps) for steps in row.cached_steps]
        psnr = row.psnr(comparison.reference)
        found.append(
            (
                row.name,
                f"{statistics.fmean(counts):.1f}" if row.threshold is not None else "",
                _difference(row, peer) if peer else "",
                "" if row is comparison.reference else "equal" if math.isinf(psnr) else f"{psnr:.1f}",
                f"{row.work(comparison.reference):.2f}",
                f"{statistics.median(ratios(row, comparison.reference)):.2f}",
                f"{statistics.median(ratios(row, comparison.reference, 'cpu_seconds')):.2f}",
                spread(ratios(row, peer)) if peer else "",
                spread(ratios(row, peer, "cpu_seconds")) if peer else "",
            )
        )
    return found


def _step_differences(ours: Row, peer: Row) -> list[int]:
    pairs = zip(ours.cached_steps, peer.cached_steps, strict=True)
    return [abs(len(mine) - len(theirs)) for mine, theirs in pairs]


def _difference(ours: Row, peer: Row) -> str:
    same = ours.cached_steps == peer.cached_steps
    return f"{max(_step_differences(ours, peer))}{' =' if same else ''}"


def verdicts(comparison: Comparison) -> list[tuple[bool, str]]:
    """What was promised, and whether it holds."""
    found = []
    for peer, ours, _ in comparison.triples:
        difference = max(_step_differences(ours, peer))
        psnr, peer_psnr = ours.psnr(comparison.reference), peer.psnr(comparison.reference)
        wall = statistics.median(ratios(ours, peer))
        found += [
            (
                difference <= STEPS_TOLERANCE,
                f"R{ours.threshold:g}: number of cached steps within {STEPS_TOLERANCE} of cache-dit's on every prompt "
                f"(largest difference {difference})",
            ),
            (
                psnr >= peer_psnr - PSNR_TOLERANCE,
                f"R{ours.threshold:g}: PSNR {psnr:.2f} dB, cache-dit's {peer_psnr:.2f} dB",
            ),
            (wall <= 1, f"R{ours.threshold:g}: wall time {wall:.2f} times cache-dit's"),
        ]
    return found


def show(comparison: Comparison) -> None:
    title = f"{comparison.mode}, {comparison.steps} steps, {len(comparison.prompts)} prompts one by one"
    table = Table(title=title, box=SIMPLE_HEAD, padding=0)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == COLUMNS[0] else "right", no_wrap=True)
    for cells in table_of(comparison):
        medians = (cell.split(" (")[0] for cell in cells)  # quartiles would not fit into 80 characters
        table.add_row(*medians, end_section=cells[0].startswith(("uncached", "fewer")))
    console.print(table)
    for holds, words in verdicts(comparison):
        console.print(f"[green]yes[/] {words}" if holds else f"[red]no [/] {words}", highlight=False)


def markdown(comparisons: Sequence[Comparison], setting: dict[str, Any]) -> str:
    """Everything as one page."""
    lines = ["# cachedit_fx against cache-dit", ""]
    lines += [f"- {name}: {value}" for name, value in setting.items()]
    for comparison in comparisons:
        lines += ["", f"## {comparison.mode.capitalize()}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", f"|---{'|---:' * (len(COLUMNS) - 1)}|"]
        lines += [f"| {' | '.join(cells)} |" for cells in table_of(comparison)]
        lines += ["", *(f"- {'yes' if holds else '**no**'}: {words}" for holds, words in verdicts(comparison))]
    return "\n".join([*lines, "", LEGEND, ""])


def as_json(comparisons: Sequence[Comparison], setting: dict[str, Any]) -> dict[str, Any]:
    """Everything, raw times and the numbers of all cached steps included; pictures left out."""
    page: dict[str, Any] = {"setting": setting, "prompts": list(comparisons[0].prompts), "tables": []}
    for comparison in comparisons:
        rows = []
        for row in comparison.rows:
            psnr = row.psnr(comparison.reference)
            entry = {name: value for name, value in vars(row).items() if name not in ("pictures", "worker")}
            derived = {"psnr_db": None if math.isinf(psnr) else psnr, "work": row.work(comparison.reference)}
            rows.append(entry | derived)
        held = [{"holds": holds, "what": words} for holds, words in verdicts(comparison)]
        page["tables"].append(
            {"mode": comparison.mode, "versions": comparison.versions, "rows": rows, "verdicts": held}
        )
    return page


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@app.command(help=__doc__)
def main(
    mode: Annotated[Mode, typer.Option(help="Which of the two tables.")] = Mode.both,
    rounds: Annotated[int, typer.Option(min=1, help="Timed requests of each prompt; 3 or more on a busy machine.")] = 3,
    prompts: Annotated[int, typer.Option(min=1, max=len(PROMPTS), help="Prompts, each with a seed of its own.")] = 8,
    steps: Annotated[int, typer.Option(min=6, help="Denoising steps of the uncached and the cached rows.")] = 28,
    threshold: Annotated[
        list[float] | None,
        typer.Option("--threshold", "-r", help="A threshold R; may be repeated. Left out: 0.08, 0.12 and 0.2."),
    ] = None,
    peer_python: Annotated[
        str, typer.Option(help="An interpreter that has cache-dit; torch and diffusers of the same versions.")
    ] = sys.executable,
    peer_compile: Annotated[
        PeerCompile,
        typer.Option(
            help="How cache-dit is compiled: the transformer, as its README says; the same after its "
            "set_compile_configs(); or diffusers' compile_repeated_blocks, as its own example scripts do."
        ),
    ] = PeerCompile.transformer,
    granularity: Annotated[
        Granularity, typer.Option(help="Ours: what is compiled as one piece (no difference in the eager table).")
    ] = Granularity.block,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a worker.")] = 1,
    out: Annotated[Path | None, typer.Option(help="A folder for comparison.json and comparison.md.")] = None,
) -> None:
    signal.signal(signal.SIGTERM, _interrupted)
    thresholds = threshold or [0.08, 0.12, 0.2]
    pythons = {"uncached": sys.executable, "cachedit_fx": sys.executable, "cache-dit": peer_python}
    comparisons = []
    started = time.time()
    try:
        found = check_peer(peer_python)
        if found != PEER_VERSION:
            console.print(f"[yellow]cache-dit is {found}; what follows was written for {PEER_VERSION}[/]")
        for compiled in [False, True]:
            if mode.value == ("eager" if compiled else "compiled"):
                continue
            comparison = Comparison(compiled, thresholds, steps, PROMPTS[:prompts])
            with (
                console.status(f"starting {len({row.worker for row in comparison.rows})} processes") as status,
                workers_for(comparison.rows, pythons, peer_compile.value, granularity.value, threads) as workers,
            ):
                status.stop()
                with Progress(
                    TextColumn("{task.description:<32}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    console=console,
                    transient=True,
                ) as progress:
                    comparison.run(workers, rounds, progress)
            _warn_of_versions(comparison)
            show(comparison)
            comparisons.append(comparison)
    except BenchmarkError as error:
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("interrupted; all workers are stopped")
        raise typer.Exit(130) from None
    console.print(LEGEND, style="dim", highlight=False)
    setting = {
        "date": time.strftime("%Y-%m-%d %H:%M", time.localtime(started)),
        "seconds": round(time.time() - started),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f} (5 min)",
        "threads of a worker": threads,
        "rounds": rounds,
        "steps": steps,
        "versions": comparisons[-1].versions["cache-dit"],
        "cache-dit is compiled by": peer_compile.value,
        "ours is compiled by": granularity.value,
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.json").write_text(json.dumps(as_json(comparisons, setting), indent=1) + "\n")
        (out / "comparison.md").write_text(markdown(comparisons, setting))
        console.print(f"written: {out / 'comparison.json'}, {out / 'comparison.md'}")


def _warn_of_versions(comparison: Comparison) -> None:
    ours, theirs = comparison.versions["cachedit_fx"], comparison.versions["cache-dit"]
    for name, version in ours.items():
        if name in theirs and theirs[name] != version:
            console.print(
                f"[yellow]{name} is {version} here and {theirs[name]} for cache-dit: not a fair comparison[/]"
            )


if __name__ == "__main__":
    app()
