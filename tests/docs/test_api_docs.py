"""docs/api.md, the OpenAPI document and the code agree on routes, statuses, codes, limits and the filter's grammar."""

import json
import re
from typing import Any

import jsonschema_rs
import pytest

from service import errors
from service.http.openapi import STATUSES
from service.http.routes import create_app
from service.settings import Settings
from service.store.filters import DESCRIPTION, parse_filter
from tests.conftest import ROOT

API = (ROOT / "docs" / "api.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
DOCUMENT = create_app().openapi()
ROUTES = {
    f"{method.upper()} {path}": operation
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
}


def table(first: str) -> list[list[str]]:
    """Return the rows of the table in docs/api.md whose first heading is this one."""
    lines = API[API.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_of_routes_and_statuses_is_the_documents() -> None:
    head, _, *rows = table("route")
    # As in Markdown, cells that are missing at the end of a row are empty.
    written = {row[0].strip("`"): {code for code, mark in zip(head[1:], row[1:], strict=False) if mark} for row in rows}
    assert written == {route: set(operation["responses"]) for route, operation in ROUTES.items()}


def test_the_codes_are_those_of_the_errors() -> None:
    _, _, *rows = table("status")
    written = {(int(row[0]), code) for row in rows for code in re.findall(r"`(\w+)`", row[1])}
    known = {
        (error.status, error.code)
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.LookalikeError)
    }
    at_the_command_line = {"invalid_source", "invalid_model", "invalid_output", "store_mismatch"}
    known = {(status, code) for status, code in known if code not in at_the_command_line}
    assert written == known | {(404, "unknown_route"), (405, "method_not_allowed")}


def test_every_route_has_examples_of_bodies_and_errors() -> None:
    for route, operation in ROUTES.items():
        bodies = operation.get("requestBody", {}).get("content", {})
        if bodies:
            assert any("examples" in content for content in bodies.values()), route
        for status, told in operation["responses"].items():
            if int(status) >= 400:
                (content,) = told["content"].values()
                assert content["examples"], (route, status)
                assert int(status) in STATUSES
            elif status != "204" and not route.endswith(("/thumbnail", "/preview", "/content", "GET /info")):
                assert any("examples" in content for content in told["content"].values()), (route, status)


def test_every_limit_is_in_the_operations_page() -> None:
    for name in Settings.model_fields:
        if name.startswith("max_") or name.endswith("_timeout_s"):
            assert f"`{name}`" in OPERATIONS, name


def test_limits_in_the_document_are_those_of_the_settings() -> None:
    limits = {name: field.default for name, field in Settings.model_fields.items()}
    (id,) = [one for one in ROUTES["GET /images/{id}"]["parameters"] if one["name"] == "id"]
    assert id["schema"]["maxLength"] == limits["max_id_bytes"]
    details = {status: detail for status, (_, detail) in STATUSES.items()}
    assert f"from 1 to {limits['max_k']}," in details[400]
    assert f"limit is {limits['max_pixels']} pixels" in details[413]
    assert details[429].startswith(f"{limits['max_waiting']} requests")
    assert f"{limits['work_timeout_s']:g} s" in details[504]
    assert f"text of 1 to {limits['max_id_bytes']} bytes" in API
    assert f"up to {limits['max_metadata_bytes'] // 1024} KB" in API


OPERATORS = {"$and", "$or", "$not", "$eq", "$ne", "$in", "$nin", "$gt", "$gte", "$lt", "$lte", "$exists", "$contains"}


def test_the_filters_of_the_docs_are_the_grammar() -> None:
    _, _, *rows = table("filter")
    cells = [example for row in rows for example in re.findall(r"`(\{.*?\})`(?: or|,|$)", row[0])]
    assert len(cells) == 14
    for example in [*cells, *re.findall(r"\{\"\w+\": (?:\"\w+\"|\{.*?\})\}", DESCRIPTION)]:
        example = example.replace("[...]", '[{"a": 1}]').replace("{...}", '{"a": 1}')
        parse_filter(json.loads(example))
    schemas = DOCUMENT["components"]["schemas"]
    assert {*schemas["Filter"]["properties"], *schemas["Condition"]["properties"]} == OPERATORS
    assert set(re.findall(r"\$\w+", " ".join(cell for row in rows for cell in row))) == OPERATORS
    most = int(re.findall(r"At most (\d+) conditions", API)[0])
    parse_filter({f"field {n}": n for n in range(most // 2)})
    with pytest.raises(errors.InvalidQuery, match=f"at most {most} conditions"):
        parse_filter({f"field {n}": n for n in range(most // 2 + 1)})


SCALARS: list[Any] = ["a", 1, 1.5, True, None]
FILTERS: list[Any] = [
    *({"a": value} for value in SCALARS),
    *(
        {"a": {operator: value}}
        for operator in OPERATORS | {"$regex"}
        for value in [*SCALARS, [], ["a"], [{}], {}, {"b": 1}]
    ),
    *(
        {operator: value}
        for operator in OPERATORS | {"$regex"}
        for value in [*SCALARS, [], ["a"], [{}], {}, {"b": 1}, [{"b": 1}]]
    ),
    *({"a": {operator: ["v"] * count}} for operator in ("$in", "$nin") for count in (999, 1000, 1001)),
    *({"a": 1, "b": {"$gt": 1, "$lt": 2}}, {"a": {"$gt": 1, "b": 2}}, {}, [], "a", 1, None, {"a": []}),
]


def is_parsed(filter: Any) -> bool:
    try:
        parse_filter(filter)
    except errors.InvalidQuery:
        return False
    return True


def test_the_schema_takes_what_the_parser_takes() -> None:
    schema = {"$ref": "#/components/schemas/Filter", "components": DOCUMENT["components"]}
    taken = [filter for filter in FILTERS if is_parsed(filter)]
    assert 20 < len(taken) < len(FILTERS) - 20
    assert [filter for filter in FILTERS if jsonschema_rs.is_valid(schema, filter)] == taken
