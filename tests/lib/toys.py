"""Two-stream toys, denoising loops for them, and counters. `models.py` has the shapes of block loops there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class Block(nn.Module):
    """Two streams: the text is carried along and added to the hidden states."""

    def __init__(self, width: int, in_place: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.text = nn.Linear(width, width)
        self.in_place = in_place

    def forward(self, hidden, text, temb):
        change = self.norm(hidden) * (1 + self.scale(temb)[:, None])
        change = self.down(nn.functional.gelu(self.up(change))) + text.mean(1, keepdim=True)
        change = change.to(hidden.dtype)
        text = text + torch.tanh(self.text(text)).to(text.dtype)
        if self.in_place:
            hidden += change
            return hidden, text
        return hidden + change, text


class Toy(nn.Module):
    """`blocks` blocks between two projections. The timestep is a tensor, or a number, as in diffusers' models."""

    def __init__(self, blocks: int = 6, width: int = 8, in_place: bool = False) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0.1, 3, width))
        self.embed, self.time = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, in_place) for _ in range(blocks))
        self.out = nn.Linear(width, width)

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([timestep], dtype=torch.float32)
        angles = timestep.reshape(-1, 1).to(torch.float32) / 1000 * self.frequencies
        temb = self.time(torch.cos(angles).to(hidden_states.dtype))
        hidden, text = self.embed(hidden_states), encoder_hidden_states
        for block in self.blocks:
            hidden, text = block(hidden, text, temb)
        return self.out(hidden + text.mean(1, keepdim=True))


class Timeless(nn.Module):
    """No timestep at all, so that two steps can have identical inputs."""

    def __init__(self, blocks: int = 6, width: int = 8, in_place: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, in_place) for _ in range(blocks))
        self.out = nn.Linear(width, width)

    def forward(self, hidden_states, encoder_hidden_states):
        hidden, text = self.embed(hidden_states), encoder_hidden_states
        temb = text.mean(1)
        for block in self.blocks:
            hidden, text = block(hidden, text, temb)
        return self.out(hidden + text.mean(1, keepdim=True))


class Step(nn.Module):
    """A product of matrices, and one kernel."""

    def __init__(self, width: int, function: Callable[[torch.Tensor], torch.Tensor] = torch.tanh) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(width, width), function

    def forward(self, hidden):
        return hidden + 0.5 * self.function(self.linear(hidden))


class Steps(nn.Module):
    """Inductor is done with these blocks soon. Time and text change nothing."""

    def __init__(self, blocks: int = 6, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Step(width) for _ in range(blocks))

    def forward(self, hidden_states, timestep=None, encoder_hidden_states=None):
        hidden = self.embed(hidden_states)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Loopless(nn.Module):
    """Nothing repeats."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden_states, timestep):
        return self.second(torch.relu(self.first(hidden_states))) * torch.cos(timestep).reshape(-1, 1, 1)


def make(kind: Callable[..., nn.Module] = Toy, seed: int = 0, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    return kind(**arguments).eval()


def make_small(kind: Callable[..., nn.Module] = Toy, **arguments: Any) -> Any:
    """With three blocks, which dynamo captures in half the time of six."""
    return make(kind, **{"blocks": 3} | arguments)


def noise(batch: int = 1, tokens: int = 5, width: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


FALLING = tuple(torch.linspace(900, 100, 10).tolist())


def as_tensor(timestep: float) -> torch.Tensor:
    return torch.tensor([timestep])


@torch.no_grad()
def denoise(
    model: Callable[..., torch.Tensor],
    timesteps: Iterable[float] = FALLING,
    texts: Iterable[torch.Tensor] | None = None,
    start: torch.Tensor | None = None,
    convert: Callable[[float], Any] = as_tensor,
    rate: float = 0.05,
) -> torch.Tensor:
    """Euler steps; with several `texts` the model is called once for each at every step, as for CFG."""
    hidden = noise() if start is None else start
    texts = (noise(hidden.shape[0], 3, seed=2),) if texts is None else tuple(texts)
    for timestep in timesteps:
        first, *others = [model(hidden, convert(timestep), text) for text in texts]
        hidden = hidden - rate * sum((first - other for other in others), first)
    return hidden


class CountingBackend:
    """An inner backend that compiles nothing and counts how often it was asked to."""

    def __init__(self) -> None:
        self.pieces = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.pieces += 1
        return gm.forward
