"""Tables, and the pages they stand in: as Markdown and for a terminal. Nothing else writes either."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_COLOURS = {"✓": "green", "✗": "red", "-": "dim"}
"""Of cells that are a mark and nothing else, in a terminal."""


@dataclass(frozen=True)
class Line:
    """A line of a table."""

    cells: tuple[str, ...]
    stands_out: bool = False
    """Bold: the line in a terminal, its first cell in Markdown."""
    style: str = ""
    """Of the line in a terminal, in rich's words."""
    ends_group: bool = False
    """A gap follows in a terminal."""


@dataclass
class Table:
    """Headings, and lines of as many cells."""

    headings: tuple[str, ...]
    """A line break in a heading is one in a terminal, a space in Markdown."""
    texts: Collection[int] = (0,)
    """Columns of text, set to the left. The others hold figures, set to the right and never wrapped."""
    title: str = ""
    lines: list[Line] = field(default_factory=list)

    def add(self, *cells: str, stands_out: bool = False, style: str = "", ends_group: bool = False) -> None:
        """Append a line."""
        self.lines.append(Line(cells, stands_out, style, ends_group))


@dataclass(frozen=True)
class Heading:
    """A heading of a page."""

    text: str
    level: int = 1


Part = str | Sequence[str] | Heading | Table
"""Of a page: a paragraph, a list, a heading or a table."""


def titled_list(title: str, texts: Sequence[str]) -> list[Part]:
    """A list below a heading; nothing if the list is empty."""
    return [Heading(title, 2), texts] if texts else []


def page(*parts: Part) -> str:
    """Parts as a Markdown file, a blank line between them. Empty paragraphs and lists are left out."""
    return "\n\n".join(markdown(part) for part in parts if part) + "\n"


def markdown(part: Part) -> str:
    """A part as Markdown, without a line break at its end."""
    if isinstance(part, str):
        return part
    if isinstance(part, Heading):
        return f"{'#' * part.level} {part.text}"
    if isinstance(part, Table):
        rule = ["---" if column in part.texts else "---:" for column in range(len(part.headings))]
        return "\n".join(map(_row, [part.headings, rule, *map(_marked, part.lines)]))
    return "\n".join(f"- {text}" for text in part)


def _marked(line: Line) -> Sequence[str]:
    first, *others = line.cells
    return [f"**{first}**", *others] if line.stands_out else line.cells


def _row(cells: Sequence[str]) -> str:
    plain = (cell.replace("|", "/").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(plain)} |"


def terminal(table: Table) -> RichTable:
    """A table that rich can print."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    result = RichTable(
        title=Text(table.title) if table.title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for column, heading in enumerate(table.headings):
        is_text = column in table.texts
        widest = max(map(len, heading.split()), default=1)  # a heading breaks between words alone
        justify: Literal["left", "right"] = "left" if is_text else "right"
        result.add_column(heading, justify=justify, no_wrap=not is_text, overflow="fold", min_width=widest)
    for line in table.lines:
        cells = (Text(cell, _COLOURS.get(cell, "")) for cell in line.cells)
        result.add_row(*cells, style="bold" if line.stands_out else line.style, end_section=line.ends_group)
    return result
