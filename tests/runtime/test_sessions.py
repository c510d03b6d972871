"""Generations that must not meet: threads, named sessions, models, and what becomes of them."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from lib.toys import FALLING, Loopless, denoise, make, noise

from cachedit_fx import (
    CacheWarning,
    DBCacheConfig,
    disable_cache,
    enable_cache,
    end_session,
    refresh_context,
    session,
    summary,
)
from cachedit_fx.backend import cachedit
from cachedit_fx.runtime import model_state
from cachedit_fx.runtime.registry import state_of_module, states_of
from cachedit_fx.runtime.session import present_block

pytestmark = [pytest.mark.keep_compiled, pytest.mark.filterwarnings("ignore:.*inert threshold")]
BASE = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.1)
TEXT = noise(1, 3, seed=2)
REQUESTS = {"a": noise(seed=11), "b": noise(seed=12) * 2, "c": noise(seed=13) / 2}


def enabled(seed: int = 0):
    model = enable_cache(make(seed=seed, blocks=3), BASE, inner_backend="eager")
    denoise(model, FALLING[:1])  # compiles
    return refresh_context(model)


@pytest.fixture(scope="module")
def model():
    return enabled()


def cache_of(model):
    found = state_of_module(model)
    assert found is not None
    return found


def decisions(regions):
    return [branch.decisions for region in regions for branch in region.branches]


@pytest.fixture(scope="module")
def alone():
    """What each request gives when the model has nothing else to do."""
    found, model = {}, enabled()
    for name, start in REQUESTS.items():
        refresh_context(model)
        found[name] = denoise(model, start=start), decisions(summary(model))
    results = [decided for _, decided in found.values()]
    assert results[0] != results[1] != results[2], "requests that behave alike show nothing"
    return found


def euler(model, hidden, timestep):
    with torch.no_grad():
        return hidden - 0.05 * model(hidden, torch.tensor([timestep]), TEXT)


def test_interleaved_sessions(model, alone):
    """A server steps three requests in turn."""
    hidden = dict(REQUESTS)
    for timestep in FALLING:
        for name in hidden:
            with session(name):
                hidden[name] = euler(model, hidden[name], timestep)
    for name, (expected, decided) in alone.items():
        assert torch.equal(hidden[name], expected)
        with session(name):
            assert decisions(cache_of(model).session().summary()) == decided


UNEQUAL = [("a", t) for t in FALLING[:5]]
UNEQUAL += [call for late, early in zip(FALLING[5:], FALLING[:5], strict=True) for call in (("a", late), ("b", early))]
UNEQUAL += [("b", t) for t in FALLING[5:]]
"""One request is at its fifth step when another begins."""


def test_sessions_of_unequal_pace(model, alone):
    """Keys may be any hashable object."""
    hidden = dict(REQUESTS)
    for name, timestep in UNEQUAL:
        with session((name, 1)):
            hidden[name] = euler(model, hidden[name], timestep)
    for name in "ab":
        assert torch.equal(hidden[name], alone[name][0])


def test_without_sessions_they_do_meet(model, alone):
    """Or the test above could not fail."""
    hidden = dict(REQUESTS)
    for name, timestep in UNEQUAL:
        hidden[name] = euler(model, hidden[name], timestep)
    assert any(not torch.equal(hidden[name], alone[name][0]) for name in "ab")


def test_a_session_within_a_session(model, alone):
    hidden = dict(REQUESTS)
    for timestep in FALLING:
        with session("outer"):
            hidden["a"] = euler(model, hidden["a"], timestep)
            with session("inner"):
                hidden["b"] = euler(model, hidden["b"], timestep)
    for name in "ab":
        assert torch.equal(hidden[name], alone[name][0])


def test_a_session_ends_with_an_error(model, alone):
    with pytest.raises(RuntimeError), session("broken"):
        raise RuntimeError
    assert torch.equal(denoise(model, start=REQUESTS["a"]), alone["a"][0])
    assert decisions(summary(model)) == alone["a"][1]


def test_none_is_no_key():
    with pytest.raises(ValueError, match="None"), session(None):
        pass


def test_an_unhashable_key_is_refused_at_once():
    with pytest.raises(TypeError, match="unhashable"), session(["a"]):  # type: ignore[arg-type]
        pass


def test_blocks_that_generators_leave_open_do_not_outlive_them():
    def request(name):
        with session(name):
            yield name

    def present():
        block = present_block()
        return block and block.key

    one, two = request("a"), request("b")
    assert [next(one), next(two)] == ["a", "b"] and present() == "b"
    assert list(one) == [] and present() == "b"
    assert list(two) == [] and present() is None


def test_more_sessions_than_are_kept(model, monkeypatch):
    """The one unused for longest is dropped and starts anew; the others go on."""
    monkeypatch.setattr(model_state, "MAX_SESSIONS", 3)
    for timestep in FALLING[:4]:
        for name in ("s0", "s1", "s2"):
            with session(name):
                euler(model, noise(), timestep)
    with session("s0"):
        euler(model, noise(), FALLING[4])
    with session("s3"):  # s1 goes
        euler(model, noise(), FALLING[0])
    steps = {}
    for name in ("s0", "s2", "s1"):
        with session(name):
            euler(model, noise(), FALLING[5])
            (region,) = summary(model)
            steps[name] = region.executed_steps
    assert steps == {"s0": 6, "s2": 5, "s1": 1}
    assert len(cache_of(model)._by_key) == 3


def run_in_threads(jobs):
    """Run the jobs at once, step by step in lockstep as far as the interpreter lets them; raise what they raised."""
    results, errors, barrier = {}, [], threading.Barrier(len(jobs))

    def work(name, job):
        try:
            barrier.wait(60)
            results[name] = job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=item) for item in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors, errors
    return results


def test_threads_on_one_model_have_sessions_of_their_own(model, alone):
    turn = threading.Barrier(2)

    def job(name):
        def run():
            hidden = REQUESTS[name]
            for timestep in FALLING:
                turn.wait(60)
                hidden = euler(model, hidden, timestep)
            return hidden

        return run

    results = run_in_threads({name: job(name) for name in "ab"})
    for name in "ab":
        assert torch.equal(results[name], alone[name][0])


@pytest.mark.parametrize("by_name", [False, True], ids=["compile", "torch.compile"])
def test_two_threads_with_two_models(by_name, alone):
    options: dict[str, Any] = {"cache": BASE, "inner_backend": "eager"}

    def prepare(seed):
        plain = make(seed=seed, blocks=3)
        return torch.compile(plain, backend=cachedit, options=options) if by_name else enabled(seed)

    names = ("a", "b")
    expected = {}
    for seed, name in enumerate(names):
        fast = enabled(seed)
        expected[name] = denoise(fast, start=REQUESTS[name]), decisions(summary(fast))
    fast = {name: prepare(seed) for seed, name in enumerate(names)}  # these compile inside the threads

    def job(name):
        return lambda: (denoise(fast[name], start=REQUESTS[name]), decisions(summary(fast[name])))

    results = run_in_threads({name: job(name) for name in names})
    for name in names:
        assert torch.equal(results[name][0], expected[name][0]) and results[name][1] == expected[name][1]


def test_a_session_is_gone_with_its_thread(model, quick_collection):
    before = len(cache_of(model)._by_thread)
    run_in_threads({"a": lambda: denoise(model, start=REQUESTS["a"])})
    denoise(model, FALLING[:1])
    gc.collect()
    assert len(cache_of(model)._by_thread) == before


@pytest.mark.parametrize("how", ["compile", "torch.compile", "disabled"])
def test_state_is_gone_with_its_model(how, quick_collection):
    """Dynamo keeps backends and compiled code of a class for good; the buffers must not hang on them."""
    plain = make(blocks=3)
    if how == "torch.compile":
        fast = torch.compile(plain, backend=cachedit, options=dict[str, Any](cache=BASE, inner_backend="eager"))
    else:
        fast = enable_cache(plain, BASE, inner_backend="eager")
    denoise(fast)
    (cache,) = states_of(plain)
    kept = weakref.ref(cache), weakref.ref(cache.latest)
    del cache, fast
    if how == "disabled":
        disable_cache(plain)
    else:
        del plain
    for _ in range(2):  # the module is a cycle, and its cache another one that the registry lets go of then
        gc.collect()
    assert [reference() for reference in kept] == [None, None]


# ---------------------------------------------------------------------------------------------------------------------
# memory, statistics, threads


def test_a_session_is_freed_at_its_end(model):
    held = {}
    for how in ("ends", "end_session", "reset"):
        with session(how, ends=how == "ends"):
            denoise(model)
            held[how] = summary(model)[0].bytes_held
            if how == "reset":
                cache_of(model).end_generation()
                assert summary(model)[0].bytes_held == held[how] and summary(model)[0].cached_steps
                assert cache_of(model).session().bytes_held == 0
        if how == "end_session":
            assert cache_of(model)._by_key[how].bytes_held == held[how]
            end_session(model, how)
            end_session(model, "unknown")
        assert how == "reset" or how not in cache_of(model)._by_key
    assert min(held.values()) == max(held.values()) > 0


def test_bytes_of_all_sessions(model, alone):
    denoise(model)
    before = summary(model)[0].bytes_of_all_sessions
    with session("one more"):
        denoise(model)
        (region,) = summary(model)
    assert region.bytes_of_all_sessions == before + region.bytes_held
    end_session(model, "one more")
    assert summary(model)[0].bytes_of_all_sessions == before


def test_statistics_are_those_of_the_session_that_asks(model):
    denoise(model, FALLING[:3])
    with session("long"):
        denoise(model, FALLING[:7])
        assert (summary(model)[0].executed_steps, summary(model)[0].session) == (7, "session 'long'")
    assert (summary(model)[0].executed_steps, summary(model)[0].session) == (3, "thread MainThread")
    with session("unknown"):
        assert summary(model) == []
    reports = {region.session: region.executed_steps for region in summary(model, all_sessions=True)}
    assert reports["session 'long'"] == 7 and reports["thread MainThread"] == 3
    (seen,) = run_in_threads({"reader": lambda: summary(model)})["reader"]
    assert seen.session == "session 'long'"  # the one used last
    end_session(model, "long")


def test_statistics_are_copies(model):
    denoise(model, FALLING[:3])
    (before,) = summary(model)
    euler(model, noise(), FALLING[3])
    assert before.executed_steps == 3 and summary(model)[0].executed_steps == 4


def test_statistics_while_another_thread_denoises(model):
    done = threading.Event()

    def denoises():
        try:
            for number in range(12):
                with session(number % 3):
                    denoise(model, start=noise(batch=1 + number % 2))
        finally:
            done.set()

    def reads():
        readings = 0
        while not done.is_set():
            for region in summary(model, all_sessions=True):
                assert len(region.cached_steps) <= region.executed_steps and str(region)
            readings += 1
        return readings

    assert run_in_threads({"denoises": denoises, "reads": reads})["reads"] > 10
    for key in range(3):
        end_session(model, key)


def test_an_uncached_generation_after_a_cached_one(model):
    """Under gradients nothing is cached: those calls are a generation of their own."""
    denoise(model)
    for _ in range(2):
        for timestep in FALLING[:4]:
            model(noise(), torch.tensor([timestep]), TEXT)
        (region,) = summary(model)
        assert (region.name, region.uncached_calls, region.cached_steps) == ("uncached", 4, [])
    denoise(model)
    assert summary(model)[0].uncached_calls == 0


@pytest.mark.parametrize("scale", [1.0, 0.9], ids=["same timestep", "later timestep"])
def test_uncached_steps_join_the_generation_of_calls_that_want_gradients(scale):
    """As cached steps do: the calls before the first step count in its generation."""
    model = enable_cache(make(Loopless), BASE, inner_backend="eager")
    with pytest.warns(CacheWarning):
        for start in (500.0, 700.0):  # the second generation begins where the timestep turns back
            for time in (start, start * 0.9):
                model(noise(), torch.tensor([time]))
            with torch.no_grad():
                model(noise(), torch.tensor([start * 0.9 * scale]))
                model(noise(), torch.tensor([start * 0.9 * scale * 0.9]))
            (region,) = summary(model)
            assert region.uncached_causes == {"gradients wanted": 2, "no block loop": 2}


def test_the_steps_of_a_generation_may_run_in_several_threads(model, alone):
    def step(hidden, timestep):
        with session("request"):
            return euler(model, hidden, timestep)

    with ThreadPoolExecutor(3) as pool:
        hidden = REQUESTS["a"]
        for timestep in FALLING:
            (hidden,) = pool.map(step, [hidden], [timestep])
    assert torch.equal(hidden, alone["a"][0])
    end_session(model, "request")


def test_asyncio_takes_the_session_along(model, alone):
    async def request(name):
        hidden = REQUESTS[name]
        with session(name, ends=True):
            for timestep in FALLING:
                hidden = await asyncio.to_thread(euler, model, hidden, timestep)
        return hidden

    async def server():
        return await asyncio.gather(*map(request, "ab"))

    results = asyncio.run(server())
    assert all(torch.equal(result, alone[name][0]) for result, name in zip(results, "ab", strict=True))


def test_a_thread_without_a_session_while_others_have_one_computes(model):
    """`run_in_executor` leaves the session behind: the call might be anyone's."""

    async def request():
        with session("left behind"):
            loop = asyncio.get_running_loop()
            hidden = REQUESTS["a"]
            for timestep in FALLING:
                hidden = await loop.run_in_executor(None, euler, model, hidden, timestep)
        return hidden

    plain = make(blocks=3)
    with pytest.warns(CacheWarning, match="asyncio.to_thread"):
        assert torch.equal(asyncio.run(request()), denoise(plain, start=REQUESTS["a"], texts=[TEXT]))
