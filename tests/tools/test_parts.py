"""The parts of the test suite: which test is in which, the table of their runs, which need not run again."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import parts
import pytest
from parts import (
    PARTS,
    RECORD,
    Run,
    is_current,
    present_commit,
    present_versions,
    read,
    run_part,
    run_parts,
    write,
)

ROOT = Path(__file__).resolve().parents[2]
RUN = Run("zoo", "2031-01-02", "0123456789ab", 31.5, 58.0, 69, 0, "Python 3.11.7, torch 2.13.0+cpu")


def test_the_table_holds_what_was_written(tmp_path):
    record = tmp_path / RECORD
    assert read(record) == {}
    runs = {"zoo": RUN, "fuzz": replace(RUN, part="fuzz", failures=2)}
    write(record, runs)
    assert read(record) == runs
    text = record.read_text()
    assert all(f"- **{part}**: {content}." in text for part, content in PARTS.items())
    assert text.count("| never |") == len(PARTS) - 2


def test_the_projects_table_can_be_read():
    assert set(read(ROOT / RECORD)) <= set(PARTS) and (ROOT / RECORD).read_text().count("\n| ") == len(PARTS) + 2


@pytest.fixture
def tree(tmp_path):
    """A repository with one commit."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "source.py").write_text("x = 1\n")
    git("add", "--all")
    git("commit", "-m", "one")
    return tmp_path


def test_what_passed_on_this_tree_with_these_versions_is_current(tree):
    run = replace(RUN, commit=present_commit(tree), versions=present_versions())
    assert not run.commit.endswith("+") and is_current(run, tree)
    write(tree / RECORD, {"zoo": run})  # the table is not what is tested
    assert is_current(run, tree) and present_commit(tree) == run.commit
    assert not is_current(replace(run, failures=1), tree) and not is_current(replace(run, tests=0), tree)
    assert not is_current(replace(run, versions="Python 2.7"), tree)
    assert not is_current(replace(run, commit=f"{run.commit}+"), tree)
    (tree / "new.py").write_text("")
    assert not is_current(run, tree) and present_commit(tree) == f"{run.commit}+"
    (tree / "new.py").unlink()
    (tree / "source.py").write_text("x = 2\n")
    assert not is_current(run, tree)


def test_outside_git_nothing_is_current(tmp_path):
    assert present_commit(tmp_path) == "unknown"
    assert not is_current(replace(RUN, commit="unknown", versions=present_versions()), tmp_path)


def test_parts_are_entered_as_they_end_and_skipped_once_they_have_passed(tree, monkeypatch, capsys):
    failing, ran = {"fuzz"}, []

    def passed(part, root, arguments, minutes):
        ran.append(part)
        return Run(part, "2031-01-02", present_commit(root), 1.0, 1.0, 5, int(part in failing), present_versions())

    monkeypatch.setattr(parts, "run_part", passed)
    assert not run_parts(["zoo", "fuzz"], tree, (), again=False)
    failing.clear()
    assert run_parts(["zoo", "fuzz"], tree, (), again=False)
    assert ran == ["zoo", "fuzz", "fuzz"]
    assert "zoo: passed on 2031-01-02" in capsys.readouterr().out
    assert run_parts(["zoo"], tree, (), again=True) and ran[-1] == "zoo"
    assert {part: run.failures for part, run in read(tree / RECORD).items()} == {"zoo": 0, "fuzz": 0}


# ---------------------------------------------------------------------------------------------------------------------
# What tests/conftest.py does: another suite has a copy of it

SUITE = """
import time
import pytest

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def test_default():
    burn(0.3)

@pytest.mark.full("kernels")
def test_within_its_budget():
    burn(0.3)

@pytest.mark.full("kernels")
@pytest.mark.budget(0.1, "to be missed")
def test_over_its_budget():
    burn(0.3)

@pytest.mark.full("kernels")
@pytest.mark.skip
def test_skipped():
    pass

@pytest.fixture(scope="module")
def costly():
    burn(0.3)

@pytest.mark.full("kernels")
@pytest.mark.budget(0.1, "a fixture's set-up is not the test's")
def test_of_a_costly_fixture(costly):
    pass
"""


@pytest.fixture
def suite(tmp_path):
    """A folder with `SUITE`, and with another folder that is called as one of the parts is."""
    (tmp_path / "pyproject.toml").write_text(
        f"[tool.pytest.ini_options]\npythonpath = ['{ROOT / 'tests'}']\ntestpaths = ['tests']\n"
        "markers = ['full', 'budget', 'keep_compiled']\n"
    )
    for folder in ("tests", "kernels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tests" / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "tests" / "test_some.py").write_text(SUITE)
    return tmp_path


def test_a_part_is_run_alone_and_a_test_over_its_budget_fails(suite, capfd):
    """In a worker of xdist, whose time and whose tests' count."""
    run = run_part("kernels", suite, ("-n", "1", "--dist", "loadgroup"))
    output = capfd.readouterr().out
    assert (run.part, run.tests, run.failures) == ("kernels", 3, 1)  # one is skipped, one of another part
    assert re.search(r"0\.\d CPU seconds, 0\.1 allowed\. Make the test cheaper", output)
    assert "FAILED tests/test_some.py::test_over_its_budget" in output
    table = output.partition(" CPU seconds =")[2]
    (in_file,) = re.findall(r"([\d.]+)  tests/test_some\.py\n", table)
    (in_all,) = re.findall(r"([\d.]+)  in all\n", table)
    assert 0.9 <= float(in_file) < float(in_all)


def test_a_part_that_takes_too_long_is_stopped_and_has_failed(suite, capfd):
    run = run_part("kernels", suite, (), minutes=0.001)
    assert (run.tests, run.failures) == (0, 1)
    assert "kernels: stopped after 0.001 minutes" in capfd.readouterr().out


def test_a_part_that_is_not_listed_is_an_error(suite):
    (suite / "tests" / "test_some.py").write_text(SUITE.replace("kernels", "kernel"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q"]
    output = subprocess.run(command, cwd=suite, capture_output=True, text=True)
    assert (
        "no part is called 'kernel'" in output.stdout + output.stderr and "kernels, " in output.stdout + output.stderr
    )
