"""The command line as a whole: help, versions, typing errors, what it imports, which room imports which."""

import ast
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from lib.command_line import invoke, plain

import cachedit_fx

PACKAGE = Path(cachedit_fx.__file__).parent
HEAVY = {"torch", "diffusers", "matplotlib", "numpy", "transformers", "triton"}

START = """
import sys
from cachedit_fx.cli import app
from typer.testing import CliRunner
for words in (["--help"], ["demo", "--help"], ["bench", "--help"], ["bench", "cold", "--help"], ["kernels"], ["dem"],
              ["demo", "--step", "3"], ["bench", "--rounds", "many"], ["bench", "overhead", "--rounds", "0"]):
    result = CliRunner().invoke(app, words)
    expected = 0 if "--help" in words else 2
    assert result.exit_code == expected, (words, result.exit_code, result.output)
print(" ".join(sys.modules))
"""


def test_help_and_version():
    top = invoke("--help")
    assert top.exit_code == 0 and 'backend="cachedit"' in top.output
    assert all(command in top.output for command in ("demo", "bench", "coverage", "kernels"))
    assert version("torch") in invoke("--version").output
    assert invoke().exit_code == 2 and "demo" in invoke().output


def test_help_and_typing_errors_import_nothing_heavy():
    command = [sys.executable, "-c", START]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TERM": "dumb"})
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize("words", [["bench", "cold"], ["bench", "overhead"]])
def test_a_sub_command_has_a_page_of_its_own(words):
    helped = invoke(*words, "--help")
    assert helped.exit_code == 0 and f"Usage: cachedit {' '.join(words)} [OPTIONS]" in plain(helped.output)
    assert "--blocks" in helped.output and "--guidance" not in helped.output


def test_words_after_bench_are_its_own_unless_they_name_a_sub_command():
    own = invoke("bench", "no-such.toml", "--list")
    assert own.exit_code == 2 and "no-such.toml cannot be read" in plain(own.output)
    assert invoke("bench", "--list", "no-such.toml").exit_code == 2
    assert "preset fast" in invoke("bench", "--list").output
    twice = invoke("bench", "one.toml", "two.toml", "--list")
    assert twice.exit_code == 2 and "two.toml" in plain(twice.output)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize(
    ("room", "faces"),
    [
        ("bench", ("cachedit_fx.cli", "rich", "typer", "matplotlib")),
        ("report", ("cachedit_fx.cli", "typer")),
        ("metrics", ("cachedit_fx.cli", "cachedit_fx.bench", "cachedit_fx.report", "rich")),
        ("shapes", ("cachedit_fx.cli", "cachedit_fx.bench", "cachedit_fx.report", "rich")),
    ],
)
def test_no_room_imports_a_face(room, faces):
    files = list((PACKAGE / room).glob("*.py"))
    found = {(path.name, name) for path in files for name in imports(path) if name.startswith(faces)}
    assert files and not found
