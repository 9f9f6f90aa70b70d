"""These tests run in an environment of their own, .venv-scale; see `make test-scale`."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.scale.unsteady_storage import UnsteadyStorage

_NEEDED = {
    "test_milvus*": "pymilvus",
    "test_copy.py": "pymilvus",
    "test_ray*": "ray",
    "test_object_storage.py": "moto",
}

collect_ignore_glob = [pattern for pattern, package in _NEEDED.items() if find_spec(package) is None]


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator["UnsteadyStorage"]:
    """Yield an object store that s3fs finds by the environment."""
    import s3fs

    from tests.scale.unsteady_storage import UnsteadyStorage

    with UnsteadyStorage() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
