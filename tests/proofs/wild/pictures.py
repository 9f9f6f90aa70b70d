"""Odd pictures of every format, each with the pixels that a person sees, computed from the arrays they were made of.

PNG, BMP and TIFF are written here, byte by byte, because Pillow writes only a few of their kinds. JPEG, WebP, GIF and
AVIF are written by Pillow and HEIC by pillow-heif, and then changed. `picture(number)` is the same on every run.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from tests.heif import coded

SEED = 16
# Levels of 255. A lossless format may differ by the rounding of one level.
LOSSLESS = 1.0
# JPEG, WebP and AVIF of smooth pictures at a quality of 90 and more, chroma at half of the size, by their own losses.
LOSSY = 4.0

Numbers = NDArray[Any]
Generator = np.random.Generator


class Picture(NamedTuple):
    """A picture file.

    Attributes:
        name: what it is, for a message.
        data: the bytes of the file.
        seen: (H, W, 3) float, 0 to 255: the upright picture on white.
        most: the largest mean difference from `seen` in levels of 255.
        optional: it may be refused instead, by a LookalikeError; wrong pixels are never allowed.
    """

    name: str
    data: bytes
    seen: Numbers
    most: float = LOSSLESS
    optional: bool = False


def picture(number: int) -> Picture:
    """Return the picture of a number; the formats take turns."""
    generator = np.random.default_rng([SEED, number])
    return _WRITERS[number % len(_WRITERS)](generator)


# What a person sees -------------------------------------------------------------------------------


def turned(pixels: Numbers, orientation: int) -> Numbers:
    """Return pixels (H, W, C) as EXIF's orientation shows them. A value outside 1 to 8 means upright."""
    across, down, both = pixels[:, ::-1], pixels[::-1], pixels[::-1, ::-1]
    turns: dict[int, Numbers] = {2: across, 3: both, 4: down}
    sideways: dict[int, Numbers] = {5: pixels, 6: down, 7: both, 8: across}
    return sideways[orientation].transpose(1, 0, 2) if orientation in sideways else turns.get(orientation, pixels)


def on_white(colour: Numbers, alpha: Numbers) -> Numbers:
    """Lay colour (H, W, 1 or 3) of 0 to 255 on white; alpha (H, W) from 0 to 1."""
    opacity = alpha[:, :, None]
    seen: Numbers = np.broadcast_to(colour * opacity + 255 * (1 - opacity), (*alpha.shape, 3))
    return seen


def _drawn(generator: Generator, channels: int, depth: int = 8, smooth: bool = False) -> Numbers:
    """Return samples (H, W, channels) of 0 to 2**depth − 1: noise of an odd size, or a smooth larger picture."""
    if not smooth:
        height, width = generator.integers(1, 20, 2)
        noise: Numbers = generator.integers(0, 2**depth, (height, width, channels))
        return noise
    height, width = generator.integers(24, 57, 2)
    down, across = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    corners = generator.integers(0, 256, (4, channels)).astype(float)
    top, bottom = corners[0] * (1 - across) + corners[1] * across, corners[2] * (1 - across) + corners[3] * across
    smoothed: Numbers = np.rint(top * (1 - down) + bottom * down).astype(np.int64)
    return smoothed


def _alpha(generator: Generator, shape: tuple[int, ...], most: int) -> Numbers:
    """Return alpha (H, W): everything between, only its ends, all of it 0, or all opaque."""
    kind = int(generator.integers(4))
    alpha: Numbers = np.full(shape, most if kind == 3 else 0)
    if kind < 2:
        alpha = generator.integers(0, most + 1, shape) if kind else generator.integers(0, 2, shape) * most
    return alpha


# Metadata and bytes behind the end ----------------------------------------------------------------


def exif(orientation: int, order: str) -> bytes:
    """Return an EXIF block in the byte order "<" or ">" with a maker, the orientation and a software name."""
    entries = [(0x010F, 2, 4, b"cam\0"), (0x0112, 3, 1, struct.pack(order + "HH", orientation, 0))]
    body = struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack(order + "HHI", tag, kind, count) + value
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8) + body + bytes(4)


def xmp(orientation: int) -> bytes:
    """Return XMP that names an orientation, which browsers ignore."""
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        f'tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'
    ).encode()


# The primaries of colour spaces in the XYZ of D50: a column each for red, green and blue.
_PRIMARIES = {
    "sRGB": ((0.43607, 0.38506, 0.14308), (0.22250, 0.71688, 0.06062), (0.01393, 0.09710, 0.71417)),
    "Display P3": ((0.51512, 0.29198, 0.15710), (0.24120, 0.69225, 0.06657), (-0.00105, 0.04189, 0.78407)),
    "Adobe RGB": ((0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457)),
}
# The curve of every profile here, in 1/256.
_GAMMA = 563


def profile(space: str) -> bytes:
    """Return an ICC profile of version 2 with three primaries and one curve."""

    def fixed(numbers: Sequence[float]) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(number * 65536) for number in numbers))

    name = space.encode() + b"\0"
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, _GAMMA, 0)
    red, green, blue = np.array(_PRIMARIES[space]).T.tolist()
    tags = [
        (b"desc", b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78)),
        (b"cprt", b"text\0\0\0\0none\0\0\0\0"),
        (b"wtpt", fixed((0.9642, 1, 0.82491))),
        (b"rXYZ", fixed(red)),
        (b"gXYZ", fixed(green)),
        (b"bXYZ", fixed(blue)),
        *((tag, curve) for tag in (b"rTRC", b"gTRC", b"bTRC")),
    ]
    table, body = struct.pack(">I", len(tags)), b""
    for tag, value in tags:
        value += bytes(-len(value) % 4)
        table += tag + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(value))
        body += value
    kind = struct.pack(">I", 0x02400000) + b"mntrRGB XYZ " + struct.pack(">6H", 2023, 1, 1, 0, 0, 0) + b"acsp"
    light = struct.pack(">3i", *(round(number * 65536) for number in (0.9642, 1, 0.82491)))
    head = bytes(8) + kind + bytes(28) + light + bytes(48)
    whole = head + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def in_srgb(colour: Numbers, space: str) -> Numbers:
    """Return colour (H, W, 3) of a space, 0 to 255, as sRGB shows it."""
    light = (colour / 255) ** (_GAMMA / 256)
    linear = light @ np.array(_PRIMARIES[space]).T @ np.linalg.inv(np.array(_PRIMARIES["sRGB"])).T
    linear = linear.clip(0, 1)
    shown: Numbers = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return shown


def any_space(generator: Generator) -> str:
    """Draw a colour space."""
    return list(_PRIMARIES)[int(generator.integers(len(_PRIMARIES)))]


def _metadata(generator: Generator) -> tuple[int, dict[str, bytes], str]:
    """Draw metadata: the orientation that counts, the blocks "exif" and "xmp", and their description."""
    blocks, words, counts = {}, "", 1
    if generator.random() < 0.7:
        counts = int(generator.choice([1, 2, 3, 4, 5, 6, 7, 8, 0, 9]))
        order = "<>"[generator.integers(2)]
        blocks["exif"] = exif(counts, order)
        words += f", EXIF {counts}{order}"
    if generator.random() < 0.2:
        turn = int(generator.integers(2, 9))
        blocks["xmp"] = xmp(turn)
        words += f", XMP {turn}"
    return counts, blocks, words


def _behind(generator: Generator, data: bytes) -> tuple[bytes, str]:
    """Append bytes behind the end of a file: none, zeros, noise, line ends, scan markers, or the file once more."""
    kind = int(generator.integers(8))
    if kind == 0:
        return data + bytes(int(generator.choice([1, 3, 4096, 700_000]))), ", zeros behind"
    if kind == 1:
        return data + generator.bytes(int(generator.choice([1, 12, 5000]))), ", noise behind"
    if kind == 2:
        return data + b"\r\n", ", a line end behind"
    if kind == 3:
        return data + b"\xff\xda\0\x08\1\1\0\0\x3f\0ab" * 100, ", a hundred scan markers behind"
    if kind == 4:
        return data + data, ", itself behind"
    return data, ""


# PNG ----------------------------------------------------------------------------------------------

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def packed(samples: Numbers, depth: int, order: str = ">") -> list[bytes]:
    """Return the rows of samples (H, W, C) of 1 to 16 bits, the first sample in the highest bits."""
    rows = samples.reshape(len(samples), -1)
    if depth >= 8:
        return [row.astype(f"{order}u{depth // 8}").tobytes() for row in rows]
    bits = rows[:, :, None] >> np.arange(depth - 1, -1, -1) & 1
    return [np.packbits(row.ravel().astype(np.uint8)).tobytes() for row in bits]


def chunk(kind: bytes, body: bytes, wrong: bool = False) -> bytes:
    """Return a PNG chunk, perhaps with a wrong checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ wrong)


def png(
    samples: Numbers,
    kind: int,
    depth: int,
    before: bytes = b"",
    after: bytes = b"",
    interlaced: bool = False,
    piece: int = 65_536,
) -> bytes:
    """Write a PNG of a colour type; `before` and `after` are chunks beside its data, which comes in pieces of bytes."""
    height, width = samples.shape[:2]
    parts = [samples[top::down, left::across] for top, left, down, across in _PASSES] if interlaced else [samples]
    rows = [b"\0" + row for part in parts if part.size for row in packed(part, depth)]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced))
    packed_rows = zlib.compress(b"".join(rows), 1)
    data = b"".join(chunk(b"IDAT", packed_rows[at : at + piece]) for at in range(0, len(packed_rows), piece))
    return b"\x89PNG\r\n\x1a\n" + header + before + data + after + chunk(b"IEND", b"")


def _png(generator: Generator) -> Picture:
    kind = int(generator.choice(list(_CHANNELS)))
    depth = int(generator.choice(_DEPTHS[kind]))
    most = 2**depth - 1
    samples = _drawn(generator, _CHANNELS[kind], depth)
    name = f"PNG of colour type {kind}, {depth} bits"
    colour, alpha = samples[:, :, :3] * (255 / most), np.ones(samples.shape[:2])
    before = b""
    if kind in (4, 6):
        samples[:, :, -1] = _alpha(generator, samples.shape[:2], most)
        colour, alpha = samples[:, :, :-1] * (255 / most), samples[:, :, -1] / most
    elif kind == 3:
        palette = generator.integers(0, 256, (most + 1, 3))
        before += chunk(b"PLTE", palette.astype(np.uint8).tobytes())
        colour = palette[samples[:, :, 0]].astype(float)
    if kind in (0, 2, 3) and generator.random() < 0.5:
        name += ", tRNS"
        # A short tRNS of a palette leaves the other colours opaque.
        if kind == 3:
            opacity = np.full(most + 1, 255)
            few = int(generator.integers(1, most + 2))
            opacity[:few] = _alpha(generator, (few,), 255)
            before += chunk(b"tRNS", opacity[:few].astype(np.uint8).tobytes())
            alpha = opacity[samples[:, :, 0]] / 255
        else:
            key = samples[0, 0].copy()
            before += chunk(b"tRNS", key.astype(">u2").tobytes())
            # A neighbour of the key in the lowest bit is another colour.
            samples[-1, -1, -1] ^= 1
            colour = samples * (255 / most)
            alpha = 1.0 - (samples == key).all(-1)
    counts, blocks, words = _metadata(generator)
    if kind in (2, 3, 6) and generator.random() < 0.2:
        space = any_space(generator)
        colour, words = in_srgb(colour, space), f"{words}, {space}"
        before = chunk(b"iCCP", b"icc\0\0" + zlib.compress(profile(space))) + before
    extra, extra_words = _png_extras(generator)
    ours = (chunk(b"eXIf", blocks["exif"]) if "exif" in blocks else b"") + extra
    if "xmp" in blocks:
        ours += chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + blocks["xmp"])
    # Metadata may stand on either side of the data.
    first, interlaced = generator.random() < 0.5, generator.random() < 0.3
    piece = int(generator.choice([1, 50, 65_536]))
    data = png(samples, kind, depth, before + ours * first, ours * (not first), interlaced, piece)
    data, behind = _behind(generator, data)
    name += words + extra_words + ", interlaced" * interlaced + ", metadata last" * (not first) + behind
    return Picture(name, data, turned(on_white(colour, alpha), counts))


def _png_extras(generator: Generator) -> tuple[bytes, str]:
    """Draw chunks that a picture does not need."""
    kind = int(generator.integers(10))
    if kind == 0:
        return chunk(b"tEXt", b"Comment\0hello", wrong=True), ", text with a wrong checksum"
    if kind == 1:
        size = int(generator.choice([10_000, 1_500_000]))
        return chunk(b"zTXt", b"Raw\0\0" + zlib.compress(b"a" * size)), f", {size} bytes of packed text"
    if kind == 2:
        return chunk(b"tEXt", b"A\0b") * int(generator.choice([3, 500])), ", many texts"
    if kind == 3:
        return chunk(b"prVt", generator.bytes(30), wrong=generator.random() < 0.5), ", a private chunk"
    if kind == 4:
        return chunk(b"tIME", struct.pack(">HBBBBB", 2023, 13, 40, 25, 61, 61)), ", a wrong time"
    if kind == 5:
        return chunk(b"bKGD", bytes(6)), ", a background"
    if kind == 6:
        return chunk(b"gAMA", struct.pack(">I", 100_000)), ", gamma"
    return b"", ""


# BMP ----------------------------------------------------------------------------------------------


def _bmp(generator: Generator) -> Picture:
    bits = int(generator.choice([1, 4, 8, 16, 24, 32]))
    masks: tuple[int, ...] = ()
    palette = b""
    header = int(generator.choice([40, 108, 124]))
    words = ""
    alpha = None
    if bits <= 8:
        samples = _drawn(generator, 1, bits)
        colours = generator.integers(0, 256, (2**bits, 4))
        palette = colours.astype(np.uint8).tobytes()
        colour: Numbers = colours[samples[:, :, 0]][:, :, 2::-1]
        rows = packed(samples, bits)
    elif bits == 24:
        colour = _drawn(generator, 3)
        rows = packed(colour[:, :, ::-1], 8)
    else:
        masks, sizes, words = _bmp_masks(generator, bits)
        parts = np.stack(
            [generator.integers(0, 2**size, (7, 9)) if size else np.zeros((7, 9), int) for size in sizes], -1
        )
        if sizes[3]:
            parts[:, :, 3] = _alpha(generator, (7, 9), 2 ** sizes[3] - 1)
            # A file whose alpha is 0 everywhere has none.
            alpha = parts[:, :, 3] / (2 ** sizes[3] - 1) if parts[:, :, 3].any() else None
        colour = parts[:, :, :3] * (255 / (2.0 ** np.array(sizes[:3]) - 1))
        shifts = [(mask & -mask).bit_length() - 1 if mask else 0 for mask in masks]
        whole = sum(parts[:, :, channel] << shifts[channel] for channel in range(4))
        # The unused byte of a pixel may hold anything.
        if words == ", unused byte":
            whole = whole | generator.integers(0, 256, (7, 9)) << 24
        rows = [row.astype(f"<u{bits // 8}").tobytes() for row in np.asarray(whole)]
        if words in (", 5 5 5", ", unused byte"):
            masks = ()
    downward = generator.random() < 0.3
    pixels = b"".join(row.ljust(-(-len(row) // 4) * 4, b"\0") for row in (rows if downward else rows[::-1]))
    height, width = colour.shape[:2]
    fields = struct.pack(
        "<IiiHHIIiiII",
        header, width, -height if downward else height, 1, bits, 3 if masks else 0, len(pixels), 2835, 2835,
        len(palette) // 4, 0,
    )  # fmt: skip
    if header == 40:
        # Without a field for it in the header, the alpha's mask stands behind the three others only in later headers.
        fields += struct.pack("<3I", *masks[:3]) if masks else b""
        alpha = None
    else:
        fields += struct.pack("<4I", *(masks or (0, 0, 0, 0))) + b"BGRs".ljust(header - 56, b"\0")
    place = 14 + len(fields) + len(palette)
    data = b"BM" + struct.pack("<IHHI", place + len(pixels), 0, 0, place) + fields + palette + pixels
    data, behind = _behind(generator, data)
    name = f"BMP of {bits} bits{words}, header of {header}{', top down' * downward}{behind}"
    seen = on_white(colour.astype(float), np.ones((height, width)) if alpha is None else alpha)
    return Picture(name, data, seen, optional=words == ", RGBA" and header == 40)


def _bmp_masks(generator: Generator, bits: int) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Draw the masks of red, green, blue and alpha, their sizes in bits, and what they are."""
    if bits == 16:
        if generator.random() < 0.5:
            return (0x7C00, 0x3E0, 0x1F, 0), (5, 5, 5, 0), ", 5 5 5"
        return (0xF800, 0x7E0, 0x1F, 0), (5, 6, 5, 0), ", 5 6 5"
    kind = generator.integers(3)
    if kind == 0:
        return (0xFF0000, 0xFF00, 0xFF, 0), (8, 8, 8, 0), ", unused byte"
    if kind == 1:
        return (0xFF0000, 0xFF00, 0xFF, 0xFF000000), (8, 8, 8, 8), ", BGRA"
    return (0xFF, 0xFF00, 0xFF0000, 0xFF000000), (8, 8, 8, 8), ", RGBA"


# TIFF ---------------------------------------------------------------------------------------------


def _tiff(generator: Generator) -> Picture:
    kind = ("white is zero", "grey", "RGB", "palette", "grey alpha", "RGB alpha", "RGB premultiplied", "CMYK")[
        generator.integers(8)
    ]
    depth = int(generator.choice({"white is zero": [1, 8], "grey": [1, 8, 16], "palette": [4, 8]}.get(kind, [8, 16])))
    most = 2**depth - 1
    channels = {"RGB": 3, "grey alpha": 2, "RGB alpha": 4, "RGB premultiplied": 4, "CMYK": 4}.get(kind, 1)
    samples = _drawn(generator, channels, depth)
    alpha = np.ones(samples.shape[:2])
    tags: dict[int, tuple[int, Sequence[int]]] = {}
    colour = samples * (255 / most)
    if kind == "white is zero":
        colour = 255 - colour
    elif kind == "palette":
        table = generator.integers(0, 256, (3, most + 1))
        tags[320] = (3, (table * 257).ravel().tolist())
        colour = table.T[samples[:, :, 0]].astype(float)
    elif kind == "CMYK":
        colour = (255 - colour[:, :, :3]) * (1 - samples[:, :, 3:] / most)
    elif channels in (2, 4):
        opacity = _alpha(generator, samples.shape[:2], most)
        if kind == "RGB premultiplied":
            samples = np.rint(samples * (opacity[:, :, None] / most)).astype(np.int64)
        samples[:, :, -1] = opacity
        alpha = opacity / most
        colour = samples[:, :, :-1] * (255 / most)
        tags[338] = (3, [1 if kind == "RGB premultiplied" else 2])
    seen = on_white(colour, alpha)
    # Premultiplied colour is light already.
    if kind == "RGB premultiplied":
        seen = colour + 255 * (1 - alpha[:, :, None])
    order = "<>"[generator.integers(2)]
    orientation = int(generator.choice([0, 1, 2, 3, 4, 5, 6, 7, 8]))
    if orientation:
        tags[274] = (3, [orientation])
    compression, how = ((1, "plain"), (8, "deflate"), (32773, "PackBits"))[generator.integers(3)]
    photometric = {"white is zero": 0, "grey": 1, "grey alpha": 1, "palette": 3, "CMYK": 5}.get(kind, 2)
    data = tiff(samples, depth, photometric, order, compression, tags)
    data, behind = _behind(generator, data)
    name = f"TIFF, {kind}, {depth} bits, {order}, {how}, orientation {orientation}{behind}"
    # Not every decoder has these; a clear refusal will do.
    rare = (depth == 16 and channels in (2, 4)) or kind == "CMYK" or depth == 4
    return Picture(name, data, turned(seen, orientation), 1.0 if kind != "RGB premultiplied" else 2.0, optional=rare)


def tiff(
    samples: Numbers,
    depth: int,
    photometric: int,
    order: str,
    compression: int,
    tags: dict[int, tuple[int, Sequence[int]]],
) -> bytes:
    """Write a TIFF of one strip. `tags` maps further tags to their type (3 for 16 bits) and numbers."""
    height, width, channels = samples.shape
    rows = packed(samples, depth, order)
    # Every row has runs of at most 128 bytes of its own, here as they are.
    if compression == 32773:
        runs = [row[at : at + 128] for row in rows for at in range(0, len(row), 128)]
        rows = [bytes([len(run) - 1]) + run for run in runs]
    strip = b"".join(rows)
    if compression == 8:
        strip = zlib.compress(strip)
    tags = tags | {
        256: (3, [width]), 257: (3, [height]), 258: (3, [depth] * channels), 259: (3, [compression]),
        262: (3, [photometric]), 273: (4, [8]), 277: (3, [channels]), 278: (3, [height]), 279: (4, [len(strip)]),
    }  # fmt: skip
    strip += bytes(len(strip) % 2)
    place = 8 + len(strip)
    entries, behind = b"", b""
    for tag, (type, numbers) in sorted(tags.items()):
        value = struct.pack(f"{order}{len(numbers)}{'H' if type == 3 else 'I'}", *numbers)
        if len(value) > 4:
            at = place + 2 + 12 * len(tags) + 4 + len(behind)
            behind += value + bytes(len(value) % 2)
            value = struct.pack(order + "I", at)
        entries += struct.pack(order + "HHI", tag, type, len(numbers)) + value.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", place)
    return start + strip + struct.pack(order + "H", len(tags)) + entries + bytes(4) + behind


# Formats that Pillow writes -----------------------------------------------------------------------


def _saved(pixels: Numbers, mode: str, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    array = pixels.astype(np.uint8)
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array, mode).save(buffer, format, **options)
    return buffer.getvalue()


def _jpeg(generator: Generator) -> Picture:
    mode = ("L", "RGB", "CMYK")[generator.integers(3)]
    pixels = _drawn(generator, len(mode), smooth=True)
    seen: Numbers = pixels.astype(float)
    if mode == "CMYK":
        seen = (255.0 - pixels[:, :, :3]) * (1 - pixels[:, :, 3:] / 255)
    counts, blocks, words = _metadata(generator)
    # Pillow writes the block as it is, and JPEG's has a name in front.
    if "exif" in blocks:
        blocks["exif"] = b"Exif\0\0" + blocks["exif"]
    options: dict[str, Any] = {"quality": int(generator.integers(90, 101)), **blocks}
    if generator.random() < 0.3:
        options["progressive"] = True
    if generator.random() < 0.3:
        options["restart_marker_rows"] = 1
    if mode == "RGB" and generator.random() < 0.2:
        options["keep_rgb"] = True
    elif mode == "RGB":
        options["subsampling"] = int(generator.integers(3))
    if mode == "RGB" and generator.random() < 0.4:
        space = any_space(generator)
        options["icc_profile"], seen, words = profile(space), in_srgb(seen, space), f"{words}, {space}"
    elif generator.random() < 0.2:
        options["icc_profile"], words = SRGB, f"{words}, sRGB profile"
    data = _saved(pixels, mode, "JPEG", **options)
    if generator.random() < 0.2:
        # Any number of ff may stand before a marker.
        data, words = data[:2] + b"\xff\xff\xff\xfe\0\x06text" + data[2:], words + ", fill bytes"
    if generator.random() < 0.2:
        data, behind = data[:-2], ", no end mark"
    else:
        data, behind = _behind(generator, data)
    kinds = ", ".join(f"{key} {value}" for key, value in options.items() if isinstance(value, int))
    seen = np.broadcast_to(seen, (*seen.shape[:2], 3))
    return Picture(f"JPEG {mode}, {kinds}{words}{behind}", data, turned(seen, counts), LOSSY)


def _webp(generator: Generator) -> Picture:
    mode = ("RGB", "RGBA")[generator.integers(2)]
    lossless = generator.random() < 0.6
    pixels = _drawn(generator, len(mode), smooth=not lossless)
    if mode == "RGBA":
        pixels[:, :, 3] = _alpha(generator, pixels.shape[:2], 255)
    counts, blocks, words = _metadata(generator)
    colour = pixels[:, :, :3]
    if generator.random() < 0.3:
        space = any_space(generator)
        blocks["icc_profile"], colour, words = profile(space), in_srgb(colour, space), f"{words}, {space}"
    data = _saved(pixels, mode, "WEBP", lossless=lossless, quality=95, exact=True, method=0, **blocks)
    data, behind = _behind(generator, data)
    alpha = pixels[:, :, 3] / 255 if mode == "RGBA" else np.ones(pixels.shape[:2])
    seen = turned(on_white(colour, alpha), counts)
    name = f"WebP {mode}, {'lossless' if lossless else 'lossy'}{words}{behind}"
    return Picture(name, data, seen, LOSSLESS if lossless else LOSSY)


def _gif(generator: Generator) -> Picture:
    samples = _drawn(generator, 1, int(generator.choice([1, 3, 8])))[:, :, 0]
    palette = generator.integers(0, 256, (256, 3))
    drawn = Image.fromarray(samples.astype(np.uint8), "P")
    drawn.putpalette(palette.astype(np.uint8).tobytes())
    options: dict[str, Any] = {"optimize": False, "interlace": bool(generator.integers(2))}
    alpha = np.ones(samples.shape)
    words = ""
    if generator.random() < 0.5:
        options["transparency"] = int(samples[0, 0])
        alpha = 1.0 * (samples != samples[0, 0])
        words += ", transparent"
    if generator.random() < 0.3:
        options |= {"save_all": True, "append_images": [drawn.transpose(Image.Transpose.ROTATE_180)], "duration": 50}
        words += ", animated"
    buffer = io.BytesIO()
    drawn.save(buffer, "GIF", **options)
    data, seen = buffer.getvalue(), on_white(palette[samples].astype(float), alpha)
    if generator.random() < 0.4:
        data, seen = _moved(data, seen, generator)
        words += ", first frame inside the canvas"
    data, behind = _behind(generator, data)
    return Picture(f"GIF{words}{behind}", data, seen)


def _moved(data: bytes, seen: Numbers, generator: Generator) -> tuple[bytes, Numbers]:
    """Enlarge a GIF's canvas and put its first frame somewhere inside; the rest of the canvas is transparent."""
    height, width = seen.shape[:2]
    left, top, right, bottom = (int(n) for n in generator.integers(0, 6, 4))
    place = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    while data[place : place + 1] == b"!":
        place += 2
        while data[place]:
            place += 1 + data[place]
        place += 1
    canvas = struct.pack("<HH", left + width + right, top + height + bottom)
    moved = data[:6] + canvas + data[10 : place + 1] + struct.pack("<HH", left, top) + data[place + 5 :]
    return moved, np.pad(seen, ((top, bottom), (left, right), (0, 0)), constant_values=255)


def _avif(generator: Generator) -> Picture:
    mode = ("RGB", "RGBA")[generator.integers(2)]
    pixels = _drawn(generator, len(mode), smooth=True)
    if mode == "RGBA":
        pixels[:, :, 3] = _alpha(generator, pixels.shape[:2], 255)
    counts, blocks, words = _metadata(generator)
    data = _saved(pixels, mode, "AVIF", quality=95, speed=10, subsampling="4:4:4", **blocks)
    data, behind = _behind(generator, data)
    alpha = pixels[:, :, 3] / 255 if mode == "RGBA" else np.ones(pixels.shape[:2])
    return Picture(f"AVIF {mode}{words}{behind}", data, turned(on_white(pixels[:, :, :3], alpha), counts), LOSSY)


def _heic(generator: Generator) -> Picture:
    channels, depth = int(generator.integers(1, 5)), int(generator.choice([8, 8, 10, 12]))
    most = 2**depth - 1
    pixels = np.rint(_drawn(generator, channels, smooth=True) * (most / 255)).astype(np.int64)
    if channels in (2, 4):
        pixels[:, :, -1] = _alpha(generator, pixels.shape[:2], most)
    counts, blocks, words = _metadata(generator)
    seen, alpha = pixels[:, :, : 3 if channels > 2 else 1] * (255 / most), np.ones(pixels.shape[:2])
    if channels in (2, 4):
        alpha = pixels[:, :, -1] / most
    if channels > 2 and generator.random() < 0.3:
        space = any_space(generator)
        blocks["icc_profile"], seen, words = profile(space), in_srgb(seen, space), f"{words}, {space}"
    # The encoder turns a picture by XMP where EXIF does not.
    if not 2 <= counts <= 8 and "xmp" in blocks:
        del blocks["xmp"]
        words += ", left out"
    options: dict[str, Any] = {"chroma": int(generator.choice([420, 422, 444]))}
    # A phone writes a picture as tiles, and may add others of its burst.
    if generator.random() < 0.2:
        options["tile_size"], words = 64, f"{words}, tiles"
    pictures = [pixels]
    if generator.random() < 0.3:
        pictures = [pixels[::-1, ::-1] // 2, pixels]
        options["primary"], words = 1, f"{words}, second of two"
    data, behind = _behind(generator, coded(pictures, depth, **(options | blocks)))
    name = f"HEIC of {channels} channels, {depth} bits, {options['chroma']}{words}{behind}"
    return Picture(name, data, turned(on_white(seen, alpha), counts), LOSSY)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
_WRITERS = (_png, _bmp, _jpeg, _webp, _png, _gif, _tiff, _avif, _heic)
