"""Which pictures are drawn."""

from __future__ import annotations

from pathlib import Path

from cachedit_fx.bench.errors import RequestError
from cachedit_fx.shapes import bench_prompts, held_out_prompts, tokenize


class PromptError(RequestError):
    """These prompts cannot be drawn; the message says why."""


def chosen_prompts(text: str, held_out: int | None, seed: int) -> tuple[str, ...]:
    """The prompts that a user chose.

    Args:
        text: a number of ShapesBench's prompts, or the path of a file with a prompt a line.
        held_out: in place of `text`, a number of captions that are none of ShapesBench.
        seed: of the held-out captions.

    Raises:
        PromptError: if there is no such file, or the number is not one of ShapesBench's.
    """
    if held_out is not None:
        return held_out_prompts(held_out, seed)
    if not text.isdecimal():
        return _lines(Path(text))
    try:
        return bench_prompts(int(text))
    except ValueError as error:
        raise PromptError(str(error)) from None


def _lines(path: Path) -> tuple[str, ...]:
    try:
        lines = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} is neither a number nor a text file ({error})") from None
    if not lines:
        raise PromptError(f"{path} has no prompts: write one a line")
    return lines


def known_prompts(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """The prompts, if the bundled model knows their words.

    Raises:
        PromptError: for a word it does not know, or a prompt that is too long.
    """
    try:
        tokenize(prompts)
    except ValueError as error:
        raise PromptError(str(error)) from None
    return prompts


def calibration_prompts(prompts: tuple[str, ...], entry: str | None, seed: int) -> tuple[str, ...]:
    """Four prompts that peers are calibrated on: held-out captions, or for a pipeline of the user's the first ones.

    The noise of a calibration is used for nothing else.
    """
    return held_out_prompts(4, seed + 1) if entry is None else prompts[:4]
