"""The formulas of `parallel_plan` against published times.

One number is fitted for each card: the TFLOP/s that the time of one card tells. All others are predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from cachedit_fx.bench.links import FLUX, QWEN, title
from cachedit_fx.parallel_plan.cards import H200, L20, Kind
from cachedit_fx.parallel_plan.costs import cost
from cachedit_fx.parallel_plan.descriptions import Model, Split
from cachedit_fx.report.tables import Table


@dataclass(frozen=True)
class Run:
    """Published times of whole pipelines.

    Attributes:
        name: of this run, for people.
        steps: of a picture.
        outside_flops: of a picture, beside the steps, which every card computes whole.
        alone: seconds on one card, which tell what it reaches.
        times: split -> seconds on several.
        source: where they stand.
    """

    name: str
    model: str
    kind: Kind
    steps: int
    outside_flops: float
    alone: float
    times: tuple[tuple[Split, float], ...]
    source: str


CACHE_DIT = Run(
    "cache-dit",
    FLUX,
    L20,
    28,
    10.5e12 + 4.9e12,  # the decoder at 1024 x 1024, by torch's FlopCounterMode; T5-XXL, 2 x 4.8e9 weights x 512 tokens
    23.56,
    (
        (Split(ulysses=2), 13.87),
        (Split(ulysses=2, is_async=True), 13.20),
        (Split(ulysses=2, float8=True), 13.36),
        (Split(ring=2), 13.43),
        (Split(ulysses=4), 8.22),
        (Split(ring=4), 9.16),
        (Split(ring=2, ulysses=2), 8.55),
    ),
    "vipshop/cache-dit, docs/user_guide/CONTEXT_PARALLEL.md: 1024 x 1024, 28 steps, not compiled. Other tables "
    "there have 13.80 for U2 and 8.28 for U4",
)
SGLANG = Run(
    "sglang",
    QWEN,
    H200,
    50,
    0.0,
    12.7,
    ((Split(cfg=2), 6.7),),
    "12.7 s on one card and 6.7 s on two, quoted at second hand and taken to be of 50 steps at 1024 x 1024 on H200",
)
SGLANG_AUTO = Run(
    "sglang, later",
    QWEN,
    H200,
    50,
    0.0,
    12.7,
    ((Split(cfg=2), 7.14), (Split(ulysses=2), 11.21)),
    "sgl-project/sglang, pull request 22763: two H200, 1024 x 1024, without a time of one card, so that of the run "
    "before is taken",
)
RUNS = (CACHE_DIT, SGLANG, SGLANG_AUTO)
MISFITS = (
    "Rings are slower than predicted. The formulas leave out that sending takes processors from attention, and that "
    "attention to parts is less efficient than to all.",
    "On NVLink, Ulysses is slower than predicted. The formulas leave out the host's launches, which FastUSP (arXiv "
    "2602.10940) finds to be the limit on fast links. So sharing branches leads by more than they say.",
)


@dataclass(frozen=True)
class Check:
    """A published time and the predicted one, in seconds."""

    run: Run
    split: Split
    published: float
    predicted: float

    @property
    def error(self) -> float:
        """Of the prediction: -0.1 is a tenth too fast."""
        return self.predicted / self.published - 1


def reached(run: Run, model: Model) -> float:
    """TFLOP/s of the card, by the time of one."""
    return (run.steps * model.flops + run.outside_flops) / run.alone / 1e12


def checks(run: Run, model: Model) -> Iterator[Check]:
    """The predictions for one run."""
    tflops = reached(run, model)
    cards = run.kind.cards(tflops / run.kind.tflops)
    theirs = replace(model, blocks=tuple(replace(each, beside_flops=0) for each in model.blocks))
    for split, published in run.times:  # their exchanges run beside the three projections alone
        seconds = run.steps * cost(theirs, cards, split).seconds + run.outside_flops / tflops / 1e12
        yield Check(run, split, published, seconds)


def table(models: Sequence[Model], runs: Sequence[Run] = RUNS) -> Table:
    """A line for each published time of these runs, whose models are among `models`."""
    headings = ("model", "card", "alone, s", "reached", "split", "published", "predicted", "error")
    result = Table(headings, (0, 1, 4))
    for run, model in _with_models(models, runs):
        share = reached(run, model) / run.kind.tflops
        for each in checks(run, model):
            times = f"{each.published:.2f}", f"{each.predicted:.2f}", f"{each.error:+.1%}"
            result.add(run.model, run.kind.name, f"{run.alone:.2f}", f"{share:.0%}", title(each.split), *times)
    return result


def verdicts(models: Sequence[Model], runs: Sequence[Run] = RUNS) -> list[str]:
    """A sentence for each kind of misfit."""
    found = [each for run, model in _with_models(models, runs) for each in checks(run, model)]
    kinds: dict[str, Callable[[Split], bool]] = {
        "Splits with a ring": lambda split: split.ring > 1,
        "Ulysses alone": lambda split: split.ring == 1 < split.ulysses,
        "Branches of guidance": lambda split: split.cfg > 1,
    }
    texts = []
    for run in dict.fromkeys(each.run for each in found):
        for words, fits in kinds.items():
            errors = [each.error for each in found if each.run is run and fits(each.split)]
            if errors:
                spread = " to ".join(f"{error:+.0%}" for error in sorted({min(errors), max(errors)}))
                texts.append(f"{words}, {run.model} on {run.kind.name} ({run.name}): {spread}.")
    return [*texts, *MISFITS]


def sources(runs: Sequence[Run] = RUNS) -> list[str]:
    """Where the published times stand."""
    return [f"{run.name}: {run.source}." for run in runs]


def _with_models(models: Sequence[Model], runs: Sequence[Run]) -> Iterator[tuple[Run, Model]]:
    by_name = {model.name: model for model in models}
    return ((run, by_name[run.model]) for run in runs)
