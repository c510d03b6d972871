"""What a policy or a calibrator of one's own takes: one file each, and nothing else is touched."""

import copy
import importlib
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

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
    pass_pipeline,
    summary,
)
from cachedit_fx.config.cache import CONFIGS
from cachedit_fx.config.rules import ContractError
from cachedit_fx.passes.base import FlatGraph, Rewrite, Rewritten
from cachedit_fx.passes.normalize import Normalized
from cachedit_fx.runtime.calibrators import (
    CALIBRATORS,
    Calibrator,
    Moment,
    coefficients,
    register_calibrator,
    values_kept,
)
from cachedit_fx.runtime.policies.base import POLICIES, Policy, Situation, Stored, decision_of, policy_of, register
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


def test_a_config_class_belongs_to_one_name(extensions):
    """Otherwise the newcomer would silently take the other's place, for all models."""

    other = type("Other", (POLICIES[CONFIGS["every_nth"]],), {})
    with pytest.raises(ValueError, match="EveryNthConfig is the config of the policy 'every_nth': give 'other' a"):
        register("other")(other)
    with pytest.raises(ValueError, match="MeanConfig is the config of the calibrator 'mean': give 'middle' a"):
        register_calibrator("middle", CALIBRATORS["mean"])
    assert "other" not in CONFIGS and "middle" not in CALIBRATORS


def test_what_is_registered_has_a_config_class(extensions):
    with pytest.raises(TypeError, match="policy 'configless' has the config class None: it must be a subclass of DBC"):
        register("configless")(type("Configless", (Policy,), {}))
    not_a_calibrators: Any = DBCacheConfig
    calibrator = Calibrator(not_a_calibrators, lambda config: 1, lambda config, trail, now: (1.0,))
    with pytest.raises(TypeError, match="'wrong' has the config class .* a subclass of CalibratorConfig"):
        register_calibrator("wrong", calibrator)


anything: Any = Decision
BROKEN_DECISIONS = [
    (None, "EveryNth.decide returned None for Situation.*it must be a Decision of an Action and a Reason"),
    (True, "returned True"),
    (anything(Action.COMPUTE, "due"), "a Decision of an Action and a Reason"),
    (anything("compute", Reason.WARMUP), "a Decision of an Action and a Reason"),
    (Decision(Action.COMPUTE, Reason.BELOW_THRESHOLD), "the reason 'below' stands for Action.REUSE"),
    (anything(Action.COMPUTE, Reason.WARMUP, "0.1"), "the difference must be a number, or None"),
    (
        Decision(Action.REUSE, Reason.BELOW_THRESHOLD),
        "nothing can be reused if .* is Stored.OTHER_SHAPES",
    ),
]


@pytest.mark.parametrize(("decision", "message"), BROKEN_DECISIONS)
def test_a_decision_that_breaks_the_contract_is_told_why(extensions, monkeypatch, decision, message):
    config = CONFIGS["every_nth"]
    monkeypatch.setattr(POLICIES[config], "decide", lambda *_: decision)
    with pytest.raises(ContractError, match=message):
        decision_of(policy_of(config()), Situation(3, Stored.OTHER_SHAPES), 0, float)


BROKEN_WEIGHTS = [
    ((0.5, 0.25, 0.25), r"MeanConfig returned \(0.5, 0.25, 0.25\) for step 2: .* 1 to 2 finite numbers"),
    ((), "1 to 2 finite numbers"),
    (1.0, "returned 1.0 for step 2: it must be a tuple"),
    (None, "coefficients of MeanConfig returned None"),
    ((float("nan"), 1.0), "finite numbers"),
    (("1",), "finite numbers"),
    ((torch.tensor(1.0),), "finite numbers"),
]


@pytest.mark.parametrize(("weights", "message"), BROKEN_WEIGHTS)
def test_weights_that_break_the_contract_are_told_why(extensions, monkeypatch, weights, message):
    mean = CALIBRATORS["mean"]
    monkeypatch.setitem(CALIBRATORS, "mean", replace(mean, coefficients=lambda *_: weights))
    with pytest.raises(ContractError, match=message):
        coefficients(mean.config_class(), [Moment(1), Moment(0)], Moment(2))


def test_a_broken_contract_ends_the_call_and_leaves_the_model_usable(extensions, monkeypatch):
    model, plain = make(), denoise(make())
    policy = POLICIES[CONFIGS["every_nth"]]
    options: dict = {"inner_backend": "eager", "cache": "every_nth", "Fn_compute_blocks": 1, "period": 3}
    with monkeypatch.context() as patch:
        patch.setattr(policy, "decide", lambda self, situation, history, measure: measure())
        compile(model, **options)
        with pytest.raises(ContractError, match="call `measure` only if situation.stored is Stored.FITS"):
            denoise(model)
        patch.setattr(policy, "decide", lambda *_: Decision(Action.REUSE, Reason.BELOW_THRESHOLD))
        with pytest.raises(ContractError, match="if situation.stored is Stored.NOTHING: compute then"):
            denoise(model)
    with monkeypatch.context() as patch:
        patch.setitem(CALIBRATORS, "mean", replace(CALIBRATORS["mean"], coefficients=lambda *_: (1.0,) * 9))
        compile(model, **options, calibrator="mean")
        with pytest.raises(ContractError, match="coefficients of MeanConfig returned"):
            denoise(model)
    compile(model, **options | {"period": 1})
    assert torch.equal(denoise(model), plain)


@pytest.mark.parametrize("count", [0, -1, 2.0, None, True, "2"])
def test_the_number_of_values_is_checked(extensions, monkeypatch, count):
    config = CALIBRATORS["mean"].config_class()
    monkeypatch.setitem(CALIBRATORS, "mean", replace(CALIBRATORS["mean"], values_kept=lambda config: count))
    with pytest.raises(ContractError, match="values_kept of MeanConfig returned .* an integer >= 1"):
        values_kept(config)


class TanhGelu(Rewrite):
    """Replaces the exact gelu in the blocks, as CONTRIBUTING tells."""

    name = "tanh_gelu"
    requires: ClassVar = (FlatGraph,)
    preserves: ClassVar = (FlatGraph, Normalized)

    def run(self, gm, facts):
        nodes = gm.graph.find_nodes(op="call_function", target=torch.nn.functional.gelu)
        for node in nodes:
            node.kwargs = {"approximate": "tanh"}
        return Rewritten(gm, len(nodes))


def test_a_pass_reaches_the_blocks_from_the_end_of_the_list(monkeypatch):
    whole = pass_pipeline.pipeline
    monkeypatch.setattr(pass_pipeline, "pipeline", lambda options, traced: [*whole(options, traced), TanhGelu()])
    results = []
    for switches in ({}, {"tanh_gelu": False}):
        model = make()
        compile(model, inner_backend="eager", Fn_compute_blocks=1, residual_diff_threshold=0.0, passes=switches)
        results.append(denoise(model))
    changed, plain = results
    assert torch.equal(plain, denoise(make()))
    assert not torch.equal(changed, plain) and torch.allclose(changed, plain, atol=1e-2)


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
