"""These tests run in an environment of their own, .venv-scale; see `make test-scale`."""

from importlib.util import find_spec

_NEEDED = {
    "test_milvus*": "pymilvus",
    "test_copy.py": "pymilvus",
    "test_ray*": "ray",
}

collect_ignore_glob = [pattern for pattern, package in _NEEDED.items() if find_spec(package) is None]
