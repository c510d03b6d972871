"""Results that another rank computes: views do not wait, every use waits once, and messages keep their layout."""

from __future__ import annotations

import copy
import ctypes
import functools
import pickle
from collections import UserDict, deque
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from cachedit_fx import RankMissing
from cachedit_fx.runtime.awaited import Arrival, Awaited, arrived
from cachedit_fx.runtime.branches import Form

pytestmark = pytest.mark.keep_compiled


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
    "flatten": lambda x: x.flatten(1),
}
USES: dict[str, Any] = {
    "sum": lambda x: x + 1,
    "on the right": lambda x: torch.ones(4) * x,
    "in place": lambda x: x.mul_(2),
    "written": lambda x: x.index_fill_(0, torch.tensor([1]), 5.0),
    "copy of a slice": lambda x: x[:, 1:].clone(),
    "other dtype": lambda x: x.to(torch.float64),
    "half of a slice": lambda x: x[:, 1:].half(),
    "contiguous": lambda x: x.transpose(1, 2).contiguous(),
    "reshape of a slice": lambda x: x[:, 1:].reshape(-1),
    "deep copy": lambda x: copy.deepcopy(x),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "dlpack": lambda x: torch.from_dlpack(x),
    "memory": lambda x: torch.frombuffer(ctypes.string_at(x.data_ptr(), 96), dtype=torch.float32),
    "memory of a slice": lambda x: torch.frombuffer(ctypes.string_at(x[1:].data_ptr(), 48), dtype=torch.float32),
    "storage": lambda x: torch.tensor(x.untyped_storage().tolist()),
    "typed storage": lambda x: torch.tensor(list(x.storage())),
    "file": lambda x: safetensors.torch.load(safetensors.torch.save({"x": x}))["x"],
    "text": lambda x: torch.tensor(float(f"{x[0, 0, 1]:.2f}")),
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
    presence = SimpleNamespace(members=(4, 5), heading="h: ", watch=lambda model: nullcontext())
    ranks: Any = SimpleNamespace(presence=presence, faults=[])
    delivery = Delivery(torch.zeros_like(values), values)
    arrival = Arrival(delivery, torch.tensor(header), 7, ranks, 1, "M")  # type: ignore[arg-type]
    return Awaited(delivery.message, arrival), delivery


MODES = [torch.no_grad, torch.inference_mode]
"""In inference mode operations come whole that are made of others."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VIEWS)
def test_views_do_not_wait(name, mode):
    with mode():
        tensor, delivery = awaited(VALUES)
        view = VIEWS[name](tensor)
        assert delivery.waits == 0 and view.shape == VIEWS[name](VALUES).shape
        assert torch.equal(view + 0, VIEWS[name](VALUES)) and delivery.waits == 1
        assert torch.equal(tensor + 0, VALUES) and delivery.waits == 1


NOT_IN_INFERENCE = ("compiled", "compiled on the right")
"""torch refuses to compile for a subclass of tensors in inference mode."""
MODES_OF_USES = [
    (name, mode) for mode in MODES for name in USES if mode is torch.no_grad or name not in NOT_IN_INFERENCE
]


@pytest.mark.parametrize(("name", "mode"), MODES_OF_USES)
def test_uses_wait_once(name, mode):
    with mode():
        tensor, delivery = awaited(VALUES)
        result = USES[name](tensor)
        expected = USES[name](VALUES.clone())
        assert torch.equal(result + 0, expected) and type(result + 0) is torch.Tensor and delivery.waits == 1
        if name in ("in place", "written"):
            assert torch.equal(tensor + 0, expected)


def test_inputs_without_awaited_results_stay_themselves():
    """A model may write to a list or a dict that it is given."""
    tensor, delivery = awaited(VALUES)
    cache = {"keys": [VALUES]}
    assert arrived(cache) is cache and arrived(VALUES) is VALUES and delivery.waits == 0
    (kept,) = arrived([tensor])
    assert type(kept) is torch.Tensor and torch.equal(kept, VALUES) and delivery.waits == 1


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Frozen:
    content: Any


class Plain:
    def __init__(self, content):
        self.content = content


HOLDERS: dict[str, tuple[Any, Any]] = {
    "list": (lambda x: [x, 1], lambda holder: holder[0]),
    "dict": (lambda x: {"a": x}, lambda holder: holder["a"]),
    "deque": (lambda x: deque([x]), lambda holder: holder[0]),
    "mapping": (lambda x: UserDict(a=x), lambda holder: holder["a"]),
    "output": (lambda x: BaseModelOutput(last_hidden_state=x), lambda holder: holder.last_hidden_state),
    "dataclass": (Frozen, lambda holder: holder.content),
    "object": (Plain, lambda holder: holder.content),
    "nested": (lambda x: {"a": [Frozen(Pair(1, x))]}, lambda holder: holder["a"][0].content.second),
}
"""Holder of a result; what it holds."""


@pytest.mark.parametrize("name", HOLDERS)
def test_holders_take_results_in_place(name):
    """A model may write to them, and its caller may read what it has written."""
    make, content = HOLDERS[name]
    tensor, delivery = awaited(VALUES)
    holder = make(tensor)
    assert arrived(holder) is holder and delivery.waits == 1
    assert type(content(holder)) is torch.Tensor and torch.equal(content(holder), VALUES)


def test_a_view_of_a_result_that_was_read_is_no_view_of_the_wrapper():
    """Dynamo looks at the tensor that a view is of."""
    tensor, _ = awaited(VALUES)
    assert torch.equal(tensor * 1, VALUES)
    plain = arrived({"a": tensor[:, 1:]})["a"]
    assert type(plain) is torch.Tensor and type(plain._base) in (torch.Tensor, type(None))
    assert torch.equal(nn.Parameter(tensor, requires_grad=False) + 0, VALUES)


def test_containers_that_hold_themselves_have_an_end():
    tensor, _ = awaited(VALUES)
    holder: list[Any] = [tensor]
    holder.append(holder)
    assert arrived(holder) is holder and type(holder[0]) is torch.Tensor


def test_tuples_are_made_anew():
    tensor, _ = awaited(VALUES)
    pair = arrived(Pair(1, tensor))
    assert type(pair) is Pair and type(pair.second) is torch.Tensor and type(arrived((tensor,))[0]) is torch.Tensor


def test_data_is_replaced():
    tensor, _ = awaited(VALUES.clone())
    view = tensor[0]
    tensor.data = 2 * VALUES
    assert torch.equal(tensor + 0, 2 * VALUES) and torch.equal(tensor.data, 2 * VALUES)
    assert torch.equal(view, VALUES[0])  # as of a plain tensor, it stays a view of the old values
    with pytest.raises(TypeError, match="data of another form changes the shape"):
        tensor.data = VALUES[0]


def test_shapes_are_not_changed_in_place():
    tensor, _ = awaited(VALUES)
    with pytest.raises(
        TypeError, match="unsqueeze_ changes the shape or the memory of a result that another rank computes"
    ):
        tensor.unsqueeze_(0)


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
