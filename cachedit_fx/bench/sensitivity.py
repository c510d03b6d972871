"""How much each group of layers costs if it alone is quantized, and what plans made of that are worth.

a generation ─► calls of the model, kept ─► the same calls with one group quantized ─► its error     `Probe.measure`
errors ─► plans (quantization/plan.py) ─► pictures with a plan ─► PSNR                               `Probe.draw`

The calls are those of the unquantized model on its own trajectory, so that errors of earlier steps are not in them.
"""

from __future__ import annotations

import json
import math
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from cachedit_fx.bench.errors import RequestError
from cachedit_fx.bench.progress import Tell, silent
from cachedit_fx.bench.resume import kept_rows, save_page
from cachedit_fx.bench.systems import Setup, System
from cachedit_fx.config.rules import OptionError
from cachedit_fx.metrics import mean_psnr, psnr
from cachedit_fx.passes.graph_cost import bytes_of_tensors
from cachedit_fx.quantization.apply import COMPONENTS, modules_of, quantized
from cachedit_fx.quantization.kinds import KINDS, kind_of, kinds_for
from cachedit_fx.quantization.layers import Request, groups_of, select
from cachedit_fx.quantization.plan import Candidate, Plan, plan_in_order
from cachedit_fx.quantization.report import QuantizationReport, QuantizedLayer
from cachedit_fx.runtime.warning import CacheWarning

FILE = "sensitivity.json"
WHOLE = "all groups"
"""The name of all groups together."""


@dataclass(frozen=True)
class Settings:
    """What the errors of a run share. A run is resumed only with the same ones."""

    prompts: tuple[str, ...]
    kinds: tuple[str, ...] = ("int8",)
    steps: int = 28
    seed: int = 0
    guidance: float = 1.0
    entry: str | None = None
    batch: int = 1
    """Pictures drawn by one call of the pipeline."""
    every: int = 5
    """One of so many calls of the model is kept. An odd number keeps calls of both branches of guidance."""
    threads: int = 1

    def plain_values(self) -> dict[str, Any]:
        """As a JSON file gives them back."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


@dataclass(frozen=True)
class Measurement:
    """A group of layers in one kind, and nothing else quantized.

    Attributes:
        block: name of the block; `WHOLE` for all groups together.
        part: of the block that has the layers.
        kind: of quantization.
        layers: their names.
        error: squared error of the model's output over its square.
        before: bytes of the layers' weights.
        after: the same quantized. A stand-in counts as the kind that it stands for.
    """

    block: str
    part: str
    kind: str
    layers: tuple[str, ...]
    error: float
    before: int
    after: int

    @property
    def group(self) -> str:
        """Name of the group."""
        return f"{self.block}.{self.part}"

    @property
    def candidate(self) -> Candidate:
        """As plans take it."""
        return Candidate(self.group, self.kind, tuple(self.layers), self.error, self.before - self.after)


@dataclass(frozen=True)
class Drawing:
    """Pictures of a model with some layers quantized.

    Attributes:
        name: of the choice of layers.
        kinds: layer -> kind.
        prompts: that were drawn.
        psnr: of each picture against the unquantized model's, in dB; None if they are identical.
        error: squared error of the output over its square, on the same calls as single groups.
        bytes: of all weights.
    """

    name: str
    kinds: Mapping[str, str]
    prompts: tuple[str, ...]
    psnr: tuple[float | None, ...]
    error: float
    bytes: int

    @property
    def mean_psnr(self) -> float:
        """Over the pictures that differ, in dB; infinite if none does."""
        return mean_psnr([math.inf if value is None else value for value in self.psnr])


@dataclass
class Record:
    """A run as it stands."""

    settings: Settings
    command: str
    machine: str
    versions: Mapping[str, str]
    bytes: int = 0
    """Of all weights before."""
    measurements: list[Measurement] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)

    @property
    def groups(self) -> list[Measurement]:
        """The measurements of single groups."""
        return [each for each in self.measurements if each.block != WHOLE]

    @property
    def candidates(self) -> list[Candidate]:
        """What plans are made of."""
        return [each.candidate for each in self.groups]

    def find(self, block: str, part: str, kind: str) -> Measurement | None:
        """The measurement of a group."""
        matches = (each for each in self.measurements if (each.block, each.part, each.kind) == (block, part, kind))
        return next(matches, None)

    def save(self, folder: Path) -> None:
        """Write `sensitivity.json`, whole or not at all."""
        rows = [*map(asdict, self.measurements), *map(asdict, self.drawings)]
        page = {name: getattr(self, name) for name in ("command", "machine", "versions", "bytes")}
        save_page(folder / FILE, page | {"settings": self.settings.plain_values(), "rows": rows})

    def resume(self, folder: Path) -> None:
        """Take over the rows of an earlier run.

        Raises:
            ResumeError: if there is none, or it was made with other settings.
        """
        for row in kept_rows(folder / FILE, "cachedit sensitivity", self.settings.plain_values()):
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in row.items()
            }
            if "block" in row:
                self.measurements.append(Measurement(**values))
            else:
                self.drawings.append(Drawing(**values))


class Probe:
    """A pipeline, and what is measured on it.

    Raises:
        RequestError: if a kind does not run here, or takes none of the layers.
    """

    def __init__(self, settings: Settings, tell: Tell = silent) -> None:
        self.settings, self._tell = settings, tell
        setup = Setup(steps=settings.steps, entry=settings.entry, guidance=settings.guidance, threads=settings.threads)
        self._system = System(setup)
        self._modules = [*modules_of(self._system.pipe, COMPONENTS).values()]
        self.bytes = bytes_of_tensors(
            tensor for each in self._modules for tensor in (*each.parameters(), *each.buffers())
        )
        self.groups = {kind: self._groups_of(kind) for kind in settings.kinds}
        self._calls: list[tuple[Any, Any, Any]] = []
        self._outputs: list[torch.Tensor] = []
        self._pictures: dict[tuple[str, ...], torch.Tensor] = {}

    def _groups_of(self, name: str) -> dict[tuple[str, str], tuple[str, ...]]:
        """The layers of each group that the kind takes."""
        kind = kind_of(name)
        groups: dict[tuple[str, str], tuple[str, ...]] = {}
        reasons: dict[str, None] = {}
        for module in self._modules:
            device = next(module.parameters()).device
            lack = kind.lack(device)
            if lack is not None:
                raise RequestError(f"--kinds: {name!r} does not run here: {lack}; {kinds_for(device)}")
            selection = select(module, Request(kind))
            reasons |= dict.fromkeys(selection.kept.values())
            for group, layers in groups_of(module, selection.kinds).items():
                groups[group] = tuple(dict.fromkeys((*groups.get(group, ()), *layers)))
        if not groups:
            raise RequestError(f"--kinds: {name!r} takes none of the model's layers: {'; '.join(reasons)}")
        return groups

    def measure(self, record: Record) -> Iterator[None]:
        """Measure every group in every kind, and all groups together, that `record` lacks; a step of the loop each."""
        record.bytes = self.bytes
        wholes = {kind: {(WHOLE, ""): sum(groups.values(), ())} for kind, groups in self.groups.items()}
        every = [
            (kind, *group, layers)
            for kind, groups in self.groups.items()
            for group, layers in {**groups, **wholes[kind]}.items()
        ]
        order = {(kind, block, part): place for place, (kind, block, part, _) in enumerate(every)}
        todo = [
            (kind, block, part, layers) for kind, block, part, layers in every if not record.find(block, part, kind)
        ]
        self._tell(more=len(todo))
        for kind, block, part, layers in todo:
            self._tell(f"{kind} {block}")
            error, report = self.error(dict.fromkeys(layers, kind))
            before, after = sum(each.bytes_before for each in report.layers), _bytes_after(report)
            record.measurements.append(Measurement(block, part, kind, layers, error, before, after))
            record.measurements.sort(key=lambda each: order[each.kind, each.block, each.part])
            self._tell(done=1)
            yield

    def error(self, kinds: Mapping[str, str]) -> tuple[float, QuantizationReport]:
        """Squared error over the square of the model's output with these layers quantized, and the report of that."""
        if not self._calls:
            self._keep_calls()
        with quantized_quietly(self._system.pipe, kinds) as report:
            results = self._run()
        differences = [(new - old, old) for new, old in zip(results, self._outputs, strict=True)]
        squares = [(_square(difference), _square(old)) for difference, old in differences]
        return sum(first for first, _ in squares) / sum(second for _, second in squares), report

    def draw(self, record: Record, name: str, kinds: Mapping[str, str], prompts: tuple[str, ...]) -> Drawing:
        """Pictures with these layers quantized, from `record` if they were drawn before."""
        for drawing in record.drawings:
            if drawing.kinds == dict(kinds) and drawing.prompts == prompts and drawing.name == name:
                return drawing
        self._tell(name, more=1)
        reference = self._reference(prompts)
        error, report = self.error(kinds)
        with quantized_quietly(self._system.pipe, kinds):
            values = psnr(self._draw(prompts), reference)
        finite = tuple(value if math.isfinite(value) else None for value in values)
        saved = sum(each.bytes_before for each in report.layers) - _bytes_after(report)
        drawing = Drawing(name, dict(kinds), prompts, finite, error, self.bytes - saved)
        record.drawings.append(drawing)
        self._tell(done=1)
        return drawing

    def _keep_calls(self) -> None:
        """Draw the unquantized pictures, and keep some calls of the model, with what it returns for them."""
        count = 0

        def keep(module: Any, args: Any, kwargs: Any) -> None:
            nonlocal count
            if count % self.settings.every == 0:
                self._calls.append((module, *_copied((args, kwargs))))
            count += 1

        hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in self._modules]
        try:
            self._pictures[self.settings.prompts] = self._draw(self.settings.prompts)
        finally:
            for hook in hooks:
                hook.remove()
        if not self._calls:
            raise RequestError("the pipeline never called its transformer as a module, so no errors can be measured")
        self._outputs = self._run()

    @torch.no_grad()
    def _run(self) -> list[torch.Tensor]:
        """The model's results for the kept calls, a flat tensor each."""
        results = []
        for module, *inputs in self._calls:
            args, kwargs = _copied(inputs)  # a model may write to its inputs
            tensors = [leaf for leaf in tree_leaves(module(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
            results.append(torch.cat([tensor.float().flatten() for tensor in tensors]))
        return results

    def _reference(self, prompts: tuple[str, ...]) -> torch.Tensor:
        if prompts not in self._pictures:
            self._pictures[prompts] = self._draw(prompts)
        return self._pictures[prompts]

    def _draw(self, prompts: tuple[str, ...]) -> torch.Tensor:
        """The pictures. Prompts that no error was measured on have noise of their own."""
        settings = self.settings
        seed = settings.seed + (0 if prompts == settings.prompts else len(settings.prompts))
        starts = range(0, len(prompts), settings.batch)
        drawings = [
            self._system.draw(prompts[at : at + settings.batch], settings.steps, seed + at).pictures for at in starts
        ]
        return torch.cat(drawings)


def kinds_in(text: str) -> tuple[str, ...]:
    """The kinds whose names stand in a list with commas.

    Raises:
        RequestError: on an unknown one.
    """
    try:
        return tuple(dict.fromkeys(kind_of(name.strip(), "--kinds").name for name in text.split(",")))
    except OptionError as error:
        raise RequestError(str(error)) from None


def most_bytes(text: str, bytes_before: int) -> float:
    """The size that a text such as `60%` or `14MiB` says, in bytes.

    Raises:
        RequestError: if it says none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(%|KiB|MiB|GiB)", text.strip())
    if match is None:
        raise RequestError(f"--size: {text!r} is no size; write a share of all weights, such as 60%, or such as 14MiB")
    factors = {"%": bytes_before / 100, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return float(match[1]) * factors[match[2]]


def plan_for_psnr(plans: Sequence[Plan], wanted: float, probe: Probe, record: Record) -> Plan:
    """The smallest plan whose pictures are at least so near, in dB, on the prompts that errors were measured on.

    Bisection, so a handful of plans are drawn.

    Raises:
        RequestError: if no plan reaches it.
    """
    good, bad, nearest = 0, len(plans), math.inf
    while bad - good > 1:
        middle = (good + bad) // 2
        name = f"{len(plans[middle].candidates)} groups"
        drawing = probe.draw(record, name, plans[middle].kinds, record.settings.prompts)
        if drawing.mean_psnr >= wanted:
            good = middle
        else:
            bad, nearest = middle, drawing.mean_psnr
    if not good:
        raise RequestError(
            f"--psnr: {plans[1].candidates[0].group} alone in {plans[1].candidates[0].kind} brings pictures to "
            f"{nearest:.1f} dB already; ask for no more than that"
        )
    return plans[good]


def plan_for_size(plans: Sequence[Plan], size: float, bytes_before: int) -> Plan:
    """The plan of least error with which all weights take so many bytes at most.

    Raises:
        RequestError: if no plan is so small.
    """
    for plan in plans:
        if bytes_before - plan.saved <= size:
            return plan
    least = bytes_before - plans[-1].saved
    raise RequestError(
        f"--size: these kinds bring the weights from {bytes_before / 2**20:.4g} MiB to {least / 2**20:.4g} MiB "
        f"({least / bytes_before:.1%}), and no further"
    )


RANDOM_ORDERS = 5
PLAN, EVERYWHERE = "plan", "everywhere"


def rivals(candidates: Sequence[Candidate], plan: Plan) -> dict[str, Plan]:
    """The bytes of a plan spent otherwise: groups front to back, back to front, and in five random orders.

    If the plan mixes kinds, the groups get the kind that saves least first, and then, in the same order, the next one.
    A rival saves no more than the plan.
    """
    options = {(candidate.group, candidate.kind): candidate for candidate in candidates}
    saved = {candidate.kind: 0 for candidate in plan.candidates}
    for candidate in candidates:
        if candidate.kind in saved:
            saved[candidate.kind] += candidate.saved
    kinds = sorted(saved, key=lambda kind: saved[kind])
    groups = list(dict.fromkeys(candidate.group for candidate in candidates))
    orders = {"front to back": groups, "back to front": groups[::-1]}
    for seed in range(1, RANDOM_ORDERS + 1):
        orders[f"random {seed}"] = random.Random(seed).sample(groups, len(groups))
    return {
        name: plan_in_order(
            (options[group, kind] for kind in kinds for group in order if (group, kind) in options), plan.saved
        )
        for name, order in orders.items()
    }


def compare(probe: Probe, record: Record, plan: Plan, prompts: tuple[str, ...]) -> Iterator[Drawing]:
    """Drawings of a plan, its rivals, and each kind everywhere."""
    everywhere = {
        f"{kind} {EVERYWHERE}": {layer: kind for layers in groups.values() for layer in layers}
        for kind, groups in probe.groups.items()
    }
    choices = {name: each.kinds for name, each in {PLAN: plan, **rivals(record.candidates, plan)}.items()}
    for name, kinds in {**everywhere, **choices}.items():
        if kinds:
            yield probe.draw(record, name, kinds, prompts)


@contextmanager
def quantized_quietly(pipe: Any, kinds: Mapping[str, str]) -> Iterator[QuantizationReport]:
    """`quantized`, without the warnings of kinds that gain no time here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)
        with quantized(pipe, kinds) as report:
            yield report


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _copied(values: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.clone, values)


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))


def _bytes_after(report: QuantizationReport) -> int:
    return sum(_as_meant(layer) for layer in report.layers)


def _as_meant(layer: QuantizedLayer) -> int:
    """Bytes of a quantized weight. A stand-in for int4 keeps each value in a byte, where two would be."""
    stands_in = layer.kind in KINDS and KINDS[layer.kind].stands_in_for is not None
    return layer.bytes_after - (layer.shape[0] * layer.shape[1] // 2 if stands_in else 0)
