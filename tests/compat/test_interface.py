"""enable_cache, disable_cache, refresh_context, summary and strify under cache-dit's arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lib.models import TwoLoops
from lib.models import inputs as two_loops_inputs
from lib.ranks import close, on_ranks
from lib.toy_pipeline import TEXTS, ToyPipeline
from lib.toys import FALLING, Toy, denoise, make, make_small, noise

import cachedit_fx
import cachedit_fx.compat as cache_dit
from cachedit_fx import AttentionConfig, OptionError
from cachedit_fx.compat import BlockAdapter, DBCacheConfig, DBPruneConfig, ForwardPattern, ParamsModifier
from cachedit_fx.compat.kept import kept_of
from cachedit_fx.runtime.registry import states_of
from cachedit_fx.runtime.warning import SettingWarning

EAGER: dict[str, Any] = {"inner_backend": "eager"}
ALWAYS: dict[str, Any] = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}
STEPS = len(FALLING)
REST = list(range(2, STEPS))


def ANY(value) -> Any:
    """Hides a wrong type from the type checker."""
    return value


def always(**changes):
    return DBCacheConfig(**ALWAYS | changes)


def two_loops():
    torch.manual_seed(0)
    return TwoLoops()


def run_two_loops(model):
    with torch.no_grad():
        for timestep in (900.0, 700.0, 500.0, 300.0):
            model(*two_loops_inputs(timestep=timestep), noise(1, 3, two_loops_inputs()[0].shape[-1]))


def lists(model):
    return {name: blocks for name, blocks in model.named_children() if isinstance(blocks, torch.nn.ModuleList)}


def test_a_pipeline_is_enabled_changed_and_disabled():
    pipe, image = ToyPipeline(make()), noise()
    plain = pipe(image)
    assert cache_dit.enable_cache(pipe, cache_config=always(), **EAGER) is pipe
    assert not torch.equal(pipe(image), plain)
    (stats,) = cache_dit.summary(pipe, logging=False)
    assert stats.cached_steps == list(range(2, 8)) and stats.accumulated_executed_steps == 8
    cache_dit.enable_cache(pipe, cache_config=always(max_warmup_steps=5), **EAGER)  # cache-dit keeps the first config
    pipe(image)
    assert cache_dit.summary(pipe, logging=False)[0].cached_steps == [5, 6, 7]
    assert cache_dit.disable_cache(pipe) is pipe
    assert torch.equal(pipe(image), plain)
    assert cache_dit.summary(pipe, logging=False) == [cache_dit.CacheStats()]


def test_statistics_under_their_names(capsys):
    pipe = ToyPipeline(make(), texts=TEXTS)
    config = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=0.99)
    cache_dit.enable_cache(pipe, config, cache_dit.TaylorSeerCalibratorConfig(), **EAGER)
    pipe(noise())
    own = cachedit_fx.summary(pipe)[0]
    (stats,) = cache_dit.summary(pipe, details=True)
    assert "branch" in capsys.readouterr().out
    assert stats.cached_steps == own.cached_steps != [] and stats.cfg_cached_steps == own.cfg_cached_steps
    assert stats.residual_diffs == {str(step): value for step, value in own.residual_diffs.items()} != {}
    assert stats.cfg_residual_diffs.keys() == {str(step) for step in own.cfg_residual_diffs}
    assert (stats.accumulated_cached_steps, stats.accumulated_transformer_executed_steps) == (len(own.cached_steps), 16)
    assert stats.cache_options["cache_config"] == config
    assert stats.pruned_ratio is None and stats.parallelism_config is None
    name = f"DBCache_F1B0_W3I1M0MC0_R0.99_T1O1_S{len(own.cached_steps)}"
    assert cache_dit.strify(stats) == cache_dit.strify([stats]) == cache_dit.strify(pipe) == name
    assert cache_dit.strify({"cache_config": config}) == "DBCache_F1B0_W3I1M0MC0_R0.99_T0O0"
    assert cache_dit.strify({"max_warmup_steps": 4}) == "DBCache_F8B0_W4I1M0MC0_R0.08_T0O0"
    assert cache_dit.strify(torch.nn.Linear(1, 1)) == "" and cache_dit.summary(None) == [cache_dit.CacheStats()]


def test_pruning_and_its_statistics():
    model = make()
    config = DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.9)
    cache_dit.enable_cache(model, cache_config=config, **EAGER)
    denoise(model)
    own = cachedit_fx.summary(model)[0]
    (stats,) = cache_dit.summary(model, logging=False)
    assert stats.pruned_steps == own.pruned_steps != [] and stats.pruned_blocks == own.pruned_blocks
    assert stats.actual_blocks == [6] * STEPS and stats.pruned_ratio == own.pruned_ratio
    assert all(isinstance(values, list) for values in stats.residual_diffs.values()) and stats.residual_diffs
    share = round(100 * (stats.pruned_ratio or 0), 2)
    assert cache_dit.strify(stats).startswith(f"DBPrune_F1B0_W2I1M0MC0_R0.9_P{share}_T0O0")


def test_a_transformer_alone_with_an_adapter():
    model = make()
    adapter = BlockAdapter(
        transformer=model,
        blocks=model.blocks,
        forward_pattern=ForwardPattern.Pattern_0,
        has_separate_cfg=True,
        check_forward_pattern=False,
    )
    assert cache_dit.enable_cache(adapter, cache_config=always(num_inference_steps=STEPS), **EAGER) is adapter
    denoise(model)
    assert cache_dit.summary(adapter, logging=False)[0].cached_steps == REST
    cache_dit.disable_cache(adapter)
    assert not cachedit_fx.summary(model)


def test_every_list_has_an_entry_and_settings_of_its_own():
    model = two_loops()
    first, second = lists(model).values()
    adapter = BlockAdapter(
        pipe=None,
        transformer=model,
        blocks=[second, first],  # not in the order of their execution
        forward_pattern=[ForwardPattern.Pattern_3] * 2,
        params_modifiers=[ParamsModifier(cache_config=DBCacheConfig().reset(max_warmup_steps=3)), ParamsModifier()],
    )
    cache_dit.enable_cache(adapter, cache_config=always(), **EAGER)
    run_two_loops(model)
    stats = cache_dit.summary(adapter, logging=False)
    assert [entry.cached_steps for entry in stats] == [[2, 3], [3]]
    assert [entry.cache_options["cache_config"].max_warmup_steps for entry in stats] == [2, 3]
    cache_dit.refresh_context(model, max_warmup_steps=1)  # holds for every list, whatever its own settings
    run_two_loops(model)
    assert [entry.cached_steps for entry in cache_dit.summary(adapter, logging=False)] == [[1, 2, 3]] * 2


def test_the_lists_of_flux_decide_together_unless_an_adapter_names_them():
    model = type("FluxTransformer2DModel", (TwoLoops,), {})()
    cache_dit.enable_cache(model, cache_config=always(), **EAGER)
    run_two_loops(model)
    (stats,) = cache_dit.summary(model, logging=False)
    assert stats.cached_steps == [2, 3]
    cache_dit.enable_cache(BlockAdapter(transformer=model, blocks=list(lists(model).values())), always(), **EAGER)
    run_two_loops(model)
    assert [entry.cached_steps for entry in cache_dit.summary(model, logging=False)] == [[2, 3]] * 2


def test_only_the_named_blocks_are_bypassed():
    model = two_loops()
    name, blocks = list(lists(model).items())[-1]
    adapter = BlockAdapter(transformer=model, blocks_name=name, forward_pattern=ForwardPattern.Pattern_3)
    cache_dit.enable_cache(adapter, cache_config=always(), **EAGER)
    run_two_loops(model)
    (own,) = cachedit_fx.summary(model)
    assert own.num_blocks == len(blocks) and own.cached_steps == [2, 3]


def test_several_transformers():
    first, second = make(seed=1), make(seed=2)
    adapter = BlockAdapter(
        transformer=[first, second],
        blocks=[first.blocks, second.blocks],
        forward_pattern=[ForwardPattern.Pattern_0] * 2,
        params_modifiers=[ParamsModifier(max_warmup_steps=steps) for steps in (3, 5)],
    )
    cache_dit.enable_cache(adapter, cache_config=always(), **EAGER)
    for model in (first, second):
        denoise(model)
    stats = cache_dit.summary(adapter, logging=False)
    assert [entry.cached_steps for entry in stats] == [list(range(start, STEPS)) for start in (3, 5)]


def test_refresh_changes_settings_and_starts_a_generation(capsys):
    model = make()
    cache_dit.enable_cache(model, cache_config=always(), **EAGER)
    denoise(model)
    config = DBCacheConfig().reset(max_warmup_steps=4)
    assert cache_dit.refresh_context(model, cache_config=config, verbose=True) is model
    assert "max_warmup_steps=4" in capsys.readouterr().out
    denoise(model)
    assert cache_dit.summary(model, logging=False)[0].cached_steps == list(range(4, STEPS))
    cache_dit.refresh_context(model, num_inference_steps=STEPS, enable_foca=True)
    own: Any = states_of(model)[0].options
    assert own.cache.num_inference_steps == STEPS and own.calibrator == cachedit_fx.FoCaCalibratorConfig()
    assert own.cache.max_warmup_steps == 4
    with pytest.raises(ValueError, match="call enable_cache first"):
        cache_dit.refresh_context(make(), num_inference_steps=28)


def test_settings_in_the_style_of_older_scripts():
    model = make()
    cache_dit.enable_cache(model, **ALWAYS, enable_taylorseer=True, taylorseer_order=2, **EAGER)
    own: Any = states_of(model)[0].options
    assert own.calibrator == cachedit_fx.TaylorSeerCalibratorConfig(taylorseer_order=2)
    denoise(model)
    assert cache_dit.summary(model, logging=False)[0].cached_steps == REST


def test_other_settings_alone_switch_no_cache_on():
    model = make()
    with pytest.warns(SettingWarning, match="'xformers' has no effect: cachedit_fx has no such.*set_attention_backend"):
        cache_dit.enable_cache(model, attention_backend="xformers")
    assert not states_of(model) and kept_of(model).attention_backend == "xformers"
    cache_dit.enable_cache(model, cache_config=DBCacheConfig(cache_type=cache_dit.NONE))
    assert not states_of(model)


def test_what_has_no_effect_is_kept_and_said():
    model = make()
    config = cache_dit.ParallelismConfig(
        ring_size=1,
        cp_plan={"": {}},
        parallel_kwargs={"experimental_ulysses_async": True, "attention_backend": "_native_npu"},
    )
    with pytest.warns(SettingWarning) as said:
        cache_dit.enable_cache(model, always(), parallelism_config=config, **EAGER)
    words = (
        "cp_plan=...) is ignored",
        "'_native_npu' has no eff",
    )
    assert all(any(each in str(warning.message) for warning in said) for each in words)
    denoise(model)
    (stats,) = cache_dit.summary(model, logging=False)
    assert stats.parallelism_config is config and config.ulysses_async
    assert kept_of(model).attention_backend == "_native_npu"
    assert cache_dit.strify(stats) == f"DBCache_F1B0_W2I1M0MC0_R1.0_T0O0_Ring1_UAS_S{len(REST)}"
    with pytest.warns(SettingWarning, match="changes no global setting"):
        cache_dit.set_compile_configs(descent_tuning=True)


def test_a_back_end_of_attention_is_the_option_until_another_one_comes():
    def attention() -> Any:
        return [(state.options.cache is not None, state.options.attention) for state in states_of(model)]

    model, math = make(), AttentionConfig("math")
    cache_dit.enable_cache(model, attention_backend="_native_math", **EAGER)
    assert attention() == [(False, math)]
    cache_dit.enable_cache(model, always(), **EAGER)
    assert attention() == [(True, math)]
    cache_dit.enable_cache(model, always(), attention=AttentionConfig("flex"), **EAGER)
    assert attention() == [(True, AttentionConfig("flex"))]
    cache_dit.set_attn_backend(model, "flash")
    assert attention() == [(True, AttentionConfig("flash"))]
    cache_dit.set_attn_backend(model, "native")
    assert attention() == [(True, None)]
    config = cache_dit.ParallelismConfig(parallel_kwargs={"attention_backend": "_native_math"})
    cache_dit.enable_cache(model, always(), parallelism_config=config, **EAGER)
    assert attention() == [(True, math)]
    cache_dit.disable_cache(model)
    cache_dit.enable_cache(model, always(), **EAGER)
    assert attention() == [(True, None)]


@pytest.mark.parametrize(("name", "words"), [("sage", "does not run here"), ("saeg", "did you mean 'sage'")])
def test_a_back_end_that_is_not_there_is_an_error(name, words):
    model = make()
    for call in (
        lambda: cache_dit.enable_cache(model, always(), attention_backend=name, **EAGER),
        lambda: cache_dit.enable_cache(model, attention_backend=name),
        lambda: cache_dit.set_attn_backend(model, name),
    ):
        with pytest.raises(OptionError, match=words):
            call()
    assert not states_of(model) and kept_of(model).attention_backend is None


def test_ranks_share_with_and_without_a_cache_and_until_another_config_comes():
    """Sizes and `ulysses_async` are the options of these names, whatever calls come between."""

    def sizes(_):
        model = make_small()
        own = {"ulysses_anything": True, "experimental_ulysses_async": True}
        two = cache_dit.ParallelismConfig(ulysses_size=2, backend="native_diffuser", parallel_kwargs=own)
        calls = (
            {"parallelism_config": cache_dit.ParallelismConfig(ulysses_size=1)},
            {"parallelism_config": two},
            {"cache_config": always()},
            {"attention_backend": "native"},
            {"parallelism_config": cache_dit.ParallelismConfig(ulysses_size=1)},
            {"parallelism_config": cache_dit.ParallelismConfig(ring_size=2)},
            {"cache_config": DBCacheConfig(cache_type=cache_dit.NONE)},
        )
        found = []
        for settings in calls:
            cache_dit.enable_cache(model, **settings, **EAGER)
            options = [state.options for state in states_of(model)[:1]]
            found += [
                (each.cache is not None, each.ulysses_size, each.ring_size, each.ulysses_async) for each in options
            ]
        output = denoise(model, FALLING[:1])
        cache_dit.disable_cache(model)
        assert close(output, denoise(model, FALLING[:1]))
        assert not states_of(model) and kept_of(model).parallelism_config is None
        return found

    without, with_cache = (False, 2, 1, True), (True, 2, 1, True)
    expected = [without, with_cache, with_cache, (True, 1, 1, False), (True, 1, 2, False), (False, 1, 2, False)]
    assert on_ranks(sizes) == [expected, expected]


def test_ranks_that_are_not_there_are_an_error():
    model = make()
    for settings in ({"cache_config": always()}, {}):
        with pytest.raises(OptionError, match="torchrun --nproc_per_node=2"):
            cache_dit.enable_cache(model, parallelism_config=cache_dit.ParallelismConfig(ulysses_size=2), **settings)
    assert not states_of(model) and kept_of(model).parallelism_config is None


@pytest.mark.parametrize(
    "config", [{"tp_size": 2}, {"extra_parallel_modules": ["text_encoder"]}, {"ulysses_size": 2, "use_ray": True}]
)
def test_what_memory_depends_on_raises_before_anything_is_enabled(config):
    model = make()
    with pytest.raises(NotImplementedError, match="enable_model_cpu_offload"):
        cache_dit.enable_cache(model, always(), parallelism_config=cache_dit.ParallelismConfig(**config))
    assert not states_of(model)


@pytest.mark.parametrize("name", ["layerwise_offload", "ProfilerContext", "load"])
def test_names_without_a_counterpart_say_what_to_use(name):
    with pytest.raises(NotImplementedError, match="enable_group_offload|torch.profiler|these types work"):
        getattr(cache_dit, name)(torch.nn.Linear(1, 1), "path")


@pytest.mark.parametrize(
    ("enable", "words"),
    [
        (lambda model: BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern="Pattern_9"), "Pattern_0"),
        (lambda model: BlockAdapter(transformer=model, blocks_name="block"), "did you mean 'blocks'"),
        (lambda model: BlockAdapter(transformer=model, blocks=make().blocks), "none of Toy's block lists, blocks"),
        (lambda model: BlockAdapter(transformer=model, blocks=model.blocks[0]), "a Block is no list of blocks"),
        (lambda model: BlockAdapter(transformer=[model, make()], blocks=model.blocks), "need a list of 2"),
        (lambda model: BlockAdapter(), "pass a pipe or a transformer"),
        (
            lambda model: BlockAdapter(
                transformer=[model, make()], blocks_name=["blocks", "blocks"], forward_pattern=[*ForwardPattern][:3]
            ),
            "forward_pattern has 3 entries for 2 block lists",
        ),
        (lambda model: cache_dit.enable_cache(model, max_warm_up=4), "'max_warmup_steps'"),
        (lambda model: cache_dit.enable_cache(model, ANY({"max_warmup_steps": 4})), "must be a DBCacheConfig"),
        (lambda model: cache_dit.enable_cache(model, params_modifiers=[[ParamsModifier()]] * 2), "2 lists for 1"),
        (
            lambda model: cache_dit.enable_cache(
                BlockAdapter(transformer=model, blocks=model.blocks), params_modifiers=[ParamsModifier()] * 2
            ),
            "params_modifiers has 2 entries for 1 block lists",
        ),
        (lambda model: cache_dit.ParallelismConfig(ulysses_size=ANY("two")), "a number of devices"),
        (lambda model: cache_dit.ParallelismConfig(backend="ring"), "unknown option 'ring'"),
        (lambda model: cache_dit.ParallelismConfig(parallel_kwargs={"uaa": 1}), "unknown option 'uaa'"),
    ],
)
def test_bad_input_has_its_words(enable, words):
    with pytest.raises(OptionError) as error:
        enable(make())
    assert words in str(error.value)


def test_objects_of_the_other_package_are_recognised():
    other = type("BlockAdapter", (), {"__module__": "cache_dit.caching"})()
    with pytest.raises(OptionError, match="import it from cachedit_fx.compat"):
        cache_dit.enable_cache(other)
    pattern = type("ForwardPattern", (), {"__module__": "cache_dit.caching"})()
    with pytest.raises(OptionError, match="import it from cachedit_fx.compat"):
        BlockAdapter(transformer=make(), forward_pattern=pattern)


def test_patch_functors_are_left_out_and_say_so():
    from cachedit_fx.compat.caching.patch_functors import FluxPatchFunctor

    class Own(cache_dit.PatchFunctor):
        def _apply(self, transformer, **_):
            raise AssertionError("never called")

    for functor in (FluxPatchFunctor(), Own()):
        with pytest.warns(SettingWarning, match="patches nothing"):
            BlockAdapter(transformer=make(), blocks_name="blocks", patch_functor=functor)


def test_adapters_can_be_registered():
    class Special(Toy):
        pass

    @cache_dit.BlockAdapterRegister.register("Special")
    def adapter(pipe, **arguments):
        return BlockAdapter(
            transformer=pipe.transformer,
            blocks=pipe.transformer.blocks,
            params_modifiers=[ParamsModifier(max_warmup_steps=5)],
        )

    try:
        model = make(Special)
        assert cache_dit.get_adapter(model).blocks is model.blocks
        assert "Special*" in cache_dit.supported_pipelines()[1]
        cache_dit.enable_cache(model, always(), **EAGER)
        denoise(model)
        assert cache_dit.summary(model, logging=False)[0].cached_steps == list(range(5, STEPS))
    finally:
        del cache_dit.BlockAdapterRegister._adapters["Special"]
    assert cache_dit.BlockAdapterRegister.is_supported(model) and not cache_dit.BlockAdapterRegister.is_supported(7)
    assert cache_dit.get_adapter(model).modules() == [model]
