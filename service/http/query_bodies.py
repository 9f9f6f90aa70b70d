"""JSON bodies of searches: a query of one kind, a weighted sum of queries, or a list of them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema
from pydantic.config import JsonDict

from service.http.bodies import picture_of
from service.queries import ItemQuery, PictureQuery, SumQuery, TextQuery, VectorQuery
from service.settings import Settings
from service.store.filters import DESCRIPTION

Included = Literal["metadata", "embedding", "file", "digest", "source"]
DEFAULT_K = 10
# The fields that tell what a part of a sum is, a query, and the body of a search.
PART_KINDS = ("image", "text", "vector", "id")
QUERY_KINDS = (*PART_KINDS, "all")
SEARCH_KINDS = (*QUERY_KINDS, "queries")
# Parts of a weighted sum, and the largest weight.
_MOST_PARTS, _LARGEST_WEIGHT = 16, 1000
# The white space of Python's str.strip: that of regular expressions in JavaScript, and five separators.
NOT_BLANK: JsonDict = {"minLength": 1, "pattern": r"[^\s\u001c-\u001f\u0085]"}


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
# Blank texts are refused where they are embedded; `openapi` adds the greatest length.
Text = Annotated[
    str,
    Field(
        description="Words, for an encoder that reads them. What is longer than the encoder takes is cut.",
        json_schema_extra=NOT_BLANK,
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


class ByImage(Body):
    """Search with a picture."""

    image: Base64

    def query(self, settings: Settings) -> PictureQuery:
        """Return the query. Its base64 is decoded on a decoder thread."""
        return PictureQuery(picture_of(self.image, settings))


class ByText(Body):
    """Search with words. Their scores are lower than those of pictures."""

    text: Text

    def query(self, _: Settings) -> TextQuery:
        """Return the query."""
        return TextQuery(self.text)


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


class _Weighted(Body):
    weight: float = Field(
        1, ge=-_LARGEST_WEIGHT, le=_LARGEST_WEIGHT, description="Negative for what the hits shall be unlike."
    )


class PartByImage(ByImage, _Weighted):
    """A picture in a sum."""


class PartByText(ByText, _Weighted):
    """Words in a sum."""


class PartByVector(ByVector, _Weighted):
    """A vector in a sum."""


class PartById(ById, _Weighted):
    """A stored item in a sum, which is left out of the hits."""


def kind_of_part(content: Any) -> str | None:
    """Return the tag of a part of a sum, or None for none that we know."""
    return _tag("part", content, PART_KINDS)


AnyPart = Annotated[
    Annotated[PartByImage, Tag("part by image")]
    | Annotated[PartByText, Tag("part by text")]
    | Annotated[PartByVector, Tag("part by vector")]
    | Annotated[PartById, Tag("part by id")],
    Discriminator(kind_of_part),
]


class ByAll(Body):
    """Search with the weighted sum of the unit vectors of several queries."""

    all: list[AnyPart] = Field(min_length=1, max_length=_MOST_PARTS)

    def query(self, settings: Settings) -> SumQuery:
        """Return the query."""
        return SumQuery([(part.query(settings), part.weight) for part in self.all])


def whole(value: Any) -> Any:
    """Return 3.0 as 3, and all else unchanged: JSON knows one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(whole)]


class _Wanted(Body):
    k: Whole = Field(DEFAULT_K, ge=1, description="Hits a query, at most.")
    threshold: float = Field(-1, ge=-1, le=1, description="Hits have at least this score.")
    filter: FilterObject = None
    prefix: str = Field("", max_length=2000, description="Only items whose ids begin with this text.")
    include: list[Included] = Field(["metadata"], description="Fields of a hit besides id and score.")
    fingerprint: Fingerprint = None


class SearchByImage(ByImage, _Wanted):
    """One search."""


class SearchByText(ByText, _Wanted):
    """One search."""


class SearchByVector(ByVector, _Wanted):
    """One search."""


class SearchById(ById, _Wanted):
    """One search."""


class SearchByAll(ByAll, _Wanted):
    """One search."""


def kind_of_query(content: Any) -> str | None:
    """Return the tag of one of several queries, or None for none that we know."""
    return _tag("one", content, QUERY_KINDS)


def kind_of_search(content: Any) -> str | None:
    """Return the tag of the body of a search, or None for none that we know."""
    return _tag("search", content, SEARCH_KINDS)


def _tag(begin: str, content: Any, kinds: tuple[str, ...]) -> str | None:
    names = [name for name in kinds if isinstance(content, dict) and name in content]
    return f"{begin} by {names[0]}" if len(names) == 1 else None


AnyQuery = Annotated[
    Annotated[ByImage, Tag("one by image")]
    | Annotated[ByText, Tag("one by text")]
    | Annotated[ByVector, Tag("one by vector")]
    | Annotated[ById, Tag("one by id")]
    | Annotated[ByAll, Tag("one by all")],
    Discriminator(kind_of_query),
]


class SearchMany(_Wanted):
    """Several searches with the same options."""

    queries: list[AnyQuery] = Field(min_length=1)


SearchBody = Annotated[
    Annotated[SearchByImage, Tag("search by image")]
    | Annotated[SearchByText, Tag("search by text")]
    | Annotated[SearchByVector, Tag("search by vector")]
    | Annotated[SearchById, Tag("search by id")]
    | Annotated[SearchByAll, Tag("search by all")]
    | Annotated[SearchMany, Tag("search by queries")],
    Discriminator(kind_of_search),
]

# The models by their tags: pydantic's errors have no other mark of the model.
TAGGED: dict[Any, type[Body]] = {
    "search by image": SearchByImage,
    "search by text": SearchByText,
    "search by vector": SearchByVector,
    "search by id": SearchById,
    "search by all": SearchByAll,
    "search by queries": SearchMany,
    "one by image": ByImage,
    "one by text": ByText,
    "one by vector": ByVector,
    "one by id": ById,
    "one by all": ByAll,
    "part by image": PartByImage,
    "part by text": PartByText,
    "part by vector": PartByVector,
    "part by id": PartById,
}
