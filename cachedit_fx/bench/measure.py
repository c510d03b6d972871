"""Rows in, measured rows out.

    uncached ─► reference pictures, FLOPs of each call
    a group of rows: each draws all prompts ─► work, PSNR, SSIM, accuracy, cached steps, bytes held
                     then, in rounds, all of them and uncached take turns, request by request ─► wall and CPU time

Fewer steps at a cached row's work, its rival, are one more row of the group. A group is measured to its end before the
next begins: an interrupted run keeps what it has, and few processes live at a time.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from cachedit_fx import OptionError
from cachedit_fx.bench.errors import BenchmarkError
from cachedit_fx.bench.process import Worker, uninterrupted
from cachedit_fx.bench.progress import Tell, silent
from cachedit_fx.bench.rows import OURS, UNCACHED, Row, RowError, fewer_steps
from cachedit_fx.bench.scorers import load_scorers
from cachedit_fx.bench.systems import Drawing, Setup, System
from cachedit_fx.metrics import PictureError, mean_psnr, psnr, ssim
from cachedit_fx.metrics.text import prompt_scores
from cachedit_fx.runtime.stats import CacheStats

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
    """Timed rounds of each row; 0 leaves out times."""
    timed: int = 4
    """Calls of the pipeline in a timed round, at most."""
    calibration: tuple[str, ...] = ()
    """Prompts that peers are calibrated on."""
    clip: str | None = None
    """The CLIP that scores pictures with their prompts: a folder, a name, or `DEFAULT_CLIP`; None: no score."""
    image_reward: str | None = None
    """The folder of ImageReward's weights; None: no score."""
    work: str = "flops"
    """The unit of work: "flops" of the transformer's calls, or "blocks" executed, which ours alone counts."""
    plain: str = "whole"
    granularity: str = "block"
    peer_compile: str = "transformer"
    threads: int = 1

    def setup(self, system: str, arguments: Mapping[str, Any]) -> Setup:
        """A system under these settings."""
        shared = ("steps", "entry", "guidance", "inner_backend", "plain", "granularity", "peer_compile", "threads",
                  "calibration")  # fmt: skip
        return Setup(system=system, arguments=arguments, **{name: getattr(self, name) for name in shared})

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
        """Of the pipeline, to time one row in all rounds."""
        return min(self.calls, self.timed) * self.rounds

    def group_calls(self, rows: int) -> int:
        """Of the pipeline, for a group of so many rows and the uncached run that they take turns with."""
        return rows * (self.calls + self.timed_calls) + self.timed_calls

    def plain_values(self) -> dict[str, Any]:
        """As a JSON file gives them back."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


@dataclass
class Measured:
    """A row, and what came of it. JSON's values, but for the last two fields."""

    name: str
    system: str
    steps: int
    arguments: dict[str, Any]
    work: float
    """Over the uncached run's; see `Settings.work`."""
    cached_steps: float
    """Of a generation, the mean: steps that ran less than the whole model."""
    psnr: list[float | None]
    """Of each picture against the uncached one, in dB; None if they are identical."""
    ssim: list[float] | None = None
    """Of each picture against the uncached one; None: torchmetrics is not installed."""
    accuracy: dict[str, float] | None = None
    """By category; None: these prompts cannot be checked."""
    clip_score: list[float] | None = None
    """Of each picture with its prompt; None: not asked for, or no weights."""
    image_reward: list[float] | None = None
    """Of each picture with its prompt; None: not asked for, or no weights."""
    flops: float | None = None
    """Of the transformer's calls for one picture, the mean; None if they were not counted."""
    bytes_held: int | None = None
    """Of stored values, the most; None: the system does not tell."""
    weight_bytes: int | None = None
    """Of the transformers' weights; None: the system does not tell."""
    cached_by_call: list[list[int] | None] = field(default_factory=list)
    """Numbers of the cached steps of each call, as the system tells them."""
    seconds: list[float] = field(default_factory=list)
    """Of each timed call."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Of each timed call."""
    wall_ratios: list[float] = field(default_factory=list)
    """`seconds` over the uncached run's for the same call in the same round."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the process that drew, if it was one of its own."""
    pictures: torch.Tensor | None = field(default=None, compare=False, repr=False)
    """[prompts, 3, H, W], if they are kept."""
    stats: CacheStats | None = field(default=None, compare=False, repr=False)
    """Ours, of the last call, if it is kept."""

    @property
    def mean_psnr(self) -> float:
        """Over the pictures that differ from the uncached ones, in dB; infinite if none does."""
        return mean_psnr([math.inf if value is None else value for value in self.psnr])

    @property
    def mean_ssim(self) -> float | None:
        """None: torchmetrics is not installed."""
        return statistics.fmean(self.ssim) if self.ssim else None

    @property
    def mean_clip_score(self) -> float | None:
        """None: not asked for, or no weights."""
        return statistics.fmean(self.clip_score) if self.clip_score else None

    @property
    def mean_image_reward(self) -> float | None:
        """None: not asked for, or no weights."""
        return statistics.fmean(self.image_reward) if self.image_reward else None

    @property
    def wall(self) -> float | None:
        """Wall time over the uncached run's, the median; None if nothing was timed."""
        return statistics.median(self.wall_ratios) if self.wall_ratios else None


Drawer = System | Worker


class Bench:
    """A run: the reference and our own rows in this process, each peer's row in one of its own.

    Args:
        settings: what all rows share.
        tell: takes reports of progress, in calls of the pipeline.
        peer_python: the interpreter of processes of their own.
        keeps: whether measured rows keep pictures and statistics.
    """

    def __init__(
        self, settings: Settings, tell: Tell = silent, peer_python: str = sys.executable, keeps: bool = False
    ) -> None:
        self.settings, self.tell, self._peer_python, self._keeps = settings, tell, peer_python, keeps
        self.plain = System(settings.setup(UNCACHED, {}))
        self._ours: System | None = None
        self._row: Row | None = None
        self._pictures = torch.empty(0)
        self._flops: list[list[int]] = []
        self.reference: Measured | None = None
        """The uncached run."""
        self.scorers = load_scorers(settings.clip, settings.image_reward)

    def check(self, rows: Sequence[Row]) -> None:
        """Raise `RowError` on arguments that ours does not take; nothing is compiled or drawn."""
        for row in rows:
            if row.system == OURS:
                try:
                    self.ours(row)
                except OptionError as error:
                    raise RowError(f"row {row.name!r}: {error}") from None

    def ours(self, row: Row) -> System:
        """Our system, with the row's cache switched on."""
        if self._ours is None:
            self._ours = System(self.settings.setup(OURS, row.arguments))
        elif row != self._row:
            self._ours.enable(row.arguments)
        self._row = row
        return self._ours

    def draw_reference(self) -> Measured:
        """Draw what all else is compared with. To be called first, in a resumed run too."""
        self.tell(UNCACHED)
        drawings = list(self.drawn(self.plain, self.settings.steps))
        self._pictures = torch.cat([drawing.pictures for drawing in drawings])
        self._flops = [drawing.flops for drawing in drawings]
        self.reference = self.measured(Row(UNCACHED, UNCACHED), drawings)
        self.reference.wall_ratios = [1.0]
        return self.reference

    def rival(self, measured: Measured) -> Row:
        """Fewer steps for the same work: what a user has without any cache."""
        return fewer_steps(max(1, round(measured.work * self.settings.steps)))

    @contextmanager
    def group(self, rows: Sequence[Row] = ()) -> Iterator[Group]:
        """Rows that share their rounds, in this process; in processes of their own if a peer is among `rows`.

        Args:
            rows: the peers among the group's rows, and others that shall live as they do. Our rows and uncached ones
                can be drawn in any group of this process.
        """
        if all(row.system in (UNCACHED, OURS) for row in rows):
            yield Group(self, self.plain, lambda row: self.plain if row.system == UNCACHED else self.ours(row))
            return
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for row in (Row(UNCACHED, UNCACHED), *rows):
                setup = self.settings.setup(row.system, row.arguments)
                with uninterrupted():
                    workers[row.name] = Worker(row.name, self._peer_python, setup)
                    stack.callback(workers[row.name].stop)
            for worker in workers.values():
                worker.wait_until_ready()
            plain = workers[UNCACHED]
            yield Group(self, plain, lambda row: plain if row.system == UNCACHED else workers[row.name])

    def drawn(self, system: Drawer, steps: int) -> Iterator[Drawing]:
        """All prompts, call by call."""
        for seed, prompts in self.settings.batches():
            yield system.draw(prompts, steps, seed, count=self.settings.work == "flops")
            self.tell(done=1)

    def measured(self, row: Row, drawings: Sequence[Drawing]) -> Measured:
        """The row, and what its drawings show."""
        pictures = torch.cat([drawing.pictures for drawing in drawings])
        held = [drawing.bytes_held for drawing in drawings if drawing.bytes_held is not None]
        try:
            against = psnr(pictures, self._pictures)
            similarity = ssim(pictures, self._pictures) if find_spec("torchmetrics") else None
            scores: dict[str, Any] = {
                name: prompt_scores(pictures, self.settings.prompts, scorer) for name, scorer in self.scorers.items()
            }
        except PictureError as error:
            raise BenchmarkError(f"{row.name}: {error}") from error
        steps = row.steps or self.settings.steps
        work, cached_steps = (
            self._by_flops(drawings) if self.settings.work == "flops" else self._by_blocks(drawings, steps)
        )
        return Measured(
            name=row.name,
            system=row.system,
            steps=steps,
            arguments=dict(row.arguments),
            work=work,
            cached_steps=cached_steps,
            psnr=[value if math.isfinite(value) else None for value in against],
            ssim=similarity,
            accuracy=self._accuracy(pictures),
            flops=sum(sum(drawing.flops) for drawing in drawings) / len(pictures) or None,
            bytes_held=max(held, default=None),
            weight_bytes=drawings[-1].weight_bytes,
            cached_by_call=[drawing.cached_steps for drawing in drawings],
            pictures=pictures if self._keeps else None,
            stats=drawings[-1].stats if self._keeps else None,
            **scores,
        )

    def _by_flops(self, drawings: Sequence[Drawing]) -> tuple[float, float]:
        """Work, and the mean of steps that ran less than the whole model, from the FLOPs of each step's calls."""
        flops = [drawing.flops for drawing in drawings]
        cached = []
        for some, whole in zip(flops, self._flops, strict=True):
            calls = sum(part < SAME * every for part, every in zip(some, whole, strict=False))
            cached.append(calls * self.settings.steps / len(whole))
        return sum(map(sum, flops)) / sum(map(sum, self._flops)), statistics.fmean(cached)

    def _by_blocks(self, drawings: Sequence[Drawing], steps: int) -> tuple[float, float]:
        """The same as our statistics count it."""
        shares = [drawing.stats.work if drawing.stats else 1.0 for drawing in drawings]
        cached = [len(drawing.cached_steps or ()) for drawing in drawings]
        return statistics.fmean(shares) * steps / self.settings.steps, statistics.fmean(cached)

    def _accuracy(self, pictures: torch.Tensor) -> dict[str, float] | None:
        if self.settings.entry is not None:
            return None
        from cachedit_fx.shapes import accuracy

        try:
            return accuracy(pictures, self.settings.prompts)
        except ValueError:  # prompts that the model reads and the checker does not, such as ""
            return None


class Group:
    """Rows that are drawn, and then timed by turns with the uncached run: a busy machine disturbs all of them."""

    def __init__(self, bench: Bench, plain: Drawer, system: Callable[[Row], Drawer]) -> None:
        self._bench, self._plain, self._system = bench, plain, system
        self._rows: list[tuple[Row, Measured]] = []

    def draw(self, row: Row) -> Measured:
        """Draw all prompts."""
        self._bench.tell(row.name)
        system = self._system(row)
        steps = row.steps or self._bench.settings.steps
        measured = self._bench.measured(row, list(self._bench.drawn(system, steps)))
        if isinstance(system, Worker):
            measured.versions = system.versions
        self._rows.append((row, measured))
        return measured

    def time(self) -> None:
        """Time the group's rows, and the uncached run, in the settings' rounds.

        Raises:
            BenchmarkError: if a system caches other steps than it did before.
        """
        settings, tell = self._bench.settings, self._bench.tell
        uncached = Measured(UNCACHED, UNCACHED, settings.steps, {}, 1.0, 0.0, [])
        turn = [(Row(UNCACHED, UNCACHED), uncached), *self._rows]
        requests = list(enumerate(settings.batches()))[: settings.timed]
        for number in range(settings.rounds):
            for place, (seed, prompts) in requests:
                # None always comes first, nor always after the same neighbour.
                for row, measured in turn if (number + place) % 2 == 0 else reversed(turn):
                    tell(f"{row.name}, round {number + 1}")
                    drawing = self._system(row).draw(prompts, measured.steps, seed)
                    measured.seconds.append(drawing.seconds)
                    measured.cpu_seconds.append(drawing.cpu_seconds)
                    if row.name != UNCACHED and drawing.cached_steps != measured.cached_by_call[place]:
                        raise BenchmarkError(
                            f"{row.name} cached steps {drawing.cached_steps} of {prompts[0]!r}, and "
                            f"{measured.cached_by_call[place]} before: it is not deterministic"
                        )
                    tell(done=1)
        for _, measured in self._rows:
            measured.wall_ratios = [a / b for a, b in zip(measured.seconds, uncached.seconds, strict=True)]
        if self._plain is self._bench.plain and self._bench.reference is not None:
            self._bench.reference.seconds += uncached.seconds
            self._bench.reference.cpu_seconds += uncached.cpu_seconds
