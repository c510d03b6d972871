"""Defaults, checks and messages of the settings; what counts as structure."""

import copy
import math
import pickle
import types
from dataclasses import FrozenInstanceError, fields

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.config.options import Options, ParamsModifier, parse_options
from cachedit_fx.config.rules import OptionError


def test_defaults_are_the_published_ones():
    assert {item.name: getattr(DBCacheConfig(), item.name) for item in fields(DBCacheConfig)} == {
        "Fn_compute_blocks": 8,
        "Bn_compute_blocks": 0,
        "residual_diff_threshold": 0.08,
        "downsample_factor": 1,
        "max_accumulated_residual_diff_threshold": None,
        "max_warmup_steps": 8,
        "warmup_interval": 1,
        "max_cached_steps": -1,
        "max_continuous_cached_steps": -1,
        "enable_separate_cfg": None,
        "cfg_compute_first": False,
        "cfg_diff_compute_separate": True,
        "num_inference_steps": None,
        "steps_computation_mask": None,
        "steps_computation_policy": "dynamic",
        "force_refresh_step_hint": None,
        "force_refresh_step_policy": "once",
    }
    assert parse_options(None) == parse_options({}) == Options()
    assert Options().cache == DBCacheConfig()


@pytest.mark.parametrize("mask", [[1, 0, 1], (1, 0, 1), "101", [True, False, True]])
def test_mask_forms_are_one(mask):
    config = DBCacheConfig(steps_computation_mask=mask)
    assert config.steps_computation_mask == (1, 0, 1)
    assert all(type(bit) is int for bit in config.steps_computation_mask)
    assert config == DBCacheConfig(steps_computation_mask=(1, 0, 1))
    assert hash(config) == hash(DBCacheConfig(steps_computation_mask=(1, 0, 1)))


@pytest.mark.parametrize(
    "setting",
    [
        {"Fn_compute_blocks": 1},
        {"Fn_compute_blocks": 0, "steps_computation_mask": "10", "steps_computation_policy": "static"},
        {"residual_diff_threshold": 0},
        {"residual_diff_threshold": -1.0},
        {"residual_diff_threshold": math.inf},
        {"max_accumulated_residual_diff_threshold": 0},
        {"max_warmup_steps": 0},
        {"max_cached_steps": 0},
        {"max_continuous_cached_steps": -1},
        {"cfg_compute_first": True, "cfg_diff_compute_separate": False},
        {"num_inference_steps": 3, "steps_computation_mask": [1, 0, 0]},
        {"inner_backend": len},
        {"inner_backend": "inductor", "mode": "max-autotune", "inner_options": {"max_autotune": False}},
        {"inner_backend": "eager", "mode": "default"},
        {"passes": {}},
        {"loops": ["transformer_blocks"]},
        {"cache": None, "scope": "loop"},
    ],
)
def test_allowed(setting):
    parse_options(setting)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"Fn_compute_blocks": -1}, ["Fn_compute_blocks=-1", ">= 0", "blocks"]),
        ({"Fn_compute_blocks": 0}, ["Fn_compute_blocks=0", ">= 1", "steps_computation_mask", "'static'"]),
        ({"Fn_compute_blocks": 0, "steps_computation_mask": "10"}, [">= 1", "'static'"]),
        ({"Fn_compute_blocks": True}, ["Fn_compute_blocks=True", "integer"]),
        ({"Fn_compute_blocks": 1.0}, ["Fn_compute_blocks=1.0", "integer"]),
        ({"Bn_compute_blocks": -2}, ["Bn_compute_blocks=-2", ">= 0"]),
        ({"residual_diff_threshold": math.nan}, ["residual_diff_threshold=nan", "number"]),
        ({"residual_diff_threshold": "0.1"}, ["residual_diff_threshold='0.1'", "number"]),
        ({"max_accumulated_residual_diff_threshold": -0.1}, [">= 0", "None"]),
        ({"max_warmup_steps": -1}, ["max_warmup_steps=-1", ">= 0"]),
        ({"warmup_interval": 0}, ["warmup_interval=0", ">= 1"]),
        ({"max_cached_steps": -2}, ["max_cached_steps=-2", ">= -1", "no limit"]),
        ({"max_continuous_cached_steps": None}, ["max_continuous_cached_steps=None", ">= -1"]),
        ({"enable_separate_cfg": 1}, ["enable_separate_cfg=1", "True or False, or None"]),
        ({"cfg_compute_first": True}, ["cfg_diff_compute_separate=False", "default"]),
        ({"num_inference_steps": 0}, ["num_inference_steps=0", ">= 1"]),
        ({"num_inference_steps": 4, "steps_computation_mask": "110"}, ["3 digits", "num_inference_steps=4"]),
        ({"num_inference_steps": 2, "steps_computation_mask": "110"}, ["3 digits", "num_inference_steps=2"]),
        ({"steps_computation_mask": ""}, ["non-empty"]),
        ({"steps_computation_mask": "1021"}, ["ones", "zeros"]),
        ({"steps_computation_mask": 101}, ["steps_computation_mask=101"]),
        ({"steps_computation_policy": "Static"}, ["'dynamic', 'static'", "did you mean 'static'?"]),
        ({"cache": "dbcach"}, ["cache='dbcach'", "'dbcache'"]),
        ({"cache": None, "Fn_compute_blocks": 1}, ["Fn_compute_blocks", "cache=None"]),
        ({"inner_backend": "inducter"}, ["did you mean 'inductor'?", "callable"]),
        ({"inner_options": [1]}, ["inner_options=[1]", "mapping"]),
        ({"mode": "max-autotun"}, ["did you mean 'max-autotune'?"]),
        ({"mode": "max-autotune", "inner_backend": "eager"}, ["mode='max-autotune'", "inner_backend='eager'"]),
        ({"granularity": "blocks"}, ["did you mean 'block'?", "'region'"]),
        ({"scope": 1}, ["'model', 'loop'"]),
        ({"passes": "normalize"}, ["passes='normalize'", "mapping from names of passes to bools"]),
        ({"passes": {"normalize": 1}}, ["mapping from names of passes to bools"]),
        ({"timestep": "a b"}, ["timestep='a b'"]),
        ({"loops": "blocks"}, ["loops='blocks'", "list of names"]),
        ({"loops": []}, ["non-empty"]),
        ({"residual_diff_treshold": 1}, ["unknown", "'residual_diff_treshold'", "one is 'residual_diff_threshold'"]),
        ({"residual_diff_treshold": 1}, ["see cachedit_fx.DBCacheConfig"]),
        ({"fn_compute_blocks": 1}, ["nearest known one is 'Fn_compute_blocks'"]),
        ({"LOOPS": ["blocks"]}, ["nearest known one is 'loops'"]),
        ({"scopes": "loop"}, ["nearest known one is 'scope'", "granularity"]),
        ({1: 2}, ["unknown option 1"]),
    ],
)  # fmt: skip
def test_rejected_with_what_is_allowed(setting, words):
    with pytest.raises(OptionError) as error:
        parse_options(setting)
    assert isinstance(error.value, ValueError)
    for word in words:
        assert word in str(error.value)


def test_not_a_mapping():
    with pytest.raises(OptionError, match="mapping"):
        parse_options(["cache"])  # type: ignore[arg-type]


def test_flat_keys_go_on_top_of_the_config_and_leave_it_alone():
    base = DBCacheConfig(Fn_compute_blocks=2, residual_diff_threshold=0.2)
    parsed = parse_options({"cache": base, "residual_diff_threshold": 0.1})
    assert parsed.cache == DBCacheConfig(Fn_compute_blocks=2, residual_diff_threshold=0.1)
    assert base.residual_diff_threshold == 0.2


def test_flat_keys_are_checked_together():
    parsed = parse_options({"cfg_compute_first": True, "cfg_diff_compute_separate": False})
    assert parsed.cache is not None and parsed.cache.cfg_compute_first


def test_reset_copies_checks_and_names_the_nearest():
    config = DBCacheConfig()
    assert config.reset(max_warmup_steps=4) == DBCacheConfig(max_warmup_steps=4)
    assert config == DBCacheConfig()
    with pytest.raises(OptionError, match="'max_warmup_steps'"):
        config.reset(warmup_steps=4)
    with pytest.raises(OptionError, match=">= 1"):
        config.reset(warmup_interval=0)
    with pytest.raises(OptionError, match="unknown option 'scope'"):
        config.reset(scope="loop")


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        DBCacheConfig().Fn_compute_blocks = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        Options().scope = "loop"  # type: ignore[misc]


def test_mode_comes_as_a_keyword_or_an_option_not_as_two():
    assert parse_options({"mode": "reduce-overhead"}) == parse_options({}, mode="reduce-overhead")
    assert parse_options({"mode": "lite"}, mode="lite").mode == "lite"
    with pytest.raises(OptionError, match="twice"):
        parse_options({"mode": "lite"}, mode="max-autotune")


def test_options_hash_and_compare_by_what_they_say():
    def backend(graph, inputs):
        return graph

    class Unhashable:
        def __eq__(self, other):
            return self is other

        def __call__(self, graph, inputs):
            return graph

    given = {"inner_options": {"list": [1], "a": {}}, "inner_backend": backend, "passes": {"b": True, "a": False}}
    one, two = parse_options(given), parse_options(types.MappingProxyType(given))
    assert one == two and hash(one) == hash(two)
    assert one.inner_options == given["inner_options"] and one.inner_options is not given["inner_options"]
    assert one.passes == (("a", False), ("b", True))
    assert parse_options({"passes": {}}).passes == parse_options({"passes": None}).passes == ()
    assert one != parse_options(given | {"inner_options": {}})
    assert one != parse_options(given | {"inner_backend": lambda graph, inputs: graph})
    assert parse_options({"inner_backend": (unhashable := Unhashable())}).structure() in {
        parse_options({"inner_backend": unhashable}).structure()
    }


def test_options_can_be_copied_and_pickled():
    options = parse_options({"inner_options": {"a": [1]}, "steps_computation_mask": "10", "passes": {"x": True}})
    assert copy.deepcopy(options) == options
    assert pickle.loads(pickle.dumps(options)) == options


OTHER_POLICY = {
    "residual_diff_threshold": 0.5,
    "downsample_factor": 2,
    "max_accumulated_residual_diff_threshold": 1.0,
    "max_warmup_steps": 1,
    "warmup_interval": 2,
    "max_cached_steps": 3,
    "max_continuous_cached_steps": 1,
    "enable_separate_cfg": True,
    "cfg_diff_compute_separate": False,
    "num_inference_steps": 2,
    "steps_computation_mask": "10",
    "steps_computation_policy": "static",
    "force_refresh_step_hint": 3,
    "force_refresh_step_policy": "repeat",
    "calibrator": "taylorseer",
}
OTHER_STRUCTURE = {
    "Fn_compute_blocks": 1,
    "Bn_compute_blocks": 1,
    "cache": None,
    "inner_backend": "aot_eager",
    "inner_options": {"a": 1},
    "mode": "lite",
    "granularity": "region",
    "compiled_pieces": "all",
    "scope": "loop",
    "passes": {"a": False},
    "timestep": "t",
    "loops": ["blocks"],
    "params_modifiers": [ParamsModifier()],
    "verify": "first",
    "motion": "batched",
    "time_weights": "host",
    "precision": "int8",
    "attention": "math",
    "hoisted_mib": 8,
    "ulysses_size": 2,
    "ulysses_inputs": "first_rank",
    "ulysses_float8": "with_keys",
    "ulysses_async": True,
    "parallel": "auto",
    "ring_size": 2,
    "cfg_parallel": True,
    "ulysses_mesh": dist.ProcessGroup(dist.HashStore(), 0, 2),
}


def test_every_setting_is_structure_or_policy():
    names = {item.name for item in (*fields(Options), *fields(DBCacheConfig))}
    # cfg_compute_first is refused alone; the property below sets it with its companion.
    assert OTHER_POLICY.keys() | OTHER_STRUCTURE.keys() | {"cfg_compute_first"} == names


@given(st.sets(st.sampled_from(sorted(OTHER_POLICY))))
def test_policy_leaves_the_structure(names):
    changed = parse_options({name: OTHER_POLICY[name] for name in names})
    assert changed.structure() == Options().structure()
    assert hash(changed.structure()) == hash(Options().structure())
    assert (changed == Options()) is (not names)
    if "cfg_diff_compute_separate" in names:
        assert changed.cache is not None
        assert changed.cache.reset(cfg_compute_first=True).cut() == changed.cache.cut()


@pytest.mark.parametrize("name", OTHER_STRUCTURE)
def test_structure_tells_structural_settings_apart(name):
    assert parse_options({name: OTHER_STRUCTURE[name]}).structure() != Options().structure()


def test_predicting_the_output_is_structure():
    other = parse_options({"calibrator": "lagrange"})
    assert other.structure() != Options().structure()
    residual = {"name": "lagrange", "calibrator_cache_type": "residual"}
    assert parse_options({"calibrator": residual}).structure() == Options().structure()
