"""Writes whose views outlive the graph, or whose kind is rare: the same memory is written to as without a compiler."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import cachedit_fx
from cachedit_fx import CacheWarning

WIDTH = 8


class Writes(nn.Module):
    """Blocks behind a write to memory that others hold. Returns the picture, and what the write returned."""

    window: Any = None

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(3)
        )
        self.register_buffer("cache", torch.zeros(4, 6, WIDTH))

    def forward(self, hidden_states, timestep, extra):
        returned = self.write(self, hidden_states, extra)
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states) * (timestep / 1000)
        return hidden_states + extra.mean(), returned


def breaks(module, hidden, x):
    view = x[1:]
    view.add_(1.0)
    torch._dynamo.graph_break()
    view.mul_(2.0)


def breaks_with_a_buffer(module, hidden, x):
    view = module.cache[1:]
    view.add_(hidden.mean())
    torch._dynamo.graph_break()
    view.mul_(2.0)
    return module.cache * 1


def keeps_a_window(module, hidden, x):
    module.cache[:, :2].add_(1.0)
    module.window = module.cache[:, :2]


def keeps_a_window_once(module, hidden, x):
    if module.window is None:
        module.window = module.cache[:, :2]
    module.cache.add_(1.0)
    return module.window * 1


def viewed_before(module, hidden, x):
    view = x[1:].transpose(0, 1)
    x.mul_(2.0)
    return view


def halves(module, hidden, x):
    first, second = x.chunk(2)
    first.add_(1.0)
    return second


def counts(module, hidden, x):
    count = module.cache.view(-1)[:3].to(torch.int64)
    module.cache += 1
    return module.cache, count


def wide(module, hidden, x):
    result = x * 1.0
    result.add_(other=x.double() * 0.3)
    return result


def wide_number(module, hidden, x):
    number = hidden.mean()
    number += x.mean().double()
    return number


BEYOND = "beyond the argument"
WRITES: dict[str, Any] = {
    "break": breaks,
    "break, a buffer": breaks_with_a_buffer,
    "kept window": keeps_a_window,
    "window kept once": keeps_a_window_once,
    "returned argument": lambda module, hidden, x: x.add_(1.0),
    "returned pair": lambda module, hidden, x: (x.add_(hidden.mean()), x[1:]),
    "viewed before": viewed_before,
    "half of an argument": halves,
    "integers": counts,
    "keyword of another dtype": wide,
    "number of another dtype": wide_number,
    "views at once": lambda module, hidden, x: (torch._foreach_mul_(x.split(2, 1), 2.0), None)[1],
    "results into views": lambda module, hidden, x: (torch.aminmax(x * 1, dim=0, out=(x[0], x[1])), None)[1],
    BEYOND: lambda module, hidden, x: x.as_strided((40, 2), (8, 1)).add_(hidden.mean()).sum(),
}
CASES = [
    (name, backend) for name in WRITES for backend in ("eager", "aot_eager") if (name, backend) != (BEYOND, "aot_eager")
]
"""Ahead-of-time autograd refuses a view that reaches beyond the argument, with or without this package."""


def run(model, module):
    """Results, argument and buffer of three calls. In between others write to what they hold."""
    found = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        memory = torch.randn(600, generator=generator)
        extra = memory[: 4 * 6 * WIDTH].view(4, 6, WIDTH)
        picture, returned = model(torch.randn(2, 5, WIDTH, generator=generator), torch.tensor([900.0 - step]), extra)
        values = [
            value for value in (picture, *(returned if type(returned) is tuple else [returned])) if value is not None
        ]
        found += [value.clone() for value in (*values, memory, module.cache)]
        for value in (module.window, *values[1:]):
            if value is not None:
                value.zero_()
        found += [memory.clone(), module.cache.clone()]
    return found


@torch.no_grad()
@pytest.mark.parametrize(("name", "inner_backend"), CASES)
def test_memory_is_that_of_the_plain_model(name, inner_backend):
    torch.manual_seed(0)
    torch._dynamo.reset()
    plain = Writes(WRITES[name]).eval().requires_grad_(False)
    module = copy.deepcopy(plain)
    model = cachedit_fx.compile(module, inner_backend=inner_backend, Fn_compute_blocks=1, residual_diff_threshold=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)
        found = run(model, module)
    for number, (expected, value) in enumerate(zip(run(plain, plain), found, strict=True)):
        assert expected.dtype == value.dtype
        assert torch.equal(expected, value) if inner_backend == "eager" else torch.allclose(expected, value), number
    assert (plain.window is None) == (module.window is None)


class Sorts(Writes):
    """Sorts its argument in place."""

    def forward(self, hidden_states, timestep, extra):
        torch.sort(extra + hidden_states.mean(), out=(extra, torch.empty(extra.shape, dtype=torch.long)))
        return super().forward(hidden_states, timestep, extra)[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("strides", "write"),
    [((100, 9, 1), None), ((6, 2, 1), None), ((6, 2, 1), lambda module, hidden, x: x[1:].mul_(hidden.mean()))],
    ids=["sorted into gaps", "sorted into an overlap", "overlap"],
)
def test_layouts_that_a_copy_does_not_have_are_left_as_they_are(strides, write):
    """The tracer shows a dense target for `out=`. A copy would hold an element twice that memory holds once."""
    torch.manual_seed(0)
    plain = (Sorts if write is None else Writes)(write or (lambda *_: None)).eval().requires_grad_(False)
    model = cachedit_fx.compile(
        copy.deepcopy(plain), inner_backend="eager", Fn_compute_blocks=1, residual_diff_threshold=0.0
    )
    picture, memory = torch.randn(2, 5, WIDTH), torch.randn(600)
    memories = [memory.clone() for _ in range(2)]
    with pytest.warns(CacheWarning, match="layout the tracer does not tell|elements share memory"):
        results = [
            call(picture, torch.tensor([900.0]), each.as_strided((4, 6, WIDTH), strides, 5))
            for call, each in zip((plain, model), memories, strict=True)
        ]
    first, second = (result if write is None else result[0] for result in results)
    assert torch.equal(first, second) and torch.equal(*memories)
