"""What an entry of the families is made of, and words for entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

STEPS = 6
TEXT, POOLED = 12, 10
"""Widths of a prompt's embeddings: of each token, and of the whole."""

SMALL = {"height": 64, "width": 64}, {"height": 64, "width": 96}
LARGE = {"height": 128, "width": 128}, {"height": 128, "width": 192}
"""Two resolutions; the large ones are for autoencoders that shrink an image 32 times."""

Pipeline = Any  # of diffusers' classes, which no type checker finds
Build = Callable[[], Pipeline]


@dataclass(frozen=True)
class Family:
    """One pipeline and what is known of it.

    Attributes:
        build: makes the pipeline, with the same weights every time.
        call: how it is called, size and seed aside.
        blocks: of the chain of each transformer; 0 where dynamo captures none.
        branches: of guidance, as a transformer sees them: 1 where it is a doubled batch, an input or none.
        sizes: two resolutions.
        steps: calls of each transformer for each branch; they add up to `STEPS`.
    """

    build: Build
    call: dict[str, Any]
    blocks: int
    branches: int
    sizes: tuple[dict[str, int], dict[str, int]]
    steps: tuple[int, ...]

    def latents(self, pipe: Pipeline, size: int = 0, seed: int = 0) -> Tensor:
        """What the pipeline makes of that seed's noise."""
        given = self.call | self.sizes[size] | {"generator": torch.Generator().manual_seed(seed)}
        (latents,) = pipe(**given, num_inference_steps=STEPS, output_type="latent", return_dict=False)
        return latents


FAMILIES: dict[str, Family] = {}


def family(
    blocks: int,
    branches: int,
    sizes: tuple[dict[str, int], dict[str, int]] = SMALL,
    steps: tuple[int, ...] = (STEPS,),
    **call: Any,
) -> Callable[[Build], Build]:
    """Enter a builder under its own name, the rest being `Family`'s attributes and the arguments of the call.

    Every weight of a transformer is drawn anew: gates and projections that start at zero would make a block do nothing.
    """

    def enter(build: Build) -> Build:
        def seeded() -> Pipeline:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                pipe = build()
                for name, component in pipe.components.items():
                    if name.startswith("transformer") and component is not None:
                        for parameter in component.parameters():
                            parameter.normal_(std=0.2)
            pipe.set_progress_bar_config(disable=True)
            return pipe

        FAMILIES[build.__name__] = Family(seeded, call, blocks, branches, sizes, steps)
        return seeded

    return enter


_words = torch.Generator().manual_seed(1)


def words(*shape: int) -> Tensor:
    """An embedding, another one each time."""
    return torch.randn(shape, generator=_words)


def prompts(suffix: str = "", length: int = 6, width: int = TEXT) -> dict[str, Any]:
    """Embeddings of a prompt and of a negative one."""
    return {f"{sign}prompt_embeds{suffix}": words(1, length, width) for sign in ("", "negative_")}


def pooled() -> dict[str, Any]:
    return {f"{sign}pooled_prompt_embeds": words(1, POOLED) for sign in ("", "negative_")}


def masks(name: str = "prompt_attention_mask", length: int = 6, dtype: torch.dtype = torch.long) -> dict[str, Any]:
    """The tokens of the two prompts that are no padding: the negative one is two tokens shorter."""
    whole = torch.ones(1, length, dtype=dtype)
    shorter = whole.clone()
    shorter[:, -2:] = 0
    return {name: whole, f"negative_{name}": shorter}


UNBINNED: dict[str, Any] = {"negative_prompt": None, "use_resolution_binning": False}
"""Whose negative prompt is "" by default, which excludes embeddings, also choose among resolutions of their own."""


def make(pipeline: str, encoders: int, **components: Any) -> Pipeline:
    """The pipeline, its first `encoders` text encoders and tokenizers left out."""
    missing = [f"{kind}{number}" for number in ("", "_2", "_3")[:encoders] for kind in ("text_encoder", "tokenizer")]
    return getattr(diffusers, pipeline)(**dict.fromkeys(missing), **components)


def tiny(name: str, **config: Any) -> Any:
    """A model of diffusers, in eval mode."""
    return getattr(diffusers, name)(**config).eval()


def image_vae(channels: int = 4, name: str = "AutoencoderKL", **config: Any) -> Any:
    """Makes latents of an eighth of the size."""
    given = {"block_out_channels": (4,) * 4, "norm_num_groups": 1, "layers_per_block": 1} | config
    if name == "AutoencoderKL":
        given |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return tiny(name, latent_channels=channels, **given)


def wan_vae(name: str = "AutoencoderKLWan") -> Any:
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return tiny(name, base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, **statistics)


def heads(dim: int = 8, count: int = 2) -> dict[str, Any]:
    return {"attention_head_dim": dim, "num_attention_heads": count}


def flow(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)
