"""The parameters of a search in its URL, in its body or in both."""

import pytest

from service.http.routes.search import SearchOptions
from service.http.schemas import SEARCH
from service.store.filters import parse_filter

URL = SearchOptions(
    k=3, threshold=0.5, filter=parse_filter({"a": 1}), prefix="u", include=("embedding",), fingerprint="url"
)


@pytest.mark.parametrize(
    ("body", "changed"),
    [
        ('{"id": "x"}', {}),
        ('{"id": "x", "k": 10}', {"k": 10}),
        ('{"id": "x", "threshold": -1}', {"threshold": -1.0}),
        ('{"id": "x", "filter": {"b": 2}}', {"filter": parse_filter({"b": 2})}),
        ('{"id": "x", "filter": null, "fingerprint": null}', {}),
        ('{"id": "x", "prefix": "b/"}', {"prefix": "b/"}),
        ('{"id": "x", "prefix": ""}', {"prefix": ""}),
        ('{"id": "x", "include": []}', {"include": []}),
        ('{"id": "x", "fingerprint": ""}', {"fingerprint": ""}),
        ('{"queries": [{"id": "x"}]}', {"k": 10}),
        ('{"queries": [{"id": "x"}], "k": 7, "threshold": 0}', {"k": 7, "threshold": 0.0}),
    ],
)
def test_the_body_wins_over_the_url(body: str, changed: dict[str, object]) -> None:
    merged = SearchOptions.merged(URL, SEARCH.validate_json(body))
    assert vars(merged) == vars(URL) | changed
