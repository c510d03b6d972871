"""What a policy or a calibrator of one's own takes: one file each, and nothing else is touched."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lib.toys import FALLING, as_tensor, denoise, make, noise

from cachedit_fx import Action, OptionError, compile, explain, summary
from cachedit_fx.config.cache import CONFIGS
from cachedit_fx.runtime.calibrators import CALIBRATORS
from cachedit_fx.runtime.policies.base import POLICIES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def extensions():
    """Both files imported, for one test: they register themselves."""
    tables: tuple[dict, ...] = (CONFIGS, POLICIES, CALIBRATORS)
    copies = [dict(table) for table in tables]
    for name in ("lib.toy_policy", "lib.toy_calibrator"):
        sys.modules.pop(name, None)
        importlib.import_module(name)
    yield
    for table, copy in zip(tables, copies, strict=True):
        table.clear()
        table.update(copy)


def steps_by_action(stats, action):
    return [step for step, decision in stats.branch(0).decisions.items() if decision.action is action]


def test_a_policy_of_one_file_decides_about_regions(extensions):
    model = make()
    compile(model, inner_backend="eager", cache="every_nth", Fn_compute_blocks=1, period=3)
    plain = denoise(make())
    assert not torch.equal(denoise(model), plain)
    (stats,) = summary(model)
    assert steps_by_action(stats, Action.COMPUTE) == [0, 3, 6, 9]
    assert {decision.reason.value for decision in stats.branch(0).decisions.values()} == {"due", "not due"}
    compile(model, inner_backend="eager", cache="every_nth", Fn_compute_blocks=1, period=1)  # compiles nothing
    assert torch.equal(denoise(model), plain)


def test_a_policy_of_one_file_decides_about_blocks(extensions):
    model = make()
    compile(model, inner_backend="eager", cache="turns", Fn_compute_blocks=1, period=2)
    denoise(model)
    (stats,) = summary(model)
    assert stats.pruned_blocks == [0, *[2 if step % 2 else 3 for step in range(1, len(FALLING))]]
    assert len(explain(model, noise(), as_tensor(500.0), noise(1, 3, seed=2)).regions) == 5


def test_a_calibrator_of_one_file_predicts(extensions):
    options = {"Fn_compute_blocks": 1, "max_warmup_steps": 3, "residual_diff_threshold": 1e9}
    results = {}
    for calibrator in (None, "mean", {"name": "mean", "values": 1}):
        model = make()
        compile(model, inner_backend="eager", calibrator=calibrator, **options)
        results[str(calibrator)] = denoise(model)
    repeat, mean, one = results.values()
    assert torch.equal(one, repeat) and not torch.equal(mean, repeat)


def test_their_settings_are_checked_as_all_others_are(extensions):
    with pytest.raises(OptionError, match="period=0 is not allowed: it must be an integer >= 1"):
        compile(make(), cache="every_nth", period=0)
    with pytest.raises(OptionError, match="period: for EveryNthConfig only, and this is a DBCacheConfig"):
        compile(make(), period=2)
    with pytest.raises(OptionError, match="nearest known one is 'values'"):
        compile(make(), calibrator={"name": "mean", "value": 2})


WITHOUT = """
import torch, cachedit_fx
from cachedit_fx.config.cache import CONFIGS
from lib.toys import denoise, make
model = make()
cachedit_fx.compile(model, inner_backend="eager", Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=1e9)
denoise(model)
assert list(CONFIGS) == ["dbcache"], CONFIGS
assert cachedit_fx.summary(model)[0].cached_steps == list(range(1, 10))
try:
    cachedit_fx.compile(make(), cache="dbprune")
except cachedit_fx.OptionError as error:
    print(error)
"""


def test_dbprune_is_one_file(tmp_path):
    """Without its file, its line of registration and its public name, all else works."""
    for folder in ("cachedit_fx", "passes", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "shapes"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "cachedit_fx/runtime/policies/dbprune.py").unlink()
    for name in ("__init__.py", "runtime/policies/__init__.py"):
        file = tmp_path / "cachedit_fx" / name
        file.write_text(re.sub(r"^.*(dbprune|DBPrune).*\n", "", file.read_text(), flags=re.MULTILINE))
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "cache='dbprune' is not allowed: it must be one of 'dbcache'" in run.stdout
