"""`parallel="auto"`: what is chosen for a graph, ranks and guidance, and that the ranks then compute what one does."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lib import toys
from lib.generations import DBCACHE, generation, odd_flux
from lib.helpers import capture
from lib.marks import only_in
from lib.mixing import Model, grouped, tokens
from lib.ranks import close, on_ranks
from lib.shared import SharedCapture
from lib.toy_pipeline import TEXTS, ToyPipeline

import cachedit_fx
from cachedit_fx import auto_parallel
from cachedit_fx.bench.ulysses import pretended
from cachedit_fx.config.options import Options, parse_options
from cachedit_fx.config.rules import OptionError
from cachedit_fx.parallel_plan import cards
from cachedit_fx.parallel_plan.descriptions import Cards, Link, Split
from cachedit_fx.passes.base import NOTHING_KNOWN
from cachedit_fx.passes.graph_values import value_of
from cachedit_fx.runtime.clock import guidance
from cachedit_fx.runtime.registry import states_of

pytestmark = [pytest.mark.keep_compiled, pytest.mark.xdist_group("ulysses")]

FAST_LINKS = Cards("cards with fast links", 1e-3, 50, Link(100, 1e-9), Link(100, 1e-9))
"""Cards so slow that a small model's work counts, and the links do not."""
AUTO: dict[str, Any] = {"parallel": "auto", "inner_backend": "eager"} | DBCACHE
STEPS = 4
NOTHING = "no self-attention that ranks could share was found, so nothing was estimated"


class Guides(ToyPipeline):
    """Guides by two calls a step, and says so."""

    do_classifier_free_guidance = True


class Doubles(ToyPipeline):
    """Guides by a doubled batch."""

    def predict(self, latents, timestep, step):
        texts = torch.cat([text[:, :3] for text in self.texts])
        first, second = self.transformer(latents.expand(2, -1, -1), timestep.expand(2) / 1.0, texts).chunk(2)
        return first + 2.0 * (first - second)


@functools.cache
def captured(heads):
    """A small FLUX, captured once, with its inputs."""
    module, inputs = odd_flux(heads)
    shared = SharedCapture(module)
    shared(**inputs(3))
    return shared, inputs(3)


def choice_for(gm, ranks, some_cards=FAST_LINKS, traced=NOTHING_KNOWN):
    """What is chosen for a graph on so many ranks, none of which is there."""
    with pytest.MonkeyPatch.context() as patch, pretended(ranks):
        patch.setattr(auto_parallel, "assumed_cards", lambda device, ranks: some_cards)
        return auto_parallel.chosen(gm, parse_options(AUTO), traced)


def choice(heads, *arguments):
    """What is chosen for a small FLUX."""
    return choice_for(captured(heads)[0].graphs[0][0], *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Choices


@pytest.mark.budget(40, "captures models")
@pytest.mark.parametrize(
    ("heads", "ranks", "split"),
    [(2, 2, Split(ulysses=2)), (1, 2, Split(ring=2)), (2, 4, Split(ring=2, ulysses=2)), (2, 1, Split())],
)
def test_heads_and_ranks_choose(heads, ranks, split):
    found = choice(heads, ranks)
    assert found.split == split
    assert all(note.startswith('parallel="auto": ') for note in found.notes)
    if ranks > 1:
        assert found.notes[0].endswith(
            f"chosen for {ranks} ranks on cards with fast links, all in one node, and one branch"
        )
        assert f"{split.words}: " in found.notes[1] and "times as fast as one rank" in found.notes[1]


def test_links_choose():
    slow = Cards("slow links", 1e-3, 50, Link(0.01, 1e-9), Link(0.01, 1e-9))
    fast, other = choice(2, 2), choice(2, 2, slow)
    assert not fast.split.is_async and other.split.is_async


@pytest.mark.parametrize(("is_branch", "words"), [(True, "two branches of"), (False, "two halves of a batch of 3")])
def test_a_batch_is_cut_unless_its_call_is_a_branch(is_branch, words):
    gm = capture(Model(grouped, heads=4), tokens(9, batch=3)).gm
    assert words in choice_for(gm, 2, traced=replace(NOTHING_KNOWN, is_branch=is_branch)).notes[0]


def test_lengths_that_vary_count_as_captured():
    fixed, varying = (capture(Model(grouped, heads=4), tokens(9), dynamic=dynamic).gm for dynamic in (False, True))
    assert any(isinstance(value_of(node), torch.SymInt) for node in varying.graph.find_nodes(op="placeholder"))
    assert choice_for(varying, 4) == choice_for(fixed, 4)


def test_grouped_heads_choose():
    found = choice_for(capture(Model(grouped, heads=4), tokens(9)).gm, 4)
    assert found.split == Split(ring=2, ulysses=2)
    assert any("not ulysses_size=4: some self-attention cannot be shared so" in note for note in found.notes)


def test_a_graph_without_blocks_chooses_nothing():
    shared = SharedCapture(toys.make(toys.Loopless))
    shared(toys.noise(), toys.as_tensor(500.0))
    assert choice_for(shared.graphs[0][0], 2) is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM"),
        ("NVIDIA A100-PCIE-40GB", "NVIDIA A100-PCIE-40GB, taken for A100 PCIe"),
        ("NVIDIA L20", "L20"),
        ("NVIDIA H20", "NVIDIA H20, taken for A100 PCIe"),
    ],
)
def test_cards_are_known_by_their_names(monkeypatch, name, kind):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert cards.assumed_cards(torch.device("cuda"), 4).name == kind


def test_torchrun_says_how_many_cards_share_a_node(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cards.assumed_cards(torch.device("cpu"), 4).per_node == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cards.assumed_cards(torch.device("cpu"), 4).per_node == 2


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def flux_generations(heads, **options):
    """Two generations, the second after the options were given again, and the sizes after each."""
    shared, inputs = captured(heads)
    runs = []
    for threshold in (0.9, 0.5):
        shared.compile(**DBCACHE | {"residual_diff_threshold": threshold}, **options)
        runs.append((*generation(shared, inputs), shared._state.options.sizes.words))
    return runs


def auto_generations(rank, heads):
    auto_parallel.assumed_cards = lambda device, ranks: FAST_LINKS
    return flux_generations(heads, parallel="auto")


@pytest.mark.budget(60, "models run on two ranks")
@pytest.mark.parametrize(
    ("heads", "words"), only_in("parallel", [(2, "ulysses_size=2"), (1, "ring_size=2")], but=[(1, "ring_size=2")])
)
def test_ranks_share_a_sample_as_chosen(heads, words):
    expected = flux_generations(heads)
    for runs in on_ranks(functools.partial(auto_generations, heads=heads)):
        for (outputs, stats, _, found), (outputs_of_one, stats_of_one, _, _) in zip(runs, expected, strict=True):
            assert found == words and stats == stats_of_one
            assert all(map(close, outputs, outputs_of_one))


def pictures(kind, texts=TEXTS, again=False, **options):
    """Latents of a pipeline, the options then, and the explanation's notes."""
    module = toys.make(blocks=4).requires_grad_(False)
    pipe = kind(module, texts)
    cachedit_fx.enable_cache(pipe, inner_backend="eager", **DBCACHE, **options)
    latents = [pipe(toys.noise(seed=seed), STEPS) for seed in range(2)]
    cachedit_fx.enable_cache(pipe, inner_backend="eager", **DBCACHE | {"residual_diff_threshold": 0.1}, **options)
    latents.append(pipe(toys.noise(seed=2), STEPS))
    cachedit_fx.refresh_context(pipe, num_inference_steps=STEPS)
    latents.append(pipe(toys.noise(seed=3), STEPS))
    state = states_of(module)[0]
    notes = cachedit_fx.explain(module).notes
    anew = (
        cachedit_fx.explain(module, toys.noise(), torch.tensor([500.0]), TEXTS[0]).notes if len(texts) == 1 else notes
    )
    return latents, state.options.sizes.words, state.asked.parallel, notes, anew


CASES: dict[str, tuple[Any, Any, dict[str, Any], str, str]] = {
    "two calls": (Guides, TEXTS, {}, "cfg_parallel=True", "two branches of guidance"),
    "doubled batch": (Doubles, TEXTS, {}, "cfg_parallel=True", "two halves of a batch of 2"),
    "one call": (ToyPipeline, TEXTS[:1], {}, "ulysses_size=2", "one branch"),
    "first rank's inputs": (Guides, TEXTS, {"ulysses_inputs": "first_rank"}, "ulysses_size=2", "two branches"),
}


BY_DEFAULT = ["two calls", "one call"]
"""Cases of the default part. The part `parallel` has the other ones."""


@functools.cache
def together(is_default):
    """For each rank: case -> what `pictures` gives. Of the default part's cases, or of the other ones."""
    cases = {name: case for name, case in CASES.items() if (name in BY_DEFAULT) == is_default}
    return on_ranks(
        lambda rank: {
            name: pictures(kind, texts, parallel="auto", **options)
            for name, (kind, texts, options, _, _) in cases.items()
        },
        seconds=60,
    )


@pytest.mark.budget(60, "models are captured on two ranks")
@pytest.mark.parametrize("name", only_in("parallel", list(CASES), BY_DEFAULT))
def test_guidance_chooses(name):
    kind, texts, _, words, reason = CASES[name]
    expected = pictures(kind, texts)[0]
    for found in together(name in BY_DEFAULT):
        latents, sizes, asked, notes, anew = found[name]
        assert all(map(close, latents, expected))
        assert (sizes, asked) == (words, "auto")
        own = [note for note in notes if note.startswith('parallel="auto": ')]
        assert own == [f'parallel="auto": {words}, for 2 ranks and {reason_of(own[0])}: {NOTHING}']
        assert reason in own[0] and own[0] in anew


def test_true_guidance_is_guidance():
    said = []

    class Says(ToyPipeline):
        def predict(self, latents, timestep, step):
            do_true_cfg = len(self.texts) > 1
            said.append((guidance()[1], do_true_cfg))
            return latents

    Says(None, TEXTS)(toys.noise(), 1)
    Says(None, TEXTS[:1])(toys.noise(), 1)
    assert said == [(True, True), (False, False)]


def reason_of(note):
    return note.partition("2 ranks and ")[2].partition(": ")[0]


def plain(rank):
    """What plain `torch.compile` makes of a model."""
    auto_parallel.assumed_cards = lambda device, ranks: FAST_LINKS
    shared, inputs = captured(2)
    torch.compiler.reset()
    compiled = torch.compile(shared.module, backend="cachedit", options=AUTO)
    with torch.no_grad():
        result = compiled(**inputs)[0]
    (state,) = states_of(shared.module)
    return result, state.options.sizes.words


@pytest.mark.budget(60, "a model is captured on two ranks")
def test_plain_compile():
    shared, inputs = captured(2)
    expected = shared.module(**inputs)[0]
    for result, words in on_ranks(plain):
        assert words == "ulysses_size=2" and close(result, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ulysses_size": 2}, "ulysses_size=2"),
        ({"ring_size": 2, "ulysses_size": 2}, "ring_size=2, ulysses_size=2"),
        ({"cfg_parallel": True}, "cfg_parallel=True"),
        ({"ulysses_async": True}, "ulysses_async=True"),
        ({"ulysses_mesh": dist.ProcessGroup(dist.HashStore(), 0, 1)}, "ulysses_mesh"),
    ],
)
def test_what_is_chosen_is_not_given(settings, words):
    with pytest.raises(OptionError, match=f"chooses how ranks share a sample, and {words} says it: leave out one"):
        parse_options({"parallel": "auto"} | settings)


def test_other_words_are_refused():
    with pytest.raises(OptionError, match="parallel='automatic' is not allowed.*did you mean 'auto'"):
        parse_options({"parallel": "automatic"})


def test_needs_processes():
    with pytest.raises(OptionError, match="parallel='auto' needs several processes .* torchrun --nproc_per_node=gpu"):
        cachedit_fx.compile(toys.make_small(), parallel="auto")


def test_one_rank_works_alone():
    module = toys.make_small()
    with pretended(1), torch.no_grad():
        cachedit_fx.compile(module, **AUTO)
        result = module(toys.noise(), toys.as_tensor(500.0), TEXTS[0])
    (state,) = states_of(module)
    assert torch.equal(result, module._call_impl(toys.noise(), toys.as_tensor(500.0), TEXTS[0]))
    assert state.options == parse_options({"inner_backend": "eager"} | DBCACHE) and isinstance(state.options, Options)
