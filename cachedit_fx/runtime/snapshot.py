"""Copies the state that a call may change, so that the call can be made again from the same state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def snapshot(arguments: Any) -> Callable[[], None]:
    """Copy the tensors in `arguments`, and the states of the random generators. The result restores that state.

    A tensor that did not change is not written to, so autograd does not see the restoring as a write.
    """
    copies = [(leaf, leaf.detach().clone()) for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    generator = torch.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        for leaf, copy in copies:
            if not torch.equal(leaf, copy):
                leaf.detach().copy_(copy)
        torch.set_rng_state(generator)
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)

    return restore
