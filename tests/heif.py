"""HEIC files for tests: whole ones by an encoder, and odd ones around two coded pictures that are kept here.

Those two are `tests.conftest.scene()` in colour, and its grey for transparency: 64×48 pixels each, HEVC of 4:2:0 and
4:0:0, written by x265. The boxes around them are written here.
"""

import base64
import io
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pillow_heif import HeifFile, options

_COLOUR_CONFIG = base64.b64decode(
    "AQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq"
    "5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIk="
)
_COLOUR = base64.b64decode(
    "AAACRygBrwT4cWdRINCAETnfteK5WxWqPeOJnJucJ37SF7E0re6NPY3nqfq3b+rJSz83SEeSPGj8s5ZZ14jRlJPv7x/V1vMXJ62hBS3wYYlM"
    "cghaEb5mgFej4KOlN07yt7WxRQSPHC8/pdNxCbDWAdzWY4esidfqRsxH65s4SL/bEnhlACfCRZxLEbKAmrSSl/n+B6dvOtv8L5dPrjvyV+6k"
    "8yCxi8JR9GIjS8y5Y2WTDFYQrV5g37ElBSgFW/dGSBOA82HZJturoNV5RvXJ5KZlh/Mvv5/bY+zmd9SNv7fu74w7qYUTimzF0yNPCNTaXhKL"
    "1sIyPppa3VAv8f8jrWqzmJJCtcvjx+Y6+CpaDr6nWfP5OIQAxEWz9WQlskOOztQtVI+hXvMDfzsRIAt8GLCU81d8SLzmvWY5uZx37WT15DHZ"
    "JCGXGcjW2D167QzfcBXHjvyW83hGahGdQnpj/ZEsFdW9bfvx45g1lHfDdmZvzBTVOcbOBwn0A7r6Ufcs90LGQJPulVdazYWAialQNr55AsvJ"
    "Etud0dbeSGQn0monuDX9E87ENYTNE5PHkiV392IuWq61CwL7JeCgbp18HeWB8+RjTtNc7GaXKwGqYYLfUU4RCyDK9gyWh39T8cOSoSKdl2VB"
    "jbw1+uUmmyY6o7VfVpU9rr5IOdanZerYq05R+E+RMZ4zcdsx9FxCq7ldbfMaL/lzIfmGCQvTP4K6WpXVKSM0bzGDRGkp/l2jzSV8cLdzIpo5"
    "nAJ80lUjPL/OGCdLxdtZWQljziA="
)
_GREY_CONFIG = base64.b64decode(
    "AQQIAAAAn/gAAAAAHvAA/Pz4+AAADwNgAAEAF0ABDAH//wQIAAADAJ/4AAADAAAeugJAYQABACVCAQEECAAAAwCf+AAAAwAAHsCCBBZbq5Ka"
    "5sCAAAAMgAAAAwCEYgABAAZEAcFzwIk="
)
_GREY = base64.b64decode(
    "AAAAeigBrhPAa5HQJMV29yXkBswOZuLmO/pRSeDFuzXZ0FOFBTnQgdIVxuof3a5+VwctTut9Anlrky2WWO3+Y/h7FQuBa6uYnBdi8ofl42tt"
    "XHPTL8v+b49CaV4ixzL+W9jUADqLiXuPZ2SH/EoG18T+iqF3Vn10WH6UPbGA"
)

# The coder's blocks have 64 pixels, so the coded pictures are 64×64, of which the clean aperture is the upper part.
_CODED = struct.pack(">III", 0, 64, 64)
_APERTURE = struct.pack(">4IiIiI", 64, 1, 48, 1, 0, 1, -16, 2)


def box(kind: bytes, *bodies: bytes) -> bytes:
    """Return a box of the ISO base media file format."""
    return struct.pack(">I4s", 8 + sum(map(len, bodies)), kind) + b"".join(bodies)


def turned(orientation: int) -> bytes:
    """Return the properties that show a picture as EXIF's orientation does: a turn to the left and then a mirror."""
    turns, axis = {1: (0, -1), 2: (0, 1), 3: (2, -1), 4: (0, 0), 5: (1, 0), 6: (3, -1), 7: (1, 1), 8: (1, -1)}[
        orientation
    ]
    return (box(b"irot", bytes([turns])) if turns else b"") + (box(b"imir", bytes([axis])) if axis >= 0 else b"")


def heic(properties: bytes = b"", exif: bytes = b"", alpha: bool = False, grid: tuple[int, ...] | None = None) -> bytes:
    """Return a HEIC file.

    Args:
        properties: boxes that apply to the picture, such as `turned`.
        exif: a TIFF structure, as EXIF has it.
        alpha: whether the scene's grey says how opaque the picture is.
        grid: rows and columns of a grid of the scene, and the width and height that it is cut to.
    """
    shared = [box(b"hvcC", _COLOUR_CONFIG), box(b"hvcC", _GREY_CONFIG), box(b"ispe", _CODED), box(b"clap", _APERTURE)]
    shared.append(box(b"auxC", bytes(4) + b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0"))
    own = [properties[at : at + size] for at, size in _spans(properties)]
    main = 3 if grid else 1
    items = [(1, b"hvc1", _COLOUR)]
    tiles: list[int] = []
    has = {1: [1, 3] + ([] if grid else [4]), 2: [2, 3, 4, 5], 3: []}
    references = b""
    if alpha:
        items.append((2, b"hvc1", _GREY))
        references += box(b"auxl", struct.pack(">3H", 2, 1, main))
    if grid:
        rows, columns, width, height = grid
        items.append((3, b"grid", struct.pack(">4B2I", 0, 1, rows - 1, columns - 1, width, height)))
        # Every tile is an item, and all have the same bytes.
        tiles = list(range(10, 10 + rows * columns))
        references += box(b"dimg", struct.pack(f">{2 + len(tiles)}H", 3, len(tiles), *tiles))
        shared.append(box(b"ispe", struct.pack(">III", 0, width, height)))
        has[3].append(len(shared))
    if exif:
        items.append((4, b"Exif", bytes(4) + exif))
        references += box(b"cdsc", struct.pack(">3H", 4, 1, main))
    has[main] += range(len(shared) + 1, len(shared) + 1 + len(own))
    places, data = b"", b"".join(body for _, _, body in items)
    items += [(number, b"hvc1", _COLOUR) for number in tiles]
    has |= {tile: [1, 3] for tile in tiles}
    for number, _, body in items:
        places += struct.pack(">4H2I", number, 1, 0, 1, data.index(body), len(body))
    names = [box(b"infe", bytes([2, 0, 0, 0]), struct.pack(">2H", number, 0), kind, b"\0") for number, kind, _ in items]
    owned = [number for number, _, _ in items if has.get(number)]
    uses = [struct.pack(">HB", number, len(has[number])) + bytes(0x80 | one for one in has[number]) for number in owned]
    meta = box(
        b"meta",
        bytes(4),
        box(b"hdlr", bytes(8) + b"pict" + bytes(13)),
        box(b"pitm", bytes(4), struct.pack(">H", main)),
        box(b"iinf", bytes(4), struct.pack(">H", len(items)), *names),
        box(b"iloc", bytes([1, 0, 0, 0, 0x44, 0]), struct.pack(">H", len(items)), places),
        box(b"iref", bytes(4), references) if references else b"",
        box(b"iprp", box(b"ipco", *shared, *own), box(b"ipma", bytes(4), struct.pack(">I", len(uses)), *uses)),
        box(b"idat", data),
    )
    return box(b"ftyp", b"heic", bytes(4), b"mif1heic") + meta


def coded(
    pictures: list[NDArray[Any]], depth: int = 8, primary: int = 0, chroma: int = 444, **blocks: bytes | int | None
) -> bytes:
    """Return a HEIC file of an encoder, at a quality that leaves a mean difference of less than a level of 8 bits.

    Args:
        pictures: (H, W, C) samples of `depth` bits: grey, grey and alpha, RGB, or RGB and alpha.
        depth: 8, 10 or 12.
        primary: the picture to show.
        chroma: 444, 422 or 420.
        blocks: `exif`, whose orientation becomes a property of the picture; `xmp`, `icc_profile`, `tile_size`.
    """
    file = HeifFile()  # type: ignore[no-untyped-call]
    for samples in pictures:
        mode = ("L", "LA", "RGB", "RGBA")[samples.shape[2] - 1]
        data = (samples << 16 - depth).astype("<u2") if depth > 8 else samples.astype(np.uint8)
        added = file.add_frombytes(mode + (";16" if depth > 8 else ""), samples.shape[1::-1], data.tobytes())
        added.info.update({name: value for name, value in blocks.items() if name != "tile_size"})
    # The encoder has no argument for it.
    options.SAVE_HDR_TO_12_BIT = depth == 12
    buffer = io.BytesIO()
    tiles = {"tile_size": blocks["tile_size"]} if "tile_size" in blocks else {}
    tuning = {"preset": "ultrafast", "x265:pools": "1"}
    file.save(buffer, primary_index=primary, quality=98, chroma=chroma, enc_params=tuning, **tiles)
    return buffer.getvalue()


def _spans(boxes: bytes) -> list[tuple[int, int]]:
    spans, at = [], 0
    while at < len(boxes):
        spans.append((at, int.from_bytes(boxes[at : at + 4])))
        at += spans[-1][1]
    return spans
