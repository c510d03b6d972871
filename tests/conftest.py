"""What every test shares: one thread, no network, a compile cache of this run's own, and fresh dynamo state.

The environment is set here, before anything imports torch, so that the processes that tests start inherit it. Here too
is decided which tests run (`--part`), and which of them one worker of xdist gets together.
"""

import gc
import logging
import os
import shutil
import sys
import tempfile

import pytest
from hypothesis import settings
from lib.cpu_time import CpuTime, allowed_seconds
from parts import DEFAULT, PARTS

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")  # a twentieth of a second each
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # else g++ tries each instruction set, for ten seconds

# Inductor's default cache outlives the run and could hide a compile that no longer works. One for the run costs its
# toolchain warm-up (some 10 s) once; xdist's workers and child processes inherit it. Set the variable to keep a cache.
_own_cache = None
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    _own_cache = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="cachedit-tests-")

import torch  # noqa: E402 - after the environment

torch.set_num_threads(1)

# Pytest adds its log handlers to every logger that does not propagate. This one must have none: torch writes out each
# graph and each guard for them, which takes a sixth of a capture's time.
_trace_log = logging.getLogger("torch.__trace")
_trace_log.handlers.clear()
_trace_log.propagate = True

# A first example may compile something: no deadline. In CI the same examples every time: a red run can be repeated.
settings.register_profile("tests", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("tests"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=PARTS, default=DEFAULT, help="the part of the test suite to run")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(CpuTime(), "cpu-time")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one part's tests. For several workers: keep tests together that share a fixture, and put long ones first."""
    chosen = config.getoption("part")
    parts = {item: _part_of(item) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if parts[item] != chosen])
    items[:] = [item for item in items if parts[item] == chosen]
    if hasattr(config, "workerinput"):
        for item in items:
            group = _group(item)
            if group is not None and item.get_closest_marker("xdist_group") is None:
                item.add_marker(pytest.mark.xdist_group(group))
        items.sort(key=lambda item: -allowed_seconds(item))


def _part_of(item: pytest.Item) -> str:
    """The part that the `full` marker names; without one, the default part."""
    marker = item.get_closest_marker("full")
    if marker is None:
        return DEFAULT
    (part,) = marker.args
    if part not in PARTS:
        raise pytest.UsageError(f"{item.nodeid}: no part is called {part!r}; tests/parts.py has {', '.join(PARTS)}")
    return str(part)


def _group(item: pytest.Item) -> str | None:
    """What the tests have in common that share a fixture of this suite: its module and parameter, or the session."""
    assert isinstance(item, pytest.Function)
    definitions = {name: each[-1] for name, each in item._fixtureinfo.name2fixturedefs.items() if each[-1].baseid}
    scopes = {definition.scope for definition in definitions.values()}  # pytest's own fixtures have no base
    if "session" in scopes:
        return "session"
    if "module" not in scopes:
        return None
    indices = item.callspec.indices if hasattr(item, "callspec") else {}
    parameters = [str(index) for name, index in indices.items() if name in definitions]
    return ":".join([item.location[0], *parameters])


def pytest_collection_finish() -> None:
    """Spare the garbage collector the half a million objects that importing leaves: it would go through them often."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def pytest_unconfigure() -> None:
    gc.unfreeze()
    if _own_cache is not None:
        shutil.rmtree(_own_cache, ignore_errors=True)


@pytest.fixture
def quick_collection():
    """Spare `gc.collect` what was there before the test: late in a run it takes seconds to go through that."""
    gc.freeze()


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
