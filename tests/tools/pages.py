"""Writes the pages that are made from docstrings. A test holds that they are current.

PYTHONPATH=tests .venv/bin/python -m tools.pages
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools import cli_page, clock_page, options_page, passes_page

ROOT = Path(__file__).resolve().parents[2]

PAGES: dict[str, Callable[[], str]] = {
    "docs/cli.md": cli_page.page,
    "docs/clock.md": clock_page.page,
    "docs/options.md": options_page.page,
    "passes/README.md": passes_page.page,
}
"""Path in the checkout -> the function that makes its text."""


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (ROOT / name).write_text(page())
        print(name)


if __name__ == "__main__":
    main()
