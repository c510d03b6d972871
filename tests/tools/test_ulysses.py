"""`cachedit bench ulysses`: counts for ranks that do not exist, on a small model."""

import pytest
import torch.distributed as dist
from lib.zoo import ZOO

from cachedit_fx.bench.graphs import largest_graph
from cachedit_fx.bench.known_models import MODELS
from cachedit_fx.bench.ulysses import INPUTS, count, table


@pytest.fixture(scope="module")
def captured():
    module, inputs = ZOO["FluxTransformer2DModel"]()
    return module, largest_graph(module, inputs(1))


def share_of(*arguments):
    share = count(*arguments)
    assert share is not None
    return share


def test_two_ranks_exchange_heads_and_keep_half(captured):
    one, more = (share_of("tiny", captured[0], captured[1], ranks) for ranks in (2, 8))
    blocks, width = 8, 16
    assert one.exchanges == 4 * blocks and one.gathers == 1 and one.sums == 0
    assert one.tokens == (1, 8, width) and more.tokens == (1, 2, width)
    assert min(one.divided, more.divided) > 0.9
    tokens = (16 + 6) // 2
    assert one.sent == 4 * blocks * (tokens * width * 4) // 2 + 8 * 4 * 4  # of each exchange one half; and the result
    assert 0 < more.stored < one.stored
    assert not dist.is_initialized()


def test_more_ranks_than_heads_gather_keys_and_values(captured):
    share = share_of("tiny", captured[0], captured[1], 8)
    assert share.exchanges == 0 and share.gathers == 2 * 8 + 1


def test_the_table_has_a_line_for_each_number_of_ranks(captured):
    rows = [share_of("tiny", captured[0], captured[1], ranks) for ranks in (2, 8)]
    assert [line.cells[1] for line in table(rows).lines] == ["2", "8"]
    assert INPUTS.keys() <= MODELS.keys()
