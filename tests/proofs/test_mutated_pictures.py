"""Thousands of damaged and hostile pictures against POST /embed: each gets a fast answer, and memory does not grow.

A mutant is an intact picture after one to three mutations. Mutations of the format's parts (parts dropped or repeated,
header fields set to extreme values) repair checksums and lengths, so the decoder gets past its first checks. Mutations
of bytes (flipped bits, overwritten bytes, cuts, splices) leave them wrong. `mutant(number)` returns the same bytes on
every run with the same Pillow, so the number in a message reproduces the file.
"""

import ctypes
import gc
import io
import os
import re
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
from PIL import Image
from starlette.testclient import TestClient

from service.settings import Settings
from service.sources import open_source
from tests.conftest import MODEL, encoded, scene
from tests.heif import heic
from tests.heif import turned as turned_boxes

pytestmark = pytest.mark.proof

# 20,000 in the long form.
MUTATIONS = int(os.environ.get("LOOKALIKE_MUTATIONS", "2000"))
SEED = 0
# Of processor time, where a picture takes longer by the clock.
LONGEST_S = 2.0
# Growth of the resident memory in the second half of the run.
MOST_GROWTH_BYTES = 50_000_000

_BYTES = (0x00, 0x7F, 0x80, 0xFF)
# Values near zero, near the service's limits and near the limits of the formats' number types.
_NUMBERS = [0, 1, 2, 3, 7, 8, 16, 28, 100, 255, 256, 4_999, 5_000, 5_001, 9_999, 10_000, 10_001, 16_383, 16_384]
_NUMBERS += [32_767, 32_768, 65_535, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1]

# Header fields: the pattern at the start of their part, their offset in it, and their size in bytes.
_SIDES = {
    "PNG": [(rb".{4}IHDR", at, 4) for at in (8, 12)],
    "JPEG": [(rb"\xff[\xc0-\xc2]", at, 2) for at in (5, 7)],
    "GIF": [(rb"GIF8", at, 2) for at in (6, 8)],
    "BMP": [(rb"BM", at, 4) for at in (18, 22)],
    "WEBP": [(rb"VP8X", at, 3) for at in (12, 15)]
    + [(rb"VP8 ", at, 2) for at in (14, 16)]
    + [(rb"VP8L", at, 2) for at in (9, 11)],
    "TIFF": [(rb"[\x00\x01]\x01[\x03\x04]\x00", 8, 4)],
    "AVIF": [(rb".{4}ispe", at, 4) for at in (12, 16)],
    "HEIF": [(rb".{4}ispe", at, 4) for at in (12, 16)],
}
_BOXES = [(rb".{4}iloc", at, size) for at, size in ((14, 2), (22, 2), (24, 4), (28, 4))]
_BOXES += [(rb".{4}(irot|imir|auxC|pixi|pitm|clap)", at, 1) for at in (8, 11, 12, 15)]
_BOXES += [(rb".{4}(hvcC|av1C)", at, 1) for at in (8, 9, 10, 11)] + [(rb".{4}grid", at, 1) for at in (9, 10, 11)]
_OTHERS = {
    "PNG": [(rb".{4}IHDR", at, 1) for at in (16, 17, 18, 19, 20)],
    "JPEG": [(rb"\xff[\xc0-\xc2]", at, 1) for at in (4, 9, 11)] + [(rb"\xff\xda", at, 1) for at in (4, 5, 6)],
    "GIF": [(rb"GIF8", at, 1) for at in (10, 11)]
    + [(rb",", at, size) for at, size in ((1, 2), (3, 2), (5, 2), (7, 2), (9, 1), (10, 1))],
    "BMP": [(rb"BM", at, size) for at, size in ((10, 4), (14, 4), (28, 2), (30, 4), (46, 4))],
    # Bits, compression, photometric, offsets, samples, rows, byte counts, predictor: each with its type, count, value.
    "TIFF": [
        (rb"[\x02\x03\x06\x11\x15\x16\x17\x3d\x42\x43]\x01", at, size) for at, size in ((2, 2), (4, 4), (8, 4), (8, 2))
    ],
    "AVIF": _BOXES,
    "HEIF": _BOXES,
    "WEBP": [(rb"VP8X", 8, 1), (rb"VP8 ", 8, 3)] + [(rb"ANMF", at, 3) for at in (8, 11, 14, 17)],
}


@dataclass(frozen=True)
class Whole:
    """An intact picture file, split into the chunks, segments or blocks of its format."""

    name: str
    format: str
    parts: tuple[bytes, ...]


# Intact pictures ----------------------------------------------------------------------------------


@cache
def wholes() -> dict[str, Whole]:
    """Return intact pictures by name: every kind of the formats that this file can write."""
    colour, grey = scene(96, 64), scene(96, 64, 1).convert("L")
    digit = Image.open(io.BytesIO(open_source("digits").entry(3).data))
    see_through = colour.convert("RGBA")
    see_through.putalpha(grey)
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    palette = colour.quantize(32)
    film: dict[str, Any] = {"save_all": True, "append_images": [scene(96, 64, 2), scene(96, 64, 3)], "duration": 50}
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "JPEG": encoded(colour, "JPEG"),
        "JPEG progressive": encoded(colour, "JPEG", progressive=True),
        "JPEG progressive grey": encoded(grey, "JPEG", progressive=True, quality=95),
        "JPEG CMYK": encoded(colour.convert("CMYK"), "JPEG"),
        "JPEG restarts, Exif, 4:4:4": encoded(colour, "JPEG", restart_marker_rows=1, exif=turned, subsampling=0),
        "PNG": encoded(colour),
        "PNG digit": encoded(digit),
        "PNG alpha": encoded(see_through),
        "PNG 16 bit": encoded(sixteen),
        "PNG palette": encoded(palette, transparency=3),
        "PNG 1 bit": encoded(grey.convert("1")),
        "PNG interlaced": interlaced(grey),
        "PNG animated, Exif": encoded(colour, exif=turned, **film),
        "WEBP lossy": encoded(colour, "WEBP"),
        "WEBP lossless": encoded(colour, "WEBP", lossless=True),
        "WEBP alpha, Exif": encoded(see_through, "WEBP", exif=turned),
        "WEBP animated": encoded(colour, "WEBP", **film),
        "GIF": encoded(palette, "GIF", transparency=3),
        "GIF animated": encoded(colour, "GIF", **film),
        "BMP": encoded(colour, "BMP"),
        "BMP palette": encoded(palette, "BMP"),
        "BMP 1 bit": encoded(grey.convert("1"), "BMP"),
        "BMP alpha": encoded(see_through, "BMP"),
        "BMP run lengths": run_lengths(palette),
        "TIFF": encoded(colour, "TIFF"),
        "TIFF lzw": encoded(colour, "TIFF", compression="tiff_lzw", tiffinfo={0x0112: 6}),
        "TIFF deflate": encoded(palette, "TIFF", compression="tiff_adobe_deflate"),
        "TIFF jpeg": encoded(colour, "TIFF", compression="jpeg"),
        "TIFF fax": encoded(grey.convert("1"), "TIFF", compression="group4"),
        "TIFF packbits alpha": encoded(see_through, "TIFF", compression="packbits"),
        "TIFF 16 bit": encoded(sixteen, "TIFF"),
        "TIFF pages": encoded(colour, "TIFF", **film),
        "AVIF": encoded(colour, "AVIF"),
        "AVIF alpha, Exif": encoded(see_through, "AVIF", exif=turned),
        "AVIF animated": encoded(colour, "AVIF", **film),
        "HEIF": heic(),
        "HEIF turned, Exif": heic(turned_boxes(6), turned.tobytes()[6:]),
        "HEIF alpha": heic(alpha=True),
        "HEIF grid": heic(grid=(2, 3, 130, 100)),
    }
    return {name: Whole(name, name.split()[0], _SPLITTERS[name.split()[0]](data)) for name, data in files.items()}


def _pick(generator: np.random.Generator) -> Whole:
    """Draw an intact picture; all formats are equally likely."""
    format = tuple(_SIDES)[generator.integers(len(_SIDES))]
    several = [whole for whole in wholes().values() if whole.format == format]
    return several[generator.integers(len(several))]


def interlaced(grey: Image.Image) -> bytes:
    """Return a PNG of seven interlaced passes, which Pillow reads but cannot write."""
    pixels = np.asarray(grey)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [row for top, left, down, across in passes for row in pixels[top::down, left::across]]
    header = struct.pack(">IIBBBBB", *grey.size, 8, 0, 0, 0, 1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def run_lengths(palette: Image.Image) -> bytes:
    """Return a run-length encoded BMP, which Pillow reads in Python code but cannot write."""
    plain = encoded(palette, "BMP")
    header = plain[:30] + b"\1" + plain[31 : int.from_bytes(plain[10:14], "little")]
    rows = [
        [bytes([len(list(run)), index]) for index, run in groupby(row)] for row in np.asarray(palette)[::-1].tolist()
    ]
    return header + b"".join(b"".join(row) + b"\0\0" for row in rows) + b"\0\1"


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _split_png(data: bytes) -> tuple[bytes, ...]:
    return _split(data, 8, lambda at: at + 12 + int.from_bytes(data[at : at + 4], "big"))


def _split_webp(data: bytes) -> tuple[bytes, ...]:
    def end(at: int) -> int:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        return at + 8 + size + size % 2

    return _split(data, 12, end)


def _split_jpeg(data: bytes) -> tuple[bytes, ...]:
    # In a scan's data 0xff precedes a 0 or begins a restart marker.
    marker = re.compile(rb"\xff[^\x00\xd0-\xd7]")

    def end(at: int) -> int:
        if data[at + 1] == 0xD9:
            return at + 2
        behind = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        found = marker.search(data, behind) if data[at + 1] == 0xDA else None
        return found.start() if found else behind

    return _split(data, 2, end)


def _split_gif(data: bytes) -> tuple[bytes, ...]:
    def behind_blocks(at: int) -> int:
        while data[at]:
            at += 1 + data[at]
        return at + 1

    def table(flags: int) -> int:
        return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0

    def end(at: int) -> int:
        kind = data[at : at + 1]
        if kind == b"!":
            return behind_blocks(at + 2)
        return behind_blocks(at + 11 + table(data[at + 9])) if kind == b"," else at + 1

    return _split(data, 13 + table(data[10]), end)


def _split_bmp(data: bytes) -> tuple[bytes, ...]:
    return _split(data, int.from_bytes(data[10:14], "little"), lambda at: at + 1_000)


def _split_tiff(data: bytes) -> tuple[bytes, ...]:
    directory = int.from_bytes(data[4:8], "little")
    entries = directory + 2 + 12 * int.from_bytes(data[directory : directory + 2], "little")
    return _split(data, directory + 2, lambda at: at + (12 if at < entries else 1_000))


def _split_boxes(data: bytes) -> tuple[bytes, ...]:
    def end(at: int) -> int:
        # The boxes within these become parts of their own.
        within = {b"meta": 12, b"iprp": 8, b"ipco": 8}.get(data[at + 4 : at + 8])
        return at + (within or int.from_bytes(data[at : at + 4]))

    return _split(data, end(0), end)


def _split(data: bytes, head: int, end: Callable[[int], int]) -> tuple[bytes, ...]:
    parts, at = [data[:head]], head
    while at < len(data):
        parts.append(data[at : end(at)])
        at = end(at)
    assert b"".join(parts) == data
    return tuple(parts)


_SPLITTERS = {"PNG": _split_png, "JPEG": _split_jpeg, "WEBP": _split_webp, "GIF": _split_gif, "BMP": _split_bmp}
_SPLITTERS |= {"TIFF": _split_tiff, "AVIF": _split_boxes, "HEIF": _split_boxes}


# Mutations ----------------------------------------------------------------------------------------


def mutant(number: int) -> tuple[bytes, str]:
    """Return the bytes of a mutant, and the names of its picture and its mutations."""
    generator = np.random.default_rng([SEED, number])
    whole = _pick(generator)
    chosen = sorted(int(pick) for pick in generator.integers(len(_MUTATIONS), size=generator.integers(1, 4)))
    steps = [_MUTATIONS[pick] for pick in chosen]
    parts = list(whole.parts)
    for step in steps:
        if step in _OF_PARTS:
            step(parts, whole.format, generator)
    if any(step in _OF_PARTS for step in steps):
        _mend(parts, whole.format)
    joined = [b"".join(parts)]
    for step in steps:
        if step not in _OF_PARTS:
            step(joined, whole.format, generator)
    return b"".join(joined), f"{whole.name}: {', '.join(step.__name__.strip('_') for step in steps)}"


def _drop(parts: list[bytes], _: str, generator: np.random.Generator) -> None:
    if len(parts) > 1:
        parts.pop(generator.integers(len(parts)))


def _repeat(parts: list[bytes], _: str, generator: np.random.Generator) -> None:
    at = int(generator.integers(len(parts)))
    parts[at:at] = [parts[at]] * int(generator.choice([1, 2, 20]))


def _swap(parts: list[bytes], _: str, generator: np.random.Generator) -> None:
    one, other = generator.integers(len(parts), size=2)
    parts[one], parts[other] = parts[other], parts[one]


def _bring_in(parts: list[bytes], _: str, generator: np.random.Generator) -> None:
    """Insert a part of another picture, usually of another format."""
    other = _pick(generator).parts
    parts.insert(int(generator.integers(len(parts) + 1)), other[generator.integers(len(other))])


def _set_fields(parts: list[bytes], format: str, generator: np.random.Generator) -> None:
    """Set one or two header fields to a valid or an extreme number."""
    fields = _SIDES[format] + _OTHERS[format]
    for pick in generator.integers(len(fields), size=generator.integers(1, 3)):
        _set(parts, format, fields[pick], int(generator.choice(_NUMBERS)))


def _set_both_sides(parts: list[bytes], format: str, generator: np.random.Generator) -> None:
    """Declare a large picture; the decoder must cope with the missing data."""
    _set_sides(parts, format, int(generator.choice([64, 1_000, 4_000, 5_000, 10_000, 65_535])))


def _set_sides(parts: list[bytes], format: str, side: int) -> None:
    for field in _SIDES[format]:
        _set(parts, format, field, side)


def _set(parts: list[bytes], format: str, field: tuple[bytes, int, int], number: int) -> None:
    begin, at, size = field
    value = (number % 256**size).to_bytes(size, "little" if format in ("GIF", "BMP", "WEBP", "TIFF") else "big")
    for position, part in enumerate(parts):
        if re.match(begin, part, re.DOTALL) and len(part) >= at + size:
            parts[position] = part[:at] + value + part[at + size :]


def _overwrite_within(parts: list[bytes], _: str, generator: np.random.Generator) -> None:
    """Overwrite bytes in the body of one part."""
    at = int(generator.integers(len(parts)))
    body = [parts[at][8:]]
    _overwrite(body, "", generator)
    parts[at] = parts[at][:8] + body[0]


def _refill(parts: list[bytes], format: str, generator: np.random.Generator) -> None:
    """Change the data inside a PNG's compression: filters out of range, too few rows, far too many."""
    for position, part in enumerate(parts):
        if format == "PNG" and part[4:8] == b"IDAT":
            rows = [zlib.decompress(part[8:-4])]
            (_overwrite, _cut, _double)[generator.integers(3)](rows, "", generator)
            parts[position] = _chunk(b"IDAT", zlib.compress(rows[0]))


def _mend(parts: list[bytes], format: str) -> None:
    """Correct lengths and checksums."""
    if format == "PNG":
        parts[:] = [
            part if part[:4] == b"\x89PNG" or len(part) < 12 else _chunk(part[4:8], part[8:-4]) for part in parts
        ]
    if format == "WEBP" and parts and parts[0][:4] == b"RIFF":
        parts[0] = b"RIFF" + struct.pack("<I", sum(map(len, parts)) - 8) + parts[0][8:]


def _flip_bits(joined: list[bytes], _: str, generator: np.random.Generator) -> None:
    bits = np.unpackbits(np.frombuffer(joined[0], np.uint8))
    if len(bits):
        bits[generator.integers(len(bits), size=generator.choice([1, 3, 30]))] ^= 1
    joined[0] = np.packbits(bits).tobytes()


def _overwrite(joined: list[bytes], _: str, generator: np.random.Generator) -> None:
    data = np.frombuffer(joined[0], np.uint8).copy()
    if len(data):
        count = int(generator.choice([1, 4, 16]))
        data[generator.integers(len(data), size=count)] = generator.choice(_BYTES, size=count)
    joined[0] = data.tobytes()


def _cut(joined: list[bytes], _: str, generator: np.random.Generator) -> None:
    joined[0] = joined[0][: generator.integers(len(joined[0]) + 1)]


def _double(joined: list[bytes], _: str, generator: np.random.Generator) -> None:
    """Repeat a stretch of bytes."""
    start, end = sorted(int(place) for place in generator.integers(len(joined[0]) + 1, size=2))
    joined[0] = joined[0][:end] + joined[0][start:]


def _leave_out(joined: list[bytes], _: str, generator: np.random.Generator) -> None:
    start = int(generator.integers(len(joined[0]) + 1))
    joined[0] = joined[0][:start] + joined[0][start + int(generator.integers(1, 65)) :]


def _fill_in(joined: list[bytes], _: str, generator: np.random.Generator) -> None:
    start = int(generator.integers(len(joined[0]) + 1))
    joined[0] = joined[0][:start] + generator.bytes(int(generator.integers(1, 65))) + joined[0][start:]


def _splice(joined: list[bytes], _: str, generator: np.random.Generator) -> None:
    """Cut the file and append the end of another."""
    other = b"".join(_pick(generator).parts)
    joined[0] = joined[0][: generator.integers(len(joined[0]) + 1)] + other[generator.integers(len(other)) :]


# In the order of application: _refill comes first because it needs intact compressed data.
_OF_PARTS = (_refill, _drop, _repeat, _swap, _bring_in, _set_fields, _set_both_sides, _overwrite_within)
_MUTATIONS = (*_OF_PARTS, _flip_bits, _overwrite, _cut, _double, _leave_out, _fill_in, _splice)


# Proofs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """Return a client of an empty service."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_DO_NOT_TRACK", "True")
        from service.app import make_service

        store = tmp_path_factory.mktemp("mutants") / "store"
        # BentoML's timer keeps 5 KB of every request for the sum of both; short times keep that out of the growth.
        settings = Settings(store=store, model=MODEL, variant="fp32", body_timeout_s=2, work_timeout_s=4)
        app = make_service(settings).to_asgi()
        with TestClient(app, raise_server_exceptions=False) as opened:
            yield opened


def test_whole_pictures_are_taken(client: TestClient) -> None:
    for whole in wholes().values():
        parts = list(whole.parts)
        _mend(parts, whole.format)
        assert tuple(parts) == whole.parts, f"{whole.name}: mending changed an intact file"
        expected = 415 if whole.name == "BMP run lengths" else 200
        assert client.post("/embed", content=b"".join(parts)).status_code == expected, whole.name


def test_a_mutant_can_be_made_again() -> None:
    assert [mutant(number) for number in range(50)] == [mutant(number) for number in range(50)]
    assert len({mutant(number)[0] for number in range(50)}) > 45


def bombs() -> dict[str, bytes]:
    """Return small files that demand much memory, many passes, or long loops in Python."""
    scans = list(wholes()["JPEG progressive"].parts)
    _set_sides(scans, "JPEG", 5_000)
    segments = list(wholes()["JPEG"].parts)
    # A scan of one component without data.
    first_scan = b"\xff\xda\0\x08\1\1\0\1\5\2\0"
    rows = list(wholes()["BMP run lengths"].parts)
    _set_sides(rows, "BMP", 5_000)
    film = list(wholes()["GIF"].parts)
    _set_sides(film, "GIF", 5_000)
    page = Image.new("L", (8, 8))
    frame = encoded(Image.new("L", (2_000, 2_000)), "AVIF", speed=10)
    cropped = frame.replace(struct.pack(">2I", 2_000, 2_000), struct.pack(">2I", 64, 64))
    return {
        "a JPEG of 5,000 scans": b"".join([*scans[:-1], *[first_scan] * 5_000, scans[-1]]),
        "a JPEG of two million empty segments": b"".join([segments[0], b"\xff\xe5\0\2" * 2_000_000, *segments[1:]]),
        "a JPEG of nine million fill bytes": b"".join([segments[0], b"\xff" * 9_000_000, *segments[1:]]),
        "a BMP of 5,000 rows that end after a pixel": rows[0] + b"\1\0\0\0" * 5_000,
        "a GIF of 25 million pixels that are not there": b"".join(film),
        "a TIFF of 50,000 tags that hold the same megabytes": tiff_of_tags(50_000),
        "a TIFF of a tile of 1.6 billion pixels": tiff_of_one_tile(40_000),
        "a TIFF of 1,000 pages": encoded(Image.new("L", (8, 8)), "TIFF", save_all=True, append_images=[page] * 1_000),
        "an AVIF whose frame has 4 megapixels more than its header says": cropped,
        "a HEIF of 990 tiles": heic(grid=(30, 33, 64 * 33, 64 * 30)),
    }


def tiff_of_tags(count: int) -> bytes:
    """Return a TIFF of 64×64 pixels with tags that nobody knows, each of the same 5 MB of bytes."""
    return _tiff({259: (3, 1, 1), 273: (4, 1, 8), 279: (4, 1, 4096)}, dict.fromkeys(range(1_000, 1_000 + count), 0))


def tiff_of_one_tile(side: int) -> bytes:
    """Return a TIFF of 64×64 pixels that is cut from a tile of `side` pixels a side."""
    return _tiff({259: (3, 1, 8), 322: (4, 1, side), 323: (4, 1, side), 324: (4, 1, 400), 325: (4, 1, 4_000_000)}, {})


def _tiff(entries: dict[int, tuple[int, int, int]], unknown: dict[int, int]) -> bytes:
    fixed = {256: (4, 1, 64), 257: (4, 1, 64), 258: (3, 1, 8), 262: (3, 1, 1), 277: (3, 1, 1)}
    tags = fixed | entries | {tag: (1, 5_000_000, offset) for tag, offset in unknown.items()}
    written = b"".join(struct.pack("<HHII", tag, *tags[tag]) for tag in sorted(tags))
    data = b"" if unknown else zlib.compress(bytes(4_000_000), 1)
    start = b"II*\0" + struct.pack("<IH", 8, len(tags)) + written + bytes(4)
    return start.ljust(400, b"\0") + data + bytes(max(0, 5_000_000 - len(data)))


def test_small_files_that_ask_for_much_work(client: TestClient) -> None:
    failed = []
    for name, data in bombs().items():
        seconds, answer = _embed(client, data)
        print(f"{name}: {len(data):,} bytes, {answer.status_code} after {seconds:.2f} s")
        if seconds > LONGEST_S or answer.status_code >= 500:
            failed.append(name)
    assert not failed, f"{', '.join(failed)}: expected an answer below 500 within {LONGEST_S} s"


@pytest.mark.timeout(1800)
def test_mutated_pictures_get_an_answer(client: TestClient, tmp_path: Path) -> None:
    # The current mutant stays on disk, in case a decoder crashes the process.
    sent = tmp_path / "sent"
    kinds, slowest, half_time = Counter[tuple[str, int]](), (0.0, ""), 0
    for number in range(MUTATIONS):
        if number == MUTATIONS // 2:
            half_time = _resident()
        data, made = mutant(number)
        sent.write_bytes(data)
        name = f"mutant {number} of seed {SEED} ({made}; its bytes: {sent})"
        seconds, answer = _embed(client, data)
        slowest = max(slowest, (seconds, name))
        kinds[made.split()[0].rstrip(":"), answer.status_code] += 1
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, f"{name}: {answer.status_code}"
        assert seconds <= LONGEST_S, f"{name}: {seconds:.1f} s; the limit is {LONGEST_S} s"
        if answer.status_code != 200:
            assert answer.headers["content-type"] == "application/problem+json", name
            assert answer.json()["code"], name
    growth = _resident() - half_time
    statuses = Counter[int]()
    for (_, status), count in kinds.items():
        statuses[status] += count
    for format in _SIDES:
        of_format = {status: kinds[format, status] for status in sorted(statuses) if kinds[format, status]}
        print(f"{format}: {of_format}")
    print(f"all: {dict(sorted(statuses.items()))}; memory {growth / 1e6:+.1f} MB in the second half")
    print(f"slowest: {slowest[0]:.2f} s, {slowest[1]}")
    taken, refused = statuses[200] / MUTATIONS, 1 - statuses[200] / MUTATIONS
    assert taken > 0.05, f"{taken:.1%} were taken: the mutations are too wild to get past the headers"
    assert refused > 0.20, f"{refused:.1%} were refused: the mutations are too tame"
    assert growth < MOST_GROWTH_BYTES, f"memory grew by {growth / 1e6:.0f} MB in the second half"


def _embed(client: TestClient, data: bytes) -> tuple[float, httpx2.Response]:
    """Send a picture. Return how long it took, or the processor time of a second try if it took too long."""
    begun = time.perf_counter()
    answer = client.post("/embed", content=data)
    seconds = time.perf_counter() - begun
    if seconds > LONGEST_S:
        # Other programs may have had the processor.
        begun = _processor_seconds()
        answer = client.post("/embed", content=data)
        seconds = _processor_seconds() - begun
    return seconds, answer


def _processor_seconds() -> float:
    """Return the processor time of this process and of its children, dead or alive."""
    own = psutil.Process()
    seconds = sum(own.cpu_times()[:4])
    for child in own.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            seconds += sum(child.cpu_times()[:4])
    return float(seconds)


def _resident() -> int:
    """Return the resident memory in bytes, after returning freed memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)
