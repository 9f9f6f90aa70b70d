"""Odd zips, tars, WebDataset shards and Parquet tables, each with what should become of its members."""

import gzip
import io
import json
import struct
import tarfile
import zlib
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.proofs.wild.pictures import SEED, Generator
from tests.proofs.wild.reference import Expected, Member, Row, composed, digest, expected, left_out
from tests.proofs.wild.trees import any_of, picture_bytes, tree

_UTF8, _DOS, _UNIX = 0x800, 0, 3


class Archive(NamedTuple):
    """An archive or several, as files.

    Attributes:
        name: what it is, for a message.
        files: the files to write, by name.
        source: the SOURCE argument below their folder.
        right: what should become of its members or rows; a str is part of the message of a refusal.
        says: a pattern that a note about the source should match.
    """

    name: str
    files: dict[str, bytes]
    source: str
    right: Expected | list[Row] | str
    says: str = ""


def archive(number: int) -> Archive:
    """Return the archive of a number; the kinds take turns."""
    generator = np.random.default_rng([SEED, number])
    return _WRITERS[number % len(_WRITERS)](generator)


# Zip ----------------------------------------------------------------------------------------------


class _Packed(NamedTuple):
    """A member of a zip as its bytes say it."""

    name: bytes
    data: bytes
    flags: int = 0
    extra: bytes = b""
    system: int = _UNIX
    method: int = 8


def zip_bytes(members: list[_Packed], before: bytes = b"", comment: bytes = b"", streamed: bool = False) -> bytes:
    """Write a zip file, perhaps behind other bytes, as a self-extracting one is.

    A streamed one says the sizes behind each member and not before it, and has times in front of each member only.
    """
    body, directory = before, b""
    for member in members:
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        data = packer.compress(member.data) + packer.flush() if member.method == 8 else member.data
        start = struct.pack("<4H", member.flags | 8 * streamed, member.method, 0, 33)
        sizes = struct.pack("<3I", zlib.crc32(member.data), len(data), len(member.data))
        local = (b"UT\5\0\1abcd" if streamed else b"") + member.extra
        # The offset counts from the first byte of the zip; a reader corrects it by the bytes before.
        at = len(body) - len(before)
        directory += b"PK\1\2" + bytes([20, member.system, 20, 0]) + start + sizes
        directory += (
            struct.pack("<5H2I", len(member.name), len(member.extra), 0, 0, 0, 0, at) + member.name + member.extra
        )
        body += b"PK\3\4" + b"\x14\0" + start + (bytes(12) if streamed else sizes)
        body += struct.pack("<2H", len(member.name), len(local)) + member.name + local + data
        body += b"PK\7\x08" + sizes if streamed else b""
    end = struct.pack("<4H2IH", 0, 0, len(members), len(members), len(directory), len(body) - len(before), len(comment))
    return body + directory + b"PK\5\6" + end + comment


def _zip(generator: Generator) -> Archive:
    style = any_of(generator, ("flag", "macOS", "CP437", "backslashes", "0x7075", "stale 0x7075", "mixed"))
    members = tree(generator, undecodable=False)
    if style == "backslashes" or generator.random() < 0.3:
        members = [member._replace(path=f"pack/{member.path}") for member in members]
    if generator.random() < 0.3:
        members.insert(0, _taken(members)._replace(data=picture_bytes(generator)))
    packed = [_named(generator, member, style) for member in members]
    if style == "macOS":
        packed += [
            _Packed(f"__MACOSX/{'/._'.join(member.path.rpartition('/')[::2])}".encode(), b"\0\5\x16\7resource")
            for member in members
        ]
        members += [
            Member(f"__MACOSX/{'/._'.join(m.path.rpartition('/')[::2])}", b"\0\5\x16\7resource") for m in members
        ]
    words = style
    if generator.random() < 0.5:
        folders = sorted({member.name.rpartition(b"/")[0] for member in packed} - {b""})
        packed = [_Packed(folder + b"/", b"", method=0) for folder in folders] + packed
        words += ", folders listed"
    before = generator.bytes(100) if generator.random() < 0.2 else b""
    streamed = generator.random() < 0.3
    words += ", streamed" * streamed
    comment = b"made by hand" if generator.random() < 0.2 else b""
    name = any_of(generator, ("a", "pack"))
    files = {f"{name}.zip": zip_bytes(packed, before, comment, streamed)}
    return Archive(
        f"zip, {words}{', bytes before' * bool(before)}", files, f"{name}.zip", expected(members, True, name)
    )


def _named(generator: Generator, member: Member, style: str) -> _Packed:
    """Spell a member's name as a program of this style does; the flag says UTF-8 where the style cannot."""
    if style == "mixed":
        style = any_of(generator, ("flag", "macOS", "0x7075"))
    path, method = member.path, int(generator.choice([0, 8]))
    raw = path.encode()
    if style == "flag" or path.isascii():
        spelt = _Packed(raw, member.data, 0 if path.isascii() else _UTF8)
    elif style == "macOS":
        spelt = _Packed(raw, member.data)
    elif style == "CP437" and _is_cp437(path):
        spelt = _Packed(path.encode("cp437"), member.data, system=_DOS)
    elif style == "0x7075":
        poor = path.encode("ascii", "replace")
        spelt = _Packed(poor, member.data, extra=_unicode_path(poor, raw))
    elif style == "stale 0x7075":
        # Whoever renamed the member forgot the field.
        spelt = _Packed(raw, member.data, _UTF8, _unicode_path(b"old name.jpg", b"older name.jpg"))
    else:
        spelt = _Packed(raw, member.data, _UTF8)
    if style == "backslashes":
        spelt = spelt._replace(name=spelt.name.replace(b"/", b"\\"), system=_DOS)
    return spelt._replace(method=method)


def _unicode_path(stored: bytes, path: bytes) -> bytes:
    return struct.pack("<HHBI", 0x7075, 5 + len(path), 1, zlib.crc32(stored)) + path


def _is_cp437(path: str) -> bool:
    """Return whether CP437 can spell a path in bytes that are not also UTF-8."""
    try:
        path.encode("cp437").decode()
    except UnicodeDecodeError:
        return True
    except UnicodeEncodeError:
        return False
    return False


# Tar ----------------------------------------------------------------------------------------------


def _tar(generator: Generator) -> Archive:
    members = tree(generator)
    top = any_of(generator, ("", "", "./", "pack/", "./pack/"))
    folder = top.removeprefix("./")
    members = [member._replace(path=folder + member.path) for member in members]
    twice = generator.random() < 0.3
    if twice:
        members.append(_taken(members)._replace(data=picture_bytes(generator)))
    cut = int(generator.integers(len(members) + 1)) if generator.random() < 0.4 else len(members)
    parts = [members[:cut], members[cut:]] if cut < len(members) else [members]
    format = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[generator.integers(3)]
    # The oldest of them has 100 bytes for a name.
    if any(len(member.path) > 90 for member in members):
        format = tarfile.GNU_FORMAT
    links = []
    files = list[bytes]()
    for number, part in enumerate(parts):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format, errors="surrogateescape") as tar:
            for member in part:
                header = tarfile.TarInfo(("./" if top.startswith("./") else "") + member.path)
                header.size = len(member.data)
                tar.addfile(header, io.BytesIO(member.data))
            if number == 0 and _taken(members) in part and not twice and generator.random() < 0.5:
                links = _tar_links(generator, tar, _taken(members), "./" if top.startswith("./") else "")
        files.append(buffer.getvalue())
    words = f"tar, format {format}{', two behind each other' if len(parts) == 2 else ''}{', links' if links else ''}"
    # The links come behind the first part.
    right = expected([*members[:cut], *links, *members[cut:]], True, "a")
    return Archive(words, {"a.tar": b"".join(files)}, "a.tar", right)


def _tar_links(generator: Generator, tar: tarfile.TarFile, target: Member, before: str) -> list[Member]:
    header = tarfile.TarInfo(target.path.rpartition("/")[0] + "/link.jpg" if "/" in target.path else "link.jpg")
    header.type = (tarfile.LNKTYPE, tarfile.SYMTYPE)[generator.integers(2)]
    header.linkname = before + target.path if header.type == tarfile.LNKTYPE else target.path.rpartition("/")[2]
    tar.addfile(header)
    return [Member(header.name, target.data, either=True)]


def _taken(members: list[Member]) -> Member:
    """Return the first picture that is taken; every tree has one."""
    return next(member for member in members if left_out(member) is None)


def _packed_tar(generator: Generator) -> Archive:
    archive = _tar(generator)
    name = any_of(generator, ("a.tar.gz", "a.tgz", "a.tar"))
    return Archive(f"compressed {archive.name}", {name: gzip.compress(archive.files["a.tar"], 1)}, name, "compress")


# WebDataset ---------------------------------------------------------------------------------------


def _shards(generator: Generator) -> Archive:
    """Shards whose samples have plain keys, keys with dots, several pictures, and sometimes no class."""
    count = int(generator.integers(1, 3))
    shards: list[list[Member]] = [[] for _ in range(count)]
    taken: dict[str, tuple[str | None, set[str]]] = {}
    samples: list[dict[str, tuple[str | None, str]]] = []
    free: list[str] = []
    kind = any_of(generator, ("plain", "dotted", "several", "folders"))
    missing = kind != "several" and generator.random() < 0.5
    for number in range(int(generator.integers(1, 7))):
        prefix = f"train-{number % count:03d}/" if count > 1 else ""
        key = {"dotted": f"shot.2024.{number}", "folders": f"day {number % 2}/{number:03d}"}.get(kind, f"{number:06d}")
        endings = (".left.jpg", ".mask.png") if kind == "several" else (any_of(generator, (".jpg", ".JPG", ".png")),)
        pictures = [Member(key + ending, picture_bytes(generator)) for ending in endings]
        written = any_of(generator, ("0", "1", "cat", "Mu\u0308ller", "a b"))
        # A tar without any class is no WebDataset, so the first sample has one.
        bare = missing and number > 0 and generator.random() < 0.5
        classes = [] if bare else [Member(f"{key}.cls", written.encode() + b"\n" * int(generator.integers(2)))]
        others = [Member(f"{key}.json", b"{}")] if generator.random() < 0.5 else []
        parts = [*pictures, *others]
        shards[number % count] += [*classes, *parts] if generator.random() < 0.5 else [*parts, *classes]
        found = {prefix + one.path: (None if bare else composed(written), digest(one.data)) for one in pictures}
        if len(found) > 1:
            samples.append(found)
        else:
            taken |= {id: (label, {mark}) for id, (label, mark) in found.items()}
        # The other parts of a sample are no files of their own, and need no word.
        free += [prefix + member.path for member in (*classes, *others)]
    files = {f"train-{shard:03d}.tar": _tar_bytes(part) for shard, part in enumerate(shards)}
    source = "train-000.tar" if count == 1 else f"train-{{000..{count - 1:03d}}}.tar"
    right = Expected(taken, [], {}, tuple(free), samples)
    return Archive(f"WebDataset of {count}, {kind}{', classes missing' * missing}", files, source, right)


def _tar_bytes(members: list[Member]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            header = tarfile.TarInfo(member.path)
            header.size = len(member.data)
            tar.addfile(header, io.BytesIO(member.data))
    return buffer.getvalue()


# Parquet ------------------------------------------------------------------------------------------


def _parquet(generator: Generator) -> Archive:
    """Tables in the layouts of the Hugging Face Hub and of plain exports, with rows that lack what others have."""
    kind = any_of(generator, ("text", "number", "dictionary", "ClassLabel", "float", "none"))
    named = any_of(generator, ("paths", "paths missing", "paths twice", "binary"))
    says = "label" if kind == "float" else ""
    rows, files = list[Row](), dict[str, bytes]()
    count = int(generator.integers(1, 3))
    for number in range(count):
        few = int(generator.integers(1, 8))
        data = [None if generator.random() < 0.15 else picture_bytes(generator) for _ in range(few)]
        data[0] = picture_bytes(generator)
        paths: list[str | None] = [f"{number}/e\u0301té {row}.jpg" for row in range(few)]
        if named == "paths missing":
            paths[int(generator.integers(few))] = None
        if named == "paths twice":
            paths[-1] = paths[0]
        column, labels = _label_column(generator, kind, few)
        images: Any = pa.array(data, pa.binary())
        if named != "binary":
            images = pa.StructArray.from_arrays([images, pa.array(paths)], ["bytes", "path"])
        table = pa.table({"image": images} if column is None else {"image": images, "label": column})
        if kind == "ClassLabel":
            features = {"label": {"names": list(_NAMES), "_type": "ClassLabel"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=int(generator.integers(1, 9)))
        files[f"t-{number}.parquet"] = buffer.getvalue()
        sure = named == "paths"
        rows += [
            Row(composed(path) if sure and path else None, picture, label, named == "paths twice")
            for path, picture, label in zip(paths, data, labels, strict=True)
        ]
    source = "t-0.parquet" if count == 1 else "t-{0..1}.parquet"
    return Archive(f"Parquet, {kind} labels, {named}", files, source, rows, says)


_NAMES = ("cat", "dog", "Mu\u0308ller")


def _label_column(generator: Generator, kind: str, count: int) -> tuple[Any, list[str | None]]:
    """Return a column of labels, some of them missing, and the labels."""
    codes = [None if generator.random() < 0.2 else int(generator.integers(3)) for _ in range(count)]
    names = [None if code is None else _NAMES[code] for code in codes]
    labels = [None if name is None else composed(name) for name in names]
    if kind == "text":
        return pa.array(names, pa.string()), labels
    if kind == "dictionary":
        return pa.array(names, pa.string()).dictionary_encode(), labels
    if kind == "number":
        return pa.array(codes, pa.int64()), [None if code is None else str(code) for code in codes]
    if kind == "ClassLabel":
        return pa.array([-1 if code is None and generator.random() < 0.5 else code for code in codes]), labels
    return (pa.array(codes, pa.float64()) if kind == "float" else None), [None] * count


_WRITERS = (_zip, _tar, _zip, _shards, _parquet, _zip, _tar, _packed_tar)
