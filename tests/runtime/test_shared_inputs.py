"""ulysses_inputs="first_rank": all ranks take the tensors of the first one, at every call."""

import functools
from typing import Any

import pytest
import torch
from lib import toys
from lib.ranks import on_ranks, ranks_of
from lib.shared import SharedCapture

import cachedit_fx
from cachedit_fx import OptionError, RanksDisagree
from cachedit_fx.config.options import parse_options
from cachedit_fx.runtime.shared_inputs import SharedInputs

pytestmark = [pytest.mark.keep_compiled, pytest.mark.xdist_group("ulysses")]

OPTIONS: dict[str, Any] = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.3}
STEPS = 5


@functools.cache
def captured():
    shared = SharedCapture(toys.make_small().requires_grad_(False))
    shared.compile(cache=None)
    shared(**arguments(0, 0, 0, rank=0))
    return shared


def arguments(number, step, branch, rank):
    """A rank's own arguments: its noise at each step, and the prompts of its branches."""
    seed = torch.Generator().manual_seed(1 + rank)
    prompts = torch.randn(2, 1, 6, 8, generator=seed)
    noise = toys.noise(1, 9, seed=rank) * (1 + 0.05 * step + number)
    return {
        "hidden_states": noise,
        "timestep": torch.tensor([900.0 - 100 * step + rank]).expand(1),
        "encoder_hidden_states": prompts[branch],
    }


def generations(rank, inputs):
    """The outputs of two generations with guidance, what was cached, and what code motion kept."""
    shared = captured()
    shared.compile_anew(**OPTIONS, ulysses_size=2, ulysses_inputs=inputs)
    own = rank if inputs == "first_rank" else 0
    prompts = [arguments(0, 0, branch, own)["encoder_hidden_states"] for branch in range(2)]
    outputs = []
    for number in range(2):
        for step in range(STEPS):
            for branch, prompt in enumerate(prompts):
                outputs.append(shared(**arguments(number, step, branch, own) | {"encoder_hidden_states": prompt}))
    stats = shared.summary()
    return outputs, [entry.cached_steps for entry in stats], shared._state.hoisted_values()


def both(rank):
    expected, found = generations(rank, "equal"), generations(rank, "first_rank")
    same = all(map(torch.equal, found[0], expected[0]))
    weight = next(captured().module.parameters())
    captured().compile_anew(**OPTIONS, ulysses_size=2, ulysses_inputs="first_rank")
    weight.mul_(1.5 if rank else 1.0)
    with pytest.raises(RanksDisagree, match="the weights have other values"):
        captured()(**arguments(0, 0, 0, rank))
    return same, expected[1:], found[1:]


def test_all_ranks_return_what_the_first_one_would():
    captured()
    for same, expected, found in on_ranks(both):
        assert same and found == expected
        (cached,), (held, _) = found
        assert cached and held


def layouts(rank):
    """Tensors of several layouts, their values each rank's own."""
    seed = torch.Generator().manual_seed(rank)
    real = torch.randn(4, 6, generator=seed)
    return [
        real,
        real.t(),
        real[:, ::2],
        real[:1].expand(3, 6),
        real[0, 0],
        real[0, 0].expand(1),
        real[:0],
        real > 0,
        real.to(torch.bfloat16),
        torch.view_as_complex(real.view(4, 3, 2)),
        (real * 100).to(torch.int64),
    ]


def taken(rank):
    ranks: Any = ranks_of(2)
    inputs, own = SharedInputs(ranks), layouts(rank)
    first, again = inputs.of(own), inputs.of([x.clone() for x in own])
    own[0].add_(1.0)
    changed = inputs.of(own)
    return (
        first,
        [x.stride() for x in first] == [x.stride() for x in own],
        [one is two for one, two in zip(first, again, strict=True)],
        changed[0] is not first[0] and changed[-1] is first[-1],
    )


def test_tensors_keep_their_layout_and_equal_ones_their_identity():
    expected = layouts(0)
    for first, has_layout, are_same, is_renewed in on_ranks(taken):
        assert has_layout and all(are_same) and is_renewed
        for one, two in zip(first, expected, strict=True):
            assert one.dtype is two.dtype and torch.equal(one, two)


class Writing(toys.Toy):
    """Writes to an argument."""

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        hidden_states.mul_(2.0)
        return super().forward(hidden_states, timestep, encoder_hidden_states)


def refusal(rank):
    module = Writing(blocks=2).requires_grad_(False)
    options = {"inner_backend": "eager", "ulysses_size": 2, "ulysses_inputs": "first_rank"}
    cachedit_fx.compile(module, **options)
    with pytest.raises(OptionError, match="this model writes to its arguments"):
        module(**arguments(0, 0, 0, rank))


def test_a_model_that_writes_to_its_arguments_is_refused():
    assert on_ranks(refusal) == [None, None]


def test_verification_is_refused():
    with pytest.raises(OptionError, match="verify compares with the plain module, which gets each rank's own inputs"):
        parse_options({"ulysses_inputs": "first_rank", "verify": "first"})
