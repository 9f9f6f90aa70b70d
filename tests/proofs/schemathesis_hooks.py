"""Hypothesis strategies for the pictures, zips, filters and metadata in our OpenAPI document."""

import base64
import io
import json
import zipfile
from typing import Any

import schemathesis
from hypothesis import strategies as st

from tests.conftest import encoded, scene

_PICTURES = {
    "image/jpeg": [encoded(scene(width, 40, seed=width), "JPEG") for width in (40, 41)],
    "image/png": [encoded(scene(width, 40, seed=width), "PNG") for width in (42, 43)],
    "image/webp": [encoded(scene(width, 40, seed=width), "WEBP") for width in (44, 45)],
    "image/gif": [encoded(scene(width, 40, seed=width), "GIF") for width in (46, 47)],
    "image/bmp": [encoded(scene(width, 40, seed=width), "BMP") for width in (48, 49)],
    "image/tiff": [encoded(scene(width, 40, seed=width), "TIFF") for width in (50, 51)],
    "image/avif": [encoded(scene(width, 40, seed=width), "AVIF") for width in (52, 53)],
}
_ALL = [data for pictures in _PICTURES.values() for data in pictures]
# What lies in a folder whose name begins with a dot is hidden.
_NO_FOLDERS = str.maketrans("", "", "/\\")


def _zip(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(f"p{name.translate(_NO_FOLDERS)}.png", _ALL[number % len(_ALL)])
    return buffer.getvalue()


_words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
_scalars: Any = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | _words
_fields = _words.filter(lambda word: not word.startswith("$"))
_conditions: Any = _scalars | st.fixed_dictionaries({"$exists": st.booleans()}, optional={"$ne": _scalars})
_conditions |= st.dictionaries(st.sampled_from(["$in", "$nin"]), st.lists(_scalars, min_size=1, max_size=3), min_size=1)
_conditions |= st.fixed_dictionaries({"$contains": _scalars})
_filters = st.recursive(
    st.dictionaries(_fields, _conditions, min_size=1, max_size=3),
    lambda inner: st.fixed_dictionaries({"$not": inner}) | st.fixed_dictionaries({"$or": st.lists(inner, min_size=1)}),
    max_leaves=5,
)


def _objects(body: Any) -> list[dict[str, Any]]:
    """Return the objects of a search: its body, its queries and the parts of sums."""
    if not isinstance(body, dict):
        return []
    members = [one for name in ("queries", "all") if isinstance(body.get(name), list) for one in body[name]]
    return [body, *(part for member in members for part in _objects(member))]


def _is_zero(body: Any) -> bool:
    """Return whether a vector is all zeros, or a sum may be: one of a weight of 0, or of parts that are alike.

    The document cannot forbid it: schemathesis 4.32 fails on `contains`.
    """
    for one in _objects(body):
        vector, parts = one.get("vector"), one.get("all")
        if isinstance(vector, list) and vector and not any(vector):
            return True
        if isinstance(parts, list) and parts:
            bare = [
                {name: value for name, value in part.items() if name != "weight"} if isinstance(part, dict) else part
                for part in parts
            ]
            weighed = all(part.get("weight", 1) for part in parts if isinstance(part, dict))
            if not weighed or any(part in bare[:number] for number, part in enumerate(bare)):
                return True
    return False


@schemathesis.hook
def filter_body(context: Any, body: Any) -> bool:
    """Leave out zero vectors, and forms with texts that are invalid only until the form turns them into text."""
    # A form whose parts have their own media types is wrapped in an object.
    form = getattr(body, "body", body)
    is_form = isinstance(form, dict) and "file" in form
    return not _is_zero(form) and not (
        is_form and any(isinstance(form.get(field), list | dict) for field in ("metadata", "sources"))
    )


@schemathesis.hook
def before_add_examples(context: Any, examples: list[Any]) -> None:
    """Leave out zero vectors."""
    examples[:] = [example for example in examples if not _is_zero(example.body)]


for media_type, pictures in _PICTURES.items():
    schemathesis.openapi.media_type(media_type, st.sampled_from(pictures))
schemathesis.openapi.media_type("application/octet-stream", st.sampled_from(_ALL))
schemathesis.openapi.media_type("application/zip", st.lists(_words, min_size=1, max_size=4, unique=True).map(_zip))
schemathesis.openapi.format("picture", st.sampled_from(_ALL).map(lambda data: base64.b64encode(data).decode()))
schemathesis.openapi.format("filter", _filters.map(json.dumps))
schemathesis.openapi.format("metadata-by-id", st.just("{}"))
schemathesis.openapi.format("metadata", st.dictionaries(_words, _scalars, max_size=4).map(json.dumps))
