"""`cachedit metrics`: how far pictures are from others, or from their prompts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachedit_fx.bench.errors import RequestError
from cachedit_fx.cli.options import check_out, grouped
from cachedit_fx.cli.terminal import command_line, console, quiet, reported, show, warn
from cachedit_fx.report.tables import Heading, Part, Table, markdown

if TYPE_CHECKING:
    from cachedit_fx.metrics import Inputs, Scores

FILES = {"metrics.json": "every value", "metrics.md": "these tables"}


class Name(StrEnum):
    """What can be computed."""

    all = "all"
    psnr = "psnr"
    ssim = "ssim"
    mse = "mse"
    lpips = "lpips"
    fid = "fid"
    clip_score = "clip_score"
    image_reward = "image_reward"


@dataclass(frozen=True)
class Given:
    """What is compared"""

    reference: Annotated[
        Path | None,
        typer.Option(
            "--img-true", "-i1", "--video-true", "-v1", "--ref-img-dir", "-r", "--ref-video", "-rv",
            metavar="PATH",
            help="The reference: a picture, a video, or a folder of them. Files of two folders are paired by name.",
        ),
    ] = None  # fmt: skip
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--img-test", "-i2", "--video-test", "-v2",
            metavar="PATH",
            help="What is judged, in the same form. Files end with .png, .jpg, .webp, .mp4, .gif, .npy, .pt and the "
            "like.",
        ),
    ] = None  # fmt: skip
    source: Annotated[
        Path | None,
        typer.Option(
            "--img-source-dir", "-d", "--video-source-dir", "-vd",
            metavar="DIR",
            help="In place of [b]-i2[/b]: a folder of which every sub-folder and video is judged. A table has a line "
            "for each.",
        ),
    ] = None  # fmt: skip
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompt-true", "-p", "--ref-prompt-true", "-rp",
            metavar="FILE",
            help="A text file, a prompt a line, in the order of the pictures' names. For clip_score and image_reward.",
        ),
    ] = None  # fmt: skip


@dataclass(frozen=True)
class Networks:
    """Weights of trained networks, which are never downloaded"""

    clip: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|NAME",
            help="A CLIP of transformers with its processor: a folder, or a model of the hub that is in the local "
            "cache.  [dim]\\[default: openai/clip-vit-large-patch14][/dim]",
        ),
    ] = None
    inception: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For fid: TorchScript, uint8 \\[N, 3, H, W] to features \\[N, D]."),
    ] = None
    lpips: Annotated[Path | None, typer.Option(metavar="FILE", help="For lpips: torchvision's weights of AlexNet.")] = (
        None
    )
    image_reward: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For image_reward: the folder with ImageReward.pt and med_config.json."),
    ] = None
    fid_batch: Annotated[
        int,
        typer.Option("--fid-batch-size", "-b", metavar="N", min=1, help="Pictures at a time through the Inception."),
    ] = 16


class PsnrType(StrEnum):
    """Both are one definition here."""

    custom = "custom"
    skimage = "skimage"


@dataclass(frozen=True)
class Accepted:
    """Other flags of cache-dit-metrics-cli"""

    markdown: Annotated[
        bool, typer.Option("--gen-markdown-table", "-table", help="Print the table as Markdown, and nothing else.")
    ] = False
    summary: Annotated[bool, typer.Option("--summary", "-s", help="No effect: the table is the summary.")] = False
    verbose: Annotated[bool, typer.Option("--enable-verbose", "-verbose", help="No effect.")] = False
    psnr_type: Annotated[
        PsnrType, typer.Option(help="No effect: both have scikit-image's definition, which is right for 8 bits.")
    ] = PsnrType.skimage
    perf_log: Annotated[
        str | None,
        typer.Option(
            "--perf-log", "-plog", "--perf-tags", "-ptags", "--extra-perf-tags", "-extra-ptags",
            metavar="TEXT",
            help="An error: [b]cachedit bench[/b] measures times.",
        ),
    ] = None  # fmt: skip
    speedup: Annotated[bool, typer.Option("--cal-speedup", help="An error too.")] = False


@grouped
def metrics(
    given: Given,
    networks: Networks,
    accepted: Accepted,
    names: Annotated[
        list[Name] | None,
        typer.Argument(metavar="METRIC...", show_default=False, help="One or more of " + ", ".join(Name) + "."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder for [b]metrics.json[/b], with every picture's value, and [b]metrics.md[/b]."
        ),
    ] = None,
) -> None:
    """Measure how far pictures are from others, or from their prompts.

    Two pictures: [bold]cachedit metrics psnr -i1 uncached.png -i2 cached.png[/bold]. Two folders, every metric:
    [bold]cachedit metrics all -i1 uncached -i2 cached -p prompts.txt[/bold]. Many settings against one reference:
    [bold]cachedit metrics psnr ssim -r uncached -d runs[/bold].

    [bold]psnr[/bold] in dB, over channels and pixels; identical pictures are left out of the mean. [bold]ssim[/bold]: a
    Gaussian window of 11 pixels, as torchmetrics has it, at most 1. [bold]mse[/bold] in squared 8-bit units.
    [bold]fid[/bold] compares two sets as a whole. [bold]all[/bold] computes what weights and prompts are there for, and
    says why the others are left out. docs/metrics.md has the formulas.
    """
    with reported(lambda: "; nothing was written"):
        wanted = None if Name.all in (names or ()) else [name.value for name in names or [Name.psnr]]
        _check(given)
        if accepted.perf_log is not None or accepted.speedup:
            raise typer.BadParameter("times are not read from logs: cachedit bench measures them", param_hint="-plog")
        if out is not None:
            check_out(out)
        with quiet():
            from cachedit_fx.metrics import PictureError, compare

            try:
                results = {str(inputs.pictures): compare(inputs, wanted) for inputs in _inputs(given, networks)}
            except PictureError as error:
                raise RequestError(str(error)) from error
        page = [_table(results), *_notes(results)]
        if accepted.markdown:
            typer.echo(markdown(page[0]))
        else:
            show(*page)
        if out is not None:
            _save(out, results, page)
            console.print()
            for name, text in FILES.items():
                console.print(f"{out / name}  [dim]{text}[/dim]")
        for source, scores in results.items():
            for reason in scores.left_out.values():
                warn(f"left out for {source}: {reason}" if len(results) > 1 else f"left out: {reason}")


def _check(given: Given) -> None:
    if (given.pictures is None) == (given.source is None):
        raise typer.BadParameter("give -i2, what is judged, or -d, a folder of many such", param_hint="-i2")
    if given.reference is None and given.prompts is None:
        raise typer.BadParameter("give -i1, the reference, or -p, a file of prompts", param_hint="-i1")


def _inputs(given: Given, networks: Networks) -> list[Inputs]:
    from cachedit_fx.metrics import Inputs, PictureError, Weights

    weights = Weights(networks.clip, networks.inception, networks.lpips, networks.image_reward)
    prompts: list[str] = []
    if given.prompts is not None:
        try:
            prompts = [line.strip() for line in given.prompts.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise PictureError(f"{given.prompts} is no file of prompts ({error})") from None
    return [Inputs(path, given.reference, prompts, weights, networks.fid_batch) for path in _judged(given)]


def _judged(given: Given) -> list[Path]:
    from cachedit_fx.metrics import PictureError
    from cachedit_fx.metrics.pictures import VIDEOS

    if given.pictures is not None:
        return [given.pictures]
    source = given.source
    assert source is not None
    parts = sorted(source.iterdir()) if source.is_dir() else []
    reference = given.reference.resolve() if given.reference else None
    judged = [
        path for path in parts if (path.is_dir() or path.suffix.lower() in VIDEOS) and path.resolve() != reference
    ]
    if not judged:
        raise PictureError(f"{source} holds no folders and no videos: -d takes a folder of such, -i2 a single one")
    return judged


def _table(results: dict[str, Scores]) -> Table:
    """A line for each source, a column for each metric."""
    from cachedit_fx.metrics import METRICS

    names = [name for name in METRICS if any(_value(scores, name) for scores in results.values())]
    marks = {True: "↑", False: "↓"}
    headings = [
        f"{METRICS[name].title} {METRICS[name].unit}".strip() + marks[METRICS[name].higher_is_better] for name in names
    ]
    table = Table(("pictures", "n", *headings))
    for source, scores in results.items():
        table.add(source, str(len(scores.names)), *(_value(scores, name) for name in names))
    return table


def _value(scores: Scores, name: str) -> str:
    value = next((score.value for score in scores.scores if score.metric == name), None)
    if value is None:
        return ""
    return "identical" if math.isinf(value) else f"{value:.4f}"


def _notes(results: dict[str, Scores]) -> list[Part]:
    unpaired = [name for scores in results.values() for name in scores.unpaired]
    notes: list[Part] = []
    if unpaired:
        notes = [Heading("Not compared", 2), unpaired]
    for source, scores in results.items():
        count = sum(math.isinf(value) for score in scores.scores for value in score.values)
        if 0 < count < len(scores.names):
            notes.append(
                f"{source}: {count} of {len(scores.names)} pictures are identical, and no part of PSNR's mean."
            )
    return notes


def _save(out: Path, results: dict[str, Scores], page: list[Any]) -> None:
    from cachedit_fx.report import tables
    from cachedit_fx.report.files import whole_files

    def plain(value: Any) -> Any:
        """JSON has no infinity: identical pictures have null."""
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value

    values = {source: plain(asdict(scores)) for source, scores in results.items()}
    with whole_files(out) as staging:
        text = json.dumps({"command": command_line(), "results": values}, indent=1)
        (staging / "metrics.json").write_text(text + "\n")
        made = f"Made by `{command_line()}`."
        (staging / "metrics.md").write_text(tables.page(Heading("cachedit metrics"), *page, made))
