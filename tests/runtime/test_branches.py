"""`cfg_parallel`: two ranks compute the branches of guidance at once, and get what one rank gets."""

from __future__ import annotations

import functools
import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.cache_utils import CacheMixin
from lib import toys, zoo
from lib.marks import only_in
from lib.ranks import close, on_ranks
from lib.toy_pipeline import ToyPipeline
from torch import nn
from torch.utils._pytree import tree_leaves

import cachedit_fx
from cachedit_fx import DBPruneConfig, RanksDisagree, TaylorSeerCalibratorConfig
from cachedit_fx.config.options import parse_options
from cachedit_fx.config.rules import OptionError
from cachedit_fx.runtime import graph
from cachedit_fx.runtime.branches import Branches
from cachedit_fx.runtime.graph import CachedGraph
from cachedit_fx.shapes import generate, held_out_prompts, load_pipeline

pytestmark = [pytest.mark.keep_compiled, pytest.mark.xdist_group("ulysses")]

DBCACHE: dict[str, Any] = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.9}
STEPS = 6
LONG, SHORT, LONGER = (toys.noise(1, tokens, seed=tokens) for tokens in (6, 4, 9))


class Guides(ToyPipeline):
    """Calls the model for each text. A step may have its own texts."""

    of_step: dict[int, Any] = {}

    def predict(self, latents, timestep, step):
        texts = self.of_step.get(step, self.texts)
        first, *others = [self.transformer(latents, timestep.expand(1) / 1.0, text) for text in texts]
        return first + sum(2.0 * (first - other) for other in others)


class Scales(Guides):
    """Gives the model another number at each step."""

    def predict(self, latents, timestep, step):
        factors = 1 + 0.1 * step, 1 - 0.01 * step
        calls = zip(self.of_step.get(step, self.texts), factors, strict=True)
        first, other = (self.transformer(latents, timestep.expand(1) / 1.0, text, factor) for text, factor in calls)
        return first + 2.0 * (first - other)


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
    "late guidance": (Guides, dict.fromkeys((0, 1, 2), (LONG,))),
    "another number": (Scales, {}),
    "another length": (Guides, dict.fromkeys((3, 4), (LONGER, SHORT))),
    "another length, once": (Guides, {4: (LONG, LONGER)}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "dbcache": DBCACHE,
    "threshold 0": DBCACHE | {"residual_diff_threshold": 0.0},
    "taylorseer": DBCACHE | {"calibrator": TaylorSeerCalibratorConfig()},
    "dbprune": {"cache": DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=0.9)},
    "loops": DBCACHE | {"scope": "loop"},
    "shortcuts": DBCACHE | {"guards": "generation"},
    "long warm-up": DBCACHE | {"max_warmup_steps": 3},
}


class Named(CacheMixin, toys.Toy):
    """A toy whose calls may be named."""


class Reading(nn.Module):
    """A block that reads the text, and hands on the picture's tokens alone: the text is no stream of the region."""

    def __init__(self, width):
        super().__init__()
        self.q, self.kv, self.scale = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, hidden_states, text, temb):
        query, key, value = (each[:, None] for each in (self.q(hidden_states), *self.kv(text).chunk(2, -1)))
        read = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return hidden_states + read * (1 + self.scale(temb)[:, None])


class Reads(CacheMixin, nn.Module):
    """A toy of such blocks, with a factor that is a number."""

    def __init__(self, blocks, width=8):
        super().__init__()
        self.time, self.out = nn.Linear(1, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Reading(width) for _ in range(blocks))

    def forward(self, hidden_states, timestep, encoder_hidden_states, factor=1.0):
        temb = self.time(timestep.reshape(-1, 1) / 1000)
        for block in self.blocks:
            hidden_states = block(hidden_states, encoder_hidden_states, temb)
        return self.out(hidden_states) * factor


def small(kind=Named):
    return toys.make(kind, blocks=4).requires_grad_(False)


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
    module = small(Reads if pipeline.startswith("another") else Named)
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


CASES = [(pipeline, "dbcache") for pipeline in PIPELINES]
CASES += [("two texts", setting) for setting in SETTINGS] + [("late guidance", "long warm-up")]
BY_DEFAULT = [("named", "dbcache"), ("late guidance", "long warm-up"), ("two texts", "shortcuts")]
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
        own = {decision for rank, part in enumerate(parts) for decision in part[1] if decision[1] % 2 == rank}
        assert own == made
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


class Chains(Guides):
    """Each call has the result of the one before as an input."""

    def predict(self, latents, timestep, step):
        time = timestep.expand(1) / 1.0
        first = self.transformer(latents, time, self.texts[0])
        return self.transformer(first, time, self.texts[1])


def chained(rank=0, **ranks):
    """Two generations, and how a last result lies in memory: its strides, offset, and the bytes of its storage."""
    module = small()
    cachedit_fx.enable_cache(module, inner_backend="eager", **DBCACHE, **ranks)
    pipe = Chains(module, (LONG, SHORT))
    results = [pipe(toys.noise(seed=seed), STEPS) for seed in range(2)]
    last = module(results[1], torch.tensor([0.5]), LONG)
    return results, (last.stride(), last.storage_offset(), last.contiguous().untyped_storage().nbytes())


def test_results_are_inputs_of_other_calls():
    expected, place = chained()
    for results, place_on_rank in on_ranks(functools.partial(chained, cfg_parallel=True), seconds=20):
        assert all(map(torch.equal, results, expected)) and place_on_rank == place


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
        first = error_of(guided, module)
    return first, error_of(guided, module)


def failing_at_first(rank, failed):
    """A rank runs out of something while all ranks compute the first call; then a generation without a fault."""
    module = small()
    cachedit_fx.enable_cache(module, inner_backend="eager", cfg_parallel=True, **DBCACHE)
    with pytest.MonkeyPatch.context() as patch:
        if rank == failed:
            patch.setattr(CachedGraph, "_results", fail)
        error = error_of(guided, module)
    return error, guided(module)


def fail(*_):
    raise Fails("out of memory")


def test_a_rank_that_fails_tells_the_other_one_at_once():
    (mine, mine_again), (theirs, theirs_again) = on_ranks(failing, seconds=10)
    assert mine[0] == "Fails: out of memory"
    assert theirs[0].startswith("RankMissing: cfg_parallel=True: rank 0 failed in its branch of Named. Its own output")
    assert mine_again[0].startswith("RankMissing: cfg_parallel=True: this rank has failed in its branch of Named")
    assert theirs_again[0] == theirs[0]
    assert max(seconds for _, seconds in (theirs, mine_again, theirs_again)) < 5


@pytest.mark.parametrize("failed", [0, 1])
def test_a_rank_that_fails_at_first_tells_the_other_one_and_both_go_on(failed):
    found = on_ranks(functools.partial(failing_at_first, failed=failed), seconds=10)
    (mine, result), (theirs, result_of_other) = found[failed], found[1 - failed]
    assert mine[0] == "Fails: out of memory"
    words = f"RankMissing: cfg_parallel=True: rank {failed} failed in a call of Named that every rank computes. Its own"
    assert theirs[0].startswith(words) and theirs[1] < 5
    assert torch.equal(result, result_of_other)


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
