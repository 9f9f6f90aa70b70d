"""JSON bodies, each validated in full before any of it is used, and the schemas of answers."""

import asyncio
import base64
import codecs
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError

from service import FloatArray
from service.errors import InvalidRequest
from service.http.bodies import read_body
from service.http.query_bodies import (
    NOT_BLANK,
    PART_KINDS,
    QUERY_KINDS,
    SEARCH_KINDS,
    TAGGED,
    Base64,
    Body,
    FilterObject,
    Fingerprint,
    SearchBody,
    Text,
    Whole,
    kind_of_part,
    kind_of_query,
    kind_of_search,
    whole,
)
from service.names import unknown
from service.settings import Settings
from service.store import Item

# Parsing a longer body (bytes) would block the event loop for too long.
_LONG = 100_000

EncodingFormat = Literal["float", "base64"]
# What an item may be shown with, besides its id and metadata.
IncludedOfItem = Literal["embedding", "digest", "source", "variant", "file"]
# Characters of a label and of a template, so that a text of both stays within the limits.
_LONGEST_LABEL, _LONGEST_TEMPLATE = 1000, 1000
# Linux has no longer paths.
_LONGEST_SOURCE = 4096
# Of SQLite's whole numbers.
_LARGEST = 2**63 - 1
# CLIP's own list has 80.
_MOST_TEMPLATES = 100


class _Embedded(Body):
    encoding_format: EncodingFormat = "float"
    fingerprint: Fingerprint = None


class EmbedBody(_Embedded):
    """Pictures to embed."""

    images: list[Base64] = Field(min_length=1)


class EmbedTextsBody(_Embedded):
    """Texts to embed."""

    texts: list[Text] = Field(min_length=1)


def kind_of_embed(content: Any) -> str | None:
    """Return the tag of a body of /embed, or None for neither."""
    names = [name for name in _EMBED_KINDS if isinstance(content, dict) and name in content]
    return f"embed {names[0]}" if len(names) == 1 else None


_EMBED_KINDS = ("images", "texts")
AnyEmbedBody = Annotated[
    Annotated[EmbedBody, Tag("embed images")] | Annotated[EmbedTextsBody, Tag("embed texts")],
    Discriminator(kind_of_embed),
]


Label = Annotated[str, Field(max_length=_LONGEST_LABEL, json_schema_extra=NOT_BLANK)]
Template = Annotated[str, Field(max_length=_LONGEST_TEMPLATE, pattern=r"^[^{}]*\{label\}[^{}]*$")]


class ClassifyBody(Body):
    """Pictures, and labels to choose from."""

    images: list[Base64] = Field(min_length=1)
    labels: list[Label] = Field(min_length=1, json_schema_extra={"uniqueItems": True})
    templates: list[Template] = Field(
        ["{label}"],
        min_length=1,
        max_length=_MOST_TEMPLATES,
        description="Sentences with `{label}` in them; a label is the mean of its sentences.",
    )
    fingerprint: Fingerprint = None


class PatchBody(Body):
    """A merge patch (RFC 7396) of an item: a metadata field given as null is removed, others are set."""

    metadata: dict[str, Any]


# The limits stand before the conversion, so that the document has them.
_Count = Annotated[int, Field(ge=0, le=_LARGEST), BeforeValidator(whole)]
_Time = Annotated[int, Field(ge=-_LARGEST, le=_LARGEST), BeforeValidator(whole)]


class FileBody(Body):
    """What a picture's file says; null for what is unknown."""

    width: _Count | None = None
    height: _Count | None = None
    size_bytes: _Count | None = None
    format: str | None = Field(None, max_length=20)
    date: str | None = Field(None, pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}$")
    mtime_ns: _Time | None = Field(None, description="Time of its last change, since 1970.")


class NewItemBody(Body):
    """An item to add by its embedding, which the encoder that runs here has made, such as a row of an export.

    Without `metadata` an item that is replaced keeps its own.
    """

    id: str
    embedding: list[Annotated[float, Field(allow_inf_nan=False)]] | str = Field(
        description="Made unit length here; or base64 of little-endian float32."
    )
    metadata: dict[str, Any] | None = None
    source: str | None = Field(None, max_length=_LONGEST_SOURCE, description="Where the picture came from.")
    digest: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="The sha256 of the picture.")
    variant: Literal["fp32", "fp16", "int8"] | None = None
    thumbnail: str | None = Field(None, description="A small WebP in base64.", json_schema_extra={"format": "picture"})
    original: str | None = Field(None, description="The picture in base64.", json_schema_extra={"format": "picture"})
    file: FileBody | None = None


class AddItemsBody(Body):
    """Items to add by their embeddings."""

    items: list[NewItemBody] = Field(min_length=1)
    fingerprint: Fingerprint = None


class MoveBody(Body):
    """What became of the file of an item. An item that has another picture than `digest` by now is left alone."""

    id: str
    digest: str = Field(max_length=128)
    to: str | None = Field(description="Its id from now on, often the same; null removes it.")
    source: str | None = Field(None, max_length=_LONGEST_SOURCE, description="Where its picture is now.")
    file: FileBody | None = None


class MovesBody(Body):
    """What became of the files of items, in one step."""

    moves: list[MoveBody] = Field(min_length=1)


class CountBody(Body):
    """Which items to count: those that match a filter and whose ids begin with a prefix and have a text in them."""

    filter: FilterObject = None
    prefix: str = Field("", max_length=2000)
    name: str = Field("", max_length=2000)


class DismissBody(Body):
    """Items of which no two are duplicates."""

    ids: list[str] = Field(min_length=2, max_length=100)
    dismissed: bool = Field(True, description="false takes an earlier dismissal back.")


class OpenAIBody(Body):
    """A request of OpenAI's clients to /v1/embeddings, with pictures as data URIs.

    Where the encoder reads texts, everything else is a text, unless `modality` says what all of them are.
    """

    model: str
    input: Base64 | Annotated[list[Base64], Field(min_length=1)]
    encoding_format: EncodingFormat = "float"
    dimensions: Whole | None = Field(None, description="The encoder's own, or left out.")
    modality: Literal["image", "text"] | None = None
    user: str | None = None


class OpenAITextBody(OpenAIBody):
    """The same with texts. It stands in the document alone."""

    input: Text | Annotated[list[Text], Field(min_length=1)]


class Embeddings(BaseModel):
    """One embedding per picture or text, in their order: D numbers, or base64 of D little-endian float32."""

    model: str
    fingerprint: str
    dimension: int
    embeddings: list[list[float]] | list[str]


class LabelAnswer(BaseModel):
    """A label with its probability among all labels, and its score, the cosine to the picture."""

    label: str
    probability: float = Field(ge=0, le=1)
    score: float = Field(ge=-1, le=1)


class Labels(BaseModel):
    """The labels of one picture, the most probable first."""

    labels: list[LabelAnswer]


class Classified(BaseModel):
    """The labels of each picture."""

    model: str
    fingerprint: str
    logit_scale: float
    results: list[Labels]


class OpenAIModel(BaseModel):
    """The encoder that runs here. `created` is unknown, and 0."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class OpenAIModels(BaseModel):
    """The models of this service, in OpenAI's shape: one."""

    object: Literal["list"]
    data: list[OpenAIModel]


class OpenAIEmbedding(BaseModel):
    """The embedding of one picture or text."""

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


class FileAnswer(BaseModel):
    """What the file of a picture says: size as stored, format, date, and when it was changed last; null if unknown."""

    width: int | None
    height: int | None
    size_bytes: int | None
    format: str | None
    date: str | None
    mtime_ns: int | None


class Hit(BaseModel):
    """An item, its score, the cosine to the query, and what `include` names."""

    id: str
    score: float = Field(ge=-1, le=1)
    metadata: dict[str, Any] | None = None
    embedding: list[float] | None = None
    digest: str | None = None
    source: str | None = None
    file: FileAnswer | None = None


class Hits(BaseModel):
    """The hits of one query, best first.

    If `include` names digest, and the query is one picture or one item, `digest` is that of the query: a hit with the
    same one is the same file.
    """

    hits: list[Hit]
    digest: str | None = None


class Results(BaseModel):
    """The hits of each query."""

    results: list[Hits]


class Arrays(BaseModel):
    """The hits of each of several vectors, best first: the ids, and the score of each."""

    ids: list[list[str]]
    scores: list[list[float]]


class ListedItem(ItemAnswer):
    """An item, and what `include` names: digest is the sha256 of its picture, source where that came from."""

    embedding: list[float] | str | None = None
    digest: str | None = None
    source: str | None = None
    variant: str | None = None
    file: FileAnswer | None = None


class ItemDetails(ItemAnswer):
    """An item, the variant of the encoder that embedded it, its file, and what `include` names."""

    variant: str
    file: FileAnswer
    embedding: list[float] | str | None = None
    digest: str | None = None
    source: str | None = None


class Page(BaseModel):
    """Items in an order, and how many match in all; `next` is the cursor of the next page, null at the end."""

    items: list[ListedItem]
    total: int
    next: str | None


class FolderAnswer(BaseModel):
    """A folder among ids, and how many items are in it at any depth."""

    prefix: str
    count: int


class Folders(BaseModel):
    """Folders in order, and how many more there are."""

    folders: list[FolderAnswer]
    left_out: int


class ValueAnswer(BaseModel):
    """A value in metadata, and how many items have it."""

    value: str | float | bool | None
    count: int


class FieldAnswer(BaseModel):
    """A field of metadata: how many items have it, how many values it has, and the most frequent ones."""

    key: str
    count: int
    distinct: int
    values: list[ValueAnswer]


class Fields(BaseModel):
    """Fields of metadata, those of most items first, and how many more there are."""

    keys: list[FieldAnswer]
    left_out: int


class ScoresAnswer(BaseModel):
    """Scores in this store; null where it has too few items to tell.

    From `near` on pictures show nearly the same, and from `alike` on they are alike. `strangers` are the quantiles
    0.05, 0.5 and 0.95 of the scores of two items, `neighbours` those of an item with the nearest other file.
    """

    near: float | None
    alike: float | None
    strangers: list[float] | None
    neighbours: list[float] | None
    sampled: int


class Count(BaseModel):
    """How many items match."""

    count: int


class Moved(BaseModel):
    """How many items were there as the request says."""

    moved: int


class Removed(BaseModel):
    """How many items were removed."""

    removed: int


class Copy(BaseModel):
    """An item of a group: its score with the best copy, whether it has the same bytes, and what its file says.

    `digest` is the sha256 of its picture, `source` where that came from.
    """

    id: str
    score: float = Field(ge=-1, le=1)
    exact: bool
    digest: str
    source: str | None
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
    """Groups as of a change of the store; `threshold` is the least score of two pictures of a group.

    `rest` counts the items of all groups without the best copies, `rest_bytes` the bytes of their files. `next` is the
    cursor of the next page, null at the end.
    """

    sequence: int
    threshold: float
    total: int
    rest: int
    rest_bytes: int
    groups: list[Group]
    next: str | None


class Progress(BaseModel):
    """The share of the work that is done."""

    progress: float = Field(ge=0, le=1)


class Map(BaseModel):
    """A place for each item. `positions` is base64 of little-endian uint16 (N, 2), in the order of `ids`.

    Both axes have one scale, and the longer one reaches from 0 to 65,535. `progress` is the share of a better or newer
    map that is done, or null if there is none to wait for.

    With `colour` there are also its most frequent `values`, at most 60, and `codes`, base64 of little-endian uint16
    (N,): the number of an item's value, from 1; 0 for another value or none.
    """

    version: str
    sequence: int
    method: Literal["pca", "t-sne"]
    progress: float | None
    count: int
    ids: list[str]
    positions: str
    values: list[str | float | bool] | None = None
    codes: str | None = None


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


class TextInfo(BaseModel):
    """How texts are read: tokens of a text, beyond which it is cut, and the scale of /classify."""

    max_tokens: int
    logit_scale: float


class Info(BaseModel):
    """The encoder, the gallery, the limits and the versions of this service.

    `queries` are the kinds of query that a search takes here; `text` is null where the encoder reads pictures alone.
    `card` has what the encoder's card.json says of its method, licence, origin, data and quality. `commit` is
    the one that the image was built from, null outside an image.
    """

    model: str
    fingerprint: str
    dimension: int
    count: int | None
    variant: str
    provider: str
    card: dict[str, Any]
    preprocessing: dict[str, Any]
    queries: list[str]
    text: TextInfo | None
    notice: str | None
    limits: dict[str, float]
    versions: dict[str, str]
    commit: str | None


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

EMBED: TypeAdapter[EmbedBody | EmbedTextsBody] = TypeAdapter(AnyEmbedBody)
SEARCH: TypeAdapter[SearchBody] = TypeAdapter(SearchBody)
CLASSIFY = TypeAdapter(ClassifyBody)
PATCH = TypeAdapter(PatchBody)
ADD_ITEMS = TypeAdapter(AddItemsBody)
COUNT = TypeAdapter(CountBody)
MOVES = TypeAdapter(MovesBody)
DISMISS = TypeAdapter(DismissBody)
OPENAI = TypeAdapter(OpenAIBody)

# By the tag of a union, else by the name of the model itself: pydantic's errors have no other mark of the model.
_MODELS: dict[Any, type[Body]] = TAGGED | {
    "embed images": EmbedBody,
    "embed texts": EmbedTextsBody,
    "ClassifyBody": ClassifyBody,
    "PatchBody": PatchBody,
    "AddItemsBody": AddItemsBody,
    "NewItemBody": NewItemBody,
    "FileBody": FileBody,
    "CountBody": CountBody,
    "MovesBody": MovesBody,
    "DismissBody": DismissBody,
    "OpenAIBody": OpenAIBody,
}
_FIELDS = {name for model in _MODELS.values() for name in model.model_fields}
# The fields of which an object has exactly one, by the function that looks for them, as pydantic writes it.
_ONE_OF = {
    f"{function.__name__}()": names
    for function, names in (
        (kind_of_embed, _EMBED_KINDS),
        (kind_of_part, PART_KINDS),
        (kind_of_query, QUERY_KINDS),
        (kind_of_search, SEARCH_KINDS),
    )
}
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
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "a text with {{label}} in it once, and no other braces",
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


def included(item: Item, include: Sequence[str]) -> dict[str, Any]:
    """Return what `include` names of an item, its metadata and embedding aside."""
    told: dict[str, Any] = {name: getattr(item, name) for name in ("digest", "source", "variant") if name in include}
    if "file" in include:
        told["file"] = item.facts._asdict() | {"mtime_ns": item.mtime_ns}
    return told


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
            *names, last = (f'"{name}"' for name in _ONE_OF[first["ctx"]["discriminator"]])
            return f"{place}: expected an object with exactly one of {', '.join(names)} or {last}"
        case "extra_forbidden":
            *_, model = [_MODELS[tag] for tag in (error.title, *first["loc"][:-1]) if tag in _MODELS]
            return f"{place}: {unknown('a field', str(first['loc'][-1]), model.model_fields)}"
        case "missing":
            return f"{place}: is missing" if place != "the body" else "the body: a field is missing"
    value = first["input"]
    got = "nothing" if value is None else _KINDS.get(type(value), "something else")
    if type(value) is int and abs(value) < _SHOWN_BELOW:
        got = str(value)
    elif first["type"] in ("too_short", "too_long", "string_too_long"):
        got = str(len(value))
    expected = _EXPECTED.get(first["type"], "something else; /docs shows what").format(**first.get("ctx", {}))
    return f"{place}: expected {expected}, got {got}"
