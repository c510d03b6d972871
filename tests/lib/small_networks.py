"""Networks of metrics with small random weights, in files as their authors' are."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "square", "circle"]


def save_clip(folder: Path) -> None:
    """A CLIP of transformers with its processor. It knows `WORDS`."""
    from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": len(WORDS), "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0,
            "max_position_embeddings": 16}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=16)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)


def save_image_reward(folder: Path) -> None:
    """Random weights under the authors' names."""
    torch.manual_seed(0)
    width, wide, text = 64, 32, 24

    def linear(name: str, inner: int, outer: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 0.3 * torch.randn(outer, inner), f"{name}.bias": 0.3 * torch.randn(outer)}

    def norm(name: str, size: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.ones(size), f"{name}.bias": torch.zeros(size)}

    block = "blip.visual_encoder.blocks.0"
    weights = {
        "blip.visual_encoder.cls_token": torch.randn(1, 1, width),
        "blip.visual_encoder.pos_embed": torch.randn(1, 5, width),
        "blip.visual_encoder.patch_embed.proj.weight": 0.1 * torch.randn(width, 3, 16, 16),
        "blip.visual_encoder.patch_embed.proj.bias": torch.zeros(width),
        **norm(f"{block}.norm1", width), **norm(f"{block}.norm2", width), **norm("blip.visual_encoder.norm", width),
        **linear(f"{block}.attn.qkv", width, 3 * width), **linear(f"{block}.attn.proj", width, width),
        **linear(f"{block}.mlp.fc1", width, wide), **linear(f"{block}.mlp.fc2", wide, width),
        **linear("mlp.layers.0", text, 8), **linear("mlp.layers.2", 8, 1),
        "blip.text_proj.weight": torch.zeros(1),
    }  # fmt: skip
    words = "blip.text_encoder"
    weights |= {
        f"{words}.embeddings.word_embeddings.weight": torch.randn(len(WORDS), text),
        f"{words}.embeddings.position_embeddings.weight": torch.randn(40, text),
        f"{words}.embeddings.position_ids": torch.arange(40)[None],
        **norm(f"{words}.embeddings.LayerNorm", text),
    }
    layer = f"{words}.encoder.layer.0"
    for name, source in (("attention", text), ("crossattention", width)):
        weights |= linear(f"{layer}.{name}.self.query", text, text)
        for part in ("key", "value"):
            weights |= linear(f"{layer}.{name}.self.{part}", source, text)
        weights |= linear(f"{layer}.{name}.output.dense", text, text) | norm(f"{layer}.{name}.output.LayerNorm", text)
    weights |= linear(f"{layer}.intermediate.dense", text, wide) | linear(f"{layer}.output.dense", wide, text)
    weights |= norm(f"{layer}.output.LayerNorm", text)
    torch.save(weights, folder / "ImageReward.pt")
    config = {"hidden_size": text, "intermediate_size": wide, "num_hidden_layers": 1, "num_attention_heads": 2,
              "max_position_embeddings": 40, "hidden_act": "gelu", "layer_norm_eps": 1e-12}  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
