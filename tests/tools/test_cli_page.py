"""tests/tools/cli_page.py: docs/cli.md has every command and option, in the words of `--help`."""

import pytest
from tools.cli_page import page


@pytest.fixture(scope="module")
def text():
    return page()


def test_every_command_has_a_section(text):
    for command in ("demo", "bench", "bench overhead", "bench cold", "coverage", "kernels", "kernels verify"):
        assert f"\n## cachedit {command}\n" in text


@pytest.mark.parametrize(
    "line",
    [
        "| `--prompts`, `-p` TEXT |  | A scene to draw",
        "| `--against` cache-dit |",
        "| `--inner-backend` inductor, eager | `inductor` |",
        "| `--steps` N | `28` | Denoising steps. (at least 1, at most 1000) |",
        "| `--peer-python` PATH | this one |",
        "| `MODELS` | `tests/lib/zoo` |",
        "| What is measured | default | meaning |",
    ],
)
def test_options_have_their_default_and_range(text, line):
    assert f"\n{line}" in text


def test_no_markup_of_the_terminal_is_left(text):
    assert "[bold]" not in text and "[/" not in text and "\\[" not in text
    assert "**--resume**" in text and '*system = "cache-dit"*' in text
