"""The backend under `torch.compile`: found by name, exact where nothing is reused, one graph for many models."""

import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lib import models
from lib.marks import only_in
from lib.shared import SharedGraph
from lib.toys import FALLING, CountingBackend, Loopless, Steps, Timeless, Toy, denoise, make, noise
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import cachedit_fx
from cachedit_fx import CacheWarning, OptionError, Reason, summary
from cachedit_fx.backend import cachedit

pytestmark = pytest.mark.filterwarnings("ignore:.*inert threshold")
ROOT = Path(__file__).resolve().parents[2]
OPTIONS: dict[str, Any] = {
    "inner_backend": "eager",
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 2,
    "residual_diff_threshold": 0.1,
}
OFF = OPTIONS | {"residual_diff_threshold": 0}
TEXT = noise(1, 3, seed=2)
NO_BRANCH = {"passes": {"insert_cache_branch": False}}


def compiled(model, options=OPTIONS, **more):
    return torch.compile(model, backend=cachedit, fullgraph=True, options=options, **more)


def decisions(model):
    return [branch.decisions for region in summary(model) for branch in region.branches]


# ---------------------------------------------------------------------------------------------------------------------
# found and configured

BY_NAME = """
import sys, torch
from lib.toys import denoise, make
from torch._dynamo.utils import counters

model = make()
expected = denoise(model)
assert not any(name.split(".")[0] == "cachedit_fx" for name in sys.modules)
options = dict(inner_backend="eager", Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.1)
fast = torch.compile(model, backend="cachedit", fullgraph=True, options=options)
found = denoise(fast)
assert not counters["graph_break"], counters["graph_break"]
assert counters["stats"]["unique_graphs"] == 1, counters["stats"]
import cachedit_fx
(region,) = cachedit_fx.summary(fast)
assert region.cached_steps and region.executed_steps == 10, region
assert not torch.equal(found, expected) and torch.allclose(found, expected, atol=0.1)
"""


@pytest.fixture
def installed(tmp_path):
    """A folder for the path of a process, with the metadata that an installation leaves: the entry points."""
    folder = tmp_path / "cachedit_fx-0.dist-info"
    folder.mkdir()
    folder.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: cachedit-fx\nVersion: 0\n")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()]
    folder.joinpath("entry_points.txt").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.full("packaging")
def test_by_name_with_no_import_of_ours(installed):
    """By default `tests/tools/test_packaging.py` asks this of the wheel."""
    paths = os.pathsep.join(map(str, (installed, ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", BY_NAME],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual_dif_threshold": 0.1}, "nearest known one is 'residual_diff_threshold'"),
        ({"granularity": "blocks"}, "did you mean 'block'"),
        ({"Fn_compute_blocks": -1}, "an integer >= 0"),
        ({"inner_backend": "aot"}, "did you mean 'aot_eager'"),
    ],
)
def test_options_are_checked_before_anything_is_compiled(options, message):
    inner = CountingBackend()
    with pytest.raises(BackendCompilerFailed, match=message):  # dynamo wraps what a backend raises
        compiled(make(), {"inner_backend": inner} | options)(noise(), torch.tensor([1.0]), TEXT)
    with pytest.raises(OptionError, match=message):
        cachedit_fx.compile(make(), **{"inner_backend": inner} | options)  # not even called
    assert inner.pieces == 0


def test_mode_is_inductors_and_excludes_other_inner_backends():
    nothing = torch.fx.symbolic_trace(torch.nn.Identity())
    with pytest.raises(OptionError, match="mode of inductor"):
        cachedit(nothing, [], options={"inner_backend": "eager"}, mode="max-autotune")
    with pytest.raises(OptionError, match="did you mean 'reduce-overhead'"):
        cachedit(nothing, [], mode="reduce-overheat")


def test_mode_reaches_inductor(monkeypatch):
    """torch.compile hands `mode` to a backend as a keyword; its settings patch inductor's for every piece."""
    from torch._inductor import compile_fx

    patches = []

    def spy(gm, inputs, config_patches=None):
        patches.append(config_patches)
        return gm.forward

    monkeypatch.setattr(compile_fx, "compile_fx", spy)
    model = torch.compile(Timeless().eval(), backend=cachedit, mode="max-autotune-no-cudagraphs")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # six blocks, eight first ones: uncached
        model(noise(), TEXT)
    assert patches and all(item.get("max_autotune") is True for item in patches)


def test_inner_options_reach_a_callable():
    seen = []

    def inner(gm, inputs, **extra):
        seen.append(extra)
        return gm.forward

    model = compiled(make(), OPTIONS | {"inner_backend": inner, "inner_options": {"level": 3}})
    denoise(model)
    assert seen and all(extra == {"level": 3} for extra in seen)


# ---------------------------------------------------------------------------------------------------------------------
# the guardrail: nothing reused, nothing changed


@pytest.fixture(scope="module")
def toy() -> SharedGraph:
    return SharedGraph(make())


@pytest.fixture(scope="module")
def flux() -> tuple[SharedGraph, dict[str, Any]]:
    model, inputs = models.flux(double=3, single=3)
    return SharedGraph(model), inputs


@pytest.mark.keep_compiled
@pytest.mark.parametrize(
    ("granularity", "scope", "last"),
    [("block", "model", 0), ("block", "loop", 1), ("region", "model", 2), ("region", "loop", 0)],
)
def test_flux_with_the_eager_inner_backend_is_the_plain_model_to_the_bit(flux, granularity, scope, last):
    """Threshold 0."""
    fast, inputs = flux
    fast.compile(**OFF | {"granularity": granularity, "scope": scope, "Bn_compute_blocks": last})
    for timestep in (0.9, 0.7):
        inputs = inputs | {"timestep": torch.full((1,), timestep)}
        with torch.no_grad():
            expected = fast.module(**inputs)[0]
        assert torch.equal(fast(**inputs)[0], expected)
    regions = summary(fast.module)[: 1 if scope == "model" else 2]  # the latest options come first
    assert [region.num_blocks for region in regions] == ([6] if scope == "model" else [3, 3])
    assert all(region.executed_steps == 2 and region.cached_steps == [] for region in regions)


@pytest.mark.keep_compiled
@pytest.mark.parametrize("granularity", ["block", "region"])
@pytest.mark.parametrize(("first", "last"), [(1, 0), (2, 2)])
def test_toys_with_the_eager_inner_backend_are_plain_to_the_bit(toy, granularity, first, last):
    """Threshold 0, and a warm-up that computes everything (which stores, too)."""
    layout = {"granularity": granularity, "Fn_compute_blocks": first, "Bn_compute_blocks": last}
    expected = denoise(toy.module)
    toy.compile(**OFF | layout)
    assert torch.equal(denoise(toy), expected)
    toy.compile(**OPTIONS | layout | {"max_warmup_steps": 10})
    assert torch.equal(denoise(toy), expected)
    assert summary(toy.module)[0].cached_steps == []


def guarded_and_plain(shared, options, **inputs):
    """Outputs of a computed call with the cache branch and without it, regions cut alike."""
    outputs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)  # the plain one says that it is uncached
        for more in ({}, NO_BRANCH):
            shared.compile(**options | more)
            outputs.append(shared(**inputs))
    return outputs


@pytest.mark.keep_compiled
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("granularity", ["block", "region"])
@pytest.mark.parametrize("last", [0, 2])
def test_the_branch_changes_nothing_in_the_lowering(toy, inner, granularity, last):
    layout = {"inner_backend": inner, "granularity": granularity, "Bn_compute_blocks": last}
    inputs = {"hidden_states": noise(), "timestep": torch.tensor([500.0]), "encoder_hidden_states": TEXT}
    guarded, plain = guarded_and_plain(toy, OFF | layout, **inputs)
    assert torch.equal(guarded, plain)


@pytest.mark.keep_compiled
@pytest.mark.parametrize(
    ("granularity", "scope"), only_in("zoo", [("block", "model"), ("region", "loop")], but=[("region", "loop")])
)
def test_the_branch_changes_nothing_in_the_lowering_of_flux(flux, granularity, scope):
    shared, inputs = flux
    options = OFF | {"inner_backend": "aot_eager", "granularity": granularity, "scope": scope}
    guarded, plain = guarded_and_plain(shared, options, **inputs)
    assert torch.equal(guarded[0], plain[0])


def test_the_branch_changes_nothing_under_inductor():
    """And a call that reuses on identical inputs repeats it to the bit."""
    shared = SharedGraph(make(Steps, blocks=3))
    options = {"inner_backend": "inductor", "Fn_compute_blocks": 1, "max_warmup_steps": 1}
    shared.compile(**options, **NO_BRANCH)
    with pytest.warns(CacheWarning):
        expected = shared(noise())
    shared.compile(**options)
    assert all(torch.equal(shared(noise()), expected) for _ in range(3))
    assert summary(shared.module)[0].cached_steps == [1, 2]


def test_alike_blocks_are_compiled_once():
    inner = CountingBackend()
    denoise(compiled(make(blocks=12), OPTIONS | {"inner_backend": inner}))
    assert inner.pieces == 1  # a block: the toy's linear of the timestep is too small to be hoisted


# ---------------------------------------------------------------------------------------------------------------------
# one graph serves many models, one model is many graphs


def test_two_models_of_one_class_share_a_graph_but_no_state():
    """Their calls alternate; each must see its own history alone."""
    inner = CountingBackend()
    options = OPTIONS | {"inner_backend": inner}
    first, second = make(seed=0), make(seed=1)
    expected = []
    for seed in range(2):
        alone = compiled(make(seed=seed), options)
        expected.append((denoise(alone), decisions(alone)))
    torch._dynamo.reset()
    before = inner.pieces
    fast = [compiled(first, options), compiled(second, options)]
    hidden = [noise(), noise()]
    with torch.no_grad():
        for timestep in FALLING:
            for index, model in enumerate(fast):
                hidden[index] = hidden[index] - 0.05 * model(hidden[index], torch.tensor([timestep]), TEXT)
    assert inner.pieces - before == 1, "not one graph"
    for index, model in enumerate(fast):
        assert torch.equal(hidden[index], expected[index][0])
        assert decisions(model) == expected[index][1]


@pytest.mark.parametrize("shared", ["embed", "out", "time", "blocks"])
def test_models_that_share_weights_keep_apart(shared):
    """Tied embeddings, a tied output head, even tied blocks with heads of their own."""
    first, second = make(seed=0, blocks=3), make(seed=1, blocks=3)
    setattr(second, shared, getattr(first, shared))
    alone = []
    for model in (first, second):
        fast = compiled(model, OPTIONS)
        alone.append((denoise(fast), decisions(fast)))
        torch._dynamo.reset()
    cachedit_fx.refresh_context(first)
    cachedit_fx.refresh_context(second)
    fast = [compiled(first, OPTIONS), compiled(second, OPTIONS)]
    hidden = [noise(), noise()]
    with torch.no_grad():
        for timestep in FALLING:
            for index, model in enumerate(fast):
                hidden[index] = hidden[index] - 0.05 * model(hidden[index], torch.tensor([timestep]), TEXT)
    for index, model in enumerate(fast):
        assert torch.equal(hidden[index], alone[index][0])
        assert decisions(model) == alone[index][1]


def test_two_option_sets_on_one_model():
    """Two compiled forms of one module, called in turn: two histories."""
    model = make()
    sets = OPTIONS, OPTIONS | {"residual_diff_threshold": 0.05}
    loose, tight = (compiled(model, options) for options in sets)
    expected = [denoise(compiled(make(), options)) for options in sets]
    hidden = [noise(), noise()]
    with torch.no_grad():
        for timestep in FALLING:
            for index, fast in enumerate((loose, tight)):
                hidden[index] = hidden[index] - 0.05 * fast(hidden[index], torch.tensor([timestep]), TEXT)
    assert not torch.equal(*expected)
    assert torch.equal(hidden[0], expected[0]) and torch.equal(hidden[1], expected[1])
    latest, other = summary(model)
    assert len(latest.cached_steps) < len(other.cached_steps)
    denoise(loose)
    assert len(summary(model)[0].cached_steps) == len(other.cached_steps), "not the one used last ahead"


@pytest.mark.parametrize("convert", [float, int, lambda t: torch.tensor(t)], ids=["float", "int", "0-d"])
def test_every_kind_of_timestep(convert):
    timesteps = [float(int(t)) for t in FALLING]
    expected = compiled(make(blocks=3), OPTIONS)
    result = denoise(expected, timesteps)
    fast = compiled(make(blocks=3), OPTIONS)
    for _ in range(2):
        assert torch.equal(denoise(fast, timesteps, convert=convert), result)
        assert decisions(fast) == decisions(expected)


def test_two_prompt_lengths_are_two_graphs_and_one_state():
    """Classifier-free guidance whose negative prompt is shorter: calls alternate between two graphs of one model."""
    texts = noise(1, 3, seed=2), noise(1, 7, seed=3)
    counters.clear()
    fast = compiled(make(), OPTIONS, dynamic=False)
    for _ in range(2):
        denoise(fast, texts=texts)
    assert counters["stats"]["unique_graphs"] == 2
    (region,) = summary(fast)
    assert [branch.executed_steps for branch in region.branches] == [10, 10]
    assert region.cached_steps and region.cfg_cached_steps


@pytest.mark.parametrize("more", [{}, {"dynamic": True}], ids=["as it comes", "dynamic"])
def test_batch_and_resolution_change_mid_life(more):
    fast = compiled(make(blocks=3), OPTIONS, **more)
    for shape in [(1, 5), (2, 5), (1, 9), (1, 5)]:
        start = noise(*shape)
        expected = compiled(make(blocks=3), OPTIONS)
        assert torch.equal(denoise(fast, start=start), denoise(expected, start=start))
        assert decisions(fast) == decisions(expected)


def test_modes_in_turn_on_one_model():
    """Buffers made under inference mode must serve outside it; autocast has graphs of its own and the same state."""
    model = make()
    fast = compiled(model, OPTIONS)
    with torch.no_grad():
        expected = denoise(compiled(make(), OPTIONS))
    modes = [torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad]
    for mode in modes:
        with mode():
            hidden = noise()
            for timestep in FALLING:
                hidden = hidden - 0.05 * fast(hidden, torch.tensor([timestep]), TEXT)
        assert torch.equal(hidden, expected)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = denoise(model)
        result = denoise(fast)
        assert summary(fast)[0].cached_steps and summary(fast)[0].uncached_calls == 0
        assert torch.allclose(result, plain, atol=0.2) and not torch.equal(result, expected)
    assert torch.equal(denoise(fast), expected)


def test_a_mode_that_changes_within_a_generation():
    """The reference and the residuals of a step under inference mode serve the next step without it."""
    fast, expected = compiled(make(), OPTIONS), denoise(compiled(make(), OPTIONS))
    hidden = noise()
    for number, timestep in enumerate(FALLING):
        with torch.inference_mode() if number % 2 == 0 else torch.no_grad():
            hidden = hidden.clone() - 0.05 * fast(hidden, torch.tensor([timestep]), TEXT)
    assert torch.equal(hidden, expected)


# ---------------------------------------------------------------------------------------------------------------------
# uncached calls


def test_gradients_are_right_uncached_and_announced_once():
    model = make()
    start: Any = noise().requires_grad_()
    inputs = start, torch.tensor([500.0]), TEXT
    model(*inputs).sum().backward()
    expected = start.grad.clone(), model.blocks[3].up.weight.grad.clone()
    start.grad = None
    model.zero_grad()
    fast = compiled(model, OPTIONS)
    with pytest.warns(CacheWarning, match="gradients wanted") as caught:
        for _ in range(3):
            fast(*inputs)
        fast(*inputs).sum().backward()
    assert len(caught) == 1
    assert torch.equal(start.grad, expected[0]) and torch.equal(model.blocks[3].up.weight.grad, expected[1])
    (region,) = summary(fast)
    assert region.uncached_causes == {"gradients wanted": 4} and region.work == 1.0
    # and the same model caches once they are not
    denoise(fast)
    assert summary(fast)[0].cached_steps and summary(fast)[0].uncached_calls == 0


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Loopless, {}, "no block loop was found"),
        (Toy, {"Fn_compute_blocks": 4, "Bn_compute_blocks": 2}, "4 \\+ 2 leaves nothing to bypass of 6 blocks"),
        (Toy, {"passes": {"detect_block_loops": False}}, "switched off"),
    ],
    ids=["no loop", "F + B", "pass off"],
)
def test_without_a_region_the_result_is_right_and_one_warning_says_why(kind, options, message):
    model = make(kind)
    inputs = (noise(), torch.tensor([500.0]), TEXT)[: 2 if kind is Loopless else 3]
    fast = compiled(model, OPTIONS | options)
    with torch.no_grad(), pytest.warns(CacheWarning, match=message) as caught:
        for _ in range(3):
            assert torch.equal(fast(*inputs), model(*inputs))
    assert len(caught) == 1
    (region,) = summary(fast)
    assert region.uncached_calls == 3 and region.work == 1.0


def test_no_cache_wanted():
    """`cache=None`: the graph is cut and compiled all the same; nothing is kept, counted or warned of."""
    model, inner = make(), CountingBackend()
    fast = compiled(model, {"cache": None, "inner_backend": inner})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(denoise(fast), denoise(model))
    assert inner.pieces == 1 and summary(fast) == []


def test_frozen_weights_under_grad_mode_are_cached():
    model = make().requires_grad_(False)
    fast = compiled(model, OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hidden = noise()
        for timestep in FALLING:
            hidden = hidden - 0.05 * fast(hidden, torch.tensor([timestep]), TEXT)
    assert summary(fast)[0].cached_steps and torch.equal(hidden, denoise(compiled(make(), OPTIONS)))


def test_a_prologue_that_is_a_graph_of_its_own_is_no_uncached_call():
    """Lumina2 and HunyuanVideo-1.5 are two graphs: the one without a loop is not a cause to warn, nor work."""

    class Breaking(Timeless):
        def forward(self, hidden_states, encoder_hidden_states):
            hidden_states = torch.tanh(hidden_states)
            torch._dynamo.graph_break()
            return super().forward(hidden_states, encoder_hidden_states)

    fast = cachedit_fx.compile(make(Breaking), **OPTIONS)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", CacheWarning)
        for _ in range(4):
            fast(noise(), TEXT)
    (region,) = [region for region in summary(fast) if region.num_blocks]
    assert region.cached_steps == [2, 3] and region.uncached_calls == 0
    assert region.work == pytest.approx(1 - 2 * 5 / 24)


def test_reasons_are_recorded():
    fast = compiled(make(), OPTIONS)
    denoise(fast)
    assert set(summary(fast)[0].reasons.values()) == {Reason.WARMUP, Reason.ABOVE_THRESHOLD, Reason.BELOW_THRESHOLD}


def test_new_weights_by_assignment():
    """`load_state_dict(assign=True)` replaces the parameters that a state was found by."""
    model = make()
    fast = compiled(model, OPTIONS)
    denoise(fast)
    other = make(seed=3)
    model.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=True)
    expected = compiled(other, OPTIONS)
    assert torch.equal(denoise(fast), denoise(expected))
    assert decisions(fast) == decisions(expected)
