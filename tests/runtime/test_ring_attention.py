"""The function that passes keys and values around, and exchanges beside it, on four ranks; and how results merge."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lib.ranks import close, on_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cachedit_fx import collectives, ring
from cachedit_fx.config.rules import OptionError
from cachedit_fx.runtime.grid import Sizes, grid_of

# ---------------------------------------------------------------------------------------------------------------------
# Merging


def drawn(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(sum),
    hidden=st.sampled_from([None, "bool", "numbers", "chunks"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    sizes=st.sampled_from([(2, 3, 5, 8, 8), (1, 1, 1, 8, 8), (2, 2, 4, 8, 5)]),
    seed=st.integers(0, 100),
)
def test_any_chunks_merge_to_the_whole(lengths, hidden, dtype, sizes, seed):
    """Chunks without a key, chunks that no query sees, and queries that see no key at all."""
    batch, heads, rows, size, value_size = sizes
    total = sum(lengths)
    query, key = (drawn((batch, heads, each, size), dtype, seed + each) for each in (rows, total))
    value = drawn((batch, heads, total, value_size), dtype, seed)
    mask = None
    if hidden is not None:
        is_seen = drawn((rows, total), seed=seed) > 0
        is_seen[0] = False
        is_seen[:, : lengths[0]] &= hidden != "chunks"
        mask = torch.zeros(rows, total, dtype=dtype).masked_fill(~is_seen, -torch.inf)
        mask = (mask if hidden == "bool" else mask + drawn((rows, total), dtype, seed))[None, None]
    borders = [0, *itertools.accumulate(lengths)]
    merged: Any = None
    for low, high in itertools.pairwise(borders):
        part = None if mask is None else mask[..., low:high]
        partial = ring.attend(query, key[:, :, low:high], value[:, :, low:high], part, None, False)
        merged = partial if merged is None else ring.merge(merged, partial)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert not merged[0].isnan().any()
    assert close(merged[0], expected.to(merged[0].dtype), 0.03 if dtype is torch.bfloat16 else 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels of GPUs, of which nothing runs here


@pytest.mark.parametrize(
    ("dtype", "is_masked", "size", "kernel"),
    [
        (torch.bfloat16, False, 64, "_scaled_dot_product_flash_attention"),
        (torch.bfloat16, True, 64, "_scaled_dot_product_efficient_attention"),
        (torch.float32, False, 64, "_scaled_dot_product_efficient_attention"),
        (torch.bfloat16, False, 20, "bmm"),
        (torch.float64, False, 64, "bmm"),
    ],
)
def test_kernels_on_gpus_by_dtype_mask_and_size(dtype, is_masked, size, kernel, monkeypatch):
    """Torch's own descriptions of the kernels take the arguments, and the log-sum-exp has a number for each query."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    called = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func._schema.name.removeprefix("aten::"))
            return func(*args, **kwargs or {})

    with FakeTensorMode(), Names():
        query, key, value = (torch.empty(1, 2, each, size, dtype=dtype, device="cuda:0") for each in (37, 21, 21))
        mask = torch.empty(1, 1, 37, 21, device="cuda:0", dtype=dtype) if is_masked else None
        out, lse = ring.attend(query, key, value, mask, None, False)
        assert out.shape == (1, 2, 37, size) and lse.shape == (1, 2, 37)
        assert out.dtype == lse.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert kernel in called


# ---------------------------------------------------------------------------------------------------------------------
# Four ranks

SEGMENTS = {"odd": ((11, 1),), "two": ((5, 1), (9, 1)), "few": ((3, 1),), "units": ((5, 2), (6, 1))}
HEADS = 3


def by_rows():
    return grid_of(Sizes(ring=2, ulysses=2))


def by_columns():
    """The ranks of the ring are neighbours."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ulysses", "ring"))
    return grid_of(Sizes(ring=2, ulysses=2), mesh)


def held(grid):
    """What one rank says of a grid: name -> whether it held."""
    tokens, ulysses, ring_name = grid.tokens.name, grid.ulysses.name, grid.ring.name
    at, neighbour = collectives.place_in(ring_name)[0], collectives.place_in(ulysses)[0]
    heads = ((HEADS, 1),)
    own_heads = slice(0, 2) if neighbour == 0 else slice(2, 3)
    checks = {"order": collectives.place_in(tokens)[0] == 2 * at + neighbour}
    for name, segments in SEGMENTS.items():
        length = sum(count * unit for count, unit in segments)
        ordered, parts = list[Any](), list[Any]()
        for index, each in enumerate(("query", "key", "value")):
            whole = drawn((1, HEADS, length, 8), seed=index)
            part = collectives.cut_sequence(whole, 2, segments, tokens)
            there = collectives.exchange(part, 2, segments, 1, heads, ulysses, ring_name)
            back = collectives.exchange(there, 1, heads, 2, segments, ulysses, ring_name)
            ordered.append(collectives.order_by_rank(whole, 2, segments, tokens))
            parts.append(there)
            lengths = collectives.lengths_in_ring(segments, ring_name, ulysses)
            run = ordered[-1][:, own_heads].split(lengths, 2)[at]
            checks[f"exchange of {each}, {name}"] = torch.equal(there, run)
            checks[f"back of {each}, {name}"] = torch.equal(back, part)
            for form in (collectives.exchange_float8, collectives.exchange_centred_float8):
                sent = form(part, 2, segments, 1, heads, ulysses, ring_name)
                checks[f"{form.__name__} of {each}, {name}"] = not run.numel() or close(sent, run, 0.07)
        mask = drawn((1, 1, length, length), seed=5) > -0.5
        mask[..., lengths[0] :] &= length > 5  # the queries see nothing of the second rank's keys
        for given_mask, is_causal in ((None, False), (mask, False), (None, True)):
            options: dict[str, Any] = {"attn_mask": given_mask, "is_causal": is_causal}
            names: dict[str, Any] = {"queries": segments, "keys": segments, "ring": ring_name, "ulysses": ulysses}
            query, key, value = parts
            result = ring.ring_attention(query, key, value, **options, **names)
            query, key, value = ordered
            expected = F.scaled_dot_product_attention(query, key, value, **options)
            run = expected[:, own_heads].split(lengths, 2)[at]
            checks[f"attention, {name}, {given_mask is not None}, {is_causal}"] = close(result, run)
    return checks


def test_rows_and_columns_of_four_ranks_share_attention():
    def run(rank):
        return {
            f"{make.__name__}: {name}": each for make in (by_rows, by_columns) for name, each in held(make()).items()
        }

    for checks in on_ranks(run, 4):
        assert [name for name, is_held in checks.items() if not is_held] == []


def test_a_mesh_whose_rows_descend_is_refused():
    def run(rank):
        mesh = DeviceMesh("cpu", [[1, 0], [3, 2]], mesh_dim_names=("ring", "ulysses"))
        with pytest.raises(OptionError, match=r"\[\[1, 0\], \[3, 2\]\]: those of a row must ascend"):
            grid_of(Sizes(ring=2, ulysses=2), mesh)
        dist.barrier()

    on_ranks(run, 4)
