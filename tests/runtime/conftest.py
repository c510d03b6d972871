"""What several modules of tests of the run time share."""

import pytest
import torch
from lib import host_weights
from lib.conditioned import Conditioned
from lib.hoisting import Cached
from lib.shared import SharedCapture
from lib.toys import make

from cachedit_fx import placement


@pytest.fixture(scope="module")
def shared() -> SharedCapture:
    """A toy whose capture serves every compilation of a module's tests. They must be marked `keep_compiled`."""
    return SharedCapture(make())


@pytest.fixture(scope="module")
def pooled() -> Cached:
    """The timestep and the pooled text modulate. Tests of hoisted values compile it anew; they are `keep_compiled`."""
    torch.manual_seed(0)
    return Cached(Conditioned())


@pytest.fixture(scope="module")
def timed() -> Cached:
    """The timestep alone modulates."""
    torch.manual_seed(1)
    return Cached(Conditioned(pooled=False))


@pytest.fixture
def timed_model(timed: Cached) -> Cached:
    """`timed`, as if it was never called."""
    timed.compile()
    return timed


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as an accelerator."""
    monkeypatch.setattr(placement, "is_accelerator", lambda device: True)


@pytest.fixture(scope="module")
def hosted() -> Conditioned:
    """A model that was called, with weights on the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "is_accelerator", lambda device: True)
        model: Conditioned = host_weights.make()
        host_weights.generation(model)
    return model
