"""`guards="generation"`: past dynamo where that is the same, and only there."""

import gc
import threading
import weakref

import pytest
import torch
from lib.toys import FALLING, Toy, denoise, noise
from lib.toys import make_small as make
from torch import nn
from torch.utils._pytree import tree_flatten

from cachedit_fx import DBCacheConfig, OptionError, compile, disable_cache, refresh_context, session, summary
from cachedit_fx.runtime.shortcut import GUARDED_CALLS, look_of

pytestmark = pytest.mark.filterwarnings("ignore:.*inert threshold")
POLICY = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.1)
TEXT = noise(1, 3, seed=2)
STEPS = len(FALLING)


class Guarded:
    """Counts the calls that go through dynamo."""

    def __init__(self, module, **options):
        self.module, self.count = module, 0
        compile(module, inner_backend="eager", guards="generation", **{"cache": POLICY, **options})
        self.call = module._compiled_call_impl
        inner = self.call.compiled

        def counted(*args, **kwargs):
            self.count += 1
            return inner(*args, **kwargs)

        self.call.compiled = counted

    def during(self, action):
        before, result = self.count, action()
        return self.count - before, result


def always(module, **options):
    return compile(module, inner_backend="eager", **{"cache": POLICY, **options})


def decisions(module):
    return [branch.decisions for region in summary(module) for branch in region.branches]


def test_results_and_decisions_are_those_of_guarded_calls():
    guarded, plain = Guarded(make()), always(make())
    for seed in range(3):
        start = noise(seed=10 + seed)
        count, found = guarded.during(lambda start=start: denoise(guarded.module, start=start))
        assert torch.equal(found, denoise(plain, start=start))
        assert decisions(guarded.module) == decisions(plain)
        assert count == (GUARDED_CALLS if seed else GUARDED_CALLS + 1), "the very first call finds out how to capture"


class KeepsElsewhere(Toy):
    """Keeps a value in an attribute, and puts one into a dict that it is given."""

    latest, first, second = None, torch.zeros(()), torch.ones(())

    def forward(self, hidden_states, timestep, encoder_hidden_states, memory=None):
        if self.keeps == "a result":
            self.latest = encoder_hidden_states * 2
        if self.keeps == "an argument":
            self.latest = encoder_hidden_states
        if self.keeps == "another place":
            self.first, self.second = self.second, self.first
        memory["is_used"] = self.puts
        return super().forward(hidden_states, timestep, encoder_hidden_states)


@pytest.mark.parametrize(
    ("keeps", "puts"),
    [("a result", True), ("a result", None), ("an argument", None), ("another place", None), ("", True)],
)
@torch.no_grad()
def test_what_is_kept_elsewhere_is_that_of_the_present_call(keeps, puts):
    module = make(KeepsElsewhere)
    module.keeps, module.puts = keeps, puts
    guarded = Guarded(module)
    for step in range(6):
        memory = {} if puts else {"is_used": None}
        module(noise(seed=step), torch.tensor([900.0 - 10 * step]), step * TEXT, memory)
        assert memory == {"is_used": puts}
        assert keeps != "a result" or torch.equal(module.latest, 2 * step * TEXT)
        assert keeps != "an argument" or torch.equal(module.latest, step * TEXT)
        assert keeps != "another place" or module.first == (step + 1) % 2
    assert guarded.count == 6


class AddsToAnInput(Toy):
    def forward(self, hidden_states, timestep, encoder_hidden_states):
        encoder_hidden_states.add_(1.0)
        return super().forward(hidden_states * 1.0, timestep, encoder_hidden_states)


@torch.no_grad()
def test_inputs_that_begin_to_share_memory_are_noticed():
    guarded, plain = Guarded(make(AddsToAnInput)), always(make(AddsToAnInput))
    for step in range(6):
        samples = [noise(seed=step) for _ in range(2)]
        texts = [each.view_as(each) if step > 3 else each.clone() for each in samples]
        calls = [
            module(sample, torch.tensor([900.0 - step]), text)
            for module, sample, text in zip((guarded.module, plain), samples, texts, strict=True)
        ]
        assert torch.equal(*calls)


def test_two_branches_of_two_lengths():
    guarded, plain = Guarded(make()), always(make())
    texts = (TEXT, noise(1, 4, seed=3))
    denoise(guarded.module, texts=texts)
    count, found = guarded.during(lambda: denoise(guarded.module, texts=texts))
    assert torch.equal(denoise(plain, texts=texts), denoise(plain, texts=texts)) and count == 2 * GUARDED_CALLS
    assert torch.equal(found, denoise(plain, texts=texts))


def test_weights_written_in_place_count_at_once_and_exchanged_ones_from_the_next_generation_on():
    guarded, plain = Guarded(make()), always(make())
    weights = {name: value * 1.1 for name, value in make().state_dict().items()}
    for assign in (False, True):
        for module in (guarded.module, plain):
            module.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=assign)
        assert torch.equal(denoise(guarded.module), denoise(plain))
        weights = {name: value * 0.9 for name, value in weights.items()}

    def written_midway(module):
        first = denoise(module, FALLING[:5])
        with torch.no_grad():
            module.out.weight.mul_(2)
        return denoise(module, FALLING[5:], start=first)

    refresh_context(guarded.module), refresh_context(plain)
    assert torch.equal(written_midway(guarded.module), written_midway(plain))


class Scaled(Toy):
    strength = 1.0

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        return super().forward(hidden_states, timestep, encoder_hidden_states) * self.strength


def test_a_change_of_the_module_between_generations_is_seen():
    guarded = Guarded(make(Scaled))
    plain = denoise(guarded.module)
    guarded.module.strength = 2.0
    count, changed = guarded.during(lambda: denoise(guarded.module))
    assert not torch.equal(plain, changed) and count == GUARDED_CALLS
    guarded.module.strength = 1.0
    assert torch.equal(denoise(guarded.module), plain)


def test_a_first_step_that_looks_like_the_next_one_passes_the_guards():
    """The last generation's shortcut is open when the new one begins; only its timestep tells."""
    guarded = Guarded(make())
    denoise(guarded.module)
    count, _ = guarded.during(lambda: denoise(guarded.module, FALLING[:1]))
    assert count == 1 and [region.executed_steps for region in summary(guarded.module)] == [1]


class Counts(Toy):
    """Behaves otherwise from its third step on."""

    steps = 0

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        self.steps += 1
        found = super().forward(hidden_states, timestep, encoder_hidden_states)
        return found * 2 if self.steps > 2 else found


def test_a_model_that_counts_its_steps_is_guarded_all_along():
    guarded, plain = Guarded(make(Counts)), always(make(Counts))
    times = FALLING[:4]
    count, found = guarded.during(lambda: denoise(guarded.module, times))
    assert torch.equal(found, denoise(plain, times)) and count == len(times) and guarded.module.steps == len(times)


class HoldsTensor(Toy):
    """A tensor that is neither parameter nor buffer, as rotary tables often are."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.table = [torch.ones(8)]

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        return super().forward(hidden_states * self.table[0], timestep, encoder_hidden_states)


@pytest.mark.parametrize("changes", [False, True])
def test_tensors_that_are_no_weights_must_stay_the_same(changes):
    guarded, plain = Guarded(make(HoldsTensor)), always(make(HoldsTensor))
    results = []
    for module in (guarded.module, plain):
        start = noise()
        for step, timestep in enumerate(FALLING):
            if changes:
                module.table[0] = torch.full((8,), 1 + step / 100)
            start = denoise(module, [timestep], start=start)
        results.append(start)
    assert torch.equal(*results)
    assert guarded.count == (STEPS if changes else GUARDED_CALLS + 1)


SHAPES = {
    "tuple": lambda found: (found, None),
    "dict": lambda found: {"sample": found, "kind": "toy"},
    "list": lambda found: [found],
    "nested": lambda found: ((found, 2 * found), ()),  # as many children as leaves
}


@pytest.mark.parametrize("shape", SHAPES)
def test_results_in_tuples_and_dicts(shape):
    class Wrapped(Toy):
        def forward(self, hidden_states, timestep, encoder_hidden_states):
            return SHAPES[shape](super().forward(hidden_states, timestep, encoder_hidden_states))

    guarded, plain = Guarded(make(Wrapped)), always(make(Wrapped))

    def step(module, timestep):
        with torch.no_grad():
            return module(noise(), torch.tensor([timestep]), TEXT)

    for timestep in FALLING:
        found, expected = step(guarded.module, timestep), step(plain, timestep)
        (leaves, spec), (others, other) = tree_flatten(found), tree_flatten(expected)
        assert spec == other
        assert all(
            torch.equal(one, two) if torch.is_tensor(one) else one == two
            for one, two in zip(leaves, others, strict=True)
        )
    assert guarded.count < STEPS


def test_numbers_that_change_are_guarded():
    """A timestep that is a Python number becomes a tensor inside the frame."""
    guarded, plain = Guarded(make()), always(make())
    count, found = guarded.during(lambda: denoise(guarded.module, convert=float))
    assert torch.equal(found, denoise(plain, convert=float)) and count == STEPS


@pytest.mark.parametrize("what", ["pre-hook", "hook", "forward"])
def test_what_runs_around_forward_keeps_running(what):
    guarded, calls = Guarded(make()), []
    if what == "pre-hook":
        guarded.module.register_forward_pre_hook(lambda module, args: calls.append(what))
    elif what == "hook":
        guarded.module.register_forward_hook(lambda module, args, result: calls.append(what))
    else:
        forward = guarded.module.forward

        def counted(*args):
            calls.append(what)
            return forward(*args)

        guarded.module.forward = counted
    denoise(guarded.module)
    assert len(calls) == STEPS


def test_another_look_is_guarded():
    guarded = Guarded(make())

    def step(timestep, batch=1):
        with torch.no_grad():
            return guarded.module(noise(batch), torch.tensor([timestep]), TEXT)

    for timestep in FALLING[:6]:
        step(timestep)
    before = guarded.count
    assert before == GUARDED_CALLS + 1
    step(FALLING[6], batch=2)
    assert guarded.count == before + 1


def test_one_tensor_in_two_places_is_guarded():
    class Twice(Toy):
        def forward(self, hidden_states, timestep, encoder_hidden_states):
            return super().forward(hidden_states * 1.5, timestep, encoder_hidden_states)

    guarded = Guarded(make(Twice))
    with torch.no_grad():
        for timestep in FALLING[:4]:
            hidden = noise()
            guarded.module(hidden, torch.tensor([timestep]), hidden)
    assert guarded.count == 4


def look(*args, **kwargs):
    found = look_of(args, kwargs)
    assert found is not None
    return found[0]


def test_the_look_of_a_call():
    x = torch.zeros(2, 3)
    found = look_of((x, 1), {"more": [x.t(), None]})
    assert found is not None and len(found[1]) == 2 and found[1][0] is x
    here = look(x, 1, more=[x.t(), None])
    assert here == found[0] == look(torch.ones(2, 3), 1, more=[torch.ones(2, 3).t(), None])
    assert here != look(x, 1.0, more=[x.t(), None])
    assert here != look(x, True, more=[x.t(), None])
    assert here != look(x, 1, more=(x.t(), None))
    assert here != look(x, 1, more=[x, None])
    assert here != look(x.double(), 1, more=[x.t(), None])
    with torch.no_grad():
        assert here != look(x, 1, more=[x.t(), None])
    with torch.autocast("cpu", torch.bfloat16):
        assert here != look(x, 1, more=[x.t(), None])
    assert look_of((object(),), {}) is None and look_of((nn.Parameter(x),), {}) is None


def test_a_mode_that_sees_every_operation_sees_them():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sees(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Sees():
        assert look_of((torch.zeros(1),), {}) is None


def test_threads_and_sessions_learn_for_themselves():
    guarded = Guarded(make())
    expected = denoise(guarded.module)
    found = []
    count, _ = guarded.during(lambda: [_in_thread(lambda: found.append(denoise(guarded.module)))])
    assert count == GUARDED_CALLS and torch.equal(found[0], expected)
    hidden = {"a": noise(seed=5), "b": noise(seed=6)}
    alone = {key: denoise(always(make()), start=start) for key, start in hidden.items()}
    for timestep in FALLING:
        for key in hidden:
            with session(key):
                hidden[key] = denoise(guarded.module, [timestep], start=hidden[key])
    assert all(torch.equal(hidden[key], alone[key]) for key in hidden)


def _in_thread(action):
    thread = threading.Thread(target=action)
    thread.start()
    thread.join()


def test_a_model_that_is_gone_leaves_nothing(quick_collection):
    guarded = Guarded(make())
    denoise(guarded.module)
    weight = weakref.ref(guarded.module.out.weight)
    disable_cache(guarded.module)
    guarded.call = guarded.module = None
    del guarded
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None


def test_the_setting_holds_until_it_is_given_again_and_compiles_nothing():
    guarded = Guarded(make())
    denoise(guarded.module)
    compile(guarded.module, cache=POLICY, inner_backend="eager")
    assert guarded.module._compiled_call_impl is guarded.call and guarded.call.guards == "generation"
    compile(guarded.module, cache=POLICY, inner_backend="eager", guards="always")
    assert guarded.module._compiled_call_impl is guarded.call
    assert guarded.during(lambda: denoise(guarded.module))[0] == STEPS
    with pytest.raises(OptionError, match="'always' or 'generation'"):
        compile(make(), guards="never")
