"""What several modules of tests of `cachedit bench` share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lib.benches import ENTRY, ROWS, shared_systems


@pytest.fixture(scope="module")
def bench_systems() -> Iterator[None]:
    """Runs of the bench share what is compiled. Modules take it by `pytestmark = SHARES_SYSTEMS`."""
    with shared_systems():
        yield


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of three rows for four steps."""
    path = tmp_path_factory.mktemp("rows") / "rows.toml"
    path.write_text(ROWS)
    return path


@pytest.fixture(scope="module")
def entry_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a module that holds a pipeline."""
    folder = tmp_path_factory.mktemp("entry")
    (folder / "toy_entry.py").write_text(ENTRY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(folder), *sys.path])
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
        yield folder
    sys.modules.pop("toy_entry", None)


@pytest.fixture
def entry(entry_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pipeline in the current folder, as a user would have it."""
    monkeypatch.chdir(entry_folder)
    return "toy_entry:Entry"
