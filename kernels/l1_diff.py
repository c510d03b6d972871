"""Relative L1 difference between what the first blocks add to the hidden states now and what they added before.

    r = H_F - H_in                      d = sum|r_prev - r| / (sum|r_prev| + eps)

Reduced in float32 whatever the model's dtype; with bfloat16 sums, as elsewhere in use, neighbouring steps become equal.
"""

from __future__ import annotations

import torch

EPSILON = 1e-30
"""Keeps 0/0 apart from a number: two zero residuals have difference 0."""


def residual(hidden: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
    """r = hidden - reference in float32, shape of `hidden`; float32 `hidden` itself where there is no reference."""
    hidden = hidden.detach().to(torch.float32)
    return hidden if reference is None else hidden - reference.detach()


def l1_difference(previous: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """d as a 0-d float32 tensor on the inputs' device. Inputs: float32, one shape. Not finite where an input is not."""
    return (previous - current).abs().sum() / (previous.abs().sum() + EPSILON)
