"""What a file is, by its name and its first bytes: a picture that we decode, or else the reason to leave it out."""

import re
from collections.abc import Callable, Iterable

from service.encoding.images import FORMATS, SUFFIXES, SUFFIXES_OF, format_of
from service.errors import InvalidSource
from service.sources.source import LeftOut, count_reasons

# Enough to tell every format below.
FIRST_BYTES = 64

HIDDEN = "hidden"
# Folders and files that systems keep for themselves; those that begin with a dot are hidden anyway.
_SYSTEM = {
    "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler", "system volume information",
    "lost+found", "__macosx", "thumbs.db", "desktop.ini",
}  # fmt: skip
# Endings of other formats; the decoder has those of its own.
_ENDINGS = {
    ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".jpx": "JPEG2000", ".j2c": "JPEG2000", ".jxl": "JPEG XL",
    ".jxr": "JPEG XR", ".psd": "PSD", ".psb": "PSD", ".svg": "SVG", ".ico": "ICO", ".tga": "TGA", ".ppm": "PPM",
    ".pgm": "PPM", ".pbm": "PPM", ".pnm": "PPM", ".exr": "OpenEXR", ".hdr": "HDR", ".dds": "DDS", ".pcx": "PCX",
    ".qoi": "QOI", ".xcf": "XCF", ".dcm": "DICOM",
}  # fmt: skip
_ENDINGS |= {ending: format for format, endings in SUFFIXES_OF.items() for ending in endings}
_RAW_ENDINGS = {
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".k25", ".kdc", ".mef", ".mos",
    ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
}  # fmt: skip
# Many of them are TIFF inside, whose only picture is a thumbnail.
_RAW = "camera RAW"
_ENDINGS |= dict.fromkeys(_RAW_ENDINGS, _RAW)
# Names of formats as people write them, where Pillow's are others.
_SPOKEN = {"JPEG2000": "JPEG 2000"}
_ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
# Files of other kinds that stand beside each picture in many a set, and that are not worth opening.
_TEXTS = (".txt", ".json", ".cls", ".csv", ".tsv", ".xml", ".md", ".yaml", ".yml", ".html", ".xmp", ".aae", ".log")
_STARTS = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"8BPS", "PSD"),
)
# The sizes of the headers that a BMP may have.
_BMP_HEADERS = {12, 16, 40, 52, 56, 64, 108, 124}
_ENDING = re.compile(r"[^.].*(\.[A-Za-z0-9_~-]{1,10})")


def is_hidden(name: str) -> bool:
    """Return whether the name of a file or folder begins with a dot or is one that systems keep for themselves."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _SYSTEM


def judge(path: str, read_start: Callable[[], bytes]) -> LeftOut | None:
    """Return None for a picture that we decode, else what to say about the file.

    The ending decides if it is that of such a picture. For other endings and without one, the content does.

    Args:
        path: within its source, with slashes.
        read_start: returns the first 64 bytes of the file; raises OSError if they cannot be read.
    """
    if any(is_hidden(part) for part in path.split("/")):
        return LeftOut(path, HIDDEN, False)
    found = _ENDING.fullmatch(path.rpartition("/")[2])
    ending = found[1].lower() if found else ""
    format = _ENDINGS.get(ending)
    if format in FORMATS:
        return None
    if format != _RAW and ending not in _TEXTS:
        try:
            content = content_format(read_start())
        except OSError as error:
            return LeftOut(path, f"unreadable: {error.strerror or error}", True)
        if content in FORMATS:
            return None
        format = content or format
    if format is not None:
        return LeftOut(path, f"{_SPOKEN.get(format, format)}, which is not read: convert it to JPEG or PNG", True)
    if ending in _ARCHIVES:
        return LeftOut(path, f"an archive inside ({ending}): open it by itself", True)
    return LeftOut(path, f"not a picture: {ending or 'no ending'}", False)


def content_format(start: bytes) -> str | None:
    """Return the format of a picture by its first 64 bytes, as Pillow names it; None for anything else."""
    format = format_of(start)
    # Two letters are too few to take a text for a picture.
    if format == "BMP" and (start[6:10] != bytes(4) or int.from_bytes(start[14:18], "little") not in _BMP_HEADERS):
        return None
    return format or next((format for signature, format in _STARTS if start.startswith(signature)), None)


def holds_none(name: str, left_out: Iterable[LeftOut], then: str = "") -> InvalidSource:
    """Return the error of a source without a picture, which says what it holds instead."""
    looked = " ".join(SUFFIXES)
    reasons = count_reasons(left_out)
    return InvalidSource(
        f"{name}: holds no picture; looked for {looked} at any depth{then}{'; found ' if reasons else ''}{reasons}"
    )
