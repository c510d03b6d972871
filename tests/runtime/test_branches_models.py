"""`cfg_parallel` with models whose inputs hold awaited results, or whose results are out of the ordinary."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lib import toys
from lib.ranks import on_ranks

import cachedit_fx
from cachedit_fx import CacheWarning
from cachedit_fx.runtime import compiled_call

pytestmark = [pytest.mark.keep_compiled, pytest.mark.xdist_group("ulysses")]

DBCACHE: dict[str, Any] = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.9}
STEPS = 4
LONG, SHORT = (toys.noise(1, tokens, seed=tokens) for tokens in (6, 4))


@dataclass(frozen=True)
class Hints:
    """An input of a model, a container that pytrees do not know."""

    first: torch.Tensor
    second: torch.Tensor


Toy: Any = toys.Toy
picture = toys.Toy.forward
"""What all the models make."""


class TakesHints(Toy):
    def forward(self, hidden_states, timestep, text, hints):
        return picture(self, hidden_states + 0.1 * hints.first, timestep, text)


class WritesToItsInput(Toy):
    def forward(self, hidden_states, timestep, text, memory):
        result = picture(self, hidden_states + 0.1 * memory["before"], timestep, text)
        memory["text"] = text.mean(1) * timestep
        return result


class TakesAnAttribute(Toy):
    before: Any = None

    def forward(self, hidden_states, timestep, text):
        return picture(self, hidden_states + 0.1 * self.before, timestep, text)


class ReturnsAView(Toy):
    def forward(self, hidden_states, timestep, text):
        result = picture(self, hidden_states, timestep, text)
        return result, result[:, 1:]


class ReturnsItsInput(Toy):
    def forward(self, hidden_states, timestep, text):
        return picture(self, hidden_states, timestep, text), hidden_states[:, 1:]


class ReturnsAConjugate(Toy):
    def forward(self, hidden_states, timestep, text):
        result = picture(self, hidden_states, timestep, text)
        return result, torch.complex(result, 2 * result).conj()


class ReturnsANumber(Toy):
    def forward(self, hidden_states, timestep, text):
        result = picture(self, hidden_states, timestep, text)
        return result, result.abs().argmax().item()


class ReturnsItsTime(Toy):
    def forward(self, hidden_states, timestep, text):
        return picture(self, hidden_states, timestep, text), timestep.sum().item()


def hinted(container):
    """Steps whose inputs hold a plain tensor at first, and later the latest result."""

    def step(module, latents, time, results):
        hints = container(results[-1] if results else 0 * latents, latents)
        return [module(latents, time, text, hints) for text in (LONG, SHORT)]

    return step


def remembered(module, latents, time, results):
    memory = {"before": results[-1] if results else latents}
    first = module(latents, time, LONG, memory)
    second = module(latents, time, SHORT, {"before": latents, "text": 0})
    return [first + memory["text"], second]


def attributed(module, latents, time, results):
    found = []
    for text in (LONG, SHORT):
        module.before = results[-1] if results else 0 * latents
        found.append(module(latents, time, text))
    return found


def written(module, latents, time, results):
    """The first result is written to, and the second one read."""
    found = []
    for text in (LONG, SHORT):
        result, view = module(latents, time, text)
        result.mul_(0.5)
        found.append(result + view.mean().real)
    return found


def written_input(module, latents, time, results):
    found = []
    for text in (LONG, SHORT):
        sample = latents.clone()
        result, view = module(sample, time, text)
        view.mul_(0.5)
        found.append(result + sample)
    return found


def numbered(module, latents, time, results):
    pairs = [module(latents, time, text) for text in (LONG, SHORT)]
    return [result + 0.001 * number for result, number in pairs]


SHARED_MEMORY = "its results share memory, with each other or with its inputs"
CASES: dict[str, tuple[Any, Any, str]] = {
    "object": (TakesHints, hinted(Hints), ""),
    "namespace": (TakesHints, hinted(lambda first, second: SimpleNamespace(first=first, second=second)), ""),
    "written dict": (WritesToItsInput, remembered, ""),
    "attribute": (TakesAnAttribute, attributed, ""),
    "view": (ReturnsAView, written, SHARED_MEMORY),
    "view of an input": (ReturnsItsInput, written_input, SHARED_MEMORY),
    "conjugate": (ReturnsAConjugate, written, ""),
    "number": (ReturnsANumber, numbered, "numbers or sizes of its results depend on data"),
    "time": (ReturnsItsTime, numbered, ""),
}
"""Kind of model; a step, from model, latents, time and earlier results to those of two calls; why none is shared."""


def drawn(name, **options):
    """Latents of two generations, whether calls were left to others, and warnings."""
    kind, step, _ = CASES[name]
    module = toys.make(kind, blocks=4).requires_grad_(False)
    cachedit_fx.enable_cache(module, inner_backend="eager", **DBCACHE, **options)
    found, elsewhere = [], 0
    with torch.no_grad(), warnings.catch_warnings(record=True, action="always", category=CacheWarning) as warned:
        for seed in range(2):
            latents, results = toys.noise(seed=seed), list[torch.Tensor]()
            for number in range(STEPS):
                results = step(module, latents, torch.tensor([900.0 - 100 * number]), results)
                latents = latents - 0.1 * (3 * results[0] - 2 * results[1])
            found.append(latents)
        elsewhere = sum(cachedit_fx.summary(module)[0].elsewhere.values())
    return found, elsewhere, [str(each.message) for each in warned]


@functools.cache
def together():
    """For each rank: case -> what it drew."""
    return on_ranks(lambda rank: {name: drawn(name, cfg_parallel=True) for name in CASES}, seconds=10)


@pytest.mark.budget(60, "models are captured on two ranks")
@pytest.mark.parametrize("name", CASES)
def test_equals_one_rank(name):
    expected, _, warned_alone = drawn(name)
    *_, obstacle = CASES[name]
    for found in together():
        latents, elsewhere, warned = found[name]
        assert all(map(torch.equal, latents, expected))
        assert bool(elsewhere) == (not obstacle)
        others = [message for message in warned if message not in warned_alone]
        assert [message.endswith(obstacle) for message in others] == [True] * bool(obstacle)


class Fails(Exception):
    """What a rank fails with."""


def uncaptured(rank):
    """A rank fails before its graph; then both call again."""
    module = toys.make(blocks=4).requires_grad_(False)
    cachedit_fx.enable_cache(module, inner_backend="eager", cfg_parallel=True, **DBCACHE)
    inputs = toys.noise(), torch.tensor([900.0]), LONG
    found = []
    for attempt in range(2):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            if rank == 1 and not attempt:
                patch.setattr(compiled_call, "call_snapshot", fail)
            try:
                found.append(module(*inputs) + 0)
            except (Fails, cachedit_fx.RanksDisagree) as error:
                found.append(f"{type(error).__name__}: {error}")
        dist.barrier()
    return found


def fail(*_):
    raise Fails("no memory")


def test_a_rank_that_fails_before_its_graph_tells_the_other_one_and_both_go_on():
    (theirs, result), (mine, result_of_other) = on_ranks(uncaptured, seconds=20)
    assert mine == "Fails: no memory"
    assert "rank 1 takes no part in the call of Toy: it failed in its latest call, with Fails" in theirs
    assert torch.equal(result, result_of_other)
