"""The command line as a whole: help, versions, typing errors, what it imports, which room imports which."""

import ast
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from lib.command_line import invoke, plain

import cachedit_fx
from cachedit_fx.cli import app

PACKAGE = Path(cachedit_fx.__file__).parent
PLAIN_TERMINAL = os.environ | {"TERM": "dumb", "COLUMNS": "100"}
MOST_SECONDS = 1.0
"""Of CPU. A start took 0.15 to 0.25 s, and with torch 1.5."""
HEAVY = {"torch", "diffusers", "matplotlib", "numpy", "transformers", "triton"}

START = """
import sys
from cachedit_fx.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    print("exit", end.code, *sorted({name.partition(".")[0] for name in sys.modules}))
"""
COMMANDS = (
    ["demo"],
    ["bench"],
    ["bench", "overhead"],
    ["bench", "cold"],
    ["bench", "motion"],
    ["bench", "quantized"],
    ["bench", "ulysses"],
    ["bench", "links"],
    ["bench", "branches"],
    ["coverage"],
    ["metrics"],
    ["sensitivity"],
    ["kernels"],
    ["kernels", "verify"],
    ["kernels", "bench"],
    ["kernels", "attention"],
    ["kernels", "fusion"],
)
TYPOS = {
    "dem": "demo",
    "bench overheat": "overhead",
    "bench no-such.toml --list": "no-such.toml cannot be read",
    "kernels verfy": "verify",
    "demo --step 3": "--steps",
    "bench --lits": "--list",
    "bench overhead --round 3": "--rounds",
    "coverage --onyl x": "--only",
    "coverage nowhere.py": "nowhere.py cannot be imported",
    "demo --thresholds many": "0.08,0.12,0.2",
    "bench --rounds many": "valid integer",
}
"""Words -> what the error names."""


def test_help_and_version():
    top = invoke("--help")
    assert top.exit_code == 0 and 'backend="cachedit"' in top.output
    assert all(command in top.output for command in ("demo", "bench", "coverage", "kernels"))
    assert version("torch") in invoke("--version").output
    assert invoke().exit_code == 2 and "demo" in invoke().output


def started(words):
    """Exit code, output, CPU seconds and imported packages of a command in a fresh process."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", START, *words], capture_output=True, text=True, env=PLAIN_TERMINAL)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == 0, done.stderr
    _, code, *modules = done.stdout.splitlines()[-1].split()
    return int(code), plain(done.stdout + done.stderr), seconds, set(modules)


def is_quick(seconds, modules):
    return seconds < MOST_SECONDS and not HEAVY & modules


@pytest.mark.parametrize("words", [[], *COMMANDS], ids=" ".join)
def test_help_imports_nothing_heavy(words):
    code, output, seconds, modules = started([*words, "--help"])
    assert code == 0 and f"Usage: {' '.join(['cachedit', *words])}".strip() in output.replace("-c", "cachedit")
    assert is_quick(seconds, modules), (seconds, HEAVY & modules)


@pytest.mark.parametrize("words", TYPOS)
def test_typing_errors_import_nothing_heavy_and_name_what_was_meant(words):
    code, output, seconds, modules = started(words.split())
    assert code == 2 and TYPOS[words] in output, output
    assert is_quick(seconds, modules), (seconds, HEAVY & modules)


def test_every_command_is_in_the_list():
    assert {" ".join(words) for words in COMMANDS} == set(commands_of(typer.main.get_command(app)))


def commands_of(group, *words):
    for name, command in getattr(group, "commands", {}).items():
        yield " ".join([*words, name])
        yield from commands_of(command, *words, name)


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
