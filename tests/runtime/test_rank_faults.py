"""Ranks that do not take part in a call, or end in it: an error on the others, which names the rank and the reason."""

import functools
import os
import signal
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lib import toys
from lib.marks import only_in
from lib.ranks import close, on_ranks, ranks_of
from lib.shared import SharedCapture
from torch import nn

import cachedit_fx
from cachedit_fx import CacheWarning, RankMissing, RanksDisagree
from cachedit_fx.runtime.presence import come_back, leave

pytestmark = [pytest.mark.keep_compiled, pytest.mark.xdist_group("ulysses")]

CACHE: dict[str, Any] = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.9}
OPTIONS = CACHE | {"ulysses_size": 2}
GROUPS: dict[str, dict[str, Any]] = {
    "ulysses_size=2": {"ulysses_size": 2},
    "ring_size=2": {"ring_size": 2},
}
"""Ways to share a sample, by the words of errors. The part `parallel` has those that are not the first."""
BY_DEFAULT = ["ulysses_size=2"]
TIMEOUT = 1.5
"""The group's time-out in seconds, for ranks that hang."""
AT_ONCE = 1.2
"""What an error may take that does not wait for the time-out, in seconds: a second is for the death of a process."""


def error_of(function, *args, **kwargs):
    """The error of a call, its cause's type, and the seconds that it took; empty and None without an error."""
    start = time.monotonic()
    try:
        function(*args, **kwargs)
    except RanksDisagree as error:
        cause = error.__cause__ and type(error.__cause__).__name__
        return f"{type(error).__name__}: {error}", cause, time.monotonic() - start
    return "", None, time.monotonic() - start


# ---------------------------------------------------------------------------------------------------------------------
# Ranks that leave


class Flagged(nn.Module):
    """A toy that captures another graph with a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = toys.make_small()

    def forward(self, hidden_states, timestep, encoder_hidden_states, is_scaled=False):
        result = self.toy(hidden_states, timestep, encoder_hidden_states)
        return result * 2.0 if is_scaled else result


def arguments():
    text = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(2))
    return {"hidden_states": toys.noise(), "timestep": torch.tensor([900.0]), "encoder_hidden_states": text}


def leaving(rank, words):
    """What rank 0 meets with while rank 1 leaves in one way after the other, and comes back each time."""
    module, found = Flagged().requires_grad_(False), {}
    expected = module(**arguments())
    options = CACHE | GROUPS[words] | {"inner_backend": "eager"}

    def call(**more):
        """The first of the two steps of a generation."""
        with torch.no_grad():
            first, _ = (module(**arguments() | {"timestep": torch.tensor([time])}, **more) for time in (900.0, 800.0))
        return first

    def together(name):
        dist.barrier()  # rank 1 is back
        found[f"after {name}"] = call()

    def alone(name, function):
        found[name] = error_of(call) if rank == 0 else function()
        dist.barrier()  # rank 1 stays away so long

    cachedit_fx.enable_cache(module, **options)
    together("nothing")
    if rank:
        cachedit_fx.disable_cache(module)
    alone("disabled", call)
    cachedit_fx.enable_cache(module, **options)
    together("disabled")
    if rank:
        cachedit_fx.enable_cache(module, **options | dict.fromkeys(GROUPS[words], 1))
    alone("another size", call)
    cachedit_fx.enable_cache(module, **options)
    together("another size")

    def with_gradients():
        module.requires_grad_(True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CacheWarning)
            result = module(**arguments())
        module.requires_grad_(False)
        return result.detach()

    alone("gradients", with_gradients)
    cachedit_fx.enable_cache(module, **options)
    together("gradients")
    with pytest.raises(RanksDisagree) as error:
        call(is_scaled=rank == 1)
    found["another graph"] = str(error.value)
    return expected, found


@functools.cache
def left(words):
    return on_ranks(functools.partial(leaving, words=words), seconds=30)


REASONS = {
    "disabled": "disabled the cache",
    "another size": "enabled the cache for itself alone",
    "gradients": "ran the model without the other ranks (gradients wanted)",
}


@pytest.mark.parametrize("fault", REASONS)
@pytest.mark.parametrize("words", only_in("parallel", GROUPS, but=BY_DEFAULT))
def test_a_rank_that_left_is_named_at_once(words, fault):
    (_, found), _ = left(words)
    error, _, seconds = found[fault]
    assert error.startswith(f"RankMissing: {words}: rank 1 takes no part in the call of Flagged: it {REASONS[fault]}.")
    assert seconds < 10  # the capture, and the way of rank 1 to its fault


@pytest.mark.parametrize("fault", REASONS)
@pytest.mark.parametrize("words", only_in("parallel", GROUPS, but=BY_DEFAULT))
def test_a_rank_that_left_computes_alone_and_may_come_back(words, fault):
    for rank, (expected, found) in enumerate(left(words)):
        assert close(found[f"after {fault}"], expected)
        if rank:
            assert close(found[fault], expected)


def test_ranks_that_call_other_graphs_are_told_the_first_operation_that_differs():
    errors = [found["another graph"] for _, found in left("ulysses_size=2")]
    assert errors[0] == errors[1]
    assert "ranks 0 and 1 differ in their calls: the operation " in errors[0]
    assert errors[0].endswith("is nothing on rank 0, mul(2.0) on rank 1")


# ---------------------------------------------------------------------------------------------------------------------
# Meetings


class Counted:
    """A store that counts what is asked of it."""

    def __init__(self, store):
        self.store, self.asked = store, 0

    def __getattr__(self, name):
        self.asked += 1
        return getattr(self.store, name)


@functools.cache
def captured():
    shared = SharedCapture(toys.make_small().requires_grad_(False))
    shared.compile(cache=None)
    shared(**arguments())
    return shared


def step(shared, number, **changes):
    given = arguments() | {"timestep": torch.tensor([900.0 - 100 * number])} | changes
    return shared(**given)


def generations(rank):
    """What four generations of four steps ask of the store: at each call, and keys in all after each generation."""
    shared = captured()
    shared.compile_anew(**OPTIONS)
    ranks: Any = shared._state.ranks
    presence = ranks.presence
    store = Counted(presence.store)
    object.__setattr__(presence, "store", store)
    asked, keys = [], []
    for _ in range(4):
        for number in range(4):
            before = store.asked
            step(shared, number)
            asked.append(store.asked - before)
        keys.append(store.store.num_keys())
    return asked, keys


def test_steps_ask_nothing_of_the_store_and_no_keys_pile_up():
    captured()
    for asked, keys in on_ranks(generations):
        first, later = asked[::4], [count for number, count in enumerate(asked) if number % 4]
        assert min(first) > 0 and not any(later)
        assert len(set(keys)) == 1


def meet(ranks, model):
    with ranks.presence.meeting(model):
        pass


def groups(rank):
    """Two groups of two. Rank 3 makes no groups at first, and leaves its group later."""
    found = []
    if rank == 3:
        cachedit_fx.compile(toys.make_small())
    else:
        found.append(error_of(ranks_of, 2))
    dist.barrier()
    if rank == 3:
        come_back("Toy")
    dist.barrier()
    ranks: Any = ranks_of(2)
    if rank == 3:
        leave("A", "went away")
    for model in ("A", "B"):
        if rank < 3 or model == "B":
            found.append(error_of(meet, ranks, model))
        dist.barrier()
    return found


def test_a_group_is_not_disturbed_by_ranks_of_another_one():
    first, second, third, fourth = on_ranks(groups, ranks=4, seconds=20)
    for making, *_ in (first, second, third):
        assert "rank 3 takes no part in the call of the model: it enabled the cache for itself alone" in making[0]
    assert all(not error for error, *_ in [*first[1:], *second[1:], *fourth])
    assert "rank 3 takes no part in the call of A: it went away" in third[1][0]
    assert not third[2][0]  # B's call is another one


# ---------------------------------------------------------------------------------------------------------------------
# Ranks that hang or end


def late(rank, words):
    """Rank 1 comes too late to the first call, then in time; then too late to a step."""
    shared, found = captured(), {}
    shared.compile_anew(**CACHE | GROUPS[words])
    if rank == 0:
        found["first call"] = error_of(step, shared, 0)
    else:
        time.sleep(TIMEOUT + 0.5)
    found["retry"] = error_of(step, shared, 0)
    if rank:
        time.sleep(TIMEOUT + 1)
    found["step"] = error_of(step, shared, 1)
    found["calls"] = shared._state.session().tracker.generation.calls
    time.sleep(0 if rank else TIMEOUT + 1)  # rank 1 sees a rank that gave up, and not one that ended
    return found


@pytest.mark.parametrize("words", only_in("parallel", GROUPS, but=BY_DEFAULT))
def test_a_rank_that_hangs_is_named_after_the_time_out(words):
    captured()
    first, second = on_ranks(functools.partial(late, words=words), seconds=TIMEOUT)
    error, _, seconds = first["first call"]
    assert error.startswith(f"RankMissing: {words}: rank 1 did not come to the call of the model within 1.5 s")
    assert TIMEOUT <= seconds < TIMEOUT + 1
    assert first["retry"][0] == second["retry"][0] == ""
    for found, limit in ((first, TIMEOUT + AT_ONCE), (second, AT_ONCE)):
        error, cause, seconds = found["step"]
        assert "could not exchange values in the call of the model" in error and cause == "RuntimeError"
        assert "did not answer within 1.5 s" in error
        assert seconds < limit + 1
        assert found["calls"] == 0  # the next call starts a generation, and is compared


def ending(rank, words, place):
    shared, found = captured(), []
    shared.compile_anew(**CACHE | GROUPS[words])
    for number in range(3):
        if rank and number == place:
            os.kill(os.getpid(), signal.SIGKILL)
        found.append(error_of(step, shared, number))
    return found


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("words", only_in("parallel", GROUPS, but=BY_DEFAULT))
def test_a_rank_that_ends_is_named_at_once(words, place):
    captured()
    errors, _ = on_ranks(functools.partial(ending, words=words, place=place), ending=[1])
    assert all(not error for error, *_ in errors[:place])
    for error, _, seconds in errors[place:]:
        assert error.startswith(f"RankMissing: {words}: rank 1 ended before or during the call of the model.")
        assert seconds < AT_ONCE
    assert [cause for _, cause, _ in errors[place:]] == [["RuntimeError", None][place == 0], None, None][: 3 - place]


# ---------------------------------------------------------------------------------------------------------------------
# Groups that are destroyed


def regrouped(rank, folder):
    """Errors and results of two models whose group is destroyed and made anew."""
    modules = {name: toys.make(blocks=2).requires_grad_(False) for name in ("enable_cache", "torch.compile")}
    expected = {name: module(**arguments()) for name, module in modules.items()}
    options = OPTIONS | {"inner_backend": "eager"}

    def enabled():
        module = cachedit_fx.enable_cache(modules["enable_cache"], **options)
        return [module, torch.compile(modules["torch.compile"], backend="cachedit", options=options)]

    def results(calls):
        with torch.no_grad():
            return [close(call(**arguments()), value) for call, value in zip(calls, expected.values(), strict=True)]

    calls = enabled()
    found: list[Any] = [results(calls)]
    dist.barrier()
    dist.destroy_process_group()
    with torch.no_grad():
        found += [error_of(call, **arguments())[0] for call in calls]
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(f"{folder}/store", 2))
    with torch.no_grad():
        found.append(error_of(calls[0], **arguments())[0])
    found.append(results(enabled()))
    return found


def test_a_call_after_the_group_was_destroyed_says_so_and_a_new_group_is_taken(tmp_path):
    for first, *errors, last in on_ranks(functools.partial(regrouped, folder=tmp_path), seconds=30):
        assert first == last == [True, True]
        for error in errors:
            assert "ulysses_size=2: the process group of these ranks was destroyed" in error


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def gradients(rank):
    module = toys.make_small()

    def of(module):
        module.zero_grad()
        module(**arguments()).square().mean().backward()
        return [parameter.grad.clone() for parameter in module.parameters()]

    expected = of(module)
    cachedit_fx.enable_cache(module, **OPTIONS | {"inner_backend": "eager"})
    with pytest.warns(CacheWarning, match="every rank computes the whole model for itself"):
        found = of(module)
    return all(map(torch.equal, found, expected))


def test_gradients_are_those_of_the_whole_model():
    assert on_ranks(gradients) == [True, True]


def test_a_missing_rank_is_a_disagreement():
    assert issubclass(RankMissing, RanksDisagree)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


def by_torch_compile(rank):
    module = Flagged().requires_grad_(False)
    options = CACHE | {"inner_backend": "eager", "ulysses_size": 1 if rank else 2}
    compiled = torch.compile(module, backend="cachedit", options=options)
    with torch.no_grad():
        found = error_of(compiled, **arguments())
    dist.barrier()
    return found


def test_a_model_that_torch_compile_returned_is_named_too():
    (error, *_), (other, *_) = on_ranks(by_torch_compile, seconds=30)
    assert "rank 1 takes no part in the call of Flagged: it compiled the model with ulysses_size=1" in error
    assert not other
