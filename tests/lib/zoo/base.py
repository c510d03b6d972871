"""How an entry is made: `entry` enters a function under its name, the rest are words for its configuration and inputs.

    @entry(blocks=8)
    def FluxTransformer2DModel() -> Case:
        module = tiny("FluxTransformer2DModel", num_layers=4, num_single_layers=4, ...)

        def inputs(size: int) -> dict[str, Any]: ...

        return module, inputs

An entry says what a class is configured with and called with; seeds, weights and `return_dict` are seen to here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import transformers
from torch import Tensor, nn

Inputs = Callable[[int], dict[str, Any]]
"""The keyword arguments of one forward at size 1 or 2, the same at every call; size 2 has more tokens."""

Case = tuple[nn.Module, Inputs]
ZOO: dict[str, Callable[[], Case]] = {}
"""Class name -> makes a small module of it, in eval mode, and its inputs."""

BLOCKS: dict[str, int] = {}
"""Class name -> blocks of the chain, all loops of it together."""

Make = Callable[..., Case]


def entry(blocks: int) -> Callable[[Make], Make]:
    """Enter a function under its own name, which is the class's; its chain has that many blocks.

    Every weight is drawn anew: gates and projections that start at zero would make a block do nothing.
    """

    def enter(make: Make) -> Make:
        @functools.wraps(make)
        def seeded(**changes: Any) -> Case:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                module, inputs = make(**changes)
                for parameter in module.parameters():
                    if parameter.dtype.is_floating_point:
                        parameter.normal_(std=0.2)
            return module, functools.partial(_seeded_inputs, inputs, "return_dict" in _parameters(module))

        ZOO[make.__name__], BLOCKS[make.__name__] = seeded, blocks
        return seeded

    return enter


def _seeded_inputs(inputs: Inputs, has_return_dict: bool, size: int) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(size)
        return inputs(size) | ({"return_dict": False} if has_return_dict else {})


def _parameters(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def tiny(name: str, **config: Any) -> nn.Module:
    return getattr(transformers, name)(**config).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


def sides(size: int) -> tuple[int, int]:
    """Height and width of the latents; patches of two make 4 x 4 and 6 x 8 tokens."""
    return (8, 8) if size == 1 else (12, 16)


def patches(size: int) -> tuple[int, int]:
    height, width = sides(size)
    return height // 2, width // 2


def length(size: int) -> int:
    """Of a sound, in latents."""
    return 12 * size


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


def at(timestep: float = 500.0) -> Tensor:
    return torch.tensor([timestep])


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def yes(*shape: int) -> Tensor:
    """A mask that keeps everything."""
    return ones(*shape, dtype=torch.bool)


def pair(height: int, width: int) -> Tensor:
    return torch.tensor([[float(height), float(width)]])


def grid(*sizes: int) -> Tensor:
    """Coordinates of every point of a grid, one a row."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).float()


def packed(height: int, width: int, batch: int = 1, text: int = 6) -> dict[str, Any]:
    """Latents as tokens of 4 channels and a text 12 wide, with the coordinates of both."""
    return {
        "hidden_states": noise(batch, height * width, 4),
        "encoder_hidden_states": noise(batch, text, 12),
        "img_ids": grid(1, height, width),
        "txt_ids": torch.zeros(text, 3),
    }
