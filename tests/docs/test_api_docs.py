"""docs/api.md: its table of routes and statuses is that of the OpenAPI document, its codes are those of the errors."""

import re

from service import errors
from service.http.openapi import STATUSES
from service.http.routes import create_app
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
    written = {row[0].strip("`"): {code for code, mark in zip(head[1:], row[1:], strict=True) if mark} for row in rows}
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
            elif status != "204" and "/thumbnail" not in route and "/content" not in route and route != "GET /info":
                assert any("examples" in content for content in told["content"].values()), (route, status)


def test_every_limit_is_in_the_operations_page() -> None:
    from service.settings import Settings

    for name in Settings.model_fields:
        if name.startswith("max_") or name.endswith("_timeout_s"):
            assert f"`{name}`" in OPERATIONS, name
