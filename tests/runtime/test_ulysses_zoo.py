"""Every transformer class of diffusers on two ranks of gloo, against one: right, and how much the ranks divide."""

from __future__ import annotations

import contextlib
import traceback
from typing import Any

import pytest
import torch
from lib import zoo
from lib.helpers import run_graph
from lib.marks import only_in
from lib.ranks import close, on_ranks
from torch import fx
from torch.utils._pytree import tree_leaves

from cachedit_fx.backend import rewrite
from cachedit_fx.bench.ulysses import pretended
from cachedit_fx.capture import capturing, copy_of
from cachedit_fx.config.options import parse_options
from cachedit_fx.passes.base import Traced
from cachedit_fx.passes.block_loops import Detection
from cachedit_fx.passes.insert_ulysses import ContextParallel

CAPTURED = sorted(set(zoo.ZOO) - set(zoo.SHORT))
GATHERING = {
    "AnyFlowFARTransformer3DModel": "flex_attention over the whole grid",
    "Kandinsky6SRTransformer3DModel": "flex_attention with a mask that is made of all queries and keys",
    "MochiTransformer3DModel": "looks up the words that count in the text",
    "NucleusMoEImageTransformer2DModel": "experts choose tokens among all",
    "RFD4ProteinaTransformer": "pairs of tokens",
    "SanaTransformer2DModel": "a convolution over neighbours",
    "SanaVideoTransformer3DModel": "a convolution over neighbours",
    "SanaWMTransformer3DModel": "a convolution over neighbours, and sums over all tokens in both directions",
}
"""Classes whose blocks need values whole, and for what."""
IN_BFLOAT16 = {"SanaWMTransformer3DModel"}
"""Classes that attend in bfloat16 whatever their dtype: the results of a ring's parts are rounded before they merge."""
MORE_HEADS: dict[str, dict[str, int]] = {
    "AceStepTransformer1DModel": {"key_heads": 2},
    "BriaFibo2Transformer2DModel": {"heads": 2},
    "Cosmos3OmniTransformer": {"key_heads": 2},
    "ZImageTransformer2DModel": {"heads": 2},
}
"""Classes that have one head in the zoo, fewer than ranks."""
LARGER = {
    "ChronoEditTransformer3DModel": ("hidden_states",),
    "WanAnimateTransformer3DModel": ("hidden_states", "pose_hidden_states"),
    "WanTransformer3DModel": ("hidden_states",),
}
"""Classes whose text is 16 times as long as the zoo's sample -> the inputs that are made 16 times larger. All ranks
have the text."""

BY_DEFAULT = {
    "AceStepTransformer1DModel": "grouped heads, music",
    "CogVideoXTransformer3DModel": "joint attention, video",
    "HunyuanVideo15Transformer3DModel": "lengths from data",
    "LTXVideoTransformer3DModel": "rotary tables of a video",
    "LatteTransformer3DModel": "attention over frames, and over each frame",
    "LuminaNextDiT2DModel": "self and cross attention in one block",
    "PixArtTransformer2DModel": "cross attention",
    "SD3Transformer2DModel": "joint attention, two streams",
    "SanaTransformer2DModel": "linear attention",
    "StableAudioDiTModel": "grouped heads in cross attention, sound",
    "T5FilmDecoder": "attention by hand",
    "WanTransformer3DModel": "cross attention, video",
}
"""Classes of the default part, each for another kind of block."""


def graphs_of(name):
    """Each graph of the class's module as dynamo captures it, its real inputs, and its results."""
    module, inputs = zoo.ZOO[name](**MORE_HEADS.get(name, {}))
    graphs = []
    arguments = inputs(1)
    arguments |= {each: arguments[each].repeat(1, 1, 1, 4, 4) for each in LARGER.get(name, ())}

    def backend(gm: fx.GraphModule, example_inputs):
        def run(*real):
            kept = [x.clone() if type(x) is torch.Tensor else x for x in real]
            results = gm(*real)
            graphs.append((gm, kept, [x.clone() for x in tree_leaves(results) if torch.is_tensor(x)]))
            return results

        return run

    for flags in (capturing(), contextlib.nullcontext()):  # as at a module's first call: the flags may fail
        torch._dynamo.reset()
        graphs.clear()
        with torch.no_grad(), flags, contextlib.suppress(Exception):
            torch.compile(module, backend=backend)(**arguments)
            return module, graphs
    raise AssertionError("dynamo captures nothing")


FORMS = [("ulysses_size", name) for name in CAPTURED] + [("ring_size", name) for name in CAPTURED]


@pytest.mark.budget(60, "captures a class, and two ranks run it")
@pytest.mark.parametrize(
    ("size", "name"), only_in("parallel", FORMS, but=[("ulysses_size", name) for name in BY_DEFAULT])
)
def test_every_class_is_right_on_two_ranks(size, name):
    module, graphs = graphs_of(name)
    options = parse_options({size: 2, "cache": None, "passes": {"outline_blocks": False}})
    with pretended(2):  # all ranks run one graph text, so it is made once
        outcomes = [rewrite(copy_of(gm), options, Traced.of(module)) for gm, *_ in graphs]

    tolerance = 5e-3 if size == "ring_size" and name in IN_BFLOAT16 else 5e-5

    def run(rank):
        found: list[Any] = []
        for outcome, (_, real, expected) in zip(outcomes, graphs, strict=True):
            try:
                results = [x for x in tree_leaves(run_graph(outcome.graph_module, real)) if torch.is_tensor(x)]
                is_right = all(close(a, b, tolerance) for a, b in zip(results, expected, strict=True))
                detection = outcome.facts.get(Detection)
                found.append((is_right, bool(detection and detection.chain), outcome.facts.get(ContextParallel)))
            except Exception:
                found.append((False, False, traceback.format_exc()))
        return found

    for found in on_ranks(run):
        assert all(is_right for is_right, *_ in found), found
        facts = [fact for _, has_chain, fact in found if has_chain]
        assert facts and all(fact is not None for fact in facts)
        gathers = sum((fact.gathers for fact in facts), start=type(facts[0].gathers)())
        assert bool(gathers) == (name in GATHERING), gathers
        if name not in GATHERING:
            assert min(fact.share for fact in facts) >= 0.8


def test_what_gathers_is_on_record():
    assert {*GATHERING, *MORE_HEADS, *LARGER, *BY_DEFAULT} <= set(CAPTURED)
    assert len(CAPTURED) - len(GATHERING) >= 60
