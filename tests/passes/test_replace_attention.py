"""Which calls of attention are replaced, by what, and which keep their nodes and why."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lib.attending import attending, exact, heads
from lib.helpers import capture, find, ops, outcome_of, run_graph
from lib.toys import noise
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from cachedit_fx import AttentionConfig
from cachedit_fx.attention import backends, calls, functions, sage
from cachedit_fx.attention.backends import NAMES, OWN, Backend, fitting, rows_of
from cachedit_fx.attention.calls import AttentionCall, mask_kind
from cachedit_fx.attention.functions import replacement
from cachedit_fx.passes.block_loops import Detection
from cachedit_fx.passes.detect_block_loops import DetectBlockLoops
from cachedit_fx.passes.graph_values import tensor_of
from cachedit_fx.passes.normalize import Normalize
from cachedit_fx.passes.replace_attention import ReplaceAttention, ReplacedAttention

HERE = [name for name in NAMES if name != OWN and any(row.lack() is None for row in rows_of(name))]
"""Back ends that run on this machine."""
TEXT = noise(1, 3, width=32, seed=2)


def inputs_of(tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return noise(1, tokens, width=32), torch.tensor([500.0]), TEXT


def replaced(gm: fx.GraphModule, backend: Any, **settings: Any) -> tuple[fx.GraphModule, ReplacedAttention]:
    config = AttentionConfig(backend, **settings)
    outcome = outcome_of(gm, Normalize(), DetectBlockLoops(), ReplaceAttention(config))
    return outcome.graph_module, outcome.facts[ReplacedAttention]


def function(name: str) -> Any:
    return next(row for row in rows_of(name) if row.lack() is None).load()


@pytest.fixture(scope="module")
def graph():
    return capture(attending(), *inputs_of())


@pytest.fixture(scope="module")
def masked():
    return capture(attending(), *inputs_of(), mask=torch.tensor([[[[True, True, False]]]]))


# ---------------------------------------------------------------------------------------------------------------------
# It fires


def test_every_call_changes_its_target_and_nothing_else(graph):
    before = ops(graph.gm)
    gm, fact = replaced(graph.copy(), "math")
    assert fact == ReplacedAttention({"math": 6}, {})
    change = ops(gm) - before, before - ops(gm)
    assert change == ({"math_attention": 6}, {"scaled_dot_product_attention": 6})
    for old, new in zip(graph.gm.graph.nodes, gm.graph.nodes, strict=True):
        assert old.name == new.name and str(old.args) == str(new.args) and str(old.kwargs) == str(new.kwargs)


@pytest.mark.parametrize("backend", [*HERE, exact])
def test_numerics(graph, masked, backend):
    for each in (graph, masked):
        gm, fact = replaced(each.copy(), backend)
        assert sum(fact.calls.values()) + sum(fact.kept.values()) == 6 and fact.calls
        (result,), (expected,) = run_graph(gm, each.inputs), each.expected
        bound = 3e-2 if backend == "int8_emulated" else 1e-6
        assert (result - expected).abs().max() <= bound * expected.abs().max()


def test_flash_is_what_torch_takes_on_a_cpu_to_the_bit(graph, masked):
    assert graph.same(replaced(graph.copy(), "flash")[0]) and masked.same(replaced(masked.copy(), "flash")[0])


@pytest.mark.parametrize("is_by_keyword", [True, False])
def test_calls_by_position_and_by_keyword(is_by_keyword):
    def model(x: torch.Tensor) -> torch.Tensor:
        query = heads(x)
        if is_by_keyword:
            return sdpa(query=query, key=query, value=query, attn_mask=None, dropout_p=0.0, is_causal=False, scale=0.3)
        return sdpa(query, query, query, None, 0.0, True)

    graph = capture(model, noise(width=32))
    gm, fact = replaced(graph.copy(), "math")
    assert fact.calls == {"math": 1}
    torch.testing.assert_close(run_graph(gm, graph.inputs), graph.expected)


def test_dynamic_lengths(graph):
    graph = capture(attending(), *inputs_of(), dynamic=True)
    gm, fact = replaced(graph.copy(), "math")
    assert fact.calls == {"math": 6}
    longer = [
        noise(1, 9, width=32) if isinstance(x, torch.Tensor) and x.shape == (1, 5, 32) else x for x in graph.inputs
    ]
    longer = [9 if isinstance(x, int) and x == 5 else x for x in longer]
    torch.testing.assert_close(run_graph(gm, longer), run_graph(graph.gm, longer))


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("is_tokens_first", [True, False])
def test_results_lie_in_memory_as_the_recorded_ones(name, is_tokens_first):
    x = heads(noise(2, 7, width=128))
    assert x.stride(1) < x.stride(2)
    result = replacement(name, function(name), is_tokens_first)(x, x, x)
    assert result.stride() == (x if is_tokens_first else x.contiguous()).stride()


def test_recorded_strides_are_those_that_run(graph):
    gm, _ = replaced(graph.copy(), "math")

    class Strides(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if isinstance(value, torch.Tensor) and (recorded := tensor_of(node)) is not None:
                assert value.stride() == recorded.stride() and value.dtype == recorded.dtype, node
            return value

    with torch.no_grad():
        Strides(gm).run(*graph.inputs)


def test_blocks_are_those_of_the_plain_graph_though_one_keeps_its_attention(graph):
    def blocks(*passes: Any) -> list[str]:
        detection = outcome_of(graph.copy(), Normalize(), DetectBlockLoops(), *passes).facts[Detection]
        return [block.name for loop in detection.loops for block in loop.blocks]

    assert blocks(ReplaceAttention(AttentionConfig("math", exclude="blocks.1"))) == blocks()


# ---------------------------------------------------------------------------------------------------------------------
# It does not fire


def test_kept_calls_and_the_reasons(masked):
    def taken(backend: Any, **settings: Any) -> tuple[Any, Any]:
        fact = replaced(masked.copy(), backend, **settings)[1]
        return fact.calls, fact.kept

    assert taken("flex") == ({"flex": 3}, {"flex takes no bool padding mask": 3})
    assert taken("sdpa") == ({}, {"backend is 'sdpa'": 6})
    assert taken("math", cross_backend="sdpa") == ({"math": 3}, {"cross_backend is 'sdpa'": 3})
    assert taken("sdpa", cross_backend="math") == ({"math": 3}, {"backend is 'sdpa'": 3})
    assert taken("math", exclude=["blocks.0", "attn2"]) == (
        {"math": 2},
        {"excluded by 'blocks.0'": 2, "excluded by 'attn2'": 2},
    )
    layers = {"blocks.0.attn1": None, "attn1": "flash"}
    assert taken("math", per_layer=layers) == ({"flash": 2, "math": 3}, {"per_layer['blocks.0.attn1'] is 'sdpa'": 1})


def test_a_graph_without_attention_is_untouched():
    graph = capture(nn.Linear(4, 4), torch.ones(2, 4))
    before = [node.target for node in graph.gm.graph.nodes]
    gm, fact = replaced(graph.gm, "math")
    assert fact == ReplacedAttention() and fact.warning is None
    assert [node.target for node in gm.graph.nodes] == before


def attend(x: torch.Tensor, **arguments: Any) -> torch.Tensor:
    query = heads(x)
    return sdpa(query, query, query, **arguments)


def in_two_dtypes(x: torch.Tensor) -> torch.Tensor:
    query = heads(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return sdpa(query, query, query)


NEAR_MISSES: list[tuple[Any, str, str]] = [
    (lambda x: attend(x, dropout_p=0.5), "math", "it has dropout"),
    (lambda x: attend(x, is_causal=True), "flex", "flex takes no causal call"),
    (lambda x: sdpa(x, x, x), "flash", "its tensors have not four dimensions"),
    (lambda x: sdpa(heads(x), heads(x)[:, :1], heads(x)[:, :1]), "flash", "one of its tensors is broadcast"),
    (
        lambda x: sdpa(heads(x), heads(x)[:, :1], heads(x)[:, :1], enable_gqa=True),
        "flash",
        "flash takes no grouped heads",
    ),
    (
        lambda x: sdpa(heads(x), heads(x), heads(x)[..., :4]),
        "flash",
        "its values have another head dim than its queries",
    ),
    (
        lambda x: attend(x.transpose(1, 2).contiguous().transpose(1, 2)),
        "flash",
        "the channels of a head do not lie side by side",
    ),
    (lambda x: sdpa(heads(x)[:0], heads(x)[:0], heads(x)[:0]), "flash", "one of its tensors is empty"),
    (in_two_dtypes, "flash", "its tensors have several dtypes"),
]


@pytest.mark.parametrize(("model", "backend", "reason"), NEAR_MISSES)
def test_near_misses(model, backend, reason):
    graph = capture(model, noise(width=32))
    gm, fact = replaced(graph.copy(), backend)
    assert fact.kept == {reason: 1} and not fact.calls
    assert fact.warning == f"attention: all calls keep the model's own attention: {reason} (1)"
    assert len(find(gm, "scaled_dot_product_attention")) == 1


def test_math_takes_every_form_of_a_call():
    x = noise(width=32)
    for model, _, _ in NEAR_MISSES[2:7]:
        graph = capture(model, x)
        gm, fact = replaced(graph.copy(), "math")
        assert fact.calls == {"math": 1}
        torch.testing.assert_close(run_graph(gm, graph.inputs), graph.expected)


def test_flex_attention_keeps_its_node():
    from torch.nn.attention.flex_attention import flex_attention

    graph = capture(lambda x: flex_attention(heads(x), heads(x), heads(x)), noise(width=32))
    gm, fact = replaced(graph.copy(), "math")
    assert fact.kept == {"it is a call of flex_attention": 1} and len(find(gm, "flex_attention")) == 1


def test_a_choice_of_torchs_kernel_around_a_call_has_no_effect_on_it():
    def model(x: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attend(x)

    graph = capture(model, noise(width=32))
    gm, fact = replaced(graph.copy(), "flash")
    assert fact.calls == {"flash": 1}
    x = heads(noise(width=32))
    flash = functions.flash_on_cpu(x, x, x, None, False, None)
    assert torch.equal(run_graph(gm, graph.inputs)[0], flash) and not torch.equal(graph.expected[0], flash)


# ---------------------------------------------------------------------------------------------------------------------
# Self or cross


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.both = nn.Linear(32, 64)
        self.norm = nn.RMSNorm(16)


def joint(model: Any, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The image's queries attend to the text's keys and to the image's."""
    keys = torch.cat([heads(model.key(text)), heads(model.key(x))], 2)
    return sdpa(heads(model.query(x)), keys, keys)


def rotary(model: Any, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cross-attention, in which both sides are rotated by one table that a product of matrices makes."""
    table = torch.arange(5.0)[:, None] @ torch.ones(1, 16)
    query, key = (model.norm(heads(x)) * table.cos() for x in (model.query(x), model.key(text)))
    return sdpa(query, key, key)


def fused(model: Any, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    query, key = model.both(x).chunk(2, dim=-1)
    return sdpa(heads(query), heads(key), heads(key))


def pooled(model: Any, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Self-attention to fewer keys: one of two tokens."""
    key = model.key(x)[:, ::2]
    return sdpa(heads(model.query(x)), heads(key), heads(key))


def plain(model: Any, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return sdpa(heads(model.query(x)), heads(model.key(text)), heads(model.value(text)))


def unprojected(model: Any, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return sdpa(heads(x), heads(x), heads(x))


@pytest.mark.parametrize(
    ("forward", "is_cross"),
    [(plain, True), (joint, False), (rotary, True), (fused, False), (pooled, False), (unprojected, False)],
)
def test_cross_attention_projects_two_values(forward, is_cross):
    """Text and image have the same length here: lengths alone would not tell."""
    model = Projections()
    graph = capture(lambda x, text: forward(model, x, text), noise(width=32), noise(width=32, seed=3))
    fact = replaced(graph.copy(), "math", cross_backend="flash")[1]
    assert fact.calls == ({"flash": 1} if is_cross else {"math": 1})


# ---------------------------------------------------------------------------------------------------------------------
# Declarations. No GPU is here: the calls say that their tensors are on one.


def call(keys: Any = 128, head_dim: int = 64, queries: int = 128, **more: Any) -> AttentionCall:
    key = (1, more.pop("key_heads", 4), keys, head_dim)
    settings = {"dtypes": (torch.bfloat16,) * 4, "device": "cuda"} | more
    return AttentionCall((1, 4, queries, head_dim), key, key, **settings)


def reason(name: str, *, row: int = 0, **settings: Any) -> str | None:
    return rows_of(name)[row].misfit(call(**settings))


def test_sage_declares_what_version_1_computes_right():
    assert reason("sage") is None and reason("sage", head_dim=96) is None
    assert reason("sage", keys=200) == "sage takes key lengths that 64 divides, not 200"
    assert reason("sage", keys=200, queries=200, is_causal=True) is None
    assert reason("sage", keys=128, queries=100, is_causal=True) == (
        "sage takes causal calls only of as many queries as keys"
    )
    assert reason("sage", head_dim=72) == "sage takes no head dim of 72"
    for kind in calls.MASKS:
        assert reason("sage", mask=kind) == f"sage takes no {kind} mask"
    assert reason("sage", key_heads=2, enable_gqa=True) is None
    assert reason("sage", dtypes=(torch.float64,) * 4) == (
        "sage takes float16 or bfloat16 or float32, and its tensors are float64"
    )
    assert reason("sage", row=1, keys=200) is None  # version 2


def test_flash_on_a_gpu_takes_half_precision_without_masks():
    assert reason("flash", keys=77) is None and reason("flash", key_heads=2, enable_gqa=True) is None
    assert reason("flash", mask="bool") == "flash takes no bool mask"
    assert reason("flash", head_dim=20) == "flash takes no head dim of 20"
    assert reason("flash", dtypes=(torch.float32,) * 4) == (
        "flash takes float16 or bfloat16, and its tensors are float32"
    )
    assert reason("cudnn", head_dim=256) == "cudnn takes no head dim of 256"


def test_the_page_has_every_back_end():
    page = (Path(__file__).resolve().parents[2] / "docs/attention.md").read_text()
    rows = [row for name in NAMES for row in rows_of(name)]
    assert all(f"| `{name}` | " in page for name in NAMES)
    assert all(row.meaning in page for row in rows if row.device != "cpu")


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        ((1, 1, 1, 5), torch.bool, "bool padding"),
        ((5, 5), torch.bool, "bool"),
        ((1, 5), torch.float32, "float padding"),
        ((1, 2, 5, 5), torch.float32, "float"),
        ((5,), torch.float32, "irregular"),
        ((5, 1), torch.bool, "irregular"),
        ((5, 5), torch.float64, "irregular"),
    ],
)
def test_kinds_of_masks(shape, dtype, kind):
    x = heads(noise(width=32))
    assert mask_kind(torch.zeros(shape, dtype=dtype), x, x) == kind


def test_int8_declares_what_its_kernel_takes():
    assert reason("int8") is None and reason("int8", keys=77, head_dim=128, mask="bool padding") is None
    assert reason("int8", row=1, head_dim=256) is None
    assert reason("int8", row=1, head_dim=256, mask="bool padding") == "int8 takes no bool padding mask"
    assert reason("int8", mask="irregular") == "int8 takes no irregular mask"
    assert reason("int8", head_dim=36) == "int8 takes no head dim of 36"
    float32 = (torch.float32,) * 4
    assert reason("int8", dtypes=float32) == "int8 takes float16 or bfloat16, and its tensors are float32"
    assert all(reason(name, row=2, dtypes=float32) is None for name in ("int8", "int8_emulated"))  # on a CPU


@pytest.fixture
def package(monkeypatch):
    """sageattention, which is not there: sdpa with the faults of version 1.0.6. A list of the lengths that it got."""
    lengths = []

    def sageattn(q, k, v, tensor_layout, is_causal, sm_scale):
        assert tensor_layout == "NHD" and all(x.stride(-1) == 1 for x in (q, k, v))
        k -= k.mean(1, keepdim=True)
        lengths.append(k.shape[1])
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        result = sdpa(query, key, value, is_causal=is_causal, scale=sm_scale, enable_gqa=True)
        is_wrong = k.shape[1] % 64 and not is_causal
        return (result * 2 if is_wrong else result).transpose(1, 2).contiguous()

    monkeypatch.setattr(backends, "find_spec", lambda _: SimpleNamespace())
    for module in (backends, sage):
        monkeypatch.setattr(module, "major_version", lambda: 1)
    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    return lengths


@pytest.fixture
def gpu(package, monkeypatch):
    """The package on a GPU, which is not there either."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")


@pytest.mark.parametrize("is_tokens_first", [True, False])
@pytest.mark.parametrize(("keys", "is_causal", "is_taken"), [(128, False, 1), (65, False, 0), (65, True, 1)])
def test_sage_is_never_wrong_on_a_faked_package(package, keys, is_causal, is_taken, is_tokens_first):
    query, key = (heads(noise(1, length, width=128, seed=length)) for length in (keys if is_causal else 70, keys))
    query = query if is_tokens_first else query.contiguous()
    before = key.clone()
    result = torch.ops.cachedit_fx.sage_attention(query, key, key, None, is_causal, None, False)
    torch.testing.assert_close(result, sdpa(query, before, before, is_causal=is_causal))
    assert torch.equal(key, before) and len(package) == is_taken
    assert result.stride() == query.stride()


def test_sage_decides_at_run_time_about_a_dynamic_length_on_a_faked_package(package):
    graph = capture(attend, noise(1, 65, width=128), dynamic=True)
    (node,) = find(graph.gm, "scaled_dot_product_attention")
    result = tensor_of(node)
    assert result is not None and isinstance(result.shape[2], torch.SymInt)
    assert reason("sage", keys=result.shape[2]) is None
    node.target = replacement("sage", rows_of("sage")[0].load(), True)
    graph.gm.recompile()
    compiled = torch.compile(graph.gm, backend="aot_eager", dynamic=True)
    for length in (65, 64, 128):
        x = noise(1, length, width=128)
        torch.testing.assert_close(compiled(*[length if isinstance(i, int) else x for i in graph.inputs])[0], attend(x))
    assert package == [64, 128]


def test_sage_keeps_its_contract_as_an_operator(package):
    x = heads(noise(1, 64, width=128))
    torch.library.opcheck(torch.ops.cachedit_fx.sage_attention.default, (x, x, x, None, False, None, False))


def test_a_faked_gpu_runs_sage_and_an_older_one_does_not(gpu, monkeypatch):
    assert isinstance(fitting(rows_of("sage"), call()), Backend)
    assert fitting(rows_of("sage"), call(device="cpu")) == "sage does not run on 'cpu'"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    lack = rows_of("sage")[0].lack()
    assert lack == "it needs an NVIDIA GPU of compute capability 8.0 or newer; a card has 7.5"


def test_version_2_of_sage_is_told_apart(gpu, monkeypatch):
    for module in (backends, sage):
        monkeypatch.setattr(module, "major_version", lambda: 2)
    backend = fitting(rows_of("sage"), call(200))
    assert isinstance(backend, Backend) and backend.major == 2
