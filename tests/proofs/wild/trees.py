"""Odd folders of pictures, as people have them: names, nests, strays, what systems leave behind, links and loops."""

import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import encoded, scene
from tests.proofs.wild.pictures import Generator, chunk, png
from tests.proofs.wild.reference import SYSTEM, Expected, Member, composed, expected

_CLASSES = ("cat", "dog", "Müller", "Mu\u0308ller", "a b", "x.y", "日本", "#1", "Été 2023", "-dash", "Train", "[0]")
_STEMS = (
    "IMG_0001",
    "a.b.c",
    "été",
    "e\u0301te\u0301",
    "two words",
    "😀",
    "100%",
    "it's",
    "x;y",
    "тест",
    "(1)",
    "~b",
    "x=1&y",
    "thumbnail",
    "content",
    "n" * 100 + "é" * 40,
)
_ENDINGS = (".jpg", ".JPG", ".jpeg", ".png", ".PNG", ".jpe", ".jfif", ".JpG", "")
_HIDDEN = (
    ".hidden.jpg",
    "._a.JPG",
    ".DS_Store",
    ".git/annex/objects/aa/s.jpg",
    ".Trash-1000/files/old.jpg",
    ".thumbnails/x.png",
)
# An id cannot have such a name, and a picture with one is named.
_CONTROLS = ("two\nlines.jpg", "bell\x07.png")
_OTHERS = ("notes.txt", "Thumbs.db", "desktop.ini", "clip.MP4", "a.xmp", "info.json")
_UNREAD = ("IMG_0001.HEIC", "shot.CR2", "raw.nef", "scan.dng", "layers.psd")
_JPEG = encoded(scene(8, 8), "JPEG")


def picture_bytes(generator: Generator) -> bytes:
    """Return the bytes of a small picture unlike any other."""
    mark = generator.bytes(12)
    if generator.random() < 0.5:
        return png(generator.integers(0, 256, (3, 4, 3)), 2, 8, chunk(b"tEXt", b"Mark\0" + mark.hex().encode()))
    return _JPEG[:2] + b"\xff\xfe" + struct.pack(">H", 14) + mark + _JPEG[2:]


def tree(generator: Generator, undecodable: bool = True, twins: bool = True) -> list[Member]:
    """Return the files of a folder, in a random order.

    Args:
        undecodable: some names may be no UTF-8.
        twins: some names may differ from others only in their composition.
    """
    prefixes = _folders(generator)
    members: dict[str, bytes] = {}
    for _ in range(generator.integers(1, 9)):
        stem, ending = any_of(generator, _STEMS), any_of(generator, _ENDINGS)
        # What follows the last dot of a name without an ending would be one.
        path = any_of(generator, prefixes) + stem + (ending if ending or "." not in stem else ".jpg")
        if twins or composed(path) not in map(composed, members):
            members[path] = picture_bytes(generator)
    pictures = tuple(members)
    for _ in range(generator.integers(0, 7)):
        path, data = _stray(generator, undecodable)
        members[any_of(generator, pictures).rpartition("/")[0] + "/" + path] = data
    members = {path.lstrip("/"): data for path, data in members.items()}
    listed = [Member(path, data) for path, data in members.items()]
    return [listed[place] for place in generator.permutation(len(listed))]


def any_of(generator: Generator, several: Sequence[str]) -> str:
    """Draw one of several."""
    return several[int(generator.integers(len(several)))]


def _folders(generator: Generator) -> tuple[str, ...]:
    """Return the folders in which pictures lie: none, classes, classes and the root, a top, splits, nests."""
    some = tuple(f"{any_of(generator, _CLASSES)}/" for _ in range(3))
    kind = generator.integers(8)
    if kind == 0:
        return ("",)
    if kind == 1:
        return ("", *some)
    if kind == 2:
        return tuple(f"animals/{folder}" for folder in some)
    if kind == 3:
        return tuple(f"{split}/{folder}" for folder in some for split in ("train", "val"))
    if kind == 4:
        return ("train/", *(f"{split}/{folder}" for folder in some for split in ("Train", "test", "dev")))
    if kind == 5:
        return tuple(f"data/{split}/{folder}" for folder in some for split in ("train", "validation"))
    if kind == 6:
        return tuple(f"{folder}{inner}" for folder in some for inner in ("", "indoor/", "a/b/c/"))
    return some


def _stray(generator: Generator, undecodable: bool) -> tuple[str, bytes]:
    """Return a file that is no picture to take."""
    kind = generator.integers(8 if undecodable else 7)
    if kind == 0:
        return any_of(generator, _HIDDEN), picture_bytes(generator)
    if kind == 1:
        return f"{any_of(generator, SYSTEM)}/sub/thumb.jpg", picture_bytes(generator)
    if kind == 2:
        return any_of(generator, _OTHERS), b"nothing to see"
    if kind == 3:
        return any_of(generator, _UNREAD), b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + generator.bytes(40)
    if kind == 4:
        damaged = {"empty.jpg": b"", "text.PNG": b"<html>not found</html>", "cut.jpeg": _JPEG[:20]}
        name = any_of(generator, tuple(damaged))
        return name, damaged[name]
    if kind == 5:
        return any_of(generator, _HIDDEN), b""
    if kind == 6:
        return any_of(generator, _CONTROLS), picture_bytes(generator)
    return any_of(generator, ("caf\udce9.jpg", "\udcff\udcfe.png", "gr\udcfcn")), picture_bytes(generator)


def write_folder(members: list[Member], root: Path) -> None:
    """Write members to disk."""
    for member in members:
        path = os.path.join(os.fsencode(root), os.fsencode(member.path))  # noqa: PTH118
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(member.data)


def linked_folder(generator: Generator, root: Path, outside: Path) -> Expected:
    """Write a folder with links, loops, pipes and sockets, whose targets lie in it or outside; return what is right."""
    members = [Member("cat/real.jpg", picture_bytes(generator)), Member("dog/real.png", picture_bytes(generator))]
    write_folder(members, root)
    beyond = [Member("one.jpg", picture_bytes(generator)), Member("deep/two.jpg", picture_bytes(generator))]
    write_folder(beyond, outside)
    left: list[tuple[str, str, bool | None]] = []
    free = []
    for kind in generator.choice(9, 4, replace=False).tolist():
        folder = any_of(generator, ("cat", "dog"))
        # A name before and one behind the real one in every order.
        name = any_of(generator, ("aaa", "zzz")) + str(kind)
        if kind == 0:
            (root / folder / f"{name}.jpg").symlink_to("nowhere.jpg")
            left.append((f"{folder}/{name}.jpg", "", None))
        elif kind == 1:
            (root / folder / name).symlink_to(any_of(generator, ("..", ".", str(root))))
            free.append(f"{folder}/{name}")
        elif kind == 2:
            (root / name).symlink_to(any_of(generator, ("cat", "dog", str(root / "cat"))))
            free.append(name)
        elif kind == 3:
            (root / folder / f"{name}.jpg").symlink_to("../cat/real.jpg")
            free.append(f"{folder}/{name}.jpg")
        elif kind == 4:
            (root / name).symlink_to(outside)
            members += [Member(f"{name}/{path}", data) for path, data, _ in beyond]
        elif kind == 5:
            data = picture_bytes(generator)
            write_folder([Member(f"{name}.png", data)], outside.parent / "single")
            (root / folder / f"{name}.png").symlink_to(f"../../single/{name}.png")
            members.append(Member(f"{folder}/{name}.png", data))
        elif kind == 6:
            data = picture_bytes(generator)
            write_folder([Member(f".git/annex/objects/{name}.jpg", data)], root)
            (root / folder / f"{name}.jpg").symlink_to(f"../.git/annex/objects/{name}.jpg")
            members += [Member(f"{folder}/{name}.jpg", data), Member(f".git/annex/objects/{name}.jpg", data)]
        elif kind == 7:
            os.mkfifo(root / folder / f"{name}.jpg")
            left.append((f"{folder}/{name}.jpg", "", None))
        else:
            # The path of a socket has at most 107 bytes.
            with socket.socket(socket.AF_UNIX) as opened:
                here = Path.cwd()
                os.chdir(root / folder)
                opened.bind(name)
                os.chdir(here)
            left.append((f"{folder}/{name}", "", None))
    right = expected(members)
    return right._replace(left=[*right.left, *left], free=tuple(free))
