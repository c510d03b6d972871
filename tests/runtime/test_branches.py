"""`cfg_parallel`: two ranks compute the branches of guidance at once, and get what one rank gets."""

from __future__ import annotations

import functools
import os
import signal
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.cache_utils import CacheMixin
from lib import toys, zoo
from lib.marks import only_in
from lib.ranks import close, on_ranks
from lib.toy_pipeline import ToyPipeline
from torch.utils._pytree import tree_leaves

import cachedit_fx
from cachedit_fx import DBPruneConfig, RankMissing, RanksDisagree, TaylorSeerCalibratorConfig
from cachedit_fx.config.options import parse_options
from cachedit_fx.config.rules import OptionError
from cachedit_fx.runtime import graph
from cachedit_fx.runtime.awaited import Arrival, Awaited
from cachedit_fx.runtime.branches import Branches, Form
from cachedit_fx.runtime.graph import CachedGraph
from cachedit_fx.shapes import generate, held_out_prompts, load_pipeline

pytestmark = [pytest.mark.keep_compiled, pytest.mark.xdist_group("ulysses")]

DBCACHE: dict[str, Any] = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.9}
STEPS = 6
LONG, SHORT = (toys.noise(1, tokens, seed=tokens) for tokens in (6, 4))


class Guides(ToyPipeline):
    """Calls the model for each text. A step may have its own texts."""

    of_step: dict[int, Any] = {}

    def predict(self, latents, timestep, step):
        texts = self.of_step.get(step, self.texts)
        first, *others = [self.transformer(latents, timestep.expand(1) / 1.0, text) for text in texts]
        return first + sum(2.0 * (first - other) for other in others)


class Names(Guides):
    """Names the branches, the second of which comes first."""

    def predict(self, latents, timestep, step):
        results = {}
        for name, text in (("uncond", SHORT), ("cond", LONG)):
            with self.transformer.cache_context(name):
                results[name] = self.transformer(latents, timestep.expand(1) / 1.0, text)
        return results["cond"] + 2.0 * (results["cond"] - results["uncond"])


PIPELINES: dict[str, Any] = {
    "two texts": (Guides, {}),
    "named": (Names, {}),
    "guidance in the middle": (Guides, dict.fromkeys((0, 1, 4, 5), (LONG,))),
    "a third branch": (Guides, dict.fromkeys((2, 3, 4), (LONG, SHORT, -LONG))),
    "a missing call": (Guides, {3: (LONG,)}),
    "no guidance": (Guides, dict.fromkeys(range(STEPS), (LONG,))),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "dbcache": DBCACHE,
    "threshold 0": DBCACHE | {"residual_diff_threshold": 0.0},
    "taylorseer": DBCACHE | {"calibrator": TaylorSeerCalibratorConfig()},
    "dbprune": {"cache": DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=0.9)},
    "loops": DBCACHE | {"scope": "loop"},
    "shortcuts": DBCACHE | {"guards": "generation"},
}


class Named(CacheMixin, toys.Toy):
    """A toy whose calls may be named."""


def small():
    return toys.make(Named, blocks=4).requires_grad_(False)


def decisions(module):
    """(branch, step, action) of every decision, and the calls that others computed."""
    entries = cachedit_fx.summary(module)
    made = {
        (number, branch, step, decision.action)
        for number, entry in enumerate(entries)
        for branch, stats in enumerate(entry.branches)
        for step, decision in stats.decisions.items()
    }
    return made, sum(entries[0].elsewhere.values())


def generations(pipeline, setting, **ranks):
    """Pictures, and decisions, of three generations."""
    kind, of_step = PIPELINES[pipeline]
    module = small()
    cachedit_fx.enable_cache(module, inner_backend="eager", **SETTINGS[setting], **ranks)
    pipe = kind(module, (LONG, SHORT))
    pipe.of_step = of_step
    runs = []
    for seed in range(3):
        latents = pipe(toys.noise(seed=seed), STEPS)
        runs.append((latents, *decisions(module)))
    return runs


@functools.cache
def alone(pipeline, setting):
    return generations(pipeline, setting)


CASES = [(pipeline, "dbcache") for pipeline in PIPELINES] + [("two texts", setting) for setting in SETTINGS]
BY_DEFAULT = [("named", "dbcache"), ("guidance in the middle", "dbcache"), ("two texts", "shortcuts")]
"""Cases of the default part. The part `parallel` has the other ones."""


@functools.cache
def together(is_default):
    """For each rank: case -> generations. Of the default part's cases, or of the other ones."""
    cases = [case for case in CASES if (case in BY_DEFAULT) == is_default]
    return on_ranks(lambda rank: {case: generations(*case, cfg_parallel=True) for case in cases}, seconds=60)


@pytest.mark.budget(60, "models are captured on two ranks")
@pytest.mark.parametrize(("pipeline", "setting"), only_in("parallel", CASES, BY_DEFAULT))
def test_equals_one_rank(pipeline, setting):
    case = pipeline, setting
    expected, both = alone(*case), [found[case] for found in together(case in BY_DEFAULT)]
    for number, (latents, made, _) in enumerate(expected):
        parts = [found[number] for found in both]
        assert all(torch.equal(part[0], latents) for part in parts)
        assert parts[0][1] | parts[1][1] == made
        if number:  # before, the first call of each form runs on both ranks
            assert not parts[0][1] & parts[1][1]
            calls = len({(branch, step) for _, branch, step, _ in made})
            assert parts[0][2] + parts[1][2] == calls
    first, second = (found[-1][1] for found in both)
    assert {branch % 2 for _, branch, _, _ in first} <= {0} and {branch % 2 for _, branch, _, _ in second} <= {1}


# ---------------------------------------------------------------------------------------------------------------------
# Grids


def guided_pictures(**ranks):
    """Pictures of the bundled model with guidance, and the cached steps of both branches."""
    pipe = load_pipeline()
    settings = DBCACHE | {"max_warmup_steps": 2, "residual_diff_threshold": 0.3}
    cachedit_fx.enable_cache(pipe, inner_backend="eager", **settings, **ranks)
    pictures = [generate(pipe, held_out_prompts(1, 0), 8, seed, true_cfg_scale=3.0) for seed in range(2)]
    (stats,) = cachedit_fx.summary(pipe)
    return pictures, (stats.cached_steps, stats.cfg_cached_steps)


@pytest.mark.full("parallel")
@pytest.mark.budget(240, "the bundled model, captured on four ranks")
@pytest.mark.parametrize("size", ["ulysses_size", "ring_size"])
def test_branches_and_tokens_make_a_grid(size):
    expected, cached = guided_pictures()
    found = on_ranks(lambda rank: guided_pictures(cfg_parallel=True, **{size: 2}), ranks=4, seconds=120)
    for rank, (pictures, steps) in enumerate(found):
        assert all(map(close, pictures, expected))
        branch = rank // 2
        assert steps[branch] == cached[branch] and cached[branch] and not steps[1 - branch]


# ---------------------------------------------------------------------------------------------------------------------
# Every class of diffusers


def guided_class(rank, name):
    """The results of two steps of two branches, as a class of the zoo computes them plainly and on two ranks."""
    module, inputs = zoo.ZOO[name]()
    arguments = inputs(1)
    settings = DBCACHE | {"residual_diff_threshold": 0.0, "enable_separate_cfg": True}
    with torch.no_grad():
        expected = flat(module(**arguments))
        cachedit_fx.enable_cache(module, inner_backend="eager", cfg_parallel=True, **settings)
        found = [flat(module(**arguments)) for _ in range(4)]
    return expected, [[value + 0 for value in each] for each in found], decisions(module)[1]


def flat(result):
    return [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)]


ALONE = {"HunyuanVideoFramepackTransformer3DModel": "the sizes of its results depend on data"}
"""Classes whose calls no rank can leave to another one, and why."""


@pytest.mark.full("parallel")
@pytest.mark.budget(120, "two ranks capture a class")
@pytest.mark.parametrize("name", sorted(set(zoo.ZOO) - set(zoo.SHORT)))
def test_every_class_is_right_on_two_ranks(name):
    for expected, found, elsewhere in on_ranks(functools.partial(guided_class, name=name), seconds=60):
        for results in found:
            assert all(close(a, b, 5e-5) for a, b in zip(results, expected, strict=True))
        assert bool(elsewhere) == (name not in ALONE)


# ---------------------------------------------------------------------------------------------------------------------
# Time


class Slow(Branches):
    """Takes a while to compute, and notes from when to when."""

    seconds = 0.05
    intervals: list[tuple[float, float]] = []

    def _computed(self, known, compute):
        def slow():
            start = time.monotonic()
            time.sleep(self.seconds)
            results = compute()
            self.intervals.append((start, time.monotonic()))
            return results

        return super()._computed(known, slow)


def guided(module, texts=(LONG, SHORT), steps=STEPS, seed=0):
    return Guides(module, texts)(toys.noise(seed=seed), steps)


def intervals(rank):
    """When this rank computed calls, in the second generation."""
    module = small()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "Branches", Slow)
        cachedit_fx.enable_cache(module, inner_backend="eager", cfg_parallel=True, **DBCACHE)
        guided(module)
        Slow.intervals.clear()
        guided(module)
    return Slow.intervals


def test_branches_are_computed_at_the_same_time():
    first, second = on_ranks(intervals)
    assert len(first) == len(second) == STEPS
    overlaps = [min(a[1], b[1]) - max(a[0], b[0]) for a, b in zip(first, second, strict=True)]
    assert min(overlaps) > 0 and sum(overlaps) > 0.5 * STEPS * Slow.seconds


# ---------------------------------------------------------------------------------------------------------------------
# Faults


class Fails(Exception):
    """What a rank fails with."""


def error_of(function, *arguments, **options):
    """The error of a call as text, and the seconds that it took."""
    start = time.monotonic()
    try:
        function(*arguments, **options)
    except (RanksDisagree, Fails) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "", time.monotonic() - start


def failing(rank):
    """Rank 0 runs out of something in its branch."""
    module = small()
    cachedit_fx.enable_cache(module, inner_backend="eager", cfg_parallel=True, **DBCACHE)
    guided(module)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(CachedGraph, "_results", fail)
        return error_of(guided, module)


def fail(*_):
    raise Fails("out of memory")


def test_a_rank_that_fails_tells_the_other_one_at_once():
    mine, theirs = on_ranks(failing, seconds=10)
    assert mine[0] == "Fails: out of memory"
    assert theirs[0].startswith("RankMissing: cfg_parallel=True: rank 0 failed in its branch of Named. Its own output")
    assert theirs[1] < 5


def other_prompts(rank, place):
    """A rank guides away from another text, or by another one."""
    module = small()
    cachedit_fx.enable_cache(module, inner_backend="eager", cfg_parallel=True, **DBCACHE)
    guided(module)
    texts = [LONG, SHORT]
    texts[place] = texts[place] * (1 + rank)
    return error_of(guided, module, texts, steps=3)


@pytest.mark.parametrize("place", [0, 1])
def test_ranks_with_other_prompts_are_told_so(place):
    first, second = on_ranks(functools.partial(other_prompts, place=place), seconds=60)
    assert first[0] == second[0]
    assert "cfg_parallel=True: ranks 0 and 1 differ in their calls: encoder_hidden_states has other values" in first[0]


def without_a_branch(rank, fault):
    """A rank never makes the second call of a step."""
    module = small()
    cachedit_fx.enable_cache(module, inner_backend="eager", cfg_parallel=True, **DBCACHE)
    guided(module)
    pipe = Guides(module, (LONG, SHORT))
    if rank == 1:
        pipe.of_step = {2: Faults(fault)}
    return error_of(pipe, toys.noise(), STEPS)


class Faults:
    """The texts of a step, of which the second never comes."""

    def __init__(self, fault):
        self.fault = fault

    def __iter__(self):
        yield LONG
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "hangs":
            time.sleep(3 * TIMEOUT)


TIMEOUT = 2.0


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("killed", "rank 1 ended before or during the call of Named"),
        ("hangs", "did not answer within 2 s"),
        ("left out", "did not answer within 2 s"),
    ],
)
def test_a_branch_that_never_comes(fault, words):
    run = functools.partial(without_a_branch, fault=fault)
    first, second = on_ranks(run, seconds=TIMEOUT, ending=[1] if fault == "killed" else [])
    assert words in first[0], first
    assert first[1] < (TIMEOUT if fault == "killed" else 2 * TIMEOUT)
    assert fault != "left out" or "the ranks have drifted apart" in second[0]


# ---------------------------------------------------------------------------------------------------------------------
# Results on their way


class Delivery:
    """Stands for a collective: the values are there after the wait."""

    def __init__(self, message, content):
        self.message, self.content, self.waits = message, content, 0

    def wait(self):
        self.waits += 1
        self.message.copy_(self.content)


@functools.cache
def combine():
    return torch.compile(lambda a, b: a + 3.0 * (a - b), backend="aot_eager")


VALUES = torch.arange(24.0).view(2, 3, 4)
VIEWS: dict[str, Any] = {
    "slice": lambda x: x[:, 1:],
    "select": lambda x: x[0],
    "view": lambda x: x.view(6, 4),
    "reshape": lambda x: x.reshape(-1),
    "permute": lambda x: x.permute(2, 0, 1),
    "chunk": lambda x: x.chunk(2)[1],
    "unbind": lambda x: x.unbind(1)[2],
    "detach": lambda x: x.detach(),
    "view of a view": lambda x: x[:, 1:].transpose(0, 1).unsqueeze(0),
    "same dtype": lambda x: x.to(torch.float32),
}
USES: dict[str, Any] = {
    "sum": lambda x: x + 1,
    "on the right": lambda x: torch.ones(4) * x,
    "in place": lambda x: x.mul_(2),
    "written": lambda x: x.index_fill_(0, torch.tensor([1]), 5.0),
    "copy of a slice": lambda x: x[:, 1:].clone(),
    "other dtype": lambda x: x.to(torch.float64),
    "compiled": lambda x: combine()(x, torch.ones(4)),
    "compiled on the right": lambda x: combine()(torch.ones(2, 3, 4), x),
    "list": lambda x: torch.tensor(x.tolist()),
    "array": lambda x: torch.from_numpy(x.numpy()),
    "array of a slice": lambda x: torch.from_numpy(x[:, 1:].numpy()),
    "number": lambda x: torch.tensor(x[1, 2, 3].item()),
    "truth": lambda x: torch.tensor(bool((x >= 0).all())),
    "cat": lambda x: torch.cat([x, x[:1]]),
    "iteration": lambda x: torch.stack([row * 2 for row in x]),
}


def awaited(values, header=(7, 0)):
    """A tensor that is on its way, and its delivery."""
    presence: Any = SimpleNamespace(members=(4, 5), heading="h: ", watch=lambda model: nullcontext())
    delivery = Delivery(torch.zeros_like(values), values)
    arrival = Arrival(delivery, torch.tensor(header), 7, presence, 1, "M")  # type: ignore[arg-type]
    return Awaited(delivery.message, arrival), delivery


@pytest.mark.parametrize("name", VIEWS)
def test_views_do_not_wait(name):
    tensor, delivery = awaited(VALUES)
    view = VIEWS[name](tensor)
    assert delivery.waits == 0 and view.shape == VIEWS[name](VALUES).shape
    assert torch.equal(view + 0, VIEWS[name](VALUES)) and delivery.waits == 1
    assert torch.equal(tensor + 0, VALUES) and delivery.waits == 1


@pytest.mark.parametrize("name", USES)
def test_uses_wait_once(name):
    tensor, delivery = awaited(VALUES)
    result = USES[name](tensor)
    expected = USES[name](VALUES.clone())
    assert torch.equal(result + 0, expected) and type(result + 0) is torch.Tensor and delivery.waits == 1
    if name in ("in place", "written"):
        assert torch.equal(tensor + 0, expected)


def test_what_is_told_without_waiting():
    tensor, delivery = awaited(VALUES)
    assert (tensor.shape, tensor.dtype, tensor.device, tensor.stride()) == (
        (VALUES.shape, VALUES.dtype, VALUES.device, VALUES.stride())
    )
    assert torch.is_tensor(tensor) and tensor.ndim == 3 and len(tensor) == 2 and delivery.waits == 0
    assert repr(tensor) == repr(VALUES)


@pytest.mark.parametrize(
    ("header", "words"),
    [((7, 1), "rank 5 failed in its branch of M"), ((8, 0), "sent the result of another call of M")],
)
def test_headers_are_read(header, words):
    tensor, _ = awaited(VALUES, header)
    with pytest.raises(RankMissing, match=words):
        tensor + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool, torch.int64])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_tensors_keep_their_layout(dtype, order):
    tensor = VALUES.to(dtype).permute(order)
    form = Form.of(tensor)
    message = torch.empty(form.bytes, dtype=torch.uint8)
    message[:] = form.sent(tensor)
    received = form.received(message)
    assert torch.equal(received, tensor) and received.stride() == tensor.stride() and received.dtype == dtype


# ---------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cache": None}, "cache=None switches it off"),
        ({"ulysses_inputs": "first_rank"}, "lets each call wait for the first rank"),
        ({"cfg_diff_compute_separate": False}, "lets one branch take the difference of the other"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, words):
    with pytest.raises(OptionError, match=words):
        parse_options({"cfg_parallel": True} | settings)


def test_needs_two_processes():
    with pytest.raises(OptionError, match="cfg_parallel=True needs 2 processes .* torchrun --nproc_per_node=2"):
        cachedit_fx.compile(small(), cfg_parallel=True)
