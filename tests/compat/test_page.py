"""docs/coming-from-cache-dit.md is true: names, status, and the families that it refers to."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tools.sentences import long_sentences, public_paragraphs

import cachedit_fx.compat as cache_dit
from cachedit_fx.bench.coverage import CHECKS
from cachedit_fx.compat.absent import _Absent
from cachedit_fx.compat.adapters import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/coming-from-cache-dit.md").read_text()
STATUS = dict(re.findall(r"^\| `(\w+)` \| (works|accepted|not needed|not yet) \|", PAGE, re.MULTILINE))


def test_the_table_has_every_public_name_and_no_other():
    assert sorted(STATUS) == sorted(cache_dit.__all__) == sorted({*cache_dit.__all__})
    assert all(hasattr(cache_dit, name) for name in STATUS)
    assert set(cache_dit.__all__) <= set(dir(cache_dit))


def test_what_is_not_there_yet_says_so():
    absent = {name for name in STATUS if isinstance(getattr(cache_dit, name), _Absent)}
    absent |= {"load"}
    assert {name for name, status in STATUS.items() if status == "not yet"} == absent


def test_every_family_passes_the_checks():
    checks = (ROOT / "docs/models.md").read_text().partition("\n## ")[0]
    rows = dict(re.findall(r"^\| (\w+) \|(.*)\|$", checks, re.MULTILINE))
    for transformer in FAMILIES.values():
        marks = rows[transformer].split("|")[1 : len(CHECKS) + 1]
        assert [mark.strip() for mark in marks] == ["✓"] * len(CHECKS), transformer
    count, names = cache_dit.supported_pipelines()
    assert count == len(names) == len(FAMILIES) and "Flux*" in names
    assert all(f"| {name} | {transformer} |" in cache_dit.supported_matrix() for name, transformer in FAMILIES.items())


def test_importing_costs_as_little_as_the_package_itself():
    code = "import sys, cachedit_fx; before = {*sys.modules}; import cachedit_fx.compat as cache_dit; "
    code += "print(*sorted({*sys.modules} - before)); assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.split() == ["cachedit_fx.compat"], run.stderr


def test_nothing_below_imports_it():
    sources = [path for path in (ROOT / "cachedit_fx").rglob("*.py") if "compat" not in path.parts]
    assert not [path for path in sources if "cachedit_fx.compat" in path.read_text()]


@pytest.mark.parametrize("name", cache_dit.__all__)
def test_sentences_of_docstrings_are_short(name):
    assert not [str(sentence) for sentence in long_sentences(public_paragraphs(name, getattr(cache_dit, name)))]
