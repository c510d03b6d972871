"""What a policy or a calibrator of one's own takes: one file each, and nothing else is touched."""

import copy
import importlib
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lib.toys import FALLING, as_tensor, denoise, make, noise

from cachedit_fx import (
    Action,
    CalibratorConfig,
    DBCacheConfig,
    Decision,
    OptionError,
    Reason,
    TaylorSeerCalibratorConfig,
    compile,
    explain,
    summary,
)
from cachedit_fx.config.cache import CONFIGS
from cachedit_fx.runtime.calibrators import CALIBRATORS, register_calibrator
from cachedit_fx.runtime.policies.base import POLICIES, register
from cachedit_fx.runtime.policies.dbprune import BELOW_DYNAMIC

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
    for table, entries in zip(tables, copies, strict=True):
        table.clear()
        table.update(entries)


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


def test_a_subclass_of_a_config_is_decided_and_predicted_as_its_base():
    class Cache(DBCacheConfig):
        pass

    class Calibrator(TaylorSeerCalibratorConfig):
        pass

    results = []
    settings: dict = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 0.2}
    for cache, calibrator in (
        (Cache(**settings), Calibrator()),
        (DBCacheConfig(**settings), TaylorSeerCalibratorConfig()),
    ):
        model = make()
        compile(model, inner_backend="eager", cache=cache, calibrator=calibrator)
        results.append(denoise(model))
    assert torch.equal(*results)


def test_a_config_that_nobody_registered_is_refused_before_anything_runs():
    with pytest.raises(OptionError, match="no calibrator is registered for CalibratorConfig; there are taylorseer"):
        compile(make(), calibrator=CalibratorConfig())


def test_names_are_taken_once(extensions):
    policy, calibrator = POLICIES[CONFIGS["every_nth"]], CALIBRATORS["mean"]
    register("every_nth")(policy)
    register_calibrator("mean", calibrator)
    with pytest.raises(ValueError, match="'dbcache' is the name of .*dbcache.DBCache: choose another name"):
        register("dbcache")(policy)
    with pytest.raises(ValueError, match="'foca' is the name of the calibrator of FoCaCalibratorConfig"):
        register_calibrator("foca", calibrator)


def test_reasons_stay_themselves_in_copies_and_pickles():
    for reason in (Reason.WARMUP, BELOW_DYNAMIC):
        decision = Decision(reason.action, reason, 0.5)
        for copy_of in (copy.copy(decision), copy.deepcopy(decision), pickle.loads(pickle.dumps(decision))):
            assert copy_of == decision and copy_of.reason is reason
    assert repr(Reason.WARMUP) == "<Reason: 'warm-up'>"


THREADS = """
import threading
import cachedit_fx
names, errors = ["compile", "DBPruneConfig", "Options", "presets", "Reason", "session"] * 2, []
def access(name):
    barrier.wait()
    try:
        getattr(cachedit_fx, name)
    except BaseException as error:
        errors.append(error)
barrier = threading.Barrier(len(names))
threads = [threading.Thread(target=access, args=(name,)) for name in names]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not errors, errors
"""


def test_threads_may_ask_for_public_names_at_once():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", THREADS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


WITHOUT = """
import torch, cachedit_fx
from cachedit_fx.config.cache import CONFIGS
from lib.toys import denoise, make
model = make()
cachedit_fx.compile(model, inner_backend="eager", Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=1e9)
denoise(model)
assert list(CONFIGS) == ["dbcache", "preset"], CONFIGS
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
    assert "cache='dbprune' is not allowed: it must be one of 'dbcache', 'preset'" in run.stdout
