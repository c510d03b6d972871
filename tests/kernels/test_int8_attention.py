"""INT8 attention on a CPU: `scaled_dot_product_attention` behind its op, the stand-in with the kernel's roundings, and
what the kernel takes. The Triton kernels: test_kernels_interpreted.py."""

import math

import pytest
import torch
from lib.attention import KEY_BIAS, exact, relative_error
from torch.nn.functional import scaled_dot_product_attention

from cachedit_fx.kernels.int8_attention import (
    KEY_ROWS,
    _codes,
    int8_attention,
    int8_attention_emulated,
    refusal,
    takes,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(dtype=torch.float32, head_dim=40, lengths=(7, 75), heads=(4, 2)):
    """Views of [batch, length, heads, head_dim]."""
    torch.manual_seed(0)
    return [
        torch.randn(2, length, count, head_dim).to(dtype).transpose(1, 2)
        for length, count in zip((lengths[0], lengths[1], lengths[1]), (heads[0], heads[1], heads[1]), strict=True)
    ]


def forms(dtype=torch.float32):
    """Arguments after the value."""
    pairs = torch.rand(2, 4, 7, 75) > 0.3
    pairs[1, 2, 3] = False
    bias = torch.randn(2, 4, 7, 75).to(dtype)
    return {
        "plain": {},
        "causal": {"is_causal": True, "scale": 0.1},
        "keys": {"attn_mask": torch.rand(2, 1, 1, 75) > 0.3},
        "pairs": {"attn_mask": pairs},
        "two dimensions": {"attn_mask": pairs[0, 0]},
        "bias": {"attn_mask": bias.masked_fill(~pairs, -math.inf)},
        "bias of keys": {"attn_mask": bias[:1, :, :1]},
    }


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_cpu_it_is_sdpa(dtype, form):
    given = forms(dtype)[form]
    query, key, value = inputs(dtype)
    out = int8_attention(query, key, value, enable_gqa=True, **given)
    assert torch.equal(out, scaled_dot_product_attention(query, key, value, enable_gqa=True, **given))
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(torch.ops.cachedit_fx.int8_attention(query, key, value, enable_gqa=True, **given), out)


@pytest.mark.parametrize("form", forms())
def test_log_sum_exp(form):
    given = forms()[form]
    query, key, value = inputs()
    expected, expected_lse = exact(query, key, value, *(given.get(n) for n in ("attn_mask", "is_causal", "scale")))
    for function, bound in ((int8_attention, 1e-5), (int8_attention_emulated, 0.03)):
        out, lse = function(query, key, value, enable_gqa=True, return_lse=True, **given)
        assert lse.dtype is torch.float32 and lse.shape == query.shape[:3] and lse.is_contiguous()
        assert relative_error(out, expected) < bound
        torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=bound)
    out, lse = torch.ops.cachedit_fx.int8_attention_lse(query, key, value, enable_gqa=True, **given)
    assert torch.equal(lse.isinf(), expected_lse.isinf())


@pytest.mark.parametrize("head_dim", [40, 72, 128])
@pytest.mark.parametrize("length", [1, KEY_ROWS, 75])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_stand_in_is_near_attention(dtype, length, head_dim):
    query, key, value = inputs(dtype, head_dim, (33, length))
    out = int8_attention_emulated(query, key, value, enable_gqa=True)
    assert out.dtype is dtype and out.transpose(1, 2).is_contiguous()
    expected, _ = exact(query, key, value)
    assert relative_error(out, expected) < 0.015
    assert relative_error(out, expected) > 1e-3 or length == 1
    assert relative_error(int8_attention_emulated(query, key, value, enable_gqa=True, fp8_values=True), expected) < 0.05


def test_smoothing_is_worth_most_of_the_error_of_keys_with_an_offset():
    query, key, value = inputs(head_dim=64, lengths=(70, 130), heads=(2, 2))
    expected, _ = exact(query, key + KEY_BIAS, value)
    smoothed = relative_error(int8_attention_emulated(query, key + KEY_BIAS, value), expected)
    q_codes, q_scales = _codes(query)
    padded = torch.nn.functional.pad(key + KEY_BIAS, (0, 0, 0, -130 % KEY_ROWS)).unflatten(2, (-1, KEY_ROWS))
    codes, scales = _codes(padded.flatten(3))
    rough = (codes * scales).unflatten(3, (KEY_ROWS, -1)).flatten(2, 3)[:, :, :130]
    unsmoothed = relative_error(scaled_dot_product_attention(q_codes * q_scales, rough, value), expected)
    assert smoothed < 0.015 and unsmoothed > 5 * smoothed


@pytest.mark.parametrize("name", ["int8_attention", "int8_attention_lse", "int8_attention_emulated"])
@pytest.mark.parametrize("form", ["plain", "pairs"])
def test_ops_are_registered_rightly(name, form):
    """Schema, fake implementation, tracing with symbolic sizes."""
    given = forms()[form] | {"enable_gqa": True}
    torch.library.opcheck(getattr(torch.ops.cachedit_fx, name).default, tuple(inputs()), given)


def attend(query, key, value, mask):
    out = torch.ops.cachedit_fx.int8_attention(query, key, value, mask, enable_gqa=True)
    return out.transpose(1, 2).flatten(2) * 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full("kernels"))])
def test_compiled_for_any_length(backend):
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=backend, dynamic=True, fullgraph=True)
    for lengths in ((7, 75), (9, 64), (1, 33)):
        query, key, value = inputs(lengths=lengths)
        mask = torch.rand(2, 1, 1, lengths[1]) > 0.3
        torch.testing.assert_close(compiled(query, key, value, mask), attend(query, key, value, mask))


def changed(**changes):
    shapes = {"query": (2, 4, 7, 64), "key": (2, 4, 75, 64), "value": (2, 4, 75, 64)}
    given = {name: torch.empty(changes.pop(name, shape)) for name, shape in shapes.items()}
    return given | changes


REFUSED = {
    "four dimensions": changed(query=(4, 7, 64)),
    "head_dim 36": changed(query=(2, 4, 7, 36), key=(2, 4, 75, 36), value=(2, 4, 75, 36)),
    "head_dim 264": changed(query=(2, 4, 7, 264), key=(2, 4, 75, 264), value=(2, 4, 75, 264)),
    "keys and values": changed(value=(2, 4, 75, 32)),
    "of one length": changed(key=(2, 4, 0, 64), value=(2, 4, 0, 64)),
    "4 heads": changed(key=(2, 3, 75, 64), value=(2, 3, 75, 64), enable_gqa=True),
    "at once": changed(attn_mask=torch.ones(75).bool(), is_causal=True),
    "a mask of torch.int32": changed(attn_mask=torch.ones(7, 75, dtype=torch.int32)),
    "each of the 75": changed(attn_mask=torch.ones(7, 1).bool()),
    "for scores": changed(attn_mask=torch.ones(3, 75).bool()),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_the_kernel_does_not_take(words):
    reason = refusal(**REFUSED[words])
    assert reason is not None and words in reason and not takes(**REFUSED[words])
    with pytest.raises(ValueError, match="int8_attention_emulated"):
        int8_attention_emulated(**REFUSED[words])


def test_what_it_takes():
    assert takes(**changed()) and takes(**changed(key=(2, 2, 75, 64), value=(2, 2, 75, 64), enable_gqa=True))
    assert not takes(**changed(key=(2, 2, 75, 64), value=(2, 2, 75, 64)))
    wide = torch.empty(1, 1, 4, 256, dtype=torch.bfloat16)
    assert takes(wide, wide, wide) and takes(wide, wide, wide, is_causal=True)
    assert not takes(wide, wide, wide, torch.ones(4, 4).bool())
    assert not takes(wide.double(), wide.double(), wide.double())


def test_no_log_sum_exp_without_the_kernel_elsewhere():
    query, key, value = (x.to("meta") for x in inputs(torch.bfloat16))
    with pytest.raises(ValueError, match="no log-sum-exp on meta for a GPU without the kernel"):
        int8_attention(query, key, value, enable_gqa=True, return_lse=True)


@pytest.mark.parametrize("lying", [lambda x: x.repeat_interleave(2, -1)[..., ::2], lambda x: x.mT.contiguous().mT])
def test_the_log_sum_exp_of_channels_that_are_apart(lying):
    query, key, value = inputs(torch.float32, heads=(2, 2))
    results = int8_attention(lying(query), lying(key), lying(value), return_lse=True)
    torch.testing.assert_close(results, int8_attention(query, key, value, return_lse=True))


def test_no_queries():
    query, key, value = inputs(torch.float32, heads=(2, 2))
    out, lse = int8_attention(query[:, :, :0], key, value, return_lse=True)
    assert out.shape == query[:, :, :0].shape and lse.shape == (*query.shape[:2], 0)


def test_float32_is_for_cpus():
    query, key, value = inputs(torch.float32, heads=(2, 2))
    assert takes(query, key, value)
    query, key, value = (x.to("meta") for x in (query, key, value))
    assert not takes(query, key, value)
    assert int8_attention(query, key, value).shape == query.shape
    with pytest.raises(ValueError, match="float32 on a CPU"):
        int8_attention(query, key, value, return_lse=True)
    with pytest.raises(ValueError, match="float32 on a CPU"):
        int8_attention_emulated(query, key, value)
