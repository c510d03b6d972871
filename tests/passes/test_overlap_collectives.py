"""OverlapCollectives: the order in blocks, in the graph and in inductor's code; the same bits; the time in waits.

Two ranks of gloo share a small FLUX. A network that takes its time is a mock, `lib.slow_wire`.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from lib.helpers import capture, outcome_of, run_graph
from lib.marks import only_in
from lib.ranks import close, on_ranks, ranks_of
from lib.shared import SharedCapture
from lib.slow_wire import SlowWire
from lib.zoo.base import packed
from torch import nn
from torch._inductor.graph import GraphLowering

from cachedit_fx.bench.ulysses import pretended
from cachedit_fx.config.options import parse_options
from cachedit_fx.lowering import compile_piece, inner_compiler
from cachedit_fx.pass_pipeline import pass_manager
from cachedit_fx.passes.detect_block_loops import DetectBlockLoops
from cachedit_fx.passes.graph_values import target_name
from cachedit_fx.passes.infer_sequence_axes import InferSequenceAxes
from cachedit_fx.passes.insert_ulysses import InsertUlysses
from cachedit_fx.passes.normalize import Normalize
from cachedit_fx.passes.overlap_collectives import OverlapCollectives, OverlappedCollectives

pytestmark = [pytest.mark.keep_compiled, pytest.mark.xdist_group("overlap")]

WIDTH = 16
PAIRS, SINGLES = 2, 2


def flux(side, text, dtype=torch.float32, **sizes):
    """A FLUX and its inputs, of `side` x `side` image tokens."""
    torch.manual_seed(0)
    small = {"in_channels": 4, "joint_attention_dim": 12, "pooled_projection_dim": 10}
    module = FluxTransformer2DModel(**small | {"num_layers": PAIRS, "num_single_layers": SINGLES} | sizes)
    inputs = packed(side, side, text=text)
    inputs |= {"pooled_projections": torch.randn(1, 10), "timestep": torch.tensor([0.5]), "guidance": None}
    inputs = {name: each.to(dtype) if torch.is_tensor(each) else each for name, each in inputs.items()}
    return module.to(dtype).eval().requires_grad_(False), inputs | {"return_dict": False}


def small_flux():
    return flux(3, 7, attention_head_dim=8, num_attention_heads=2, axes_dims_rope=(2, 2, 4))


def captured(module, inputs):
    """The module, captured; what its passes will learn."""
    facts: list[Any] = []
    shared = SharedCapture(module, facts.append)
    shared.compile(cache=None)
    shared(**inputs)
    return shared, facts


# ---------------------------------------------------------------------------------------------------------------------
# The order


@functools.cache
def outlined(**options):
    """Name -> the graph of each piece, for the first of two ranks."""
    module, inputs = small_flux()
    settings = {"cache": None, "ulysses_size": 2, "ulysses_async": True, "inner_backend": "inductor"}
    outcome = pass_manager(parse_options(settings | options)).run(capture(module, **inputs).gm)
    return dict(outcome.graph_module.named_children())


def calls(piece):
    """Short names of a piece's linear layers and attention, starts and waits."""
    short = {"linear": "linear", "scaled_dot_product_attention": "attention"}
    names = (target_name(node) for node in piece.graph.nodes if node.op == "call_function")
    halves = {"start": "start", "wait": "wait"}
    return [short.get(name) or halves[name.split("_")[0]] for name in names if name in short or "_exchange" in name]


MODULATIONS = {"transformer_blocks": ["linear"] * 2, "single_transformer_blocks": ["linear"]}
REST = {"transformer_blocks": ["wait", *["linear"] * 6], "single_transformer_blocks": ["linear", "wait", "linear"]}
"""Linear layers before those of q, k and v, and what follows the start of the output's exchange."""


def expected(loop):
    """Each exchange starts behind its own projections, and is waited for before attention.

    In blocks of one stream the feed-forward's first layer runs beside the output's exchange. Blocks of two streams have
    nothing that does not depend on it.
    """
    projections = ["linear"] * len(MODULATIONS[loop])
    return [*MODULATIONS[loop], *[*projections, "start"] * 3, *["wait"] * 3, "attention", "start", *REST[loop]]


@pytest.mark.parametrize("loop", MODULATIONS)
def test_exchanges_start_early_and_are_waited_for_late(loop):
    with pretended(2):
        pieces = outlined()
    blocks = [piece for name, piece in pieces.items() if name.startswith(loop)]
    assert [calls(block) for block in blocks] == [expected(loop)] * 2


class Written(BaseException):
    """Ends a compilation once its code is written."""


def code_of(piece, monkeypatch):
    """What inductor writes for the piece; nothing is built."""
    codes: list[str] = []

    def save(code):
        codes.append(code)
        raise Written

    options = parse_options(
        {"ulysses_async": True, "inner_backend": "inductor", "inner_options": {"fx_graph_cache": False}}
    )
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(save))
    with torch.no_grad(), pytest.raises(Written):
        compile_piece(piece, inner_compiler(options))
    return codes[-1]


NAMES = {"all_to_all_single": "start", "wait_tensor": "wait", "addmm": "linear", "flash_attention_for_cpu": "attention"}
CALL = re.compile(rf"^\s+(?:\w+ = )?(?:torch\.ops|extern_kernels)\..*?({'|'.join(NAMES)})[.(]")


@pytest.mark.budget(40, "inductor writes the code of two blocks")
@pytest.mark.parametrize("loop", MODULATIONS)
def test_inductor_keeps_the_order(loop, monkeypatch):
    with pretended(2):
        code = code_of(outlined()[f"{loop}_0"], monkeypatch)
    lines = code[code.index("def call(") :].splitlines()
    assert [NAMES[match[1]] for line in lines if (match := CALL.match(line))] == expected(loop)


# ---------------------------------------------------------------------------------------------------------------------
# The bits

FORMS: tuple[Any, ...] = (False, True, "with_keys")
RUNS = [("eager", "with_keys"), ("eager", False), ("aot_eager", True)]


@pytest.mark.budget(60, "captures a model, and two ranks run it in two forms")
@pytest.mark.parametrize(("backend", "form"), only_in("parallel", RUNS, but=RUNS[:1]))
def test_no_bit_changes(backend, form):
    module, inputs = small_flux()
    shared, facts = captured(module, inputs)
    expected = shared(**inputs)[0]

    def run(rank):
        found = []
        for is_async in (False, True):
            options = {"ulysses_float8": form, "ulysses_async": is_async, "inner_backend": backend}
            shared.compile(cache=None, ulysses_size=2, **options)
            found.append((shared(**inputs)[0], facts[-1].get(OverlappedCollectives)))
        return found

    both = on_ranks(run)
    (first, _), *others = [each for found in both for each in found]
    assert close(first, expected, 0.1 if form else 2e-5)
    assert all(torch.equal(output, first) for output, _ in others)
    for (_, plain), (_, overlapped) in both:
        assert plain is None and overlapped == OverlappedCollectives(4 * (PAIRS + SINGLES))


class Beside(nn.Module):
    """A block whose attention runs beside something else."""

    def __init__(self, other):
        super().__init__()
        self.q, self.k, self.v, self.out, self.ff = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.other = other

    def attend(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x):
        return x + self.out(self.other(self, x))


def one_after_the_other(block, x):
    return block.attend(x) + block.ff(x)


def in_autocast(block, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = block.attend(x)
    return y.float() + block.ff(x)


def draws_first(block, x):
    """The first draw is read last."""
    h = F.dropout(block.ff(x), 0.5)
    return block.attend(F.dropout(x, 0.5)) + h


def writes_beside(block, x):
    """What attention reads is written to before it, and after it."""
    y = block.ff(x)
    h = y * 2
    y[..., :4] = h[..., 4:8]
    out = block.attend(y)
    y[..., 4:] = 1.0
    return out + h + y


OTHERS = (in_autocast, draws_first, writes_beside)


def passes(group):
    return Normalize(), DetectBlockLoops(), InferSequenceAxes(2), InsertUlysses(group), OverlapCollectives()


def test_what_comes_later_runs_beside_the_exchange_too():
    model = nn.Sequential(*(Beside(one_after_the_other) for _ in range(3))).requires_grad_(False)
    with pretended(2):
        outcome = outcome_of(capture(model, torch.randn(1, 6, WIDTH)).gm, *passes("0"))
    block = [*["linear", "start"] * 3, *["wait"] * 3, "attention", "start", "linear", "wait", "linear"]
    assert calls(outcome.graph_module) == block * 3


def test_effects_keep_their_order():
    models = {other: nn.Sequential(*(Beside(other) for _ in range(3))) for other in OTHERS}
    graphs = {other: capture(model.requires_grad_(False), torch.randn(1, 6, WIDTH)) for other, model in models.items()}

    def run(rank):
        group, found = ranks_of(2), {}
        assert group is not None
        for other, graph in graphs.items():
            for is_async in (False, True):
                outcome = outcome_of(graph.copy(), *passes(group.name)[: None if is_async else -1])
                torch.manual_seed(0)
                results = run_graph(outcome.graph_module, graph.inputs)
                found[other.__name__, is_async] = results, outcome.facts.get(OverlappedCollectives)
        return found

    for found in on_ranks(run):
        for other in OTHERS:
            (plain, _), (overlapped, fact) = (found[other.__name__, is_async] for is_async in (False, True))
            assert fact == OverlappedCollectives(3 * 4)
            assert all(torch.equal(a, b) for a, b in zip(plain, overlapped, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The time in waits

STEPS = 5


def waits(shared, inputs, forms, **wire):
    """Form -> the least seconds that a rank spends in the waits of a step. The last one waits for the wire alone."""

    def run(rank):
        found = {}
        for name, options in forms.items():
            shared.compile(cache=None, ulysses_size=2, **options)
            shared(**inputs)
            seconds = []
            for _ in range(STEPS):
                with SlowWire(**wire) as slow:
                    shared(**inputs)
                seconds.append(slow.waited)
            found[name] = min(seconds)
        return found

    both = on_ranks(run)
    found = {name: min(each[name] for each in both) for name in forms}
    print({name: f"{seconds:.3f} s" for name, seconds in found.items()})
    return found


def test_the_wire_is_slow_from_the_start_on():
    """The mock: a wait right after the start takes the whole delay, a later one the rest; bytes take turns."""
    with pretended(2):
        x = torch.ones(100)
        with SlowWire(latency=0.04, seconds_per_byte=1e-4) as wire:
            one, other = (torch.ops._c10d_functional.all_reduce(x, "sum", "0") for _ in range(2))
            torch.ops._c10d_functional.wait_tensor(one)
            assert 0.07 < wire.waited < 0.2
            first = wire.waited
            torch.ops._c10d_functional.wait_tensor(other)
            assert 0.03 < wire.waited - first < 0.1
        assert wire.starts == [2, 2]


@pytest.mark.full("parallel")
@pytest.mark.budget(120, "two ranks run 24 steps of a FLUX of width 512")
def test_time_in_waits_with_20_ms_for_each_collective():
    sizes = {"attention_head_dim": 128, "num_attention_heads": 4, "axes_dims_rope": (32, 48, 48)}
    module, inputs = flux(20, 32, num_single_layers=4, **sizes)
    shared, _ = captured(module, inputs)
    found = waits(shared, inputs, {"plain": {}, "async": {"ulysses_async": True}}, latency=0.02)
    assert found["async"] <= 0.5 * found["plain"]


@pytest.mark.full("parallel")
@pytest.mark.budget(120, "two ranks run 36 steps of a FLUX of width 256")
def test_time_in_waits_with_a_delay_for_each_byte():
    """A head of a token takes 132 bytes in place of 256. An exchange of 16 bits takes 20 ms."""
    sizes = {"attention_head_dim": 128, "num_attention_heads": 2, "axes_dims_rope": (32, 48, 48)}
    module, inputs = flux(8, 16, torch.bfloat16, **sizes)
    shared, _ = captured(module, inputs)
    forms = {
        f"{form} {'async' if is_async else 'plain'}": {"ulysses_float8": form, "ulysses_async": is_async}
        for is_async in (False, True)
        for form in FORMS
    }
    found = waits(shared, inputs, forms, seconds_per_byte=1e-6)
    for kind in ("plain", "async"):
        assert found[f"True {kind}"] <= 0.7 * found[f"False {kind}"]
        assert found[f"with_keys {kind}"] <= 0.6 * found[f"False {kind}"]


@pytest.mark.full("parallel")
@pytest.mark.budget(400, "inductor compiles a FLUX on each of two ranks")
def test_ranks_compiled_by_inductor():
    module, inputs = small_flux()
    shared, _ = captured(module, inputs)
    expected = shared(**inputs)[0]

    def run(rank):
        shared.compile(cache=None, ulysses_size=2, ulysses_async=True, inner_backend="inductor")
        shared(**inputs)
        with SlowWire() as wire:
            output = shared(**inputs)[0]
        return output, wire.starts

    with torch._inductor.config.patch(compile_threads=1):
        (first, starts), (second, _) = on_ranks(run, seconds=600)
    assert torch.equal(first, second) and close(first, expected)
    blocks = PAIRS + SINGLES
    assert starts == [4 * block + start for block in range(blocks) for start in (3, 3, 3, 4)] + [4 * blocks + 1]
