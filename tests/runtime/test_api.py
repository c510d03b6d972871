"""The public face: compile in place, enable and disable, refresh, summary, explain."""

import copy
import io
import sys
import warnings
from typing import Any

import pytest
import torch
from lib import models
from lib.marks import only_in
from lib.toy_pipeline import ToyPipeline
from lib.toys import FALLING, CountingBackend, Loopless, Timeless, denoise, make, noise
from torch._dynamo.utils import counters

import cachedit_fx
from cachedit_fx import (
    CacheWarning,
    DBCacheConfig,
    OptionError,
    Reason,
    disable_cache,
    enable_cache,
    explain,
    refresh_context,
    summary,
)
from cachedit_fx.metrics.flops import FlopCounter
from cachedit_fx.runtime import progress

pytestmark = pytest.mark.filterwarnings("ignore:.*inert threshold")
BASE = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.1)
TEXT = noise(1, 3, seed=2)
CALL = (noise(), torch.tensor([500.0]), TEXT)


def enabled(model=None, config=BASE, **options):
    return enable_cache(make() if model is None else model, config, **{"inner_backend": "eager"} | options)


def graphs_compiled():
    return counters["stats"]["unique_graphs"]


class Pipeline:
    """What `enable_cache` needs of a diffusers pipeline."""

    def __init__(self, **components):
        self.components = components


# ---------------------------------------------------------------------------------------------------------------------
# compile


def test_compile_keeps_class_state_dict_and_identity():
    model = make()
    kind, keys, ids = type(model), list(model.state_dict()), [id(weight) for weight in model.parameters()]
    returned = cachedit_fx.compile(model, cache=BASE, inner_backend="eager", fullgraph=True)
    denoise(model)
    assert returned is model and type(model) is kind
    assert list(model.state_dict()) == keys and [id(weight) for weight in model.parameters()] == ids
    assert summary(model)[0].cached_steps


def test_hooks_still_run():
    model, seen = make(), []
    model.register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.register_forward_hook(lambda module, args, output: output * 2)
    expected = denoise(model)
    seen.clear()
    enabled(model, BASE.reset(residual_diff_threshold=0))
    assert torch.equal(denoise(model), expected)
    assert seen == ["before"] * len(FALLING)


@pytest.mark.parametrize("kind", ["toy", "flux"])
def test_a_deep_copy_is_uncompiled(kind):
    model, inputs = (make(), dict(zip(("hidden_states", "timestep", "encoder_hidden_states"), CALL, strict=True)))
    if kind == "flux":
        model, inputs = models.flux(double=2, single=2)
    enabled(model)
    with torch.no_grad():
        model(**inputs)
    twin = copy.deepcopy(model)
    assert twin._compiled_call_impl is None and model._compiled_call_impl is not None
    assert summary(twin) == [] and len(summary(model)) == 1
    before = graphs_compiled()
    with torch.no_grad():
        twin(**inputs)
    assert graphs_compiled() == before and summary(model)[0].executed_steps == 1
    # enabling the copy leaves the original alone
    enabled(twin)
    with torch.no_grad():
        twin(**inputs)
    disable_cache(twin)
    with torch.no_grad():
        model(**inputs)
    assert summary(model)[0].executed_steps + summary(model)[0].branch(1).executed_steps == 2


def test_a_compiled_module_can_be_saved(tmp_path):
    model, inputs = models.flux(double=2, single=2)
    enabled(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], disable_cache(model)(**inputs)[0])


def test_policy_changes_compile_nothing_and_structural_ones_do():
    inner = CountingBackend()
    counters.clear()
    model = enabled(inner_backend=inner)
    denoise(model)
    pieces, graphs = inner.pieces, graphs_compiled()
    assert pieces > 0 and graphs == 1
    policies: list[dict[str, Any]] = [
        {"residual_diff_threshold": 0.3},
        {"max_warmup_steps": 5, "warmup_interval": 2},
        {"max_cached_steps": 2, "max_continuous_cached_steps": 1},
        {"max_accumulated_residual_diff_threshold": 0.2},
        {"enable_separate_cfg": False},
        {"num_inference_steps": 10},
        {"steps_computation_mask": "1" * 10, "steps_computation_policy": "static"},
        {"residual_diff_threshold": 0.0},
    ]
    for changes in policies:
        enabled(model, BASE.reset(**changes), inner_backend=inner)
        denoise(model)
        refresh_context(model, cache_config=BASE.reset(**changes))
        denoise(model)
    assert (inner.pieces, graphs_compiled()) == (pieces, graphs)
    enabled(model, BASE.reset(Fn_compute_blocks=2), inner_backend=inner)
    denoise(model)
    assert inner.pieces > pieces and graphs_compiled() == graphs + 1
    assert summary(model)[0].first == 2


@pytest.mark.parametrize("torch_options", [{"fullgraph": True}, {"dynamic": False}])
def test_policy_changes_compile_nothing_with_options_of_torch_compile(torch_options):
    inner = CountingBackend()
    model = enabled(inner_backend=inner, **torch_options)
    denoise(model)
    pieces = inner.pieces
    enabled(model, BASE.reset(residual_diff_threshold=0.3), inner_backend=inner, **torch_options)
    denoise(model)
    assert inner.pieces == pieces


def test_a_structural_refresh_keeps_the_options_of_torch_compile():
    class Breaking(Timeless):
        def forward(self, hidden_states, encoder_hidden_states):
            hidden_states = hidden_states + 1
            torch._dynamo.graph_break()
            return super().forward(hidden_states, encoder_hidden_states)

    model = enabled(make(Breaking), fullgraph=True)
    refresh_context(model, cache_config=BASE.reset(Fn_compute_blocks=2))
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported):
        model(noise(), TEXT)


def test_wrong_options_are_told_before_the_first_call():
    with pytest.raises(OptionError, match="nearest known one is 'Fn_compute_blocks'"):
        cachedit_fx.compile(make(), Fn_compute_block=1)
    with pytest.raises(OptionError, match="two names for one thing"):
        enable_cache(make(), BASE, cache="dbcache")
    with pytest.raises(ValueError, match="insert_cache_branches"):
        cachedit_fx.compile(make(), passes={"insert_cache_branches": False})
    with pytest.raises(OptionError, match="no such argument"):
        cachedit_fx.compile(make(), timestep="time_step")


def test_nine_configurations_of_one_class_stay_cached():
    """Dynamo's limit of eight is per forward function; what is beyond it runs eager, in silence."""
    kept = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(10):
            model = enabled(make(Timeless, width=4 + number, blocks=2))
            kept.append(model)
            with torch.no_grad():
                for _ in range(3):
                    model(noise(width=4 + number), noise(1, 3, 4 + number, seed=2))
            assert summary(model)[0].cached_steps == [2]
    assert all(summary(model)[0].uncached_calls == 0 for model in kept)


def test_calls_that_reach_no_graph_are_counted_and_announced_once():
    model = enabled(make(Timeless), dynamic=False, recompile_limit=2)
    with torch.no_grad():
        for tokens in (3, 4):
            model(noise(tokens=tokens), TEXT)
        with pytest.warns(CacheWarning, match="captured no frame") as caught:
            for tokens in (5, 6, 7):
                result = model(noise(tokens=tokens), TEXT)
                assert torch.equal(result, model._call_impl(noise(tokens=tokens), TEXT))
    assert len([item for item in caught if item.category is CacheWarning]) == 1
    (region,) = summary(model)
    assert region.uncached_calls == 3 and region.work == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# enable, disable, refresh


def test_enable_returns_what_it_was_given_and_disable_restores():
    model = make()
    expected, pipe = denoise(model), Pipeline(transformer=model, vae=None)
    assert enable_cache(pipe, BASE, inner_backend="eager") is pipe
    assert not torch.equal(denoise(model), expected)
    assert disable_cache(pipe) is pipe
    before = graphs_compiled()
    assert torch.equal(denoise(model), expected)
    assert graphs_compiled() == before and model._compiled_call_impl is None and summary(pipe) == []
    assert disable_cache(pipe) is pipe  # twice is once
    enable_cache(pipe, BASE, inner_backend="eager")
    denoise(model)
    assert summary(pipe)[0].cached_steps


def test_disable_takes_the_listener_off():
    model, _ = models.flux()
    enabled(model)
    registry: Any = model._diffusers_hook
    assert "cachedit_fx" in registry.hooks
    disable_cache(model)
    assert registry.hooks == {} and registry._hook_order == []


def test_both_transformers_of_a_pipeline_are_enabled():
    pipe = Pipeline(transformer=make(seed=0), transformer_2=make(seed=1), text_encoder=torch.nn.Linear(2, 2), vae=None)
    enable_cache(pipe, BASE, inner_backend="eager")
    denoise(pipe.components["transformer"])
    denoise(pipe.components["transformer_2"], FALLING[:5])
    assert [region.executed_steps for region in summary(pipe)] == [10, 5]
    assert pipe.components["text_encoder"]._compiled_call_impl is None
    refresh_context(pipe, cache_config=BASE.reset(residual_diff_threshold=0))
    for model in (pipe.components["transformer"], pipe.components["transformer_2"]):
        denoise(model)
        assert summary(model)[0].cached_steps == []


@pytest.mark.parametrize("thing", [Pipeline(vae=None, unet=make(Loopless)), "transformer", None])
def test_what_has_no_transformer_is_refused(thing):
    with pytest.raises(TypeError, match="transformer|torch.nn.Module"):
        enable_cache(thing, BASE)


def test_refresh_starts_a_generation_under_another_policy(capsys):
    model = enabled()
    denoise(model, FALLING[:5])
    assert refresh_context(model) is model
    denoise(model, FALLING[5:])  # would otherwise go on
    assert summary(model)[0].executed_steps == 5 and summary(model)[0].reasons[1] is Reason.WARMUP
    refresh_context(model, num_inference_steps=3, verbose=True)
    assert "num_inference_steps=3" in capsys.readouterr().out
    denoise(model, FALLING[:4])
    assert summary(model)[0].executed_steps == 1
    refresh_context(model, cache_config=BASE.reset(residual_diff_threshold=0))
    denoise(model)
    assert summary(model)[0].executed_steps == 10 and summary(model)[0].cached_steps == []


def test_refresh_reaches_what_torch_compile_returned():
    model, inner = make(), CountingBackend()
    from cachedit_fx.backend import cachedit

    fast = torch.compile(model, backend=cachedit, options=dict[str, Any](cache=BASE, inner_backend=inner))
    denoise(fast)
    pieces = inner.pieces
    for handle in (fast, model):
        refresh_context(handle, cache_config=BASE.reset(residual_diff_threshold=0))
        denoise(fast)
        assert summary(fast)[0].cached_steps == []
        refresh_context(handle, cache_config=BASE)
        denoise(fast)
        assert summary(fast)[0].cached_steps
    assert inner.pieces == pieces
    with pytest.raises(OptionError, match="torch.compile"):
        refresh_context(fast, cache_config=BASE.reset(Fn_compute_blocks=2))
    with pytest.raises(OptionError, match="torch.compile"):
        enable_cache(fast, BASE)


def test_new_weights_by_assignment():
    model, other = enabled(), make(seed=3)
    denoise(model)
    model.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=True)
    assert torch.equal(denoise(model), denoise(enabled(other)))
    assert summary(model)[0].branch(0) == summary(other)[0].branch(0) and summary(model)[0].uncached_calls == 0


# ---------------------------------------------------------------------------------------------------------------------
# summary


def test_summary_prints_steps_reasons_and_differences(capsys):
    model = enabled()
    assert summary(model, details=True) == []
    assert "no statistics" in capsys.readouterr().out
    denoise(model)
    (region,) = summary(model, details=True)
    printed = " ".join(capsys.readouterr().out.split())  # wherever the lines break
    for word in ("warm-up", "below", "region_0", f"{region.residual_diffs[3]:.4f}", "left out", "saved"):
        assert word in printed
    assert summary(model) and capsys.readouterr().out == ""


def test_summary_is_of_the_latest_generation_and_measures_time_and_bytes():
    model = enabled()
    denoise(model)
    first = summary(model)[0].branch(0).decisions
    denoise(model, FALLING[:3])
    (region,) = summary(model)
    assert region.executed_steps == 3 and len(first) == 10
    computed = region.executed_steps - len(region.cached_steps)
    assert len(region.compute_seconds) == computed and len(region.reuse_seconds) == len(region.cached_steps)
    summary(model)
    assert len(region.compute_seconds) == computed, "counted twice"
    hidden, text = 5 * 8, 3 * 8  # elements; both are stored in float64, and the reference in float32
    assert region.bytes_held == 8 * (hidden + text) + 4 * hidden


def test_summary_of_a_loop_at_a_time_has_a_region_each():
    model, inputs = models.flux(double=2, single=3)
    enabled(model, scope="loop")
    with torch.no_grad():
        for timestep in (0.9, 0.8, 0.7):
            model(**inputs | {"timestep": torch.tensor([timestep])})
    regions = summary(model)
    assert [(region.name, region.num_blocks) for region in regions] == [("region_0", 2), ("region_1", 3)]
    assert all(region.executed_steps == 3 for region in regions)


# ---------------------------------------------------------------------------------------------------------------------
# explain


@pytest.mark.parametrize("state", only_in("zoo", ["plain", "compiled", "called"], but=["plain", "called"]))
def test_explain_finds_the_loops_and_runs_no_kernel(state):
    model, inputs = models.flux(double=2, single=3)
    if state != "plain":
        enabled(model)
    with torch.no_grad():
        if state == "called":
            model(**inputs)
        with FlopCounter() as work:
            found = explain(model, **inputs)
    assert work.kernels == 0
    assert [(loop.name, loop.num_blocks) for loop in found.loops] == [
        ("transformer_blocks", 2),
        ("single_transformer_blocks", 3),
    ]
    assert all(len(loop.carried) == 2 for loop in found.loops)
    assert found.chain == ("transformer_blocks", "single_transformer_blocks")
    assert len(found.regions) == (0 if state == "plain" else 1)  # the default F of 8 is more than there is
    assert sum(found.weights.values()) == pytest.approx(1) and 0.3 < found.weights["timestep"] < 0.4
    printed = str(found)
    assert "2 blocks (chain" in printed and "timestep 3" in printed and "class CachedTransformer" in found.code
    if state == "plain":
        assert "leaves nothing to bypass of 5 blocks" in printed
    else:
        assert "blocks 1 to 4 of 5 may be bypassed" in printed
        with torch.no_grad():
            model(**inputs)
        assert summary(model)[0].uncached_calls == 0


def test_explain_sees_the_kernels_of_a_call_that_does_run():
    """The counter above does count."""
    model = make()
    with torch.no_grad(), FlopCounter() as work:
        model(*CALL)
    assert work.kernels > 50 and work.flops > 0


def test_explain_says_that_there_is_no_loop():
    model = make(Loopless)
    found = explain(model, noise(), torch.tensor([500.0]))
    assert found.loops == () and found.regions == ()
    assert "Block loops: none" in str(found)


def test_explain_behind_a_graph_break():
    class Breaking(Timeless):
        def forward(self, hidden_states, encoder_hidden_states):
            hidden_states = hidden_states + 1
            torch._dynamo.graph_break()
            return super().forward(hidden_states, encoder_hidden_states)

    assert [loop.num_blocks for loop in explain(make(Breaking), noise(), TEXT).loops] == [6]


def test_explain_prints_to_any_stream():
    stream = io.StringIO()
    print(explain(make(), *CALL), file=stream)
    assert "blocks: 6 blocks" in stream.getvalue()


def test_explain_without_inputs_is_about_the_last_call():
    model = enable_cache(make(), BASE, inner_backend="eager")
    with pytest.raises(ValueError, match="no cached call of Toy was made yet"):
        explain(model)
    denoise(model)
    with_inputs, last = explain(model, *CALL), explain(ToyPipeline(model))
    assert str(last).splitlines()[:-1] == str(with_inputs).splitlines()[:-1] and len(last.regions) == 1
    assert len(str(last).splitlines()) < 12 and "print(explanation.code)" in str(last) and "region_call" in last.code
    uncached = enable_cache(make(blocks=1), BASE, inner_backend="eager")
    with pytest.warns(CacheWarning):
        denoise(uncached)
    assert any("no block loop" in note for note in explain(uncached).notes)


def test_the_first_compile_shows_its_steps_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "LONG", 0.0)
    model = enable_cache(make(), BASE, inner_backend=lambda gm, inputs: gm.forward)
    denoise(model)
    text = capsys.readouterr().err
    assert "capturing Toy" in text and "Toy captured and compiled in" in text
    denoise(model)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dynamic": "yes"}, "dynamic='yes' is not allowed: it must be True or False, or None"),
        ({"fullgraph": 2}, "fullgraph=2 is not allowed: it must be True or False"),
        ({"fullgraph": None}, "fullgraph=None is not allowed"),
        ({"recompile_limit": -1}, "recompile_limit=-1 is not allowed: it must be an integer >= 1"),
        ({"recompile_limit": True}, "recompile_limit=True is not allowed"),
    ],
)
def test_options_of_torch_are_checked(options, told):
    for enable in (cachedit_fx.compile, cachedit_fx.enable_cache):
        with pytest.raises(OptionError, match=told):
            enable(make(), **options)
