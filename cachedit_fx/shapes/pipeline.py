"""A diffusers ``FluxPipeline`` around the bundled model: prompts in, 32 x 32 pictures out, in a second or two.

Latents are pixels here: ``pixel_unshuffle`` by 2 makes a [3, 32, 32] picture a [12, 16, 16] latent, and Flux's own
packing makes that 64 tokens of 48 values. No VAE, and the text encoder is ours (:mod:`cachedit_fx.shapes.text`):
prompt embeddings are passed in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn

from cachedit_fx.shapes.dataset import CANVAS
from cachedit_fx.shapes.text import ShapesTextEncoder, tokenize

WEIGHTS_DIR = Path(__file__).resolve().parent / "weights"
"""Where the bundled weights are, in a checkout and in an installed wheel alike."""

WEIGHTS_FILE = "shapes.safetensors"
CONFIG_FILE = "config.json"

TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 48,
    "num_layers": 6,
    "num_single_layers": 12,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 96,
    "guidance_embeds": False,
    "axes_dims_rope": [8, 12, 12],
}
"""Arguments of ``FluxTransformer2DModel`` for the bundled model."""

TEXT_CONFIG: dict[str, Any] = {"width": 96, "layers": 2, "heads": 3}
"""Arguments of `ShapesTextEncoder` for the bundled model."""

LATENT_SIDE = CANVAS // 2
"""Height and width of the unpacked latents; the image tokens are a grid of half of that."""

PIPELINE_SIDE = LATENT_SIDE * 8
"""Height and width to ask the pipeline for: without a VAE it takes latents to be 8 x smaller than pictures."""


def build_models(
    transformer_config: dict[str, Any] | None = None, text_config: dict[str, Any] | None = None
) -> tuple[FluxTransformer2DModel, ShapesTextEncoder]:
    """Make the two networks, untrained; the configurations of the bundled model by default."""
    transformer = FluxTransformer2DModel(**(transformer_config or TRANSFORMER_CONFIG))
    return transformer, ShapesTextEncoder(**(text_config or TEXT_CONFIG))


def pack_images(images: torch.Tensor) -> torch.Tensor:
    """Turn pictures [B, 3, 32, 32] into image tokens [B, 64, 48], in the order that ``FluxPipeline`` uses."""
    latents = nn.functional.pixel_unshuffle(images, 2)
    batch, channels, height, width = latents.shape
    latents = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return latents.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack_images(tokens: torch.Tensor) -> torch.Tensor:
    """Turn image tokens [B, 64, 48] back into pictures [B, 3, 32, 32]; the inverse of `pack_images`."""
    batch, _, channels = tokens.shape
    half = LATENT_SIDE // 2
    latents = tokens.view(batch, half, half, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return nn.functional.pixel_shuffle(latents.reshape(batch, channels // 4, LATENT_SIDE, LATENT_SIDE), 2)


def image_ids() -> torch.Tensor:
    """The rotary ids of the image tokens, [64, 3]: (0, row, column), as ``FluxPipeline`` makes them."""
    half = LATENT_SIDE // 2
    ids = torch.zeros(half, half, 3)
    ids[..., 1] = torch.arange(half)[:, None]
    ids[..., 2] = torch.arange(half)[None, :]
    return ids.reshape(-1, 3)


def make_pipeline(transformer: FluxTransformer2DModel, text_encoder: ShapesTextEncoder) -> FluxPipeline:
    """Put two networks behind a ``FluxPipeline``. The text encoder is kept as the attribute ``shapes_text_encoder``."""
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.eval(),
    )
    pipe.shapes_text_encoder = text_encoder.eval()
    return pipe


def load_pipeline(dtype: torch.dtype = torch.float32, weights_dir: str | Path | None = None) -> FluxPipeline:
    """Load the bundled, trained model as a ``FluxPipeline``.

    `dtype` is that of the transformer (the file is 16-bit); `weights_dir` is another folder that ``save_weights``
    wrote. Raises ``FileNotFoundError`` if the weights are not there and ``ValueError`` if they do not fit the
    configuration.
    """
    from safetensors.torch import load_file

    folder = WEIGHTS_DIR if weights_dir is None else Path(weights_dir)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no {name} in {folder}: the installation is incomplete (reinstall cachedit-fx), or the model "
                "was not trained yet (`python examples/train_shapes.py train`, then `... export`)"
            )
    config = json.loads((folder / CONFIG_FILE).read_text())
    transformer, text_encoder = build_models(config["transformer"], config["text_encoder"])
    state = load_file(folder / WEIGHTS_FILE)
    try:
        for prefix, module in (("transformer.", transformer), ("text_encoder.", text_encoder)):
            part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            module.load_state_dict(part)
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} does not fit {folder / CONFIG_FILE}: {error}") from error
    if dtype != torch.float32:  # diffusers warns of every cast, of one that changes nothing too
        transformer = transformer.to(dtype)
    return make_pipeline(transformer, text_encoder)


def save_weights(
    transformer_state: dict[str, torch.Tensor],
    text_state: dict[str, torch.Tensor],
    folder: str | Path,
    dtype: torch.dtype = torch.float16,
    training: dict[str, Any] | None = None,
) -> Path:
    """Write both state dicts as one safetensors file of `dtype`, and a configuration beside it; returns its path.

    `training` (steps, loss, ...) goes into the configuration file for the record.
    """
    from safetensors.torch import save_file

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    state = {f"transformer.{key}": value for key, value in transformer_state.items()}
    state |= {f"text_encoder.{key}": value for key, value in text_state.items()}
    config = {"transformer": TRANSFORMER_CONFIG, "text_encoder": TEXT_CONFIG, "training": training or {}}
    save_file({key: value.to(dtype).contiguous() for key, value in state.items()}, target / WEIGHTS_FILE)
    (target / WEIGHTS_FILE).chmod(0o644)  # safetensors 0.8 makes it readable to its owner alone, also once installed
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return target / WEIGHTS_FILE


@torch.no_grad()
def encode_prompts(pipe: FluxPipeline, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode prompts for a pipeline of `load_pipeline`.

    Returns prompt_embeds [B, 12, 96] and pooled_prompt_embeds [B, 96] in the transformer's dtype and on its device.
    Raises `UnknownWordError` for a word outside the vocabulary.
    """
    encoder: ShapesTextEncoder = pipe.shapes_text_encoder
    weight = encoder.word.weight
    embeds, pooled = encoder(tokenize(prompts).to(weight.device))
    target = next(pipe.transformer.parameters())
    return embeds.to(target.device, target.dtype), pooled.to(target.device, target.dtype)


def generate(
    pipe: FluxPipeline,
    prompts: Sequence[str],
    num_inference_steps: int = 28,
    seed: int = 0,
    true_cfg_scale: float = 1.0,
    progress: bool = False,
    callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
) -> torch.Tensor:
    """Draw one picture for each prompt: float32 [B, 3, 32, 32] in 0..1.

    Picture i starts from the noise of seed `seed` + i, whatever the batch. `true_cfg_scale` above 1 guides away from
    the empty prompt and calls the transformer twice a step. `progress` shows the pipeline's own bar;
    `callback_on_step_end` is handed to the pipeline.
    """
    embeds, pooled = encode_prompts(pipe, prompts)
    guidance: dict[str, Any] = {}
    if true_cfg_scale > 1:
        negative, negative_pooled = encode_prompts(pipe, [""] * len(prompts))
        guidance = {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
    pipe.set_progress_bar_config(disable=not progress)
    tokens = pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        true_cfg_scale=true_cfg_scale,
        height=PIPELINE_SIDE,
        width=PIPELINE_SIDE,
        num_inference_steps=num_inference_steps,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        output_type="latent",
        callback_on_step_end=callback_on_step_end,
        **guidance,
    ).images
    return (unpack_images(tokens.float()) / 2 + 0.5).clamp(0, 1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Turn pictures in 0..1 into 8-bit ones of the same shape."""
    return (images * 255).round().to(torch.uint8)
