"""What a source should give, by the plainest reading of its members, and what it did give.

`expected` knows nothing of zip, tar or disks: it takes the paths and bytes that a person sees. `follow` follows a
Source to its end, so it does not matter whether the source or the decoder leaves something out. `mistakes` compares.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from service.encoding.images import decode
from service.encoding.limits import Limits
from service.errors import LookalikeError
from service.items import check_id
from service.sources.source import Source

SYSTEM = ("@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "__MACOSX", "System Volume Information")
_PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
# Pictures that are not read, and what never is a picture.
_UNREAD = (".cr2", ".nef", ".dng", ".psd")
_OTHERS = (".txt", ".db", ".ini", ".mp4", ".xmp", ".json", ".cls")
# The pattern of the reason for a name that cannot be an id.
CONTROL = "control"
_SPLITS = {"train", "val", "valid", "validation", "test", "dev"}
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"GIF8")
# No whole picture of the generator is as short as its cut ones.
_SHORTEST = 30


class Member(NamedTuple):
    """A file or a member of an archive: its path in Unicode, lone surrogates for bytes that are not UTF-8, its bytes.

    `either` says that it may also be passed over with a word, as a link in a tar.
    """

    path: str
    data: bytes
    either: bool = False


class Expected(NamedTuple):
    """What should become of all members.

    Attributes:
        taken: for each id the label and the digests that may stand there.
        left: for each path left out a pattern of its reason, and whether it may be a picture that the user wanted;
            None where both is right.
        either: ids that may be taken, with their digest, or else are named.
        free: names that may be left out with a word or without, such as a link to a folder that is read anyway.
        samples: groups of ids, with label and digest, of which one is taken and the others are named.
    """

    taken: dict[str, tuple[str | None, set[str]]]
    left: list[tuple[str, str, bool | None]]
    either: dict[str, str]
    free: tuple[str, ...] = ()
    samples: Sequence[dict[str, tuple[str | None, str]]] = ()


class Row(NamedTuple):
    """A row of a table: its id, or None where more than one is right; its picture, or None; and its label.

    `twice` says that another row may have its path, so that it may be left out with a word.
    """

    id: str | None
    data: bytes | None
    label: str | None
    twice: bool


class Found(NamedTuple):
    """What became of a source: label and digest of each id, reason and loss of each name left out, and its notes."""

    taken: dict[str, tuple[str | None, str]]
    left: list[tuple[str, str, bool]]
    notes: list[str]


def expected(members: Sequence[Member], later_wins: bool = False, archive: str | None = None) -> Expected:
    """Read members as a person would.

    Args:
        members: in the order of the archive.
        later_wins: of two members with one path the later is taken, as when unpacking.
        archive: the archive's name without its ending.
    """
    good: dict[str, list[Member]] = {}
    last = {member.path: member for member in members}
    remaining = [one for one in members if not later_wins or not _is_placed(one) or one is last[one.path]]
    left: list[tuple[str, str, bool | None]] = [(one.path, "", None) for one in members if one not in remaining]
    for member in remaining:
        why = left_out(member)
        if why is None or member.either:
            good.setdefault(composed(member.path), []).append(member)
        else:
            left.append((member.path, *why))
    placed = list(dict.fromkeys(composed(member.path) for member in remaining if _is_placed(member)))
    by_folder = dict(zip(placed, folder_labels(placed, archive), strict=True))
    either = {id: digest(several[-1].data) for id, several in good.items() if several[-1].either}
    taken = {}
    for id, several in good.items():
        left += [(member.path, "", None) for member in several[1:]]
        if id not in either:
            taken[id] = by_folder[id], {digest(member.data) for member in several}
    return Expected(taken, left, either)


def _is_placed(member: Member) -> bool:
    """Return whether a member counts as a picture of its folder: it is taken, or is damaged."""
    return _is_text(member.path) and (left_out(member) or ("", True))[1]


def left_out(member: Member) -> tuple[str, bool] | None:
    """Return a pattern of the reason and whether a picture may be lost, or None for a picture that is taken."""
    *folders, name = member.path.split("/")
    if any(folder in SYSTEM for folder in folders):
        return "system|hidden", False
    if any(part.startswith(".") for part in (*folders, name)):
        return "hidden|system", False
    if not _is_text(member.path):
        return "UTF-8", True
    if any(character < " " for character in member.path):
        return CONTROL, True
    ending = re.search(r"(\.[^.]*)?$", name.lower())[0]  # type: ignore[index]
    # Without the ending of a picture or of another kind, the content decides.
    begins = member.data.startswith(_BEGINNINGS) and ending not in (*_UNREAD, *_OTHERS)
    if begins and len(member.data) >= _SHORTEST:
        return None
    return "HEI[CF]|damaged" if ending == ".heic" else "", begins or ending in (*_PICTURES, *_UNREAD)


def folder_labels(ids: Sequence[str], archive: str | None = None) -> list[str | None]:
    """Return the class of each path: its first folder below those that all share, and below train and val.

    If no folder lies below, the last one that all share is their class, but not that of an archive of its name.
    """
    parts = [id.split("/")[:-1] for id in ids]
    shared = []
    while parts and all(parts) and len({folders[0] for folders in parts}) == 1:
        shared.append(parts[0][0])
        parts = [folders[1:] for folders in parts]
    if shared and not any(parts):
        parts = [[] if shared == [archive] else shared[-1:]] * len(ids)
    if {folders[0].lower() for folders in parts if folders} <= _SPLITS:
        parts = [folders[1:] for folders in parts]
    return [folders[0] if folders else None for folders in parts]


def follow(source: Source) -> Found:
    """Read, name and decode every picture of a source as `index` does."""
    assert len(set(source.ids)) == len(source.ids) == len(source), "the ids of a source are distinct"
    assert source.labels is None or len(source.labels) == len(source)
    taken, left = {}, [(one.name, one.reason, one.lost) for one in source.left_out]
    for position in range(len(source)):
        id = source.ids[position]
        try:
            check_id(id, 1000)
            entry = source.entry(position)
            decode(entry.data, 8, Limits())
        except LookalikeError as error:
            left.append((id, str(error), True))
        else:
            assert entry.label == (source.labels[position] if source.labels is not None else None)
            taken[id] = entry.label, digest(entry.data)
    return Found(taken, left, list(source.notes))


def mistakes(right: Expected, found: Found) -> list[str]:
    """Return a sentence for each difference; none when everything is as expected."""
    said = []
    for id, (label, digests) in right.taken.items():
        if id not in found.taken:
            said.append(f"{id!r} is not taken; {_fate(id, found)}")
        elif found.taken[id][0] != label:
            said.append(f"{id!r} has the label {found.taken[id][0]!r}, expected {label!r}")
        elif found.taken[id][1] not in digests:
            said.append(f"{id!r} has the bytes of another member")
    samples = {id: fact for sample in right.samples for id, fact in sample.items()}
    for sample in right.samples:
        chosen = [id for id in sample if id in found.taken]
        if len(chosen) != 1 or any(found.taken[id] != sample[id] for id in chosen):
            said.append(f"of the sample {sample} {[(id, found.taken[id]) for id in chosen]} was taken")
    for id, (_, mark) in found.taken.items():
        if id not in right.taken and id not in samples and right.either.get(id) != mark:
            said.append(f"{id!r} is taken, and should not be")
    names = [(_plain(name), reason, lost) for name, reason, lost in found.left]
    for path, why, lost in right.left:
        covers = [one for one in names if one[0] in _spellings(path)]
        if not covers:
            said.append(f"{path!r} is gone without a word")
        elif not any(re.search(why, one[1], re.IGNORECASE) and lost in (one[2], None) and one[1] for one in covers):
            said.append(f"{path!r}: {covers[0][1]!r}, lost {covers[0][2]}; expected {why!r}, lost {lost}")
    said += [
        f"{id!r} is gone without a word"
        for id in (*right.either, *samples)
        if id not in found.taken and not _named(id, names)
    ]
    known = {name for path, _, _ in right.left for name in _spellings(path)} | {_plain(id) for id in right.either}
    known |= {_plain(name) for name in (*right.free, *samples)}
    said += [f"{name!r} is left out ({why}), and is no member or taken" for name, why, _ in names if name not in known]
    return said


def row_mistakes(rows: Sequence[Row], found: Found) -> list[str]:
    """Return a sentence for each row of a table that is not as expected; rows are told apart by their pictures."""
    taken = {mark: (id, label) for id, (label, mark) in found.taken.items()}
    said = []
    for number, row in enumerate(rows):
        id, label = taken.get(digest(row.data), (None, None)) if row.data is not None else (None, None)
        if id is None:
            if row.data is not None and not row.twice:
                said.append(f"row {number} is not taken")
        elif label != row.label or row.id not in (None, id):
            said.append(f"row {number} is {id!r} with the label {label!r}; expected {row.id!r}, {row.label!r}")
    if len(found.taken) + len(found.left) != len(rows):
        said.append(f"{len(rows)} rows, but {len(found.taken)} are taken and {len(found.left)} named: {found.left}")
    return said


def composed(path: str) -> str:
    return unicodedata.normalize("NFC", path)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _fate(id: str, found: Found) -> str:
    return next((f"left out: {why}" for name, why, _ in found.left if _plain(name) in _spellings(id)), "and not named")


def _named(id: str, names: Iterable[tuple[str, str, bool]]) -> bool:
    return any(name == _plain(id) for name, _, _ in names)


def _spellings(path: str) -> list[str]:
    """Return the path and the folders above it as `_plain` spells them."""
    parts = path.split("/")
    return [_plain("/".join(parts[:end])) for end in range(len(parts), 0, -1)]


def _plain(name: str) -> str:
    """Return a name composed, without a slash at its end and without what is not UTF-8 in it, however it is shown."""
    name = re.sub(r"\\x[0-9a-fA-F]{2}|\\u?dc[0-9a-fA-F]{2}|\\n|[\udc80-\udcff\ufffd\0-\x1f]", "", name)
    return composed(name).rstrip("/")


def _is_text(path: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in path)
