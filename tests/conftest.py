"""What every test shares: one thread, no network, a compile cache of this run's own, and fresh dynamo state.

The environment is set here, before anything imports torch, so that the processes that tests start inherit it.
"""

import os
import shutil
import sys
import tempfile

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# Inductor's default cache outlives the run and could hide a compile that no longer works. One for the run costs its
# toolchain warm-up (some 10 s) once; xdist's workers and child processes inherit it. Set the variable to keep a cache.
_own_cache = None
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    _own_cache = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="cachedit-tests-")

import torch  # noqa: E402 - after the environment

torch.set_num_threads(1)

# A first example may compile something: no deadline. In CI the same examples every time: a red run can be repeated.
settings.register_profile("tests", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("tests"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "tests")


def pytest_unconfigure() -> None:
    if _own_cache is not None:
        shutil.rmtree(_own_cache, ignore_errors=True)


@pytest.fixture(autouse=True)
def _fresh_state(request: pytest.FixtureRequest):
    """Seed torch, and drop dynamo's compiled code afterwards.

    Dynamo's recompile limit is per code object, so the ninth test that compiles one toy class would run eager in
    silence. `@pytest.mark.keep_compiled` keeps the code, where one compile serves many tests.
    """
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules and request.node.get_closest_marker("keep_compiled") is None:
        torch._dynamo.reset()
