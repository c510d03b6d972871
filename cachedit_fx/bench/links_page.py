"""What `cachedit bench links` shows and leaves behind: `links.md` and `links.png`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

from cachedit_fx.bench import links, links_checks
from cachedit_fx.parallel_plan import costs
from cachedit_fx.parallel_plan.cards import H100, L20, WIRE_SHARE
from cachedit_fx.parallel_plan.costs import cost
from cachedit_fx.parallel_plan.descriptions import Model, Split
from cachedit_fx.report.tables import Heading, Part

ABOUT = (
    "Milliseconds of a denoising step by formulas, for as many cards as share one picture or film. Nothing was run on "
    "any card: the page says what to expect, and what `choose` of `cachedit_fx.parallel_plan` takes. FLUX.1-dev at "
    "1024 x 1024 has one branch, since its guidance is distilled. Qwen-Image at 1024 x 1024 and Wan 2.1 14B with 81 "
    "frames of 832 x 480 or 1280 x 720 have two, one after the other."
)
LETTERS = (
    "C2: the two branches of guidance. R: ring, U: Ulysses, each with its number of cards. `a`: exchanges of heads run "
    "beside the computation (`ulysses_async`)."
)
INPUTS = (
    "Dense bfloat16 by data sheets, one direction of links. What a card reaches of its TFLOP/s follows from the "
    "published times of one L20 and one H200; 65 % for the A100 is assumed. Assumed too: 80 % of the bandwidth of "
    "links and memory. An exchange takes 20 us beyond its bytes inside a node of 8 cards, and 30 us between nodes. "
    "Nodes are joined by InfiniBand of 400 Gb/s: an adapter for each SXM card, and one for all PCIe cards of a node."
)
WORK = (
    "Of one branch in a step, counted on graphs of diffusers' classes in their true widths. Linear layers are those "
    "whose work the ranks divide. Beside attention: those of them that neither feed it nor need its result. Each rank "
    "reads all weights. What depends on timestep or prompt alone is kept between steps, and not counted."
)
CHECKS = (
    "The time of one card gives the TFLOP/s that it reaches. That is the only number fitted; the others are predicted, "
    "by the links and shares above. cache-dit's asynchronous form runs beside the three projections alone, and is "
    "predicted so. Its times are of whole pipelines: the text encoder and the decoder are added."
)
CHOSEN = (
    "The split that `choose` takes, milliseconds of a step, and how many times as fast as one card. Exchanges may be "
    "asynchronous. A ring must gain 10 %, since published rings are slower than the formulas have them."
)
BY_SPEED = (
    "Milliseconds with the H100's TFLOP/s and memory, by the bandwidth that is reached. Of each kind of split the "
    "fastest by the formulas alone; all but U may be asynchronous."
)
BETWEEN = "The same at 64 cards in 8 nodes, 360 GB/s inside a node, by what one card gets between nodes."
PARTS = (
    "Milliseconds on 8 cards L20 in one node, and what each sends. The last columns of milliseconds are waiting: for "
    "exchanges of heads, for the ring, and for results of branches and of the whole."
)
FORMS = "Milliseconds at 8 cards in one node. In eight bits: 0.64 of the bytes, with keys 0.52, and more packing."
DRAWN = (
    "Drawn is the time over a perfect division's, whose milliseconds stand in brackets: that of one card over the "
    "number of cards."
)
PICTURE = "links.png"


def parts(models: Sequence[Model]) -> list[Part]:
    """The page for these models."""
    h100 = H100.cards()
    checked = [run for run in links_checks.RUNS if run.model in {model.name for model in models}]
    checks: list[Part] = [
        Heading("Against published times", 2),
        CHECKS,
        links_checks.table(models, checked),
        links_checks.verdicts(models, checked),
        links_checks.sources(checked),
    ]
    return [
        ABOUT,
        LETTERS,
        Heading("Which split is chosen", 2),
        CHOSEN,
        links.choices_table(models),
        "A step gets faster by a tenth or more with each doubling of the cards:",
        links.last_gains(models),
        *(checks if checked else []),
        Heading("By link speed", 2),
        f"![Time of a step over a perfect division's, by link speed]({PICTURE})",
        DRAWN,
        BY_SPEED,
        Heading("Eight cards in one node", 3),
        links.speeds_table(models, h100, 8, is_between=False),
        "The fastest kind of split, from 1 GB/s on:",
        links.winners(models, h100, 8),
        "The same with the L20's TFLOP/s and memory:",
        links.winners(models, L20.cards(), 8),
        Heading("64 cards in eight nodes", 3),
        BETWEEN,
        links.speeds_table(models, h100, 64, is_between=True),
        Heading("What a step is made of", 2),
        PARTS,
        links.parts_table(models, L20.cards(), 8),
        Heading("Forms of the exchange of heads", 2),
        FORMS,
        links.forms_table(models, 8),
        Heading("Formulas", 2),
        inspect.cleandoc(costs.__doc__ or "").partition("\n\n")[2],
        Heading("Inputs", 2),
        INPUTS,
        links.cards_table(),
        WORK,
        links.models_table(models),
    ]


def save_picture(models: Sequence[Model], path: Path) -> None:
    """Draw the time of a step by link speed, inside a node above and between nodes below."""
    from cachedit_fx.report.plots_links import Panel, save_links

    cards = H100.cards()

    def alone(model: Model) -> float:
        return cost(model, cards, Split()).seconds

    rows = [
        [
            Panel(
                f"{model.name}, {ranks} cards ({links.milliseconds(alone(model) / ranks)} ms)",
                {
                    links.NAMES[kind]: links.curve(model, cards, ranks, fits, is_between)
                    for kind, fits in links.FAMILIES.items()
                },
            )
            for model in models
        ]
        for ranks, is_between in ((8, False), (64, True))
    ]
    marks = {kind.wire: kind.link * WIRE_SHARE for kind in links.KINDS[:4]}
    adapters = {f"{count} adapter{'s' * (count > 1)}": count * 50 / 8 * WIRE_SHARE for count in (1, 8)}
    labels = ("GB/s inside a node, 8 cards", "GB/s of a card between nodes, 8 nodes of 8 cards")
    save_links(rows, (marks, adapters), labels, (5, 20), path)
