"""SendFloat8: bytes on the wire by formula, results near the 16-bit exchange's, on two ranks of gloo."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from lib.helpers import capture, outcome_of
from lib.mixing import Model, heads_of, tokens
from lib.ranks import close, on_ranks
from lib.shared import SharedCapture
from lib.zoo.base import packed
from torch.utils._python_dispatch import TorchDispatchMode

from cachedit_fx.bench.ulysses import pretended
from cachedit_fx.collectives import HALVES
from cachedit_fx.passes.detect_block_loops import DetectBlockLoops
from cachedit_fx.passes.graph_values import target_name
from cachedit_fx.passes.infer_sequence_axes import InferSequenceAxes
from cachedit_fx.passes.insert_ulysses import ContextParallel, InsertUlysses
from cachedit_fx.passes.normalize import Normalize
from cachedit_fx.passes.send_float8 import SendFloat8

pytestmark = [pytest.mark.keep_compiled, pytest.mark.xdist_group("float8")]

HEAD, BLOCKS = 128, 4
FORMS: dict[str, Any] = {"16 bits": False, "float8": True, "with keys": "with_keys"}
SCALE = 4
"""Bytes of a head's scale."""


class Wire(TorchDispatchMode):
    """Counts the bytes that all-to-alls take."""

    sent = 0

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            self.sent += args[0].nbytes
        return func(*args, **kwargs or {})


@functools.cache
def captured():
    facts: list[Any] = []
    torch.manual_seed(0)
    module = FluxTransformer2DModel(
        in_channels=4,
        attention_head_dim=HEAD,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        num_layers=2,
        num_single_layers=BLOCKS - 2,
        num_attention_heads=2,
        axes_dims_rope=(32, 48, 48),
    )
    inputs = packed(6, 4, text=8)
    inputs |= {"pooled_projections": torch.randn(1, 10), "timestep": torch.tensor([0.5]), "guidance": None}
    inputs = {key: each.bfloat16() if torch.is_tensor(each) else each for key, each in inputs.items()}
    shared = SharedCapture(module.bfloat16().eval().requires_grad_(False), facts.append)
    shared.compile(cache=None)
    expected = shared(**inputs, return_dict=False)[0]
    return shared, inputs, facts, expected


@functools.cache
def found():
    """For each rank: form -> its result, the bytes that it gave to all-to-alls, and what the passes say."""
    shared, inputs, facts, _ = captured()

    def run(rank):
        results = {}
        for name, form in FORMS.items():
            shared.compile(cache=None, ulysses_size=2, ulysses_float8=form)
            shared(**inputs, return_dict=False)  # ranks compare their inputs
            with Wire() as wire:
                output = shared(**inputs, return_dict=False)[0]
            results[name] = output, wire.sent, facts[-1].get(ContextParallel)
        return results

    return on_ranks(run)


@pytest.mark.budget(60, "captures a model, and two ranks run it")
def test_bytes_on_the_wire():
    for results in found():
        sent = {name: bytes for name, (_, bytes, _) in results.items()}
        row = HEAD + SCALE
        assert sent["float8"] / sent["16 bits"] == (3 * row + 2 * HEAD) / (4 * 2 * HEAD)  # 0.637
        means = BLOCKS * 2 * 2 * HEAD  # the rank's, of two heads in 16 bits, of each block
        assert sent["with keys"] - means == sent["16 bits"] * row / (2 * HEAD)  # 0.516


def test_results_are_near_those_in_16_bits():
    _, _, _, expected = captured()
    for results in found():
        assert close(results["16 bits"][0], expected, 0.02)
        for name in ("float8", "with keys"):
            assert close(results[name][0], expected, 0.1) and not torch.equal(results[name][0], results["16 bits"][0])
    first, second = found()
    assert all(torch.equal(first[name][0], second[name][0]) for name in FORMS)


def test_what_the_passes_say():
    first, _ = found()
    facts = {name: fact for name, (_, _, fact) in first.items()}
    assert [fact.in_float8 for fact in facts.values()] == [0, 3 * BLOCKS, 4 * BLOCKS]
    assert facts["with keys"].exchanges == 4 * BLOCKS and "16 of 16 exchanges" in facts["with keys"].note


@pytest.mark.parametrize(
    ("with_keys", "targets"),
    [
        (False, ["exchange_float8", "exchange", "exchange_float8"]),
        (True, ["exchange_float8", "exchange_centred_float8", "exchange_float8"]),
    ],
)
def test_a_value_that_is_keys_too_travels_as_keys_do(with_keys, targets):
    def attends(layer, x):
        query, both, _ = heads_of(layer, x)
        return F.scaled_dot_product_attention(query, both, both).transpose(1, 2).flatten(2)

    passes = Normalize(), DetectBlockLoops(), InferSequenceAxes(2), InsertUlysses("0"), SendFloat8(with_keys)
    with pretended(2):
        outcome = outcome_of(capture(Model(attends), tokens(6)).gm, *passes)
    names = [target_name(node) for node in outcome.graph_module.graph.nodes if node.target in HALVES]
    assert [name for name in names if "exchange" in name] == targets * 3
