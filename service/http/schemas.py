"""JSON bodies, each validated in full before any of it is used, and the schemas of answers."""

import asyncio
import base64
import codecs
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)

from service import FloatArray
from service.errors import InvalidRequest
from service.http.bodies import picture_of, read_body
from service.names import unknown
from service.queries import ItemQuery, PictureQuery, VectorQuery
from service.settings import Settings
from service.store.filters import DESCRIPTION

# Parsing a longer body (bytes) would block the event loop for too long.
_LONG = 100_000

EncodingFormat = Literal["float", "base64"]
Included = Literal["metadata", "embedding"]
DEFAULT_K = 10


class Body(BaseModel):
    """A JSON object: unknown fields are refused, and no value is converted to another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Base64 = Annotated[
    str,
    Field(
        description="A picture in base64, or as a data URI. URLs are never fetched.",
        json_schema_extra={"format": "picture"},
    ),
]
Vector = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]],
    Field(description="As many numbers as `/info` names as dimension, not all 0. Made unit length here."),
]
Fingerprint = Annotated[
    str | None, Field(description="The encoder that the client expects; 409 if another one runs here.")
]
FilterObject = Annotated[
    Annotated[dict[str, Any], WithJsonSchema({"allOf": [{"$ref": "#/components/schemas/Filter"}]})] | None,
    Field(description=DESCRIPTION),
]


class EmbedBody(Body):
    """Pictures to embed."""

    images: list[Base64] = Field(min_length=1)
    encoding_format: EncodingFormat = "float"
    fingerprint: Fingerprint = None


class ByImage(Body):
    """Search with a picture."""

    image: Base64

    def query(self, settings: Settings) -> PictureQuery:
        """Return the query. Its base64 is decoded on a decoder thread."""
        return PictureQuery(picture_of(self.image, settings))


class ByVector(Body):
    """Search with a vector, of which only the direction counts."""

    vector: Vector

    def query(self, _: Settings) -> VectorQuery:
        """Return the query."""
        return VectorQuery(self.vector)


class ById(Body):
    """Search with a stored item, which is left out of its own hits."""

    id: str

    def query(self, _: Settings) -> ItemQuery:
        """Return the query."""
        return ItemQuery(self.id)


def _whole(value: Any) -> Any:
    # JSON knows one kind of number: 3.0 is 3.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class _Wanted(Body):
    k: Whole = Field(DEFAULT_K, ge=1, description="Hits a query, at most.")
    threshold: float = Field(-1, ge=-1, le=1, description="Hits have at least this score.")
    filter: FilterObject = None
    include: list[Included] = Field(["metadata"], description="Fields of a hit besides id and score.")
    fingerprint: Fingerprint = None


class SearchByImage(ByImage, _Wanted):
    """One search."""


class SearchByVector(ByVector, _Wanted):
    """One search."""


class SearchById(ById, _Wanted):
    """One search."""


def _kind(content: Any) -> str | None:
    names = [name for name in ("image", "vector", "id", "queries") if isinstance(content, dict) and name in content]
    return f"by {names[0]}" if len(names) == 1 else None


def _kind_of_one(content: Any) -> str | None:
    kind = _kind(content)
    return None if kind is None else f"one {kind}"


AnyQuery = Annotated[
    Annotated[ByImage, Tag("one by image")]
    | Annotated[ByVector, Tag("one by vector")]
    | Annotated[ById, Tag("one by id")],
    Discriminator(_kind_of_one),
]


class SearchMany(_Wanted):
    """Several searches with the same options."""

    queries: list[AnyQuery] = Field(min_length=1)


SearchBody = Annotated[
    Annotated[SearchByImage, Tag("by image")]
    | Annotated[SearchByVector, Tag("by vector")]
    | Annotated[SearchById, Tag("by id")]
    | Annotated[SearchMany, Tag("by queries")],
    Discriminator(_kind),
]


class PatchBody(Body):
    """A merge patch (RFC 7396) of an item: a metadata field given as null is removed, others are set."""

    metadata: dict[str, Any]


class DismissBody(Body):
    """Items of which no two are duplicates."""

    ids: list[str] = Field(min_length=2, max_length=100, json_schema_extra={"uniqueItems": True})
    dismissed: bool = Field(True, description="false takes an earlier dismissal back.")


class OpenAIBody(Body):
    """A request of OpenAI's clients to /v1/embeddings, with pictures as data URIs."""

    model: str
    input: Base64 | Annotated[list[Base64], Field(min_length=1)]
    encoding_format: EncodingFormat = "float"
    dimensions: Whole | None = Field(None, description="The encoder's own, or left out.")
    modality: Literal["image"] = "image"
    user: str | None = None


class Hit(BaseModel):
    """An item and its score, the cosine to the query."""

    id: str
    score: float = Field(ge=-1, le=1)
    metadata: dict[str, Any] | None = None
    embedding: list[float] | None = None


class Hits(BaseModel):
    """The hits of one query, best first."""

    hits: list[Hit]


class Results(BaseModel):
    """The hits of each query."""

    results: list[Hits]


class Embeddings(BaseModel):
    """One embedding per picture, in their order: D numbers, or base64 of D little-endian float32."""

    model: str
    fingerprint: str
    dimension: int
    embeddings: list[list[float]] | list[str]


class OpenAIEmbedding(BaseModel):
    """The embedding of one picture."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class OpenAIEmbeddings(BaseModel):
    """An answer in OpenAI's shape."""

    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    usage: dict[str, int]


class ItemAnswer(BaseModel):
    """An item."""

    id: str
    metadata: dict[str, Any]


class ItemDetails(ItemAnswer):
    """An item, and the variant of the encoder that embedded it."""

    variant: str


class Page(BaseModel):
    """Items in the order of adding; `next` is the cursor of the next page, null at the end."""

    items: list[ItemAnswer]
    next: str | None


class Copy(BaseModel):
    """An item of a group: its score with the best copy, whether it has the same bytes, and what its file says."""

    id: str
    score: float = Field(ge=-1, le=1)
    exact: bool
    width: int | None
    height: int | None
    size_bytes: int | None
    format: str | None
    date: str | None


class Group(BaseModel):
    """Items that show the same, the best copy first, and why it is the best."""

    best: str
    reason: str
    items: list[Copy]


class Groups(BaseModel):
    """Groups as of a change of the store; `next` is the cursor of the next page, null at the end."""

    sequence: int
    total: int
    groups: list[Group]
    next: str | None


class Progress(BaseModel):
    """The share of the work that is done."""

    progress: float = Field(ge=0, le=1)


class Dismissed(BaseModel):
    """How many pairs of pictures were told apart, or are not any more."""

    pairs: int


class BulkLine(BaseModel):
    """The outcome of one picture: status 201 for a new item, 200 for a replaced one, else the error.

    Members of a zip that are no pictures follow with the code left_out: status 415 if it may be a picture, else 204.
    """

    index: int
    id: str | None
    status: int
    code: str | None = None
    detail: str | None = None


class Info(BaseModel):
    """The encoder, the gallery, the limits and the versions of this service."""

    model: str
    fingerprint: str
    dimension: int
    count: int | None
    variant: str
    provider: str
    preprocessing: dict[str, Any]
    notice: str | None
    limits: dict[str, float]
    versions: dict[str, str]


class PartAnswer(BaseModel):
    """The error of one member of a list."""

    index: int
    code: str
    detail: str


class Problem(BaseModel):
    """An error as RFC 9457 defines it."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[PartAnswer] | None = None


class OpenAIError(BaseModel):
    """An error in OpenAI's shape."""

    class Inner(BaseModel):
        """The error itself."""

        message: str
        type: str
        param: str | None
        code: str

    error: Inner


M = TypeVar("M")

EMBED = TypeAdapter(EmbedBody)
SEARCH: TypeAdapter[SearchByImage | SearchByVector | SearchById | SearchMany] = TypeAdapter(SearchBody)
PATCH = TypeAdapter(PatchBody)
DISMISS = TypeAdapter(DismissBody)
OPENAI = TypeAdapter(OpenAIBody)

# By the tag of a union, else by the name of the model itself: pydantic's errors have no other mark of the model.
_MODELS: dict[Any, type[Body]] = {
    "by image": SearchByImage,
    "by vector": SearchByVector,
    "by id": SearchById,
    "by queries": SearchMany,
    "one by image": ByImage,
    "one by vector": ByVector,
    "one by id": ById,
    "EmbedBody": EmbedBody,
    "PatchBody": PatchBody,
    "DismissBody": DismissBody,
    "OpenAIBody": OpenAIBody,
}
_FIELDS = {name for model in _MODELS.values() for name in model.model_fields}
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "string_type": "a text",
    "string_unicode": "a text of whole characters",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "float_type": "a number",
    "finite_number": "a finite number",
    "too_short": "at least {min_length}",
    "too_long": "at most {max_length}",
    "bool_type": "true or false",
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "{le} or less",
    "literal_error": "{expected}",
}
# A message must not repeat a client's text, and a longer number could carry one.
_SHOWN_BELOW = 10**7
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}


async def read_json(request: Request, settings: Settings, form: TypeAdapter[M]) -> M:
    """Read a JSON body and validate it.

    Raises:
        InvalidRequest: not JSON, or not of this form. The message names the place, and repeats nothing of the body.
        TooLarge: more than max_request_bytes.
    """
    body = await read_body(request, settings.max_request_bytes)
    if len(body) > _LONG:
        return await asyncio.to_thread(_parse, form, body)
    return _parse(form, body)


def listed(embeddings: FloatArray, form: EncodingFormat) -> list[Any]:
    """Return embeddings (N, D) for JSON: N arrays (D,), or N base64 texts of little-endian float32."""
    if form == "float":
        return list(embeddings)
    return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in embeddings]


def _parse(form: TypeAdapter[M], body: bytes) -> M:
    try:
        # Some clients send a BOM.
        return form.validate_json(body.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        raise InvalidRequest(_sentence(error)) from error


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    # Only the names of our own fields are repeated; others are the client's words.
    place = ""
    for part in first["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part in _FIELDS:
            place += f".{part}" if place else part
    place = place or "the body"
    match first["type"]:
        case "json_invalid":
            return "the body: not JSON"
        case "union_tag_not_found" | "union_tag_invalid":
            also = "" if "[" in place else ' or "queries"'
            return f'{place}: expected an object with exactly one of "image", "vector", "id"{also}'
        case "extra_forbidden":
            *_, model = [_MODELS[tag] for tag in (error.title, *first["loc"][:-1]) if tag in _MODELS]
            return f"{place}: {unknown('a field', str(first['loc'][-1]), model.model_fields)}"
        case "missing":
            return f"{place}: is missing" if place != "the body" else "the body: a field is missing"
    value = first["input"]
    got = "nothing" if value is None else _KINDS.get(type(value), "something else")
    if type(value) is int and abs(value) < _SHOWN_BELOW:
        got = str(value)
    elif first["type"] in ("too_short", "too_long"):
        got = str(len(value))
    expected = _EXPECTED.get(first["type"], "something else; /docs shows what").format(**first.get("ctx", {}))
    return f"{place}: expected {expected}, got {got}"
