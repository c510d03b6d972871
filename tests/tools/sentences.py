"""Lists sentences that are too long, in Markdown files and in public docstrings.

  PYTHONPATH=tests .venv/bin/python -m tools.sentences                   # documents and docstrings
  PYTHONPATH=tests .venv/bin/python -m tools.sentences docs/guide.md

Tables, code and headings are no prose. A span of code counts as one word.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.docstrings import public_docstrings

import cachedit_fx

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 30
"""Words of a sentence, at most."""
MADE = ("models.md", "cli.md", "tested.md", "options.md")
"""Pages of `docs` that are made by programs, from docstrings and from messages of others."""

_ABBREVIATIONS = r"(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bvs\.)(?<!\betc\.)"
_SENTENCE_END = re.compile(rf"(?<=[.!?]){_ABBREVIATIONS}[\"')*_]*\s+")
_LIST_ITEM = re.compile(r"(?:[-*+]|\d+\.)\s+")
_SECTION = re.compile(r"(?:Args|Attributes|Raises|Returns|Yields):$")


@dataclass(frozen=True)
class Paragraph:
    """Text without line breaks, and the place that it stands at."""

    place: str
    text: str


@dataclass(frozen=True)
class Sentence:
    """One sentence, and the place of its paragraph."""

    place: str
    text: str

    @property
    def num_words(self) -> int:
        return sum(any(letter.isalnum() for letter in word) for word in self.text.split())

    def __str__(self) -> str:
        return f"{self.place}: {self.num_words} words: {self.text}"


def long_sentences(paragraphs: Iterator[Paragraph], limit: int = LIMIT) -> list[Sentence]:
    """The sentences of more than `limit` words."""
    return [sentence for part in paragraphs for sentence in sentences_of(part) if sentence.num_words > limit]


def sentences_of(paragraph: Paragraph) -> list[Sentence]:
    text = re.sub(r"`[^`]+`", "CODE", paragraph.text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return [Sentence(paragraph.place, part) for part in _SENTENCE_END.split(text) if part]


def markdown_paragraphs(path: Path) -> Iterator[Paragraph]:
    """The prose of a Markdown file: its paragraphs and list items."""
    text = re.sub(r"<!--.*?-->", lambda comment: re.sub(r"[^\n]", "", comment[0]), path.read_text(), flags=re.DOTALL)
    text = re.sub(r"^ *```.*?^ *```", lambda code: re.sub(r"[^\n]", "", code[0]), text, flags=re.DOTALL | re.MULTILINE)
    lines: list[str] = []
    start = 0
    for number, raw in enumerate([*text.splitlines(), ""], 1):
        line = raw.strip().removeprefix("> ")
        is_break = not line or line.startswith(("#", "|")) or _LIST_ITEM.match(line)
        if is_break and lines:
            yield Paragraph(f"{path.name}:{start}", " ".join(lines))
            lines = []
        if line and not line.startswith(("#", "|")):
            start = start if lines else number
            lines.append(_LIST_ITEM.sub("", line, count=1) if is_break else line)


def docstring_paragraphs(place: str, docstring: str) -> Iterator[Paragraph]:
    """The prose of a docstring: paragraphs, list items, and the entries of `Args:` and other sections."""
    lines: list[str] = []
    in_section = False
    for raw in [*docstring.splitlines(), ""]:
        line, indent = raw.strip(), len(raw) - len(raw.lstrip())
        is_entry = in_section and indent == 4
        if lines and (not line or _LIST_ITEM.match(line) or is_entry):
            yield Paragraph(place, " ".join(lines))
            lines = []
        if not indent:
            in_section = bool(_SECTION.match(line)) or (in_section and not line)
        is_code = indent >= 4 and not in_section
        if line and not is_code and not _SECTION.match(line):
            lines.append(_LIST_ITEM.sub("", line, count=1))


def public_paragraphs(name: str, value: Any) -> Iterator[Paragraph]:
    """The paragraphs of the docstrings of a public name, its attributes and methods included."""
    for place, docstring in public_docstrings(name, value):
        yield from docstring_paragraphs(place, docstring)


def pages() -> list[Path]:
    """The Markdown files that are written by hand; those of `docs/performance` are tables."""
    return [*sorted(ROOT.glob("*.md")), *(path for path in sorted(ROOT.glob("docs/*.md")) if path.name not in MADE)]


def main() -> int:
    """Print the long sentences; the exit code is 1 if there are any."""
    paths = [Path(argument) for argument in sys.argv[1:]]
    sentences = [sentence for path in paths or pages() for sentence in long_sentences(markdown_paragraphs(path))]
    for name in cachedit_fx.__all__ if not paths else ():
        sentences += long_sentences(public_paragraphs(name, getattr(cachedit_fx, name)))
    for sentence in sentences:
        print(sentence)
    return bool(sentences)


if __name__ == "__main__":
    raise SystemExit(main())
