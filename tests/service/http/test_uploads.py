"""POST /images: one line for each picture of a form or a zip."""

import json
import os
import struct
import zipfile
from typing import NamedTuple
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from tests.service.conftest import Served
from tests.service.encoding.test_images import png_header
from tests.service.http.rows import (
    BAD,
    FORM,
    OTHER,
    PICTURE,
    TEXT,
    UNDECODABLE,
    ZIP,
    assert_refused,
    form,
    nested,
    zipped,
)


def encrypted(archive: bytes) -> bytes:
    """Mark a zip's first member as encrypted in both of its headers."""
    marked = bytearray(archive)
    marked[marked.index(b"PK\x03\x04") + 6] |= 1
    marked[marked.index(b"PK\x01\x02") + 8] |= 1
    return bytes(marked)


def damaged_inside(archive: bytes) -> bytes:
    """Overwrite some of the first member's packed bytes."""
    return archive[:100] + b"\xff" * 50 + archive[150:]


def understated(archive: bytes, size: int) -> bytes:
    """Declare this size for a zip's first member."""
    lie = bytearray(archive)
    struct.pack_into("<I", lie, lie.index(b"PK\x03\x04") + 22, size)
    struct.pack_into("<I", lie, lie.index(b"PK\x01\x02") + 24, size)
    return bytes(lie)


class Line(NamedTuple):
    """The outcome of one picture in a bulk answer; a code of None means that it is stored."""

    id: str | None
    status: int
    code: str | None = None


BULK = {
    "form with a bad one in the middle": (
        form(("1/a.png", PICTURE), ("1/b.png", UNDECODABLE), ("1/c.png", OTHER)),
        FORM,
        [Line("1/a.png", 201), Line("1/b.png", 422, BAD), Line("1/c.png", 201)],
    ),
    "zip with one name twice": (
        zipped(("t/a.png", PICTURE), ("t/b.png", PICTURE), ("t/a.png", OTHER)),
        ZIP,
        [Line("t/a.png", 201), Line("t/b.png", 201), Line("t/a.png", 200)],
    ),
    "form with one name twice, in two compositions": (
        form(("t/\u00e9.png", PICTURE), ("t/e\u0301.png", OTHER), metadata='{"t/e\\u0301.png": {"a": 1}}'),
        FORM,
        [Line("t/\u00e9.png", 201), Line("t/\u00e9.png", 200)],
    ),
    "zip with a bad one in the middle": (
        zipped(("2/a.png", PICTURE), ("2/b.png", UNDECODABLE), ("2/c.png", OTHER), ("read me.txt", TEXT)),
        ZIP,
        [Line("2/a.png", 201), Line("2/b.png", 422, BAD), Line("2/c.png", 201), Line("read me.txt", 204, "left_out")],
    ),
    "zip with a text, an empty and a large one": (
        zipped(("3/a.png", TEXT), ("3/b.png", b""), ("3/c.png", png_header(9_000, 9_000)), ("3/d.png", OTHER)),
        ZIP,
        [
            Line("3/a.png", 415, "unsupported_format"),
            Line("3/b.png", 400, "empty_picture"),
            Line("3/c.png", 413, "too_large"),
            Line("3/d.png", 201),
        ],
    ),
    "zip with odd endings and other files": (
        zipped(
            *(("13/a.jfif", PICTURE), ("13/b", OTHER), ("13/c.JPE", PICTURE), ("13/d.tif", OTHER)),
            *(("13/e.jxl", b""), ("__MACOSX/13/._a.jfif", TEXT), ("13/@eaDir/a.jfif/small.jpg", PICTURE)),
        ),
        ZIP,
        [
            *(Line(f"13/{name}", 201) for name in ("a.jfif", "b", "c.JPE", "d.tif")),
            Line("13/e.jxl", 415, "left_out"),
            Line("__MACOSX/13/._a.jfif", 204, "left_out"),
            Line("13/@eaDir/a.jfif/small.jpg", 204, "left_out"),
        ],
    ),
    "zip from macOS": (
        zipped(("14/Cafe\u0301.png", PICTURE), ("metadata.json", b'{"14/Caf\\u00e9.png": {"a": 1}}')).replace(
            # The flag for UTF-8 is taken off in both of the member's headers.
            b"\x00\x08\x08\x00",
            b"\x00\x00\x08\x00",
        ),
        ZIP,
        [Line("14/Caf\u00e9.png", 201)],
    ),
    "zip from PowerShell": (
        zipped(("15_a.png", PICTURE), ("15_b.png", OTHER)).replace(b"15_", b"15\\"),
        ZIP,
        [Line("15/a.png", 201), Line("15/b.png", 201)],
    ),
    "zip with an encrypted one": (
        encrypted(zipped(("4/a.png", PICTURE), ("4/b.png", OTHER))),
        ZIP,
        [Line("4/a.png", 415, "unsupported_format"), Line("4/b.png", 201)],
    ),
    "zip with a bomb": (
        zipped(("5/a.png", b"\0" * 10_000_001), ("5/b.png", OTHER)),
        ZIP,
        [Line("5/a.png", 413, "too_large"), Line("5/b.png", 201)],
    ),
    "zip with a bomb that says it is small": (
        understated(zipped(("6/a.png", b"\0" * 10_000_001), ("6/b.png", OTHER)), 1000),
        ZIP,
        [Line("6/a.png", 400, "invalid_request"), Line("6/b.png", 201)],
    ),
    "zip packed by lzma": (
        zipped(("7/a.png", PICTURE), packing=zipfile.ZIP_LZMA),
        ZIP,
        [Line("7/a.png", 415, "unsupported_format")],
    ),
    "zip packed by bzip2": (
        zipped(("8/a.png", PICTURE), packing=zipfile.ZIP_BZIP2),
        ZIP,
        [Line("8/a.png", 415, "unsupported_format")],
    ),
    "zip with a damaged one": (
        damaged_inside(zipped(("9/a.png", PICTURE), ("9/b.png", OTHER))),
        ZIP,
        [Line("9/a.png", 400, "invalid_request"), Line("9/b.png", 201)],
    ),
    "zip not packed, with paths that lead out of it": (
        zipped(("../10/a.png", PICTURE), ("/10/b.png", OTHER), packing=zipfile.ZIP_STORED),
        ZIP,
        [Line("../10/a.png", 201), Line("/10/b.png", 201)],
    ),
    "form with ids that are none": (
        form(("", PICTURE), ("name" * 75, PICTURE), ("some\x01name", PICTURE), ("11/a.png", OTHER)),
        FORM,
        [
            Line(None, 400, "invalid_request"),
            Line(None, 400, "invalid_request"),
            Line(None, 400, "invalid_request"),
            Line("11/a.png", 201),
        ],
    ),
    "form with metadata that is none": (
        form(
            *[(f"12/{name}.png", PICTURE) for name in "abcde"],
            metadata=json.dumps({"12/a.png": 1, "12/b.png": {"a": "x" * 16_384}, "12/e.png": {"year": 2026}})[:-1]
            + ', "12/c.png": %s, "12/d.png": {"a": %s}}' % (nested(33), "[" * 600 + "]" * 600),
        ),
        FORM,
        [
            *[Line(f"12/{name}.png", 400, "invalid_request") for name in "abcd"],
            Line("12/e.png", 201),
        ],
    ),
}


@pytest.mark.parametrize("name", BULK)
def test_bulk(client: TestClient, name: str) -> None:
    content, kind, expected = BULK[name]

    def again() -> list[Line]:
        answer = client.post("/images", content=content, headers={"content-type": kind})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert [line["index"] for line in lines] == list(range(len(lines)))
        return [Line(line["id"], line["status"], line.get("code")) for line in lines]

    assert again() == expected
    assert again() == [line._replace(status=200) if line.code is None else line for line in expected]
    for line in expected:
        if line.id is not None:
            stored = client.get(f"/images/{quote(line.id, safe='')}").status_code
            assert stored == (200 if line.code is None else 404), line


def test_more_than_max_bulk_images(served: Served) -> None:
    client = served(max_bulk_images="2")
    three = [(f"name number {n}.png", PICTURE) for n in range(3)]
    for content, kind in ((form(*three), FORM), (zipped(*three), ZIP)):
        answer = client.post("/images", content=content, headers={"content-type": kind})
        assert_refused(answer, 413, "too_large", content)
    assert client.get("/info").json()["count"] == 0
    answer = client.post("/images", content=zipped(*three[:2]), headers={"content-type": ZIP})
    assert [json.loads(line)["status"] for line in answer.text.splitlines()] == [201, 201]


def test_more_than_max_request_bytes(served: Served) -> None:
    client = served(max_request_bytes="20000", max_image_bytes="10000")
    for content, kind in (
        (zipped(("a.png", os.urandom(30_000))), ZIP),
        (form(*[("a.png", b"\0" * 9_000)] * 3), FORM),
        (form(("a.png", b"\0" * 11_000)), FORM),
        # This zip is small and unpacks to ten times its size.
        (zipped(*[(f"{n}.png", b"\0" * 9_000) for n in range(25)]), ZIP),
        (zipped(("a.png", PICTURE), ("metadata.json", b" " * 20_001)), ZIP),
    ):
        answer = client.post("/images", content=content, headers={"content-type": kind})
        assert_refused(answer, 413, "too_large", content)
    assert_refused(client.post("/embed", json={"images": ["A" * 20_000]}), 413, "too_large", b"A" * 20_000)
