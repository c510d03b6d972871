"""Everything that wants a GPU, for the day one is at hand: a whole model, the kernels' numerics, their bandwidth.

  python examples/gpu_check.py                  # on the GPU; writes runs/gpu_check
  python examples/gpu_check.py --list           # the parts, their time, and which are done
  python examples/gpu_check.py --only l1_sums   # that part, or a group such as ladder; may be repeated
  python examples/gpu_check.py --kernels-only   # parts that need torch 2.11 and Triton 3.6, and nothing else
  python examples/gpu_check.py --cpu-rehearsal  # the same code at tiny sizes on a CPU, which says nothing about a GPU

The check runs in parts. Each is written when it is done, so a time limit costs the part under way and no more. The same
command again goes on with the rest: a part is done if its file was made on the same device, by the same versions and
settings. `--again` repeats.

The exit code is 1 if anything differs, 2 if the request cannot be, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cachedit_fx.bench import kernels_bandwidth, kernels_numerics
from cachedit_fx.bench.kernels_bandwidth import Timed
from cachedit_fx.bench.kernels_numerics import Check, Launchers
from cachedit_fx.kernels.layout import HAS_TRITON
from cachedit_fx.report.files import check_folder, hardware, whole_files
from cachedit_fx.report.tables import Heading, Part, Table, page, titled_list

if TYPE_CHECKING:
    from cachedit_fx.bench.flux_steps import Found, Steps

SHAPES: tuple[tuple[int, ...], ...] = ((1,), (5,), (3, 1), (1, 1, 1), (2, 7, 5), (1, 33, 129), (2, 9, 300))
LARGE: tuple[tuple[int, ...], ...] = ((1, 4097, 3072), (2, 1000, 1111))
TINY: tuple[tuple[int, ...], ...] = ((2, 7, 5), (1, 3, 300))


@dataclass(frozen=True)
class Settings:
    """What all parts share."""

    device: torch.device
    steps: int = 12
    """Of the model's generations."""
    rounds: int = 20
    """Times that each kernel is timed."""
    inner_backend: str = "inductor"

    @property
    def is_rehearsal(self) -> bool:
        return self.device.type == "cpu"

    @property
    def conditions(self) -> dict[str, Any]:
        """What a part's figures depend on."""
        shared = {"steps": self.steps, "rounds": self.rounds, "inner_backend": self.inner_backend}
        return {"hardware": hardware(self.device)} | shared


@dataclass
class Findings:
    """What a part gives. Values of JSON, or dataclasses of them."""

    checks: Sequence[Check] = ()
    timed: Sequence[Timed] = ()
    steps: Sequence[Steps] = ()
    about: Sequence[str] = ()


@dataclass(frozen=True)
class Piece:
    """A part of the check."""

    about: str
    run: Callable[[Settings], Findings]
    seconds: int
    """On a GPU, a guess: no GPU has run this. The figure of an earlier run replaces it."""
    rehearsal: int = 2
    """Seconds on one core of a CPU."""
    needs: tuple[str, ...] = ()
    """Packages besides torch and Triton."""
    only_rehearsed: bool = False


def whole_model(settings: Settings, how: str) -> Findings:
    from cachedit_fx.bench import flux_steps

    return _of_model(getattr(flux_steps, how)(settings.device, settings.steps, settings.inner_backend))


def rung_of_ladder(settings: Settings, name: str) -> Findings:
    from cachedit_fx.bench.flux_ladder import climb

    return _of_model(climb(settings.device, settings.steps, settings.inner_backend, name))


def _of_model(found: Found) -> Findings:
    return Findings(found.checks, steps=found.steps, about=[found.about])


def numerics(settings: Settings, kernel: str) -> Findings:
    shapes = SHAPES if settings.is_rehearsal else (*SHAPES, *LARGE)
    launchers = Launchers(on_triton=not settings.is_rehearsal)
    return Findings(list(kernels_numerics.numerics(kernel, launchers, settings.device, shapes)))


def attention(settings: Settings) -> Findings:
    lengths = (1, 65, 200) if settings.is_rehearsal else (1, 65, 200, 1000, 4608)
    return Findings(list(kernels_numerics.attention(settings.device, lengths)))


def far_apart(settings: Settings) -> Findings:
    return Findings([kernels_numerics.far_apart(Launchers(not settings.is_rehearsal), settings.device)])


def interpreter(settings: Settings) -> Findings:
    """Triton's launchers themselves. The interpreter rounds float32 to 16 bits otherwise than a GPU."""
    launchers, names = Launchers(on_triton=True), ("l1_sums", "residuals")
    found = (kernels_numerics.numerics(name, launchers, settings.device, TINY, ["fp32"]) for name in names)
    checks = [check for group in found for check in group]
    for check in checks:
        check.name += ", interpreted"
    return Findings(checks)


def bandwidth(settings: Settings, shape: str) -> Findings:
    if settings.is_rehearsal:
        tiny = {shape: ((1, 16, 128), (1, 4, 128))}
        return Findings(timed=list(kernels_bandwidth.measure(tiny, ["bf16", "fp32"], settings.device, settings.rounds)))
    sizes = {name: size for name, size in kernels_bandwidth.shapes_for(settings.device).items() if shape in name}
    if not sizes:
        return Findings(about=[f"{shape}: the device has too little free memory for its hidden states"])
    dtypes = list(kernels_bandwidth.DTYPES)
    return Findings(timed=list(kernels_bandwidth.measure(sizes, dtypes, settings.device, settings.rounds)))


WHOLE = ("diffusers",)
IN_INT8 = (*WHOLE, "torchao")
PIECES: Mapping[str, Piece] = {
    "model": Piece(
        "a FLUX-sized model with the cache", partial(whole_model, how="cached"), seconds=180, rehearsal=15, needs=WHOLE
    ),
    "l1_sums": Piece("numerics of l1_sums", partial(numerics, kernel="l1_sums"), seconds=60),
    "residuals": Piece("numerics of residual_store and residual_apply", partial(numerics, kernel="residuals"), 90, 5),
    "fp8": Piece("numerics of quant_fp8 and dequant_fp8", partial(numerics, kernel="fp8"), seconds=30),
    "int8_attention": Piece("numerics of int8_attention", attention, seconds=60, rehearsal=5),
    "far_apart": Piece("rows 2^31 elements apart", far_apart, seconds=10),
    "interpreter": Piece("Triton's launchers in its interpreter", interpreter, 60, 15, only_rehearsed=True),
    "bandwidth_small": Piece("bandwidth at small shapes", partial(bandwidth, shape="small"), seconds=30),
    "bandwidth_FLUX": Piece("bandwidth at FLUX's shapes", partial(bandwidth, shape="FLUX"), seconds=30),
    "bandwidth_Wan": Piece("bandwidth at Wan's shapes", partial(bandwidth, shape="Wan"), seconds=40),
    "compile": Piece(
        "the same model eager, and by plain torch.compile", partial(whole_model, how="compiled"), 240, 15, WHOLE
    ),
    "ladder_eager": Piece("ladder: the model, eager", partial(rung_of_ladder, name="eager"), 30, 2, WHOLE),
    "ladder_cache": Piece("ladder: cache", partial(rung_of_ladder, name="cache"), 40, 10, WHOLE),
    "ladder_compile": Piece("ladder: cache + compile", partial(rung_of_ladder, name="compile"), 90, 60, WHOLE),
    "ladder_int8": Piece("ladder: cache + compile + int8", partial(rung_of_ladder, name="int8"), 120, 70, IN_INT8),
    "ladder_attention": Piece(
        "ladder: cache + compile + int8 + attention", partial(rung_of_ladder, name="attention"), 120, 70, IN_INT8
    ),
}
"""The parts, in order."""


@dataclass(frozen=True)
class Record:
    """A part's file."""

    part: str
    conditions: Mapping[str, Any]
    seconds: float
    error: str | None = None
    findings: Findings = field(default_factory=Findings)

    def save(self, folder: Path) -> None:
        with whole_files(folder) as staging:
            (staging / f"{self.part}.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, part: str) -> Record | None:
        """The part's record; None without a file, or with one that was written by something else."""
        try:
            values = json.loads((folder / f"{part}.json").read_text())
            found = values.pop("findings")
            checks, timed = [Check(**check) for check in found["checks"]], [Timed(**row) for row in found["timed"]]
            return cls(**values, findings=Findings(checks, timed, _steps(found["steps"]), found["about"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _steps(values: Sequence[Mapping[str, Any]]) -> Sequence[Steps]:
    if not values:
        return ()
    from cachedit_fx.bench.flux_steps import Steps

    return [Steps(step["kind"], tuple(step["device"]), tuple(step["host"])) for step in values]


def obstacle_to(piece: Piece, settings: Settings) -> str | None:
    """Why the part cannot run here; None if it can."""
    missing = [name for name in piece.needs if find_spec(name) is None]
    if piece.only_rehearsed and not HAS_TRITON:
        missing.append("triton")
    return f"needs {', '.join(missing)}" if missing else None


def plan_table(pieces: Mapping[str, Piece], records: Mapping[str, Record], settings: Settings) -> Table:
    """The parts, the time that each takes, and what stands in the way."""
    table = Table(("part", "what", "about, s", "state"), texts=(0, 1, 3))
    for name, piece in pieces.items():
        record = records.get(name)
        state = obstacle_to(piece, settings) or (_state(record) if record else "to do")
        table.add(name, piece.about, f"{_estimate(piece, record, settings):.0f}", state)
    return table


def _estimate(piece: Piece, record: Record | None, settings: Settings) -> float:
    if record is not None and record.error is None:
        return record.seconds
    return piece.rehearsal if settings.is_rehearsal else piece.seconds


def _state(record: Record) -> str:
    if record.error:
        return f"failed: {record.error}"
    count = sum(len(check.problems) for check in record.findings.checks)
    return f"done, {count} problems" if count else "done"


def run_piece(name: str, settings: Settings) -> Record:
    """Run a part. An error is part of its record."""
    begun, error, findings = time.monotonic(), None, Findings()
    torch.manual_seed(0)
    try:
        findings = PIECES[name].run(settings)
    except Exception as problem:
        traceback.print_exc()
        error = f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
    if not settings.is_rehearsal:
        torch.cuda.empty_cache()
    return Record(name, settings.conditions, round(time.monotonic() - begun, 1), error, findings)


def report(records: Sequence[Record], settings: Settings) -> str:
    """All parts that there are, as Markdown."""
    checks = Table(("checked", "cases", "worst error, of the allowed", "holds"))
    for record in records:
        for check in record.findings.checks:
            worst = f"{check.worst:.2f}" if check.worst else ""
            checks.add(check.name, str(check.tried), worst, "no" if check.problems else "yes")
    timed = _timed(records)
    steps = [times for record in records for times in record.findings.steps]
    parts: list[Part] = [Heading("Checks", 2), checks] if checks.lines else []
    if timed:
        parts += [Heading("Bandwidth", 2), kernels_bandwidth.table(timed)]
    if steps:
        from cachedit_fx.bench import flux_ladder, flux_steps

        rungs = [times for times in steps if flux_ladder.is_rung(times)]
        others = [times for times in steps if not flux_ladder.is_rung(times)]
        models = dict.fromkeys(text for record in records for text in record.findings.about)
        parts += [Heading("A whole model", 2), [*models]]
        parts += [flux_steps.table(others)] if others else []
        parts += [Heading("Ladder", 2), flux_ladder.table(rungs, settings.is_rehearsal)] if rungs else []
    what = "Rehearsal on a CPU: nothing here was run on a GPU" if settings.is_rehearsal else "Checked on a GPU"
    made_by = f"`{shlex.join(['python', *sys.argv])}`, on {settings.conditions['hardware']}."
    taken = f"Parts: {', '.join(f'{record.part} {record.seconds:.0f} s' for record in records)}."
    return page(Heading(what), made_by, taken, *parts, *titled_list("Problems", problems(records)))


def problems(records: Sequence[Record]) -> list[str]:
    """What went wrong, a line each."""
    found = [f"{record.part} failed: {record.error}" for record in records if record.error]
    return found + [
        f"{check.name}: {problem}"
        for record in records
        for check in record.findings.checks
        for problem in check.problems
    ]


def _parts_of(word: str) -> list[str]:
    """The parts of a name, or of a group: `ladder` stands for all that begin with `ladder_`."""
    parts = [name for name in PIECES if name == word or name.startswith(f"{word}_")]
    if not parts:
        raise argparse.ArgumentTypeError(f"there is no part {word!r}; choose from {', '.join(PIECES)}")
    return parts


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    result.add_argument(
        "--only", action="append", type=_parts_of, metavar="PART", help="that part, or group; may be repeated"
    )
    result.add_argument("--kernels-only", action="store_true", help="leave out the parts that need diffusers")
    result.add_argument("--list", action="store_true", help="show the parts and their time, and exit")
    result.add_argument("--again", action="store_true", help="repeat parts that are done")
    result.add_argument("--cpu-rehearsal", action="store_true", help="run it at tiny sizes on the CPU")
    result.add_argument("--device", default="cuda", metavar="NAME", help="the GPU")
    result.add_argument("--out", type=Path, default=Path("runs/gpu_check"), metavar="FOLDER", help="for the results")
    for name, kind in (("steps", int), ("rounds", int), ("inner-backend", str)):
        default = getattr(Settings(torch.device("cpu")), name.replace("-", "_"))
        result.add_argument(f"--{name}", type=kind, default=default, metavar="N" if kind is int else "NAME")
    return result


def main(words: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for and not done; the exit code."""
    options = parser()
    asked = options.parse_args(words)
    if asked.steps < 4 or asked.rounds < 1:
        options.error("--steps must be at least 4, --rounds at least 1")
    obstacle = check_folder(asked.out)
    if obstacle:
        options.error(f"--out: {obstacle}")
    if not (asked.cpu_rehearsal or asked.list) and not (torch.cuda.is_available() and HAS_TRITON):
        missing = "Triton is not installed" if torch.cuda.is_available() else "there is no GPU that torch can use"
        rehearsed = f"--cpu-rehearsal runs {', '.join(PIECES)} at tiny sizes on a CPU"
        options.exit(2, f"error: {missing}; {rehearsed}\n")
    if asked.cpu_rehearsal:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    is_cpu = asked.cpu_rehearsal or not torch.cuda.is_available()
    shared = {"steps": asked.steps, "rounds": asked.rounds, "inner_backend": asked.inner_backend}
    settings = Settings(torch.device("cpu" if is_cpu else asked.device), **shared)
    pieces = {
        name: piece
        for name, piece in PIECES.items()
        if (not asked.only or any(name in group for group in asked.only))
        and not (asked.kernels_only and piece.needs)
        and (settings.is_rehearsal or not piece.only_rehearsed)
    }
    return run(pieces, settings, asked.out, again=asked.again, only_list=asked.list)


def run(
    pieces: Mapping[str, Piece], settings: Settings, out: Path, again: bool = False, only_list: bool = False
) -> int:
    """Run the parts in order, and write each; the exit code."""
    if settings.is_rehearsal:
        torch.set_num_threads(1)
    on_file = {name: record for name in PIECES if (record := Record.load(out, name)) is not None}
    records = {name: record for name, record in on_file.items() if record.conditions == settings.conditions}
    print(page(f"{settings.conditions['hardware']}", plan_table(pieces, records, settings)))
    todo = {
        name: piece
        for name, piece in pieces.items()
        if obstacle_to(piece, settings) is None and (again or name not in records or records[name].error)
    }
    total = sum(_estimate(piece, records.get(name), settings) for name, piece in todo.items())
    print(f"{len(todo)} parts to do, about {total:.0f} s", flush=True)
    if only_list:
        return 0
    for name in todo:
        print(f"{name} ...", flush=True)
        try:
            records[name] = run_piece(name, settings)
        except KeyboardInterrupt:
            print(f"interrupted in {name}; {out} has the parts before, the same command goes on", file=sys.stderr)
            return 130
        records[name].save(out)
        save_report(list(records.values()), settings, out)
        if records[name].findings.timed and find_spec("matplotlib") is not None:
            save_picture(list(records.values()), settings, out)
        print(f"{name}: {_state(records[name])}, {records[name].seconds:.0f} s", flush=True)
    found = problems([records[name] for name in pieces if name in records])
    for problem in found[:20]:
        print(problem)
    if records:
        print(f"written: {out / 'report.md'}")
    return 1 if found else 0


def save_report(records: Sequence[Record], settings: Settings, out: Path) -> None:
    """`report.md` of all parts, and the figures of the bandwidth."""
    ordered = sorted(records, key=lambda record: list(PIECES).index(record.part))
    with whole_files(out) as staging:
        (staging / "report.md").write_text(report(ordered, settings))
        timed = _timed(ordered)
        if timed:
            (staging / "bandwidth.csv").write_text(kernels_bandwidth.as_csv(timed))


def save_picture(records: Sequence[Record], settings: Settings, out: Path) -> None:
    from cachedit_fx.report.plots import save_bandwidth

    with whole_files(out) as staging:
        save_bandwidth(_timed(records), f"Kernels on {settings.conditions['hardware']}", staging / "bandwidth.png")


def _timed(records: Sequence[Record]) -> list[Timed]:
    return [row for record in records for row in record.findings.timed]


if __name__ == "__main__":
    sys.exit(main())
