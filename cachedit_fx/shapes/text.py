"""The closed vocabulary of the bundled model, and its small text encoder."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import nn

from cachedit_fx.shapes.dataset import BACKGROUNDS, COLORS, POSITIONS, RADII, RELATIONS, SHAPES

MAX_WORDS = 12
"""Longest caption, in words; shorter ones are padded. The longest that the data set makes has exactly as many."""


def _words() -> tuple[str, ...]:
    phrases = ["a an at the on", *RADII, *COLORS, *SHAPES, *POSITIONS, *RELATIONS, *BACKGROUNDS]
    return tuple(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


VOCABULARY: tuple[str, ...] = ("<pad>", *_words())
"""All words; a word's place is its token."""

_TOKEN = {word: token for token, word in enumerate(VOCABULARY) if token}


class UnknownWordError(ValueError):
    """A prompt has a word that the bundled model does not know."""


def tokenize(prompts: Sequence[str]) -> torch.Tensor:
    """Turn prompts into tokens: int64 [len(prompts), MAX_WORDS], 0 where there is no word.

    Case, commas and full stops do not matter; the empty prompt is the unconditional one. Raises `UnknownWordError`
    for a word outside `VOCABULARY`, and `ValueError` for a prompt of more than `MAX_WORDS` words.
    """
    if isinstance(prompts, str):
        raise TypeError("tokenize() takes a list of prompts; put the single prompt into a list")
    tokens = torch.zeros(len(prompts), MAX_WORDS, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        words = prompt.lower().replace(",", " ").replace(".", " ").split()
        unknown = [word for word in words if word not in _TOKEN]
        if unknown:
            raise UnknownWordError(_unknown_message(unknown, prompt))
        if len(words) > MAX_WORDS:
            raise ValueError(f"prompt has {len(words)} words, the bundled model reads at most {MAX_WORDS}: {prompt!r}")
        tokens[row, : len(words)] = torch.tensor([_TOKEN[word] for word in words], dtype=torch.long)
    return tokens


def _unknown_message(unknown: Sequence[str], prompt: str) -> str:
    parts = []
    for word in dict.fromkeys(unknown):
        near = difflib.get_close_matches(word, list(_TOKEN), n=1, cutoff=0.5)
        parts.append(f"{word!r} (nearest known: {near[0]!r})" if near else repr(word))
    return (
        f"the bundled model does not know {', '.join(parts)} in {prompt!r}. "
        f"Sizes: {', '.join(RADII)}. Colours: {', '.join(COLORS)}. Shapes: {', '.join(SHAPES)}. "
        f"Positions (at the ...): {', '.join(POSITIONS)}. Relations: {', '.join(RELATIONS)}. "
        f"Backgrounds (on ...): {', '.join(BACKGROUNDS)}. Other words: a, an, at, the."
    )


class _EncoderLayer(nn.Module):
    """Pre-norm self-attention and MLP. Padding takes part: its learned embedding says "no word here"."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ShapesTextEncoder(nn.Module):
    """Word and place embeddings and a few light transformer layers, trained together with the picture model.

    `width` is the size of both outputs, `layers` and `heads` those of the transformer.
    """

    def __init__(self, width: int = 96, layers: int = 2, heads: int = 3) -> None:
        super().__init__()
        self.width = width
        self.word = nn.Embedding(len(VOCABULARY), width)
        self.place = nn.Parameter(torch.randn(MAX_WORDS, width) * 0.5)
        self.layers = nn.ModuleList(_EncoderLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode tokens [B, MAX_WORDS] to prompt_embeds [B, MAX_WORDS, width] and pooled embeddings [B, width]."""
        x = self.word(tokens) + self.place
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        said = (tokens != 0).unsqueeze(-1).to(x.dtype)
        said = torch.where(said.sum(1, keepdim=True) > 0, said, torch.ones_like(said))
        return x, (x * said).sum(1) / said.sum(1)
