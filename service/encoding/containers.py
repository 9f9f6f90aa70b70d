"""The parts of a PNG or JPEG file that its picture needs, found with bounded work.

Pillow reads the chunks of a PNG and the segments of a JPEG one by one in Python, and holds the interpreter meanwhile.
It also refuses files for parts that no picture needs: long texts, damaged chunks, whatever stands behind the end.
"""

import re
import zlib
from typing import NamedTuple

from PIL.JpegImagePlugin import MARKER

from service.errors import TooLarge

# An ordinary progressive JPEG has 10 scans, and an ordinary PNG of 10 MB a thousand chunks.
_MOST_SCANS = 64
_MOST_CHUNKS = 50_000
_MOST_MARKS = 500_000
_MAX_PROFILE_BYTES = 1_000_000

# Chunks that a picture can do without, but is not the same without: transparency, orientation, colour profile.
_OPTIONAL_CHUNKS = (b"tRNS", b"eXIf", b"iCCP")

# A bit for each of the 64 coefficients of a block.
_ALL = 2**64 - 1
_START_OF_SCAN, _END = 0xDA, 0xD9
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_BASELINE = frozenset({0xC0, 0xC1})
# Pillow does not skip the body of these.
_WITHOUT_LENGTH = frozenset(code & 0xFF for code, (_, _, handler) in MARKER.items() if handler is None)
_MARK = re.compile(rb"\xff+[^\x00\xff]")
# In the data of a scan, ff is written as ff 00, and ff d0 to ff d7 are restart markers.
_MARK_BEHIND_DATA = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")


class Parts(NamedTuple):
    """The needed bytes of a file.

    Attributes:
        data: the bytes.
        scans: the number of passes over the pixels if it is a JPEG of several, else 1.
        whole: whether the headers of these scans name every bit of every coefficient.
    """

    data: bytes
    scans: int = 1
    whole: bool = True


def needed_parts(data: bytes, format: str) -> Parts:
    """Return the parts of a file that its picture needs. Files other than PNG and JPEG come back as they are.

    Raises:
        TooLarge: more than 50,000 chunks, 500,000 segments, fill bytes and stray bytes, or 64 scans.

    Cost: a PNG or a baseline JPEG without anything to leave out is not copied.
    """
    if format == "PNG":
        return Parts(_needed_chunks(data))
    return _needed_segments(data) if format == "JPEG" else Parts(data)


def _needed_chunks(data: bytes) -> bytes:
    """Return a PNG up to its end, without the chunks that its picture does not need."""
    kept, place, seen = [data[:8]], 8, set()
    for _ in range(_MOST_CHUNKS):
        end = place + 12 + int.from_bytes(data[place : place + 4])
        kind = data[place + 4 : place + 8]
        # The names of chunks that any picture needs begin with a capital.
        if kind[:1].isupper() or (kind in _OPTIONAL_CHUNKS and kind not in seen and _is_intact(data[place:end])):
            kept.append(data[place:end])
        seen.add(kind)
        place = end
        if kind == b"IEND" or place >= len(data):
            return data if sum(map(len, kept)) == len(data) else b"".join(kept)
    raise TooLarge(f"the picture has more than {_MOST_CHUNKS} chunks")


def _is_intact(chunk: bytes) -> bool:
    """Return whether a chunk has its checksum, and whether a colour profile is of a size that is read."""
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
        return False
    if chunk[4:8] != b"iCCP":
        return True
    _, _, rest = chunk[8:-4].partition(b"\0")
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(rest[1:], _MAX_PROFILE_BYTES)
    except zlib.error:
        return False
    return unpacker.eof


def _needed_segments(data: bytes) -> Parts:
    """Return a JPEG up to its end.

    The commonest kind is not searched for its end: a baseline JPEG whose first scan holds all components. libjpeg
    refuses a second scan there, and reads the rest in C.
    """
    place, work, scans, components, baseline = 2, 0, 0, 0, False
    known: dict[int, int] = {}
    while mark := (_MARK_BEHIND_DATA if scans else _MARK).search(data, place):
        begin, code = mark.end(), mark[0][-1]
        work += 1 if scans else begin - place - 1
        if work > _MOST_MARKS:
            raise TooLarge(f"the picture has more than {_MOST_MARKS} segments and fill bytes")
        place = begin if code in _WITHOUT_LENGTH else begin + int.from_bytes(data[begin : begin + 2])
        if code in _FRAMES:
            baseline, components = code in _BASELINE, int.from_bytes(data[begin + 7 : begin + 8])
        elif code == _START_OF_SCAN:
            scans += 1
            of, coefficients = _known_by_scan(data[begin + 2 : place])
            if baseline and len(of) == components:
                return Parts(data)
            known |= {component: known.get(component, 0) | coefficients for component in of}
            if scans > _MOST_SCANS:
                raise TooLarge(f"the picture has more than {_MOST_SCANS} scans")
        elif code == _END and scans:
            return Parts(data[:begin], scans)
    if not scans and len(data) - place > _MOST_MARKS:
        raise TooLarge(f"the picture has more than {_MOST_MARKS} segments and fill bytes")
    return Parts(data, max(1, scans), sum(mask == _ALL for mask in known.values()) >= components)


def _known_by_scan(header: bytes) -> tuple[bytes, int]:
    """Return the components of a scan, and a mask of the coefficients whose lowest bit it holds; none if it is cut."""
    count = int.from_bytes(header[:1])
    components, rest = header[1 : 1 + 2 * count : 2], header[1 + 2 * count :]
    if len(rest) < 3 or rest[2] & 15:
        return components, 0
    return components, _ALL >> (63 - min(rest[1], 63) + rest[0]) << rest[0] if rest[0] <= rest[1] else 0
