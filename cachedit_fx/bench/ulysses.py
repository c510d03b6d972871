"""What each rank does and sends when many share one sample: counted on graphs of true configurations, nothing is run.

model on the meta device ──► graph ──► rewritten for 8, 64, 256 ranks of a group that only pretends to exist
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import fx, nn

from cachedit_fx import collectives
from cachedit_fx.backend import rewrite
from cachedit_fx.bench.graphs import largest_graph
from cachedit_fx.bench.known_models import DTYPE, make
from cachedit_fx.capture import copy_of
from cachedit_fx.config.options import parse_options
from cachedit_fx.passes.base import Traced
from cachedit_fx.passes.block_loops import Detection
from cachedit_fx.passes.graph_aliases import arguments_of
from cachedit_fx.passes.graph_cost import bytes_of
from cachedit_fx.passes.graph_values import op_counts, tensor_of
from cachedit_fx.passes.insert_ulysses import ContextParallel
from cachedit_fx.passes.manager import Outcome
from cachedit_fx.passes.plan_regions import RegionReport
from cachedit_fx.report.tables import Table
from cachedit_fx.ring import COMMUNICATING, ring_attention

RANKS = (8, 64, 256)


def _tokens(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=DTYPE)


INPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "FLUX.1-dev": lambda: {
        "hidden_states": _tokens(1, 4096, 64),
        "img_ids": _tokens(4096, 3),
        "encoder_hidden_states": _tokens(1, 512, 4096),
        "txt_ids": _tokens(512, 3),
    },
    "Qwen-Image": lambda: {
        "hidden_states": _tokens(1, 4096, 64),
        "encoder_hidden_states": _tokens(1, 256, 3584),
        "img_shapes": [[(1, 64, 64)]],
    },
    "Wan 2.1 14B": lambda: {"hidden_states": _tokens(1, 16, 21, 90, 160)},
}
"""Model -> inputs of one call of full size: 1024 x 1024 pixels, or 81 frames of 1280 x 720."""


@dataclass(frozen=True)
class Share:
    """What one of many ranks does in a step.

    Attributes:
        tokens: the rank's part of the hidden states that enter the chain: their sizes.
        divided: the share of the chain's linear FLOPs that the ranks divide, from 0 to 1.
        exchanges, gathers, sums: collectives in the graph.
        whole: the chain's operations that need values whole, with their number.
        sent: bytes that the rank sends in a step.
        stored: bytes of the results that the cache keeps, in the model's dtype.
        rings: calls of attention that pass keys and values around.
        in_float8: values that change hands in eight bits.
    """

    model: str
    ranks: int
    tokens: tuple[int, ...]
    divided: float
    exchanges: int
    gathers: int
    sums: int
    sent: int
    stored: int
    whole: str = ""
    rings: int = 0
    in_float8: int = 0


@contextmanager
def pretended(ranks: int, rank: int = 0) -> Iterator[None]:
    """Context manager for a process group of this many ranks, of which this process is one. Nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def capture(name: str) -> tuple[nn.Module, fx.GraphModule]:
    """A known model on the meta device, with as many tokens as a picture or a film has, and its graph."""
    module, arguments = make(name)
    with torch.device("meta"):
        arguments |= INPUTS[name]()
    return module, largest_graph(module, arguments)


def count(
    name: str,
    module: nn.Module,
    gm: fx.GraphModule,
    ranks: int,
    by: Literal["ulysses_size", "ring_size"] = "ulysses_size",
    float8: bool = False,
) -> Share | None:
    """What one of `ranks` ranks does in a step of a model. None: the ranks divide nothing."""
    settings = {by: ranks, "Fn_compute_blocks": 1, "inner_backend": "aot_eager"}
    settings |= {"ulysses_float8": "with_keys"} if float8 else {}
    off = ("outline_blocks", "hoist_invariants", "insert_cache_branch", "gather_inputs")
    options = parse_options(settings | {"passes": dict.fromkeys(off, False)})
    with pretended(ranks):
        outcome = rewrite(copy_of(gm), options, Traced.of(module))
    return _share(name, ranks, outcome) if ContextParallel in outcome.facts else None


def _share(name: str, ranks: int, outcome: Outcome) -> Share:
    parallel, detection = outcome.facts[ContextParallel], outcome.facts[Detection]
    counts = op_counts(outcome.graph_module)
    entering = tensor_of(detection.chain_loops[0].carried[detection.hidden[0]].inputs[0])
    assert entering is not None
    nodes = [node for node in outcome.graph_module.graph.nodes if node.target in COMMUNICATING]
    return Share(
        name,
        ranks,
        tuple(map(int, entering.shape)),
        parallel.share,
        counts[collectives.exchange.__name__],
        counts[collectives.gather_sequence.__name__],
        counts[collectives.sum_over_ranks.__name__],
        sum(sent_by(node, ranks) for node in nodes),
        sum(region.result_bytes for region in outcome.facts[RegionReport].regions),
        ", ".join(f"{operation} ({number})" for operation, number in parallel.gathers.items()),
        parallel.rings,
        parallel.in_float8,
    )


def sent_by(node: fx.Node, ranks: int) -> int:
    """Bytes that each rank sends for a collective: what others need of its part; for a sum, twice.

    Around a ring, keys and values of one rank after the other.
    """
    if node.target is ring_attention:
        arguments = arguments_of(node)
        return sum(bytes_of(arguments[name]) for name in ("key", "value")) * (ranks - 1)
    size = bytes_of(node.all_input_nodes[0])
    if node.target is collectives.gather_sequence:
        return size * (ranks - 1)
    return size * (ranks - 1) // ranks * (2 if node.target is collectives.sum_over_ranks else 1)


def table(rows: Sequence[Share]) -> Table:
    """A line for each model and number of ranks."""
    headings = ("model", "ranks", "part of\nthe stream", "FLOPs\ndivided", "exchanges", "gathers", "sums")
    result = Table((*headings, "MiB\nsent", "MiB\nkept"))
    for row in rows:
        numbers = (str(number) for number in (row.exchanges, row.gathers, row.sums))
        sizes = f"{row.sent / 2**20:.0f}", f"{row.stored / 2**20:.1f}"
        shape = " x ".join(str(size) for size in row.tokens if size > 1)
        result.add(row.model, str(row.ranks), shape, f"{row.divided:.1%}", *numbers, *sizes)
    return result
