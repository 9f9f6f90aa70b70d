"""A direct route: its registration's refusals, and answers equal to those of FastAPI's own route."""

from collections.abc import Callable
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, BackgroundTasks, Body, Cookie, Depends, FastAPI, Header, Query, Request, Response
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from service.http.routes import create_app
from service.http.routes.direct import DirectRoute
from service.http.schemas import EmbedBody

CALLS: list[str] = []


def note() -> str:
    CALLS.append("note")
    return "noted"


async def depends(request: Request, who: Annotated[str, Depends(note)]) -> Response:
    return Response(who)


async def depends_by_default(request: Request, who: str = Depends(note)) -> Response:
    return Response(who)


async def needs_a_parameter(request: Request, k: int) -> Response:
    return Response(str(k))


async def has_a_default_factory(request: Request, k: Annotated[int, Query(default_factory=lambda: 3)]) -> Response:
    return Response(str(k))


async def has_a_query_as_default(request: Request, k: int = Query(3)) -> Response:
    return Response(str(k))


async def takes_a_header(request: Request, accept: Annotated[str, Header()] = "") -> Response:
    return Response(accept)


async def takes_a_cookie(request: Request, who: Annotated[str, Cookie()] = "") -> Response:
    return Response(who)


async def takes_a_body(request: Request, body: EmbedBody) -> Response:
    return Response(body.model_dump_json())


async def may_take_a_body(request: Request, body: Annotated[str, Body()] = "") -> Response:
    return Response(body)


async def takes_tasks(request: Request, tasks: BackgroundTasks) -> Response:
    return Response(background=tasks)


async def changes_the_response(request: Request, response: Response = None) -> Response:  # type: ignore[assignment]
    return response


async def takes_no_request(k: int = 3) -> Response:
    return Response(str(k))


async def takes_nothing() -> Response:
    return Response()


async def takes_its_request_second(k: int = 3, *, request: Request) -> Response:
    return Response(str(k))


async def returns_an_object(request: Request) -> dict[str, int]:
    return {"k": 3}


async def says_no_type(request: Request):  # type: ignore[no-untyped-def]  # noqa: ANN201
    return {"k": 3}


def is_not_async(request: Request) -> Response:
    return Response()


async def fits(request: Request, k: Annotated[int, Query(ge=1)] = 3) -> Response:
    return Response(str(k))


REFUSED: list[tuple[Callable[..., Any], str]] = [
    (depends, "it has dependencies"),
    (depends_by_default, "it has dependencies"),
    (needs_a_parameter, "k has no plain default"),
    (has_a_default_factory, "k has no plain default"),
    (has_a_query_as_default, "k has no plain default"),
    (takes_a_header, "accept is a header parameter"),
    (takes_a_cookie, "who is a cookie parameter"),
    (takes_a_body, "body is a body parameter"),
    (may_take_a_body, "body is a body parameter"),
    (takes_tasks, "tasks is injected"),
    (changes_the_response, "response is injected"),
    (takes_no_request, "its first parameter is not a Request"),
    (takes_nothing, "its first parameter is not a Request"),
    (takes_its_request_second, "its first parameter is not a Request"),
    (returns_an_object, "it has a response model"),
    (says_no_type, "it is not annotated to return a Response"),
    (is_not_async, "it is not an async function"),
]


@pytest.mark.parametrize(("endpoint", "says"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_refused_at_registration(endpoint: Callable[..., Any], says: str) -> None:
    with pytest.raises(TypeError, match=f"^/here: DirectRoute cannot serve {endpoint.__name__}, because {says}"):
        APIRouter(route_class=DirectRoute).post("/here")(endpoint)


@pytest.mark.parametrize(
    ("path", "options", "says"),
    [
        ("/{id}", {}, "id is a path parameter"),
        ("/here", {"dependencies": [Depends(note)]}, "it has dependencies"),
        ("/here", {"max_body_size": 10}, "it has a max_body_size"),
    ],
)
def test_options_refused_at_registration(path: str, options: dict[str, Any], says: str) -> None:
    async def endpoint(request: Request, id: str = "") -> Response:
        return Response(id)

    async def by_id(request: Request, id: str) -> Response:
        return Response(id)

    with pytest.raises(TypeError, match=says):
        APIRouter(route_class=DirectRoute).post(path, **options)(by_id if "id" in path else endpoint)


def test_dependencies_of_a_router_are_refused() -> None:
    with pytest.raises(TypeError, match="it has dependencies"):
        APIRouter(route_class=DirectRoute, dependencies=[Depends(note)]).post("/here")(fits)


def test_dependencies_of_an_including_app_run() -> None:
    direct = APIRouter(route_class=DirectRoute)
    direct.post("/here")(fits)
    app = FastAPI()
    app.include_router(direct, dependencies=[Depends(note)])
    CALLS.clear()
    assert TestClient(app).post("/here").text == "3"
    assert CALLS == ["note"]


@pytest.mark.parametrize(
    ("url", "status", "text"), [("/here", 200, "3"), ("/here?k=5", 200, "5"), ("/here?k=0", 422, "")]
)
def test_a_request_is_answered_as_by_fastapi(url: str, status: int, text: str) -> None:
    for route_class in (DirectRoute, APIRoute):
        router = APIRouter(route_class=route_class)
        router.post("/here")(fits)
        client = TestClient(FastAPI(routes=router.routes))
        answer = client.post(url)
        assert answer.status_code == status
        assert text in answer.text
        assert client.get(url).status_code == 405


def test_the_short_way_asks_fastapi_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    direct = APIRouter(route_class=DirectRoute)
    direct.post("/here")(fits)
    (route,) = direct.routes
    monkeypatch.setattr(route, "app", None)
    client = TestClient(FastAPI(routes=direct.routes))
    assert client.post("/here").text == "3"
    with pytest.raises(TypeError):
        client.post("/here?k=5")


def test_which_routes_are_direct() -> None:
    direct = {route.path for route in create_app().routes if isinstance(route, DirectRoute)}
    assert direct == {"/embed", "/search", "/classify", "/v1/embeddings"}
