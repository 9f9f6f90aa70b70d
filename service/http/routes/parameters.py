"""Parameters in a URL: their types, the limits that FastAPI enforces, and their descriptions in /docs."""

from typing import Annotated, Literal

from fastapi import Path, Query
from pydantic import BeforeValidator, Field
from pydantic.json_schema import SkipJsonSchema

from service.http.openapi import ITEM_ID
from service.http.query_bodies import Included
from service.http.schemas import IncludedOfItem
from service.store import Order

# A longer one, percent-encoded, would not fit into a line of the HTTP parser.
_MAX_CHARACTERS = 2000
# A URL has no null: a parameter is given or left out, so its schema is that of the text alone.
_Missing = SkipJsonSchema[None]

ItemId = Annotated[str, Path(json_schema_extra=ITEM_ID)]
K = Annotated[int, Query(ge=1, description="Hits a query, at most.")]
Threshold = Annotated[float, Query(ge=-1, le=1, allow_inf_nan=False)]
FilterText = Annotated[
    Annotated[str, Field(max_length=_MAX_CHARACTERS)] | _Missing,
    Query(description='JSON, as {"label": "7"}.', json_schema_extra={"format": "filter"}),
]
NeededFilter = Annotated[
    str,
    Query(
        max_length=_MAX_CHARACTERS,
        description='JSON, as {"label": "7"}; {} matches every item.',
        json_schema_extra={"format": "filter"},
    ),
]
Prefix = Annotated[str, Query(max_length=_MAX_CHARACTERS, description="Only items whose ids begin with this text.")]
Name = Annotated[
    str, Query(max_length=_MAX_CHARACTERS, description="Only items whose ids have this text in them, in any case.")
]
ListOrder = Annotated[
    Order,
    Query(description="Of the time of adding, of ids, or of the dates or sizes of files; with - the other way round."),
]
Offset = Annotated[int, Query(ge=0, le=10**12, description="So many items are passed over first.")]
Expect = Annotated[
    Annotated[int, Field(ge=0, le=10**12)] | _Missing, Query(description="How many items have to match; else 409.")
]
IncludeOfItem = Annotated[tuple[IncludedOfItem, ...], Query(description="What is shown besides id and metadata.")]
Include = Annotated[tuple[Included, ...], Query()]
Fingerprint = Annotated[
    Annotated[str, Field(max_length=128)] | _Missing,
    Query(description="The encoder that the client expects; 409 if another one runs here."),
]
Metadata = Annotated[
    Annotated[str, Field(max_length=_MAX_CHARACTERS)] | _Missing,
    Query(description="A JSON object.", json_schema_extra={"format": "metadata"}),
]
PreviewSide = Annotated[
    Literal[512, 1024], BeforeValidator(int), Query(description="Longest side, in pixels. No picture is enlarged.")
]
Version = Annotated[
    Annotated[str, Field(max_length=64)] | _Missing,
    Query(description="The first 16 characters of the item's digest: with them a browser keeps the answer for good."),
]
Limit = Annotated[int, Query(ge=1, le=1000)]
ListCursor = Annotated[
    Annotated[str, Field(pattern="^[0-9]{1,18}(-[0-9a-f]{0,260})?$")] | _Missing,
    Query(description="An earlier answer's `next`."),
]
Cursor = Annotated[
    Annotated[str, Field(pattern="^[0-9]{1,18}$")] | _Missing, Query(description="An earlier answer's `next`.")
]
