"""The bundled model, compiled once for all tests of pipelines: a policy is a change of settings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from lib.wrapped import enabled

from cachedit_fx import DBCacheConfig


@dataclass
class Bundled:
    """The bundled pipeline twice: compiled, and never compiled."""

    compiled: Any
    plain: Any

    def use(self, config: DBCacheConfig) -> None:
        """Go on under this config, which must have F = 1 and B = 0."""
        enabled(self.compiled, config)


@pytest.fixture(scope="session")
def bundled_pipes() -> Bundled:
    from cachedit_fx.shapes import generate, load_pipeline

    pipes = Bundled(enabled(load_pipeline(), DBCacheConfig(1)), load_pipeline())
    generate(pipes.compiled, ["a small red circle on navy"], 1)
    return pipes


@pytest.fixture
def bundled(bundled_pipes: Bundled) -> Iterator[Bundled]:
    """Each test may set policies and schedulers."""
    schedulers = bundled_pipes.compiled.scheduler, bundled_pipes.plain.scheduler
    yield bundled_pipes
    bundled_pipes.compiled.scheduler, bundled_pipes.plain.scheduler = schedulers
