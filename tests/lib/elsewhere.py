"""Models as they are written outside diffusers, made tiny: each is one shape of denoiser that exists in public code.

`MODELS` is the table: how to make one, what to call it with, and, counted by hand, which blocks make up its chain. A
model is called as `model(*arguments)`, the sample first and the timestep second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from lib.elsewhere_blocks import (
    VACE,
    BlockOutput,
    Bridged,
    Conditioned,
    DenseExperts,
    DroppingLast,
    Every,
    LargerLast,
    Mixture,
    Replacing,
    RoutedExperts,
    Sparse,
    SpatialTemporal,
    TwoRefiners,
    Wrapped,
    Writing,
    WrittenResiduals,
)
from lib.elsewhere_streams import DiT, Flux, HunyuanDiT, Listed, Stacked, UViT, Worded, functional_block
from lib.models import (
    WIDTH,
    Block,
    Controlled,
    InDict,
    Numbered,
    Refined,
    Shared,
    time_embedding,
)
from lib.models import TwoLoops as ImageOnly
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# Near misses
# ---------------------------------------------------------------------------------------------------------------------


class ParallelExperts(nn.Module):
    """Blocks that all read the same stream, summed: none takes what another made."""

    def __init__(self, experts: int = 5, width: int = WIDTH) -> None:
        super().__init__()
        self.embed, self.project = nn.Linear(width, width), nn.Linear(width, width)
        self.experts = nn.ModuleList(Block(width) for _ in range(experts))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        temb, x = time_embedding(timestep), self.embed(hidden_states)
        return self.project(sum(expert(x, temb) for expert in self.experts))


class AccumulatingExperts(ParallelExperts):
    """The same, added to a stream one behind the other."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        temb, x = time_embedding(timestep), self.embed(hidden_states)
        total = x
        for expert in self.experts:
            total = total + expert(x, temb)
        return self.project(total)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

Turn = Any
"""What runs in one block, to be counted on the plain model: a module, a function of this file, or a tuple of them."""


class Arguments(NamedTuple):
    """How `tokens` shapes a call."""

    sample: Callable[[int], Tensor]
    others: Callable[[int], tuple[Any, ...]] = lambda tokens: ()


def stream(tokens: int) -> Tensor:
    return torch.randn(1, tokens, WIDTH)


def residuals(number: int) -> Callable[[int], tuple[Any, ...]]:
    return lambda tokens: ([stream(tokens) for _ in range(number)],)


TOKENS = Arguments(stream)
WITH_TEXT = Arguments(stream, lambda tokens: (stream(5),))
WITH_CONTROL = Arguments(stream, lambda tokens: (stream(tokens),))


@dataclass(frozen=True)
class Elsewhere:
    """A row: a model, its arguments, and for each loop of its chain what runs in each of its blocks.

    `beside` names what need not run where the blocks in the middle are bypassed, but is no block of the chain.
    """

    make: Callable[[], nn.Module]
    loops: Callable[[Any], Sequence[Sequence[Turn]]]
    blocks: int
    arguments: Arguments = TOKENS
    tokens: tuple[int, int] = (6, 9)
    beside: Callable[[Any], Sequence[nn.Module]] = field(default=lambda model: ())
    bare: Callable[[Any], Sequence[Sequence[Turn]]] | None = None
    """What the loops are to one who sees no names, where that differs: what repeats may be several blocks."""


def one_loop(name: str = "blocks") -> Callable[[Any], Sequence[Sequence[Turn]]]:
    return lambda model: [list(getattr(model, name))]


def members(model: Any) -> Sequence[Sequence[Turn]]:
    return [model.members()]


def pairs(model: Any) -> Sequence[Sequence[Turn]]:
    return [list(zip(model.blocks[::2], model.blocks[1::2], strict=True))]


def both(first: str, second: str) -> Callable[[Any], Sequence[Sequence[Turn]]]:
    return lambda model: [list(getattr(model, first)), list(getattr(model, second))]


MODELS: dict[str, Elsewhere] = {
    "flux": Elsewhere(Flux, both("double_blocks", "single_blocks"), 4 + 5, WITH_TEXT),
    "flux_image_only": Elsewhere(
        lambda: ImageOnly(4, 5, style="image"), both("double_blocks", "single_blocks"), 4 + 5, WITH_TEXT
    ),
    "dit": Elsewhere(
        DiT,
        one_loop(),
        5,
        Arguments(lambda size: torch.randn(1, 4, size, size), lambda size: (torch.tensor([3]),)),
        tokens=(6, 8),
    ),
    "hunyuan_dit": Elsewhere(HunyuanDiT, one_loop(), 8),
    "u_vit": Elsewhere(UViT, lambda m: [[*m.in_blocks, m.mid_block], list(m.out_blocks)], 4 + 1 + 4),
    "numbered": Elsewhere(lambda: Numbered(5, "block_{}"), members, 5),
    "numbered_in_the_middle": Elsewhere(lambda: Numbered(5, "layer{}_dit"), members, 5),
    "module_dict": Elsewhere(lambda: InDict(5), members, 5),
    "module_dict_of_words": Elsewhere(Worded, members, 4),
    "list_added_by_other_names": Elsewhere(Listed, one_loop(), 5),
    "list_unregistered": Elsewhere(lambda: Listed([None] * 5), one_loop(), 5),
    "stacked": Elsewhere(Stacked, lambda model: [[functional_block] * 5], 5),
    "shared": Elsewhere(lambda: Shared(5), members, 5),
    "tuples": Elsewhere(
        lambda: Wrapped(lambda t, x: (x, (t, None)), lambda y: (y[1][0], y[0])), one_loop(), 5, WITH_TEXT
    ),
    "dicts": Elsewhere(
        lambda: Wrapped(lambda t, x: {"hidden": x, "text": t}, lambda y: (y["text"], y["hidden"])),
        one_loop(),
        5,
        WITH_TEXT,
    ),
    "dataclasses": Elsewhere(
        lambda: Wrapped(lambda t, x: BlockOutput(x, t), lambda y: (y.text, y.hidden)), one_loop(), 5, WITH_TEXT
    ),
    "controlnet": Elsewhere(lambda: Controlled(5), one_loop(), 5, Arguments(stream, residuals(5))),
    "controlnet_interval": Elsewhere(Sparse, one_loop(), 6, Arguments(stream, residuals(3))),
    "controlnet_every_second": Elsewhere(Every, one_loop(), 6, Arguments(stream, residuals(3)), bare=pairs),
    "text_refiner": Elsewhere(lambda: Refined(8, 2), one_loop(), 8, WITH_TEXT),
    "two_refiners": Elsewhere(TwoRefiners, one_loop("layers"), 12, WITH_TEXT),
    "vace_ahead": Elsewhere(lambda: VACE(ahead=True), one_loop(), 8, WITH_CONTROL, bare=pairs),
    "vace_interleaved": Elsewhere(
        lambda: VACE(ahead=False),
        one_loop(),
        8,
        WITH_CONTROL,
        beside=lambda m: list(m.vace_blocks),
        bare=lambda m: [list(zip(m.vace_blocks, m.blocks[::2], m.blocks[1::2], strict=True))],
    ),
    "spatial_temporal": Elsewhere(
        SpatialTemporal,
        lambda m: [list(zip(m.spatial_blocks, m.temporal_blocks, strict=True))],
        5,
        Arguments(lambda tokens: torch.randn(1, 3, tokens, WIDTH)),
    ),
    "experts_dense": Elsewhere(lambda: Mixture(DenseExperts), one_loop(), 5),
    "experts_routed": Elsewhere(lambda: Mixture(RoutedExperts), one_loop(), 5),
    "in_place_operator": Elsewhere(lambda: Writing("iadd"), one_loop(), 5),
    "in_place_method": Elsewhere(lambda: Writing("add_"), one_loop(), 5),
    "in_place_addcmul": Elsewhere(lambda: Writing("addcmul_"), one_loop(), 5),
    "in_place_part": Elsewhere(lambda: Writing("part"), one_loop(), 5),
    "in_place_assigned": Elsewhere(lambda: Writing("assigned"), one_loop(), 5),
    "in_place_residuals": Elsewhere(
        WrittenResiduals, one_loop(), 5, Arguments(stream, lambda n: (stream(5), *residuals(5)(n)))
    ),
    "replacing": Elsewhere(Replacing, one_loop(), 5),
    "last_drops_text": Elsewhere(DroppingLast, one_loop(), 5, WITH_TEXT),
    "last_is_larger": Elsewhere(
        LargerLast,
        one_loop(),
        5,
        bare=lambda m: [[*m.blocks[:4], (m.blocks[4].modulation, m.blocks[4].attn, *m.blocks[4].ff)]],
    ),
    "bridged": Elsewhere(Bridged, both("first_blocks", "second_blocks"), 4 + 5, beside=lambda model: [model.bridge]),
    "conditioned": Elsewhere(Conditioned, one_loop(), 5, WITH_CONTROL),
}


def make(name: str) -> nn.Module:
    """The model of a row, the same weights each time."""
    torch.manual_seed(0)
    return MODELS[name].make().eval()


def arguments(name: str, timestep: float = 500.0, larger: bool = False) -> tuple[Any, ...]:
    """Arguments of one call, the same each time; `larger` makes more tokens of them."""
    torch.manual_seed(1)
    row = MODELS[name]
    tokens = row.tokens[larger]
    return row.arguments.sample(tokens), torch.tensor([timestep]), *row.arguments.others(tokens)
