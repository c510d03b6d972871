"""A call of attention in a graph, as back ends judge it: sizes, dtypes, mask and flags, without the tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size: TypeAlias = int | torch.SymInt
MaskKind: TypeAlias = Literal["bool padding", "bool", "float padding", "float", "irregular"]
"""Dtype, and whether all queries share one row of the mask (key padding). Irregular: of another dtype than the queries,
or without an entry for each key."""
REGULAR_MASKS: frozenset[MaskKind] = frozenset({"bool padding", "bool", "float padding", "float"})
MASKS: frozenset[MaskKind] = REGULAR_MASKS | {"irregular"}


@dataclass(frozen=True)
class AttentionCall:
    """One call of `scaled_dot_product_attention`.

    Attributes:
        query, key, value: sizes, [B, H, L, D] in most models.
        dtypes: of query, key, value and result.
        device: the query's device type.
        has_dense_rows: whether the channels of a head lie side by side in query, key and value.
        mask: None without a mask.
        is_causal, enable_gqa: None if a value of the graph decides.
        dropout: its probability; None if a value of the graph decides.
    """

    query: tuple[Size, ...]
    key: tuple[Size, ...]
    value: tuple[Size, ...]
    dtypes: tuple[torch.dtype, ...]
    device: str
    has_dense_rows: bool = True
    mask: MaskKind | None = None
    is_causal: bool | None = False
    enable_gqa: bool | None = False
    dropout: float | None = 0.0

    @property
    def head_dim(self) -> Size:
        return self.query[-1]

    @property
    def keys(self) -> Size:
        """Number of keys."""
        return self.key[-2]

    def obstacle(self) -> str | None:
        """Why no back end takes the call; None if one may."""
        if self.dropout != 0:
            return "it has dropout"
        if self.is_causal is None or self.enable_gqa is None:
            return "a value of the graph decides whether it is causal or has grouped heads"
        return None

    def irregularity(self) -> str | None:
        """Why the call has not the sizes and dtypes that kernels are written for; None if it has."""
        if len({len(sizes) for sizes in (self.query, self.key, self.value)}) > 1 or len(self.query) != 4:
            return "its tensors have not four dimensions"
        if len(set(self.dtypes)) > 1:
            return "its tensors have several dtypes"
        if not self.has_dense_rows:
            return "the channels of a head do not lie side by side"
        if any(same(size, 0) for size in (*self.query, *self.key)):
            return "one of its tensors is empty"
        if not all(map(same, self.key[:-1], self.value[:-1])) or not same(self.query[0], self.key[0]):
            return "one of its tensors is broadcast"
        if not self.enable_gqa and not same(self.query[1], self.key[1]):
            return "one of its tensors is broadcast"
        if not same(self.query[-1], self.value[-1]):
            return "its values have another head dim than its queries"
        return None


def mask_kind(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> MaskKind:
    """The kind of a mask that is broadcast to [..., Lq, Lk]."""
    scores = (*query.shape[:-1], key.shape[-2])
    pairs = zip(reversed(mask.shape), reversed(scores), strict=False)
    fits = all(same(size, 1) or same(size, whole) for size, whole in pairs)
    names_keys = 2 <= mask.dim() <= len(scores) and same(mask.shape[-1], scores[-1])
    if not fits or not names_keys or mask.dtype not in (torch.bool, query.dtype):
        return "irregular"
    is_padding = same(mask.shape[-2], 1)
    if mask.dtype is torch.bool:
        return "bool padding" if is_padding else "bool"
    return "float padding" if is_padding else "float"


def same(left: Size, right: Size) -> bool:
    """Whether two sizes are equal, whatever the lengths that are not known yet."""
    return statically_known_true(left == right)
