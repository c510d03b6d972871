"""ImageReward (Xu et al. 2023): how much people would like a picture for its prompt, by a BLIP of transformers.

    picture 224 x 224 ─► vision transformer ─► tokens ─┐
    prompt, 35 tokens ─► text encoder, attends to them ┴─► first token ─► five linear layers ─► (r - mean) / std

The weights are those that the authors publish, `ImageReward.pt` and `med_config.json`. Their names are translated to
transformers'.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cachedit_fx.metrics.features import WeightsError, state_dict_of
from cachedit_fx.metrics.text import Scorer

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the rewards in the authors' training set."""
LENGTH = 35
"""Tokens of a prompt."""
PATCH = 16
_HEAD_WIDTH = 64

_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)
"""Names in the authors' vision transformer -> transformers'. The text encoder's names agree."""


class ImageReward(nn.Module):
    """The network.

    Args:
        weights: the authors' state dict; its shapes give the sizes.
        text_config: of `med_config.json`: the text encoder's settings.

    Raises:
        WeightsError: if weights are missing or do not fit.
    """

    def __init__(self, weights: Mapping[str, Tensor], text_config: Mapping[str, Any]) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        vision, text, head = (
            _below(weights, prefix) for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
        )
        width, depth = vision["pos_embed"].shape[-1], _depth(vision, "blocks")
        self.side = round((vision["pos_embed"].shape[1] - 1) ** 0.5) * PATCH
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=vision["blocks.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=depth,
                num_attention_heads=max(1, width // _HEAD_WIDTH),
                image_size=self.side,
                patch_size=PATCH,
                layer_norm_eps=1e-6,
            )
        )
        shared = set(BlipTextConfig().to_dict()) & set(text_config)
        settings = {name: text_config[name] for name in shared} | {"encoder_hidden_size": width, "is_decoder": True}
        settings["vocab_size"] = text["embeddings.word_embeddings.weight"].shape[0]
        self.text = BlipTextModel(BlipTextConfig(**settings), add_pooling_layer=False)
        self.head = nn.ModuleDict(
            {
                name.split(".")[1]: nn.Linear(value.shape[1], value.shape[0])
                for name, value in head.items()
                if value.ndim == 2
            }
        )
        _load(self.vision, {_translated(name): value for name, value in vision.items()})
        _load(self.text, text)
        _load(self.head, {name.removeprefix("layers."): value for name, value in head.items()})

    def forward(self, picture: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """[N, 3, side, side] normed as CLIP's, [N, 35] and [N, 35] -> rewards [N]."""
        patches = self.vision(pixel_values=picture).last_hidden_state
        everywhere = torch.ones(patches.shape[:2], dtype=torch.long)
        values = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=everywhere,
            is_decoder=False,  # the prompt is read both ways; cross-attention exists in what is built as a decoder
        ).last_hidden_state[:, 0]
        for layer in self.head.values():
            values = layer(values)
        return (values[:, 0] - MEAN) / STD


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not part:
        raise WeightsError(f"these are no weights of ImageReward: none is named {prefix}...")
    return part


def _depth(weights: Mapping[str, Tensor], name: str) -> int:
    return 1 + max(int(key.split(".")[1]) for key in weights if key.startswith(f"{name}."))


def _translated(name: str) -> str:
    for pattern, replacement in _VISION_NAMES:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def _load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Buffers such as position ids may be missing, or be there for nothing; parameters may not."""
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise WeightsError(f"the weights do not fit: {error}") from error
    parameters = {name for name, _ in module.named_parameters()}
    wrong = [name for name in missing if name in parameters] + [n for n in unexpected if "position_ids" not in n]
    if wrong:
        raise WeightsError(f"the weights do not fit: {', '.join(wrong[:3])} are missing or unknown")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} holds no settings: it must be the med_config.json of zai-org/ImageReward")
    return config


def load_image_reward(folder: str | Path, tokenizer: str | Path | None = None) -> Scorer:
    """ImageReward's score of a picture for its prompt: mostly from -2 to 2, with mean 0 over the authors' data.

    Args:
        folder: with `ImageReward.pt` and `med_config.json`, as on the hub (zai-org/ImageReward), and with BERT's
            tokenizer (`vocab.txt`), or without.
        tokenizer: a folder, or a name in the hub's cache; None: `folder` if it has one, otherwise bert-base-uncased.

    Raises:
        WeightsError: if a file is missing or does not fit. Nothing is downloaded.
    """
    from transformers import BertTokenizer, BlipImageProcessor

    folder = Path(folder)
    for name in ("ImageReward.pt", "med_config.json"):
        if not (folder / name).is_file():
            raise WeightsError(f"ImageReward needs {folder / name}, and there is no such file: get zai-org/ImageReward")
    weights, config = state_dict_of(folder / "ImageReward.pt"), _read_config(folder / "med_config.json")
    try:
        network = ImageReward(weights, config).eval()
    except KeyError as error:
        raise WeightsError(f"{folder / 'ImageReward.pt'} holds no ImageReward: {error} is missing") from error
    source = tokenizer or (folder if (folder / "vocab.txt").is_file() else "bert-base-uncased")
    try:
        words: Any = BertTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"ImageReward needs BERT's tokenizer, and {source} has none: put vocab.txt into {folder}"
        ) from error
    size = {"height": network.side, "width": network.side}
    processor: Any = BlipImageProcessor(do_resize=False, do_normalize=True)

    def score(picture: Image.Image, prompt: str) -> float:
        pixels = processor(images=_cropped(picture, size["height"]), return_tensors="pt")["pixel_values"]
        tokens = words([prompt], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            return float(network(pixels, tokens["input_ids"], tokens["attention_mask"]))

    return score


def _cropped(picture: Image.Image, side: int) -> Image.Image:
    """The shorter side resized to `side`, bicubic, then the square in the middle."""
    scale = side / min(picture.size)
    width, height = (max(side, int(length * scale)) for length in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return resized.crop((left, top, left + side, top + side))
