"""What several modules of tests of the run time share."""

import pytest
from lib.shared import SharedCapture
from lib.toys import make


@pytest.fixture(scope="module")
def shared() -> SharedCapture:
    """A toy whose capture serves every compilation of a module's tests. They must be marked `keep_compiled`."""
    return SharedCapture(make())
