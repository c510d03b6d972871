"""Attention in float64, for the tests of the kernels."""

import math

import torch

KEY_BIAS = 20.0
"""What all keys have in common: twenty times their own size."""


def exact(query, key, value, mask=None, is_causal=False, scale=None):
    """Output and log-sum-exp in float64; rows without a key: 0 and -inf."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = query.double() @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.double()
    return scores.softmax(-1).nan_to_num(0) @ value, scores.logsumexp(-1)


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()
