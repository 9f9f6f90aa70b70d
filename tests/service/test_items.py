"""The limits of an item: ids, metadata, merge patches."""

from typing import Any

import pytest

from service.errors import InvalidRequest
from service.items import check_id, check_metadata, merge_patch


def test_ids() -> None:
    assert check_id("folder/a b%#?.png", 256) == "folder/a b%#?.png"
    assert check_id("cafe\u0301", 256) == "café"
    assert check_id("👩‍👧", 256) == "👩‍👧"
    for bad in ("", "a\nb", "a\0", "\ud800", "x" * 257, ".", ".."):
        with pytest.raises(InvalidRequest, match="id:"):
            check_id(bad, 256)


def test_metadata_that_is_refused() -> None:
    assert check_metadata({"a": [1, {"b": None}]}, 100) == {"a": [1, {"b": None}]}
    deep: dict[str, Any] = {}
    for _ in range(32):
        deep = {"a": deep}
    for bad, says in (
        ({"a": float("nan")}, "finite numbers"),
        ({"a": "\ud800"}, "whole characters"),
        ({"a": "é" * 50}, "at most 100 bytes, got 109"),
        (deep, "32 levels"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            check_metadata(bad, 100)


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    # The rows are those of RFC 7396, appendix A, in which target and patch are objects.
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patches_of_the_rfc(target: dict[str, Any], patch: dict[str, Any], result: dict[str, Any]) -> None:
    before = repr(target)
    assert merge_patch(target, patch) == result
    assert repr(target) == before
