"""YAML files and dicts in cache-dit's form."""

from __future__ import annotations

import pytest

import cachedit_fx
import cachedit_fx.compat as cache_dit
from cachedit_fx import OptionError
from cachedit_fx.compat.translation import own_cache_config

WHOLE = """
cache_config:
  max_warmup_steps: 8
  warmup_interval: 2
  max_cached_steps: -1
  max_continuous_cached_steps: 2
  Fn_compute_blocks: 1
  Bn_compute_blocks: 0
  residual_diff_threshold: 0.12
  steps_computation_mask: fast
  num_inference_steps: 28
  enable_taylorseer: true
  taylorseer_order: 2
parallelism_config:
  ulysses: auto
  ring_size: 1
  attention_backend: native
  ulysses_anything: true
attention_backend: native
quantize_config:
  quant_type: int8_weight_only
  components_to_quantize: {transformer: {quant_type: float8_weight_only}}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "cache.yaml"
    path.write_text(WHOLE)
    return path


def test_a_whole_file(file):
    configs = cache_dit.load_configs(str(file))
    assert configs["cache_config"] == cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        warmup_interval=2,
        max_continuous_cached_steps=2,
        residual_diff_threshold=0.12,
        num_inference_steps=28,
        steps_computation_mask=cache_dit.steps_mask(total_steps=28, mask_policy="fast"),
    )
    assert configs["calibrator_config"] == cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=2)
    assert configs["parallelism_config"].ulysses_size == 1 and configs["parallelism_config"].ulysses_anything
    assert configs["attention_backend"] == "native"
    assert configs["quantize_config"].strify() == "<transformer:float8_weight_only>"
    assert cache_dit.load_configs(file, return_dict=False) == tuple(configs.values())
    assert cache_dit.load_parallelism_config(file, check_only=True) is True


def test_a_flat_dict_is_a_cache_config():
    flat = {"cache_type": "DBPrune", "max_warmup_steps": 4, "non_prune_block_ids": [1], "enable_foca": True}
    config, calibrator = cache_dit.load_cache_config(flat)
    assert config == cache_dit.DBPruneConfig(max_warmup_steps=4, non_prune_block_ids=[1])
    assert calibrator == cache_dit.FoCaCalibratorConfig(enable_encoder_calibrator=True)
    assert cache_dit.load_options(flat) == {"cache_config": config, "calibrator_config": calibrator}
    assert cache_dit.load_options({"max_warmup_steps": 4}) == {
        "cache_config": cache_dit.DBCacheConfig(max_warmup_steps=4)
    }


def test_reset_leaves_the_rest_to_the_shared_config():
    config, _ = cache_dit.load_cache_config({"num_inference_steps": 9}, reset=True)
    assert config is not None and config.settings() == {"cache_type": cache_dit.DBCache, "num_inference_steps": 9}


def test_other_sections_alone_have_no_cache():
    assert cache_dit.load_cache_config({"attention_backend": "native"}) == (None, None)
    configs = cache_dit.load_configs({"quantize_config": {"quant_type": "int8"}})
    assert configs["cache_config"] is None and configs["quantize_config"].quant_type == "int8_per_row"
    assert cache_dit.load_quantize_config({}) is None
    assert cache_dit.load_parallelism_config({}) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cache_config": {"max_warmup_step": 4}}, "unknown option 'max_warmup_step'; the nearest known one is 'max_w"),
        ({"cache_configs": {}, "attention_backend": "native"}, "nearest known one is 'cache_config'"),
        ({"parallelism_config": {"ulyses_size": 2}}, "'ulysses_size'"),
        ({"quantize_config": {"quant_typ": "int8"}}, "'quant_type'"),
        ({"enable_taylorseer": True, "enable_foca": True}, "mutually exclusive"),
        ({"cache_config": {"residual_diff_threshold": "abc"}}, "residual_diff_threshold='abc'"),
        ({"steps_computation_mask": "fast"}, "give num_inference_steps too"),
        ({"parallelism_config": {"ulysses": 2, "ulysses_size": 4}}, "two names for one size"),
        ({"parallelism_config": {"ulysses": "auto", "ring": "auto"}}, "only one of the sizes may be"),
        ({"cache_config": ["F8"]}, "expected names with values"),
        ({"cache_type": "DBCash"}, "cache_type='DBCash'"),
        (7, "expected a path or a dict, not int"),
    ],
)
def test_bad_settings_have_their_words(settings, words):
    with pytest.raises(OptionError) as error:
        cache_dit.load_configs(settings)
    assert words in str(error.value)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        cache_dit.load_configs(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("cache_config: [")
    with pytest.raises(OptionError, match="is no YAML"):
        cache_dit.load_configs(tmp_path / "bad.yaml")


def test_numbers_and_masks_as_people_write_them(tmp_path):
    path = tmp_path / "cache.yaml"
    path.write_text(
        "num_inference_steps: 8\nsteps_computation_mask: 11110101\nresidual_diff_threshold: 8e-2\nmax_warmup_steps: 4\n"
        "enable_dmd: true\ndmd_ridge: 1e-8\n"
    )
    config, calibrator = cache_dit.load_cache_config(path)
    assert config is not None and config.residual_diff_threshold == 0.08
    assert own_cache_config(config) == cachedit_fx.DBCacheConfig(
        num_inference_steps=8,
        steps_computation_mask=(1, 1, 1, 1, 0, 1, 0, 1),
        residual_diff_threshold=0.08,
        max_warmup_steps=4,
    )
    assert calibrator == cache_dit.DMDCalibratorConfig(dmd_ridge=1e-8)


@pytest.mark.parametrize("value", ["true", "false", 1])
def test_a_switch_is_true_or_false(value):
    with pytest.raises(OptionError, match=f"enable_taylorseer={value!r} is not allowed: it must be True or False"):
        cache_dit.load_configs({"cache_config": {"enable_taylorseer": value}})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_warmup_steps": 4, "attention_backend": "native"}, "max_warmup_steps: put it under cache_config"),
        ({"cache_config": {}, "calibrator_config": {"taylorseer_order": 2}}, "enable_taylorseer"),
        ({"calibrator_config": {"taylorseer_order": 2}}, "enable_taylorseer"),
        ({"attention_backend": 3}, "attention_backend=3 is not allowed"),
        ({"cache_config": {"non_prune_block_ids": [1]}}, "add cache_type: DBPrune"),
        ({"parallelism_config": {"parallel_kwargs": 3}}, "parallel_kwargs"),
    ],
)
def test_keys_in_the_wrong_place_have_their_words(settings, words):
    with pytest.raises(OptionError) as error:
        cache_dit.load_configs(settings)
    assert words in str(error.value)


def test_every_loader_takes_the_options_of_all():
    whole = {"cache_config": {}, "parallelism_config": {"ulysses_size": 2}}
    for option in ({"reset": True}, {"check_only": True}, {"auto_parallel_size": False}):
        assert cache_dit.load_configs(whole, **option)["cache_config"] is not None
        cache_dit.load_quantize_config(whole, **option)
        cache_dit.load_attn_backend_config(whole, **option)
    assert cache_dit.load_configs(whole, check_only=True)["parallelism_config"] is None
    with pytest.raises(OptionError, match="unknown option 'rest'; the nearest known one is 'reset'"):
        cache_dit.load_configs(whole, rest=True)
    assert cache_dit.ParallelismConfig(parallel_kwargs=None).strify() == ""  # type: ignore[arg-type]
