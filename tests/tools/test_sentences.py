"""tests/tools/sentences.py: what counts as a sentence, and where one ends."""

from __future__ import annotations

import pytest
from tools.sentences import Paragraph, docstring_paragraphs, long_sentences, markdown_paragraphs, sentences_of

PAGE = """\
# A heading of words that do not count

One two three.
Four five, see [six seven](page.md#eight) and `nine ten eleven`.

<!-- a comment
of two lines -->
| a | table. |
| --- | --- |

- first item
  goes on
- second item

```python
code = "is no prose."
```
"""

DOCSTRING = """\
A summary of
two lines.

    a table     that counts
    1           2

Args:
    name: the first entry
        goes on.
    other: the second one.

Raises:
    ValueError: if it is wrong.
"""


def test_the_prose_of_a_page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    assert [(part.place, part.text) for part in markdown_paragraphs(path)] == [
        ("page.md:3", "One two three. Four five, see [six seven](page.md#eight) and `nine ten eleven`."),
        ("page.md:11", "first item goes on"),
        ("page.md:13", "second item"),
    ]


def test_the_prose_of_a_docstring():
    assert [part.text for part in docstring_paragraphs("here", DOCSTRING)] == [
        "A summary of two lines.",
        "name: the first entry goes on.",
        "other: the second one.",
        "ValueError: if it is wrong.",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("One two three. Four five, see [six seven](page.md#eight) and `nine ten`.", [3, 7]),
        ("Two sentences. in lower case", [2, 3]),
        ("Version 1.5.3 is one, e.g. this one.", [7]),
        ("(A remark.) And more - with a dash!", [2, 5]),
        ('It says "no." That is all?', [3, 3]),
    ],
)
def test_sentences_and_their_words(text, words):
    assert [sentence.num_words for sentence in sentences_of(Paragraph("here", text))] == words


def test_long_sentences_are_those_above_the_limit():
    paragraphs = [Paragraph("here", f"{'word ' * count}."[:-1]) for count in (29, 30, 31)]
    assert [sentence.num_words for sentence in long_sentences(iter(paragraphs))] == [31]
