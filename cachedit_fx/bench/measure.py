"""Rows in, measured rows out.

    uncached ─► reference pictures, FLOPs of each call
    each row: draw all prompts, counting ─► work, PSNR, SSIM, accuracy, cached steps, bytes held
              then in rounds, by turns with uncached ─► wall time
              then, once for each number of steps: uncached, with as many steps as cost the same work

A row is measured to its end before the next begins, so that an interrupted run keeps what it has, and so that few
processes live at a time: a peer's, and one without a cache to time it by.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cachedit_fx import OptionError
from cachedit_fx.bench.comparison import mean_psnr, psnr
from cachedit_fx.bench.process import Worker
from cachedit_fx.bench.rows import Row, RowError
from cachedit_fx.bench.systems import Drawing, Setup, System
from cachedit_fx.metrics.image import ssim

UNCACHED = "uncached"
"""Name of the first row, and of the system without a cache."""


TIMED = 4
"""Calls of the pipeline in a timed round, at most."""


SAME = 0.99
"""A step that ran less than this share of the uncached one's FLOPs counts as cached."""


@dataclass(frozen=True)
class Settings:
    """What all rows of a run share. A run is resumed only with the same ones."""

    prompts: tuple[str, ...]
    steps: int = 28
    seed: int = 0
    guidance: float = 1.0
    entry: str | None = None
    inner_backend: str = "eager"
    batch: int = 1
    """Pictures drawn by one call of the pipeline. Systems decide by the call, so 1 lets them decide by the picture."""
    rounds: int = 3
    """Timed rounds of each row; 0 leaves out wall times."""
    calibration: tuple[str, ...] = ()
    """Prompts that peers are calibrated on."""

    def setup(self, system: str, arguments: Mapping[str, Any]) -> Setup:
        return Setup(
            system=system,
            arguments=arguments,
            steps=self.steps,
            entry=self.entry,
            guidance=self.guidance,
            inner_backend=self.inner_backend,
            calibration=self.calibration,
        )

    def batches(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """(seed of the first picture, prompts) of each call of the pipeline."""
        for start in range(0, len(self.prompts), self.batch):
            yield self.seed + start, self.prompts[start : start + self.batch]

    @property
    def calls(self) -> int:
        """Of the pipeline, to draw all prompts once."""
        return math.ceil(len(self.prompts) / self.batch)

    @property
    def timed_calls(self) -> int:
        """Of the pipeline, to time a row and uncached beside it."""
        return 2 * min(self.calls, TIMED) * self.rounds


@dataclass
class Measured:
    """A row, and what came of it: JSON's values alone."""

    name: str
    system: str
    steps: int
    arguments: dict[str, Any]
    work: float
    """FLOPs of the transformer's calls over the uncached run's."""
    cached_steps: float
    """Of a generation, the mean: steps that ran less than the whole model."""
    psnr: list[float | None]
    """Of each picture against the uncached one, in dB; None where they are equal."""
    ssim: list[float] | None = None
    """Of each picture against the uncached one; None: torchmetrics is not installed."""
    accuracy: dict[str, float] | None = None
    """By category; None: these prompts cannot be checked."""
    bytes_held: int | None = None
    """Of stored values, the most; None: the system does not tell."""
    seconds: list[float] = field(default_factory=list)
    """Of each timed round."""
    wall_ratios: list[float] = field(default_factory=list)
    """`seconds` over the uncached run's in the same round."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the process that drew, where it was one of its own."""

    @property
    def mean_psnr(self) -> float:
        """Over the pictures that differ from the uncached ones, in dB; infinite if none does."""
        return mean_psnr([math.inf if value is None else value for value in self.psnr])

    @property
    def mean_ssim(self) -> float | None:
        return statistics.fmean(self.ssim) if self.ssim else None

    @property
    def wall(self) -> float | None:
        """Wall time over the uncached run's; None where nothing was timed."""
        return statistics.median(self.wall_ratios) if self.wall_ratios else None


Tell = Callable[[str, int], None]
"""Called with what happens now, and the calls of the pipeline done since the last time."""


class Bench:
    """A run: the reference and our own rows in this process, each peer's row in one of its own.

    Args:
        settings: what all rows share.
        tell: where progress is reported.
        peer_python: the interpreter that peers run in.
    """

    def __init__(self, settings: Settings, tell: Tell, peer_python: str) -> None:
        self.settings, self._tell, self._peer_python = settings, tell, peer_python
        self._plain = System(settings.setup(UNCACHED, {}))
        self._ours: System | None = None
        self._pictures = torch.empty(0)
        self._flops: list[list[int]] = []

    def check(self, rows: Sequence[Row]) -> None:
        """Raise `RowError` on arguments that ours does not take; nothing is compiled or drawn."""
        for row in rows:
            if row.system == "cachedit_fx":
                try:
                    self._switched_on(row)
                except OptionError as error:
                    raise RowError(f"row {row.name!r}: {error}") from None

    def draw_reference(self) -> Measured:
        """Draw what all else is compared with. To be called first, in a resumed run too."""
        self._tell(UNCACHED, 0)
        drawings = list(self._drawn(self._plain, self.settings.steps))
        self._pictures = torch.cat([drawing.pictures for drawing in drawings])
        self._flops = [drawing.flops for drawing in drawings]
        measured = self._measured(Row(UNCACHED, UNCACHED), drawings)
        measured.wall_ratios = [1.0]
        return measured

    def measure(self, row: Row) -> Measured:
        """Draw and time one row."""
        self._tell(row.name, 0)
        with self._started(row) as (system, plain):
            measured = self._measured(row, list(self._drawn(system, row.steps or self.settings.steps)))
            self._time(system, plain, measured)
            if isinstance(system, Worker):
                measured.versions = system.versions
        return measured

    def fewer_steps(self, measured: Measured) -> Row:
        """What a user could have had for the same work without a cache."""
        return fewer_steps(max(1, round(measured.work * self.settings.steps)))

    @contextmanager
    def _started(self, row: Row) -> Iterator[tuple[System, System] | tuple[Worker, Worker]]:
        """The row's system, and beside it one without a cache; both in this process, or each in one of its own."""
        if row.system == UNCACHED:
            yield self._plain, self._plain
        elif row.system == "cachedit_fx":
            yield self._switched_on(row), self._plain
        else:
            workers: list[Worker] = []
            try:
                for name, setup in (
                    (row.name, self.settings.setup(row.system, row.arguments)),
                    (UNCACHED, self.settings.setup(UNCACHED, {})),
                ):
                    workers.append(Worker(name, self._peer_python, setup))
                for worker in workers:
                    worker.wait_until_ready()
                yield workers[0], workers[1]
            finally:
                for worker in workers:
                    worker.stop()

    def _switched_on(self, row: Row) -> System:
        if self._ours is None:
            self._ours = System(self.settings.setup("cachedit_fx", row.arguments))
        else:
            self._ours.enable(row.arguments)
        return self._ours

    def _drawn(self, system: System | Worker, steps: int) -> Iterator[Drawing]:
        for seed, prompts in self.settings.batches():
            yield system.draw(prompts, steps, seed, count=True)
            self._tell("", 1)

    def _measured(self, row: Row, drawings: Sequence[Drawing]) -> Measured:
        pictures = torch.cat([drawing.pictures for drawing in drawings])
        flops = [drawing.flops for drawing in drawings]
        held = [drawing.bytes_held for drawing in drawings if drawing.bytes_held is not None]
        against = psnr(pictures, self._pictures)
        return Measured(
            name=row.name,
            system=row.system,
            steps=row.steps or self.settings.steps,
            arguments=dict(row.arguments),
            work=sum(map(sum, flops)) / sum(map(sum, self._flops)),
            cached_steps=statistics.fmean(map(self._cached, flops, self._flops)),
            psnr=[value if math.isfinite(value) else None for value in against],
            ssim=ssim(pictures, self._pictures),
            accuracy=self._accuracy(pictures),
            bytes_held=max(held, default=None),
        )

    def _cached(self, flops: Sequence[int], whole: Sequence[int]) -> float:
        """Steps of one generation that ran less than the whole model, from the FLOPs of its calls."""
        calls = sum(some < SAME * every for some, every in zip(flops, whole, strict=False))
        return calls * self.settings.steps / len(whole)

    def _accuracy(self, pictures: torch.Tensor) -> dict[str, float] | None:
        if self.settings.entry is not None:
            return None
        from cachedit_fx.shapes import accuracy

        try:
            return accuracy(pictures, self.settings.prompts)
        except ValueError:  # prompts that the model reads and the checker does not, such as ""
            return None

    def _time(self, system: System | Worker, plain: System | Worker, measured: Measured) -> None:
        """Time the row and uncached by turns; every other round the other way round."""
        batches = list(self.settings.batches())[:TIMED]
        for number in range(self.settings.rounds):
            taken = {True: 0.0, False: 0.0}
            for seed, prompts in batches:
                for is_row in (True, False) if number % 2 else (False, True):
                    one, steps = (system, measured.steps) if is_row else (plain, self.settings.steps)
                    taken[is_row] += one.draw(prompts, steps, seed).seconds
                    self._tell("", 1)
            measured.seconds.append(taken[True])
            measured.wall_ratios.append(taken[True] / taken[False])


def fewer_steps(steps: int) -> Row:
    return Row(f"{steps} steps", UNCACHED, steps=steps)


def as_settings(settings: Settings) -> dict[str, Any]:
    """Plain values, as a JSON file gives them back."""
    import json

    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return plain
