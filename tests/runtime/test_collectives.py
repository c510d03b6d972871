"""The functions that move parts between ranks, on three ranks of gloo: odd lengths, several segments, all dtypes."""

import pytest
import torch
import torch.distributed as dist
from lib.ranks import on_ranks
from torch.fx.experimental.proxy_tensor import make_fx

from cachedit_fx import collectives
from cachedit_fx.kernels.quant_fp8 import quant_fp8

SEGMENTS = {
    "even": ((6, 1),),
    "odd": ((7, 1),),
    "fewer than ranks": ((2, 1),),
    "two": ((4, 1), (5, 1)),
    "units": ((2, 3), (1, 2)),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]


def whole(segments, dtype=torch.float32):
    length = sum(count * unit for count, unit in segments)
    return torch.arange(2 * length * 4 * 3).reshape(2, length, 4, 3).to(dtype)


def group():
    world = dist.group.WORLD
    assert world is not None
    return world.group_name


def cut_and_gathered(x):
    segments = ((x.shape[1], 1),)
    return collectives.gather_sequence(collectives.cut_sequence(x, 1, segments, group()), 1, segments, group())


@pytest.fixture(scope="module")
def found():
    """What three ranks say: name -> whether it held."""

    def run(rank):
        checks = {}
        for name, segments in SEGMENTS.items():
            x = whole(segments)
            part = collectives.cut_sequence(x, 1, segments, group())
            ordered = collectives.order_by_rank(x, 1, segments, group())
            heads = collectives.exchange(part, 1, segments, 2, ((4, 1),), group())
            back = collectives.exchange(heads, 2, ((4, 1),), 1, segments, group())
            own = slice(*((0, 2), (2, 3), (3, 4))[rank])
            checks[f"gather, {name}"] = torch.equal(collectives.gather_sequence(part, 1, segments, group()), x)
            checks[f"exchange, {name}"] = torch.equal(heads, ordered[:, :, own])
            checks[f"exchange back, {name}"] = torch.equal(back, part)
            taken = collectives.take_segments(part, 1, segments, len(segments) - 1, len(segments), group())
            count, unit = segments[-1]
            last = collectives.cut_sequence(x[:, x.shape[1] - count * unit :], 1, segments[-1:], group())
            checks[f"take, {name}"] = torch.equal(taken, last)
            checks[f"size, {name}"] = collectives.whole_size(part, 1, segments, None, group()) == tuple(x.shape)
            rows = torch.randn(2, x.shape[1], 4, 8, generator=torch.Generator().manual_seed(0))
            part = collectives.cut_sequence(rows, 1, segments, group())
            sent = collectives.exchange_float8(part, 1, segments, 2, ((4, 1),), group())
            rounded = torch.ops.cachedit_fx.dequant_fp8(quant_fp8(rows[..., None, :]), 1, rows.dtype).squeeze(-2)
            expected = collectives.order_by_rank(rounded, 1, segments, group())[:, :, own]
            checks[f"float8, {name}"] = torch.equal(sent, expected)
            if part.numel():
                special = part.clone()
                special[0, 0, :, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0])
                sent = collectives.exchange_float8(special, 1, segments, 2, ((4, 1),), group())
            else:
                sent = collectives.exchange_float8(part, 1, segments, 2, ((4, 1),), group())
            checks[f"float8 of infinities, {name}"] = not sent.isinf().any() and (rank == 2 or bool(sent.isnan().any()))
            offset = part + 100
            centred = collectives.exchange_centred_float8(offset, 1, segments, 2, ((4, 1),), group())
            error = (centred - 100 - collectives.order_by_rank(rows, 1, segments, group())[:, :, own]).abs()
            checks[f"centred float8, {name}"] = not error.numel() or bool(error.max() < 0.2)
        keys = torch.full((1, 3000, 4, 8), 40.0, dtype=torch.float16)
        part = collectives.cut_sequence(keys, 1, ((3000, 1),), group())
        sent = collectives.exchange_centred_float8(part, 1, ((3000, 1),), 2, ((4, 1),), group())
        checks["centred sums beyond float16"] = torch.equal(sent, keys[:, :, : sent.shape[2]])
        for dtype in DTYPES:
            x = whole(SEGMENTS["two"], dtype)
            part = collectives.cut_sequence(x, 1, SEGMENTS["two"], group())
            checks[str(dtype)] = torch.equal(collectives.gather_sequence(part, 1, SEGMENTS["two"], group()), x)
        for length in (6, 7):
            x = whole(((length, 1),))
            traced = make_fx(cut_and_gathered, tracing_mode="fake" if rank else "symbolic")
            mixed = traced(x)  # on rank 0 the length is a symbol
            checks[f"a symbol among numbers, {length}"] = torch.equal(mixed(x), x)
        checks["sum"] = collectives.sum_over_ranks(torch.tensor([rank + 1.0]), group()).item() == 6
        return checks

    return on_ranks(run, 3)


def test_all_ranks_hold(found):
    for checks in found:
        assert [name for name, held in checks.items() if not held] == []


def test_one_rank_that_raises_names_itself():
    def run(rank):
        if rank == 1:
            raise ValueError("on purpose")

    with pytest.raises(AssertionError, match="rank 1:(.|\n)*on purpose"):
        on_ranks(run)
