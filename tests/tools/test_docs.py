"""The documents are true: generated pages current, links and commands valid, snippets run, sentences short."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from lib.toys import Toy, denoise, make, noise
from tools.pages import PAGES, ROOT
from tools.sentences import long_sentences, markdown_paragraphs, pages, public_paragraphs

import cachedit_fx
from cachedit_fx.cli import app

README_BYTES = 9000

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "passes/*.md", "kernels/*.md", "cachedit_fx/**/*.md")
    for path in ROOT.glob(pattern)
)

USAGE_ERROR = typer.BadParameter.__bases__[0]
"""Click's; some versions of typer hold a click of their own."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def prose(path: Path) -> str:
    """The text without code blocks and comments."""
    return re.sub(r"^ *```.*?^ *```|<!--.*?-->", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def spans(path: Path) -> list[str]:
    """The spans of code in the text, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(path))]


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_current(name):
    assert (ROOT / name).read_text() == PAGES[name](), "run: PYTHONPATH=tests .venv/bin/python -m tools.pages"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        page = (path.parent / target).resolve() if target else path
        assert page.exists(), link
        assert not anchor or anchor in anchors(page), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_paths_that_are_named_exist(path):
    for span in spans(path):
        if re.fullmatch(r"(cachedit_fx|docs|examples|kernels|passes|tests)/[\w./-]+", span):
            assert (ROOT / span).exists(), span


def commands(path: Path) -> list[str]:
    """Commands in blocks and spans, without comments and without the environment's folder."""
    lines = [line for block in blocks(path, "bash") for line in block.splitlines()]
    texts = [re.sub(r"\s+#.*", "", text).removeprefix(".venv/bin/") for text in [*lines, *spans(path)]]
    return [text for text in texts if re.match(r"(make|python|cachedit) \S", text)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_are_accepted(path):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for text in commands(path):
        program, *arguments = shlex.split(text)
        if program == "make":
            assert arguments[0] in targets, text
        elif program == "python":
            file = f"tests/{arguments[1].replace('.', '/')}.py" if arguments[0] == "-m" else arguments[0]
            assert (ROOT / file).exists(), text
        else:
            accept(arguments)


def accept(arguments: list[str]) -> None:
    """Parse the arguments of `cachedit` without running anything."""
    command: Any = typer.main.get_command(app)
    while arguments and arguments[0] in getattr(command, "commands", {}):
        command = command.commands[arguments.pop(0)]
    if arguments in (["--help"], ["--version"]):
        return
    assert not hasattr(command, "commands") or command.invoke_without_command, f"no command: {arguments}"
    command.make_context("cachedit", arguments)


@pytest.mark.parametrize(
    "arguments", [["bench", "--nonsense"], ["absent"], ["kernels"], ["bench", "--rounds", "many"]], ids=" ".join
)
def test_wrong_commands_are_not_accepted(arguments):
    with pytest.raises((USAGE_ERROR, AssertionError)):
        accept(arguments)


class Pipe:
    """A pipeline as the snippets use it, with a toy as its transformer."""

    def __init__(self) -> None:
        self.transformer = make(Toy, blocks=5)
        self.components = {"transformer": self.transformer}

    def __call__(self, prompt, num_inference_steps):
        timesteps = torch.linspace(1000, 100, num_inference_steps).tolist()
        return SimpleNamespace(images=list(denoise(self.transformer, timesteps)))


@pytest.mark.parametrize("path", [path for path in pages() if blocks(path, "python")], ids=name_of)
def test_snippets_run(path, monkeypatch):
    """Each block gets a pipeline of its own; imports and variables last to the end of the page."""
    monkeypatch.setattr("cachedit_fx.lowering.inner_compiler", lambda options: lambda gm, inputs: gm.forward)
    monkeypatch.setattr("cachedit_fx.runtime.compiled_call.warm_up", lambda options: None)
    inputs = {"hidden_states": noise(), "timestep": torch.tensor([500.0]), "encoder_hidden_states": noise(tokens=3)}
    names: dict[str, Any] = {"cachedit_fx": cachedit_fx, "torch": torch, "inputs": inputs}
    for block in blocks(path, "python"):
        names["pipe"] = Pipe()
        exec(compile(block, path.name, "exec"), names)


@pytest.mark.parametrize("path", pages(), ids=name_of)
def test_sentences_are_short(path):
    assert not [str(sentence) for sentence in long_sentences(markdown_paragraphs(path))]


@pytest.mark.parametrize("name", cachedit_fx.__all__)
def test_sentences_of_docstrings_are_short(name):
    assert not [str(sentence) for sentence in long_sentences(public_paragraphs(name, getattr(cachedit_fx, name)))]
