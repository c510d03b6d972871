"""The same settings, run by cache-dit 1.5.3 itself: in the environment that PEERS_PYTHON names, or in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from lib import peer_claims, peer_runs

import cachedit_fx.compat as cache_dit

pytestmark = pytest.mark.full("peers")

PYTHON = os.environ.get("PEERS_PYTHON", sys.executable)


def answer(python: str, package: str) -> dict[str, Any]:
    run = subprocess.run([python, peer_runs.__file__, package], capture_output=True, text=True)
    assert run.returncode == 0, (
        f"{package} did not run in {python}. The part `peers` needs cache-dit: pip install -c constraints.txt -e "
        f'".[peers]", or PEERS_PYTHON=/path/to/python of an environment that has it\n{run.stderr[-2000:]}'
    )
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def both():
    ours = answer(sys.executable, "cachedit_fx.compat")
    return ours, answer(PYTHON, "cache_dit")


@pytest.mark.budget(120, "starts both packages")
@pytest.mark.parametrize("case", peer_runs.CASES)
def test_the_same_steps_are_cached_give_or_take_one(both, case):
    ours, theirs = (each["steps"][case] for each in both)
    assert len(ours) == len(theirs) and any(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert abs(len(own) - len(other)) <= 1
        assert len({*own} ^ {*other}) <= 2, f"ours {own}, cache-dit {other}"


def test_calibrators_predict_the_same(both):
    ours, theirs = (each["predictions"] for each in both)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert torch.allclose(torch.tensor(values), torch.tensor(theirs[name]), atol=1e-5, rtol=1e-5), name


def test_masks_by_name_are_the_same_to_the_bit(both):
    ours, theirs = (each["masks"] for each in both)
    assert ours == theirs


def test_the_page_is_right_about_cache_dit():
    run = subprocess.run([PYTHON, peer_claims.__file__], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    claims = json.loads(run.stdout.splitlines()[-1])
    assert claims == dict.fromkeys(claims, True) and claims


@pytest.mark.parametrize("title", peer_runs.CONFIGS)
def test_fields_and_defaults_are_the_same(both, title):
    ours, theirs = (each["fields"][title] for each in both)
    assert list(ours) == list(theirs)
    assert {name: (value, theirs[name]) for name, value in ours.items() if value != theirs[name]} == {}


def test_every_public_name_is_here(both):
    """Names of modules and helpers that its documents do not mention aside."""
    code = "import cache_dit, types; print(*(name for name, value in vars(cache_dit).items() "
    code += "if name[0] != '_' and not isinstance(value, types.ModuleType)))"
    run = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True)
    helpers = {"ENV", "init_logger", "disable_print", "maybe_empty_cache", "parse_extra_modules"}
    helpers |= {"version", "version_tuple"}
    assert set(run.stdout.splitlines()[-1].split()) - helpers <= set(cache_dit.__all__)
