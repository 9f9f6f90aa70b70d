"""Bytes → picture → pixels, one row for each kind of bytes."""

import io
import struct
import zlib
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.encoding import images
from service.encoding.card import Preprocessing
from service.encoding.images import FORMATS, decode, format_of, media_type, thumbnail, to_pixels, tones
from service.encoding.limits import Limits
from service.errors import EmptyPicture, LookalikeError, TooLarge, UndecodablePicture, UnsupportedFormat
from tests.conftest import encoded, scene
from tests.heif import coded, heic, turned
from tests.proofs.wild.pictures import in_srgb, profile
from tests.proofs.wild.pictures import turned as turned_pixels

LIMITS = Limits()


def colour(data: bytes, x: int = 0, y: int = 0) -> tuple[int, ...]:
    pixel = decode(data, 28, LIMITS).getpixel((x, y))
    assert isinstance(pixel, tuple)
    return pixel


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header declares this size and which holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "HEIF"])
def test_every_format_decodes_to_the_same_picture(format: str) -> None:
    picture = scene()
    decoded = decode(encoded(picture, format), 28, LIMITS)
    assert decoded.mode == "RGB"
    assert decoded.size == picture.size
    difference = np.abs(np.asarray(decoded, int) - np.asarray(picture, int)).mean()
    # A GIF has only 256 colours; JPEG and WebP are lossy.
    assert difference < (12 if format == "GIF" else 4)


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"", EmptyPicture, "got none"),
        (b"this is a text and no picture at all", UnsupportedFormat, "JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, HEIF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", UnsupportedFormat, "not a picture"),
        (b"\x80\x04\x95pickle", UnsupportedFormat, "not a picture"),
        (encoded(scene(), "ICO"), UnsupportedFormat, "not a picture"),
        (encoded(scene(), "JPEG2000"), UnsupportedFormat, "not a picture"),
        (encoded(scene(), "JPEG")[:-200], UndecodablePicture, "cut short"),
        (encoded(scene())[:-300], UndecodablePicture, "damaged or cut short"),
        (encoded(scene(), "WEBP")[:60], UndecodablePicture, "damaged or cut short"),
        (b"\xff\xd8\xff\xe0", UndecodablePicture, "header"),
        (png_header(9_000, 9_000), TooLarge, "9000x9000; the limit is 25000000 pixels"),
        (png_header(50_000, 50_000), TooLarge, "50000x50000; the limit is 10000 pixels a side"),
        (png_header(10_000, 1), TooLarge, "10000x1; the limit is 100:1"),
        (b"\x89PNG" + b"\0" * 10_000_001, TooLarge, "the limit is 10000000"),
    ],
)
def test_what_is_refused(data: bytes, error: type[LookalikeError], says: str) -> None:
    with pytest.raises(error, match=says):
        decode(data, 28, LIMITS)


def test_heif() -> None:
    difference = np.abs(np.asarray(decode(heic(), 28, LIMITS), int) - np.asarray(scene(), int))
    assert difference.mean() < 4
    grey = np.asarray(scene().convert("L"), float)[..., None] / 255
    on_white = np.asarray(scene(), float) * grey + 255 * (1 - grey)
    assert np.abs(np.asarray(decode(heic(alpha=True), 28, LIMITS), int) - on_white).mean() < 5
    tiled = decode(heic(grid=(2, 3, 130, 100)), 28, LIMITS)
    assert tiled.size == (130, 100)
    assert np.array_equal(np.asarray(tiled)[:48, :64], np.asarray(tiled)[:48, 64:128])


@pytest.mark.parametrize("depth", [8, 10, 12])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_heic_of_every_depth_and_channels(mode: str, depth: int) -> None:
    samples = np.asarray(scene().convert(mode), int).reshape(48, 64, -1)
    alpha = np.ones((48, 64, 1))
    if mode.endswith("A"):
        alpha[:, :32] = 0.25
        samples = np.dstack([samples[:, :, :-1], np.rint(255 * alpha).astype(int)])
    most = 2**depth - 1
    data = coded([np.rint(samples * (most / 255)).astype(int)], depth)
    expected = samples[:, :, : 3 if "RGB" in mode else 1] * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(decode(data, 28, LIMITS)) - expected).mean() < 1


def test_heic_of_several_pictures_and_of_tiles() -> None:
    large = np.asarray(scene(150, 100), int)
    for data in (coded([large[::-1], large], primary=1), coded([large], tile_size=64)):
        assert np.abs(np.asarray(decode(data, 28, LIMITS), int) - large).mean() < 1


def test_heic_shows_display_p3_and_exif_once() -> None:
    samples, exif = np.asarray(scene(), int), Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        data = coded([samples], exif=exif.tobytes(), icc_profile=profile("Display P3"))
        expected = turned_pixels(in_srgb(samples.astype(float), "Display P3"), orientation)
        assert np.abs(np.asarray(decode(data, 28, LIMITS)) - expected).mean() < 1.5, orientation


def test_one_large_picture_is_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two threads would take a gigabyte for a picture of 250 megapixels."""
    monkeypatch.setattr(images, "LARGE_PIXELS", 64 * 48)
    small, large = [[encoded(scene(*size), format) for format in ("PNG", "TIFF")] for size in ((64, 48), (65, 48))]
    # A child that runs already decodes within milliseconds.
    decode(small[1], 28, LIMITS)
    with ThreadPoolExecutor(3) as pool:
        with images._one_large:
            waiting = [pool.submit(decode, data, 28, LIMITS) for data in large]
            assert not wait(waiting, 1, FIRST_COMPLETED).done
            for data in small:
                assert pool.submit(decode, data, 28, LIMITS).result(20).size == (64, 48)
        assert [one.result(20).size for one in waiting] == [(65, 48)] * 2


def test_formats_are_told_by_their_first_bytes() -> None:
    for format in FORMATS:
        data = heic() if format == "HEIF" else encoded(scene(), format)
        assert format_of(data[:64]) == format
        assert media_type(data) == f"image/{format.lower()}"
    # A film and a picture that names only the family's brand.
    assert format_of(b"\0\0\0\x18ftypisom\0\0\0\0isommp42") is None
    assert format_of(b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif") == "AVIF"


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_cut_anywhere_is_refused_with_our_own_error(format: str) -> None:
    data = heic() if format == "HEIF" else encoded(scene(), format)
    for cut in range(0, len(data) * 9 // 10, max(1, len(data) // 40)):
        with pytest.raises(LookalikeError):
            decode(data[:cut], 28, LIMITS)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.full((8, 8), 30_000, np.uint16))
    assert colour(encoded(grey)) == (117, 117, 117)


def test_cmyk() -> None:
    assert colour(encoded(Image.new("CMYK", (32, 32), (0, 0, 0, 255)), "JPEG")) == (0, 0, 0)
    assert colour(encoded(Image.new("CMYK", (32, 32), (0, 0, 0, 0)), "JPEG")) == (255, 255, 255)


def test_white_stands_behind_what_is_transparent() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert colour(encoded(palette, transparency=1)) == (255, 255, 255)
    assert colour(encoded(palette)) == (10, 20, 30)
    assert colour(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))) == (255, 255, 255)
    assert colour(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128)))) == (127, 127, 127)
    assert colour(encoded(Image.new("LA", (8, 8), (0, 0)))) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    upright = scene(64, 48)
    # Each transposition is the inverse of the one that EXIF prescribes.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "WEBP"):
        decoded = decode(encoded(stored, format, exif=exif, lossless=True), 28, LIMITS)
        assert np.array_equal(np.asarray(decoded), np.asarray(upright)), format
    tagged = decode(encoded(stored, "TIFF", tiffinfo={0x0112: orientation}), 28, LIMITS)
    assert np.array_equal(np.asarray(tagged), np.asarray(upright))
    # The containers of AVIF and HEIF say how to turn a picture; EXIF repeats it.
    repeated = exif.tobytes()
    for data in (encoded(stored, "AVIF", exif=repeated), encoded(stored, "JPEG", exif=repeated)):
        assert np.abs(np.asarray(decode(data, 28, LIMITS), int) - np.asarray(upright, int)).mean() < 4
    shown = np.asarray(decode(heic(turned(orientation), repeated[6:]), 28, LIMITS), int)
    how = (None, 0, 3, 1, 5, 4, 6, 2)[orientation - 1]
    expected = scene() if how is None else scene().transpose(Image.Transpose(how))
    assert np.abs(shown - np.asarray(expected, int)).mean() < 4


def test_only_exif_turns_a_picture() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for format in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF"):
        options = {"tiffinfo": {700: xmp}} if format == "TIFF" else {"xmp": xmp}
        assert decode(encoded(scene(), format, **options), 28, LIMITS).size == (64, 48), format


def test_exif_that_makes_no_sense_is_passed_over() -> None:
    exif = Image.Exif()
    exif[0x0112] = 42
    assert decode(encoded(scene(), "JPEG", exif=exif), 28, LIMITS).size == (64, 48)
    assert decode(encoded(scene(), "JPEG", exif=b"Exif\0\0 nonsense"), 28, LIMITS).size == (64, 48)


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same() -> None:
    picture = scene(1200, 900)
    small = decode(encoded(picture, "JPEG", quality=95), 28, LIMITS)
    # At an eighth, both edges are still at least twice the side.
    assert small.size == (150, 113)
    config = preprocessing(28)
    assert np.abs(to_pixels(small, config).astype(int) - to_pixels(picture, config)).mean() < 1


def preprocessing(side: int, **changes: Any) -> Preprocessing:
    config = {
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": False,
        "do_normalize": False,
    }
    return Preprocessing.from_config(config | changes, "test")


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (33, 33), (300, 7), (7, 300), (28, 28), (8, 8)])
def test_pixels_equal_resize_then_crop(size: tuple[int, int]) -> None:
    picture = scene(*size)
    pixels = to_pixels(picture, preprocessing(28))
    scale = 28 / min(size)
    resized = picture.resize((int(size[0] * scale + 1e-9), int(size[1] * scale + 1e-9)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 28) / 2), round((resized.height - 28) / 2)
    expected = np.asarray(resized.crop((left, top, left + 28, top + 28)), int)
    assert pixels.shape == (28, 28, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - expected).max() <= 1


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    picture = scene(28, 28)
    assert np.array_equal(to_pixels(picture, preprocessing(28)), np.asarray(picture))


def test_size_of_width_and_height_squeezes() -> None:
    config = preprocessing(20, size={"width": 20, "height": 20}, do_center_crop=False)
    picture = scene(80, 40)
    assert np.array_equal(to_pixels(picture, config), np.asarray(picture.resize((20, 20), Image.Resampling.BICUBIC)))


def test_thumbnail_is_small_and_keeps_tiny_pictures_exactly() -> None:
    def of(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(thumbnail(data, decode(data, 28, LIMITS), LIMITS)))

    large = scene(1280, 960)
    # decode() returns a JPEG smaller than a thumbnail.
    for format in ("PNG", "JPEG"):
        small = of(encoded(large, format))
        assert small.size == (128, 96)
        expected = np.asarray(large.resize((128, 96), Image.Resampling.BICUBIC), int)
        assert np.abs(np.asarray(small.convert("RGB"), int) - expected).mean() < 4
    tiny = scene(8, 8)
    assert np.array_equal(np.asarray(of(encoded(tiny))), np.asarray(tiny))


def test_tones_count_every_pixel_once() -> None:
    grey = np.zeros((2, 2, 3), np.uint8)
    grey[0] = 255
    assert tones(grey)[0] == 0.5
    assert tones(grey)[7] == 0.5
    assert tones(np.full((3, 3, 3), (255, 0, 0), np.uint8))[8 + 76 // 32] == 1


def test_small_files_that_ask_for_much_work_are_refused() -> None:
    progressive = encoded(scene(), "JPEG", progressive=True)
    last = progressive.rindex(b"\xff\xda")
    scan = bytes.fromhex("ffda000801010001050200")
    many = progressive[:last] + scan * 65 + progressive[last:]
    with pytest.raises(TooLarge, match="more than 64 scans"):
        decode(many, 28, Limits())
    assert decode(progressive, 28, Limits()).size == (64, 48)
    for filling, most in ((b"\xff" * 600_000, "500000 fill bytes"), (b"\xff\xe1\0\2" * 60_000, "50000 segments")):
        with pytest.raises(TooLarge, match=f"more than {most}"):
            decode(progressive[:2] + filling + progressive[2:], 28, Limits())
    png = encoded(scene())
    chunks = (struct.pack(">I", 0) + b"prVt" + struct.pack(">I", zlib.crc32(b"prVt"))) * 60_000
    with pytest.raises(TooLarge, match="more than 50000 chunks"):
        decode(png[:33] + chunks + png[33:], 28, Limits())
    header = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 14 + 40 + 1024)
    sizes = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, 0, 0, 0, 256, 0)
    with pytest.raises(UnsupportedFormat, match="run lengths"):
        decode(header + sizes + bytes(1024) + b"\x08\x01" * 8 + b"\0\1", 28, Limits())
