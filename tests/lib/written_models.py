"""Small block models that write in place through an alias: ways to alias x ways to write x places x targets.

    Case(aliases=("data", "chunk"), write="copy_", target="activation", place="across")

`build(case)` makes the model. Whatever it writes is read afterwards, by its other names too.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, TOKENS, BLOCKS = 8, 4, 3

Alias = Callable[[Tensor], Tensor]
Write = Callable[[Tensor, Tensor], object]


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2))) if x.shape[-1] % 2 == 0 and x.stride(-1) == 1 else x


def _half(x: Tensor) -> int:
    return max(x.shape[-1] // 2, 1)


ALIASES: dict[str, Alias] = {
    "itself": lambda x: x,
    "data": lambda x: x.data,
    "detach": lambda x: x.detach(),
    "alias": lambda x: torch.ops.aten.alias(x),
    "view": lambda x: x.view(x.shape),
    "view_as": lambda x: x.view_as(x),
    "reshape": lambda x: x.reshape(*x.shape, 1),
    "flatten": lambda x: x.flatten(-2) if x.dim() > 1 else x.flatten(),
    "unflatten": lambda x: x.unflatten(-1, (-1, 1)),
    "contiguous": lambda x: x.contiguous(),
    "to": lambda x: x.to(x.dtype),
    "float": lambda x: x.float(),
    "slice": lambda x: x[..., : _half(x)],
    "strided slice": lambda x: x[..., ::2],
    "ellipsis": lambda x: x[..., None],
    "select": lambda x: x.select(0, 0),
    "narrow": lambda x: x.narrow(-1, 0, _half(x)),
    "chunk": lambda x: x.chunk(2, dim=-1)[0],
    "last chunk": lambda x: x.chunk(2, dim=-1)[-1],
    "split": lambda x: x.split(1, dim=0)[0],
    "tensor_split": lambda x: torch.tensor_split(x, 2, dim=-1)[0],
    "unbind": lambda x: x.unbind(0)[0],
    "as_strided": lambda x: x.as_strided(x.shape, x.stride()),
    "as_strided rows": lambda x: x.as_strided((x.shape[0], 1), (x.stride(0), 1)),
    "T": lambda x: x[0].T if x.dim() == 3 else x,
    "mT": lambda x: x.mT if x.dim() > 1 else x,
    "transpose": lambda x: x.transpose(0, -1),
    "permute": lambda x: x.permute(*reversed(range(x.dim()))),
    "movedim": lambda x: x.movedim(0, -1),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "squeeze": lambda x: x.squeeze(),
    "diagonal": lambda x: x.diagonal(dim1=-2, dim2=-1) if x.dim() > 1 else x,
    "unfold": lambda x: x.unfold(-1, 1, 1),
    "real": lambda x: _complex(x).real,
    "imag": lambda x: _complex(x).imag if x.shape[-1] % 2 == 0 and x.stride(-1) == 1 else x,
    "view_as_real": lambda x: torch.view_as_real(_complex(x)) if x.shape[-1] % 2 == 0 and x.stride(-1) == 1 else x,
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, training=False),
    "tuple": lambda x: (x, x + 1)[0],
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, torch.zeros(()))[0],
    "atleast_2d": lambda x: torch.atleast_2d(x),
}
"""Name -> another name of the argument's memory, or of a part of it."""


def _iadd(x: Tensor, change: Tensor) -> None:
    x += change


def _imul(x: Tensor, change: Tensor) -> None:
    x *= change


def _isub_slice(x: Tensor, change: Tensor) -> None:
    x[..., :1] -= change


def _setitem(x: Tensor, change: Tensor) -> None:
    x[...] = change


def _setitem_mask(x: Tensor, change: Tensor) -> None:
    x[x > 0] = change


def _foreach(x: Tensor, change: Tensor) -> None:
    torch._foreach_add_([x, change.clone()], 0.5)
    torch._foreach_mul_([x], 0.5)


def _assign_data(x: Tensor, change: Tensor) -> None:
    x.data = x * 0.5 + change


def _batch_norm(x: Tensor, change: Tensor) -> None:
    rows = x.unflatten(-1, (-1, 1)).select(-1, 0)
    while rows.dim() > 1:
        rows = rows.select(0, 0)
    F.batch_norm(change + torch.linspace(0, 1, 2 * len(rows)).view(2, -1), rows, rows.clone() ** 2, training=True)


def _embed(x: Tensor, change: Tensor) -> None:
    if x.dim() > 1 and x.is_contiguous():
        F.embedding(torch.zeros(1, dtype=torch.long), x.view(-1, x.shape[-1]), max_norm=0.25)
    else:
        x.add_(change)


def _twice(x: Tensor, change: Tensor) -> None:
    head = x[..., :1]
    x.mul_(0.75)
    head += change
    x[..., -1:].copy_(head * 2)


def _chained(x: Tensor, change: Tensor) -> None:
    y = x.add_(change).mul_(0.5)
    y.data[..., :1] = change


@torch.library.custom_op("cachedit_fx_tests::add_into", mutates_args={"x"})
def _add_into(x: Tensor, change: Tensor) -> None:
    """An operator of a library's own. Dynamo captures it as a call, and its schema alone tells of the write."""
    x.add_(change)


def _checkpointed(x: Tensor, change: Tensor) -> None:
    """A write within a graph of its own: an argument of a higher-order operation."""
    checkpoint(lambda: x.add_(change), use_reentrant=False)


WRITES: dict[str, Write] = {
    "data =": _assign_data,
    "set_": lambda x, change: x.set_(x * 0.5 + change),  # type: ignore[call-overload]
    "unsqueeze_": lambda x, change: x[..., :].unsqueeze_(0).add_(change),  # dynamo itself fails on an argument
    "batch_norm": _batch_norm,
    "embedding": _embed,
    "twice": _twice,
    "chained": _chained,
    "add_": lambda x, change: x.add_(change),
    "mul_add_": lambda x, change: x.mul_(0.5).add_(change, alpha=2),
    "copy_": lambda x, change: x.copy_(change),
    "fill_": lambda x, change: x.fill_(change),
    "zero_": lambda x, change: x.zero_(),
    "lerp_": lambda x, change: x.lerp_(change.expand(x.shape), 0.25),
    "clamp_": lambda x, change: x.clamp_(max=0.25),
    "masked_fill_": lambda x, change: x.masked_fill_(x > 0, 0.5),
    "iadd": _iadd,
    "imul": _imul,
    "__iadd__": lambda x, change: x.__iadd__(change),
    "isub slice": _isub_slice,
    "setitem": _setitem,
    "setitem mask": _setitem_mask,
    "function": lambda x, change: torch.Tensor.add_(x, change),
    "torch.relu_": lambda x, change: torch.relu_(x),
    "out": lambda x, change: torch.add(x, change, out=x),
    "out of another": lambda x, change: torch.mul(x + 1, change, out=x),
    "foreach": _foreach,
    "silu inplace": lambda x, change: F.silu(x, inplace=True),
    "relu by position": lambda x, change: F.relu(x, True),
    "elu by position": lambda x, change: F.elu(x, 0.5, True),
    "aten": lambda x, change: torch.ops.aten.mul_.Scalar(x, 0.5),
    "custom op": _add_into,
    "checkpoint": _checkpointed,
    "index_add_": lambda x, change: x.index_add_(0, torch.zeros(x.shape[0], dtype=torch.long), x + change),
}
"""Name -> a write to the first argument, of a number that the second one holds."""

Target = Literal["activation", "argument", "buffer", "stream", "shared arguments"]
Place = Literal["before", "across", "in blocks", "after"]
TARGETS: tuple[Target, ...] = ("activation", "argument", "buffer", "stream", "shared arguments")
PLACES: tuple[Place, ...] = ("before", "across", "in blocks", "after")


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        aliases: ways to alias, each of the one before it.
        write: the way to write.
        target: what is written to; "stream" are the hidden states, "shared arguments" two that are views of a tensor.
        place: where from: before the blocks; in the last blocks through an alias from before them; in every block;
            after the blocks.
        depends: whether what is written depends on the hidden states.
    """

    aliases: tuple[str, ...] = ("itself",)
    write: str = "add_"
    target: Target = "activation"
    place: Place = "in blocks"
    depends: bool = True

    @property
    def is_traced_right(self) -> bool:
        """False if torch 2.13 records other strides than the module has: `dropout(x, 0.0, training=True)` returns x,
        and is traced as a dense copy. Any backend then gets wrong numbers (findings/dropout_of_nothing_strides.sh)."""
        pairs = itertools.pairwise(self.aliases)
        return not any(first == "dropout of nothing" and second.startswith("as_strided") for first, second in pairs)


def cases() -> st.SearchStrategy[Case]:
    """Any case, of one or two aliases."""
    return st.builds(
        Case,
        aliases=st.lists(st.sampled_from(list(ALIASES)), min_size=1, max_size=2).map(tuple),
        write=st.sampled_from(list(WRITES)),
        target=st.sampled_from(TARGETS),
        place=st.sampled_from(PLACES),
        depends=st.booleans(),
    ).filter(lambda case: case.is_traced_right)


def every_pair() -> Iterator[Case]:
    """Every way to alias with every way to write, each pair at a place and with a second alias of its own."""
    draw = random.Random(0)
    for alias in ALIASES:
        for write in WRITES:
            second = draw.choice(list(ALIASES))
            aliases = draw.choice([(alias,), (alias, second), (second, alias)])
            case = Case(aliases, write, draw.choice(TARGETS), draw.choice(PLACES), draw.random() < 0.6)
            yield case if case.is_traced_right else replace(case, aliases=aliases[::-1])


class Block(nn.Module):
    """Mixes its hidden states, and writes through an alias if it is told to."""

    def __init__(self, case: Case, writes: bool) -> None:
        super().__init__()
        self.case, self.writes = case, writes
        self.linear, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, temb: Tensor, value: Tensor, alias: Tensor) -> Tensor:
        change = self.linear(hidden * (1 + temb)).tanh()
        if self.writes:
            if self.case.place == "in blocks" and self.case.target == "activation":
                value = change * 1.5
            if self.case.place == "in blocks":
                alias = aliased(self.case, hidden if self.case.target == "stream" else value)
            apply_write(self.case, alias, change)
        return hidden + self.out(change) + 0.1 * value.mean() + 0.1 * alias.mean()


class Model(nn.Module):
    """Blocks between two projections, and a value that somebody writes to."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.proj_in, self.proj_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        writers = {"in blocks": range(BLOCKS), "across": range(BLOCKS - 1, BLOCKS)}.get(case.place, range(0))
        self.blocks = nn.ModuleList(Block(case, index in writers) for index in range(BLOCKS))
        self.register_buffer("buffer", torch.linspace(-1, 1, 2 * TOKENS * WIDTH).view(2, TOKENS, WIDTH))

    def forward(self, hidden_states: Tensor, timestep: Tensor, extra: Tensor, another: Tensor) -> tuple[Tensor, ...]:
        case = self.case
        temb = (timestep / 1000)[:, None, None].sin()
        hidden = self.proj_in(hidden_states)
        values = {"activation": hidden * 0.5, "argument": extra, "buffer": self.buffer, "stream": hidden}
        value = values.get(case.target, extra)
        alias = aliased(case, another if case.target == "shared arguments" else value)
        if case.place == "before":
            apply_write(case, alias, hidden)
        for block in self.blocks:
            hidden = block(hidden, temb, value, alias)
        if case.place == "after":
            apply_write(case, alias, hidden)
        return self.proj_out(hidden), value.sum(), alias.mean()


def aliased(case: Case, value: Tensor) -> Tensor:
    """The alias of `value` that the case writes through."""
    for name in case.aliases:
        value = ALIASES[name](value)
    return value


def apply_write(case: Case, alias: Tensor, source: Tensor) -> None:
    """The case's write, of a number that depends on `source` if the case says so."""
    change = source.mean() if case.depends else torch.full((), 0.375)
    WRITES[case.write](alias, change)


@torch.no_grad()
def build(case: Case) -> Model:
    """The model, the same weights at every call."""
    torch.manual_seed(0)
    return Model(case).eval()


def arguments(case: Case, step: int) -> dict[str, Any]:
    """Fresh arguments of one step; those of steps of one number are equal."""
    generator = torch.Generator().manual_seed(step)
    hidden, extra, other = (torch.randn(2, TOKENS, WIDTH, generator=generator) for _ in range(3))
    another = (extra if case.target == "shared arguments" else other)[:, 1:]
    timestep = torch.tensor([900.0 - 100 * step])
    return {"hidden_states": hidden, "timestep": timestep, "extra": extra, "another": another}
