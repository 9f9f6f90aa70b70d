"""The paths of a source's pictures: their ids, which are composed Unicode and distinct, and the labels in them."""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from service.sources.compact import Labels
from service.sources.source import LeftOut

P = TypeVar("P")

_REPLACED = "replaced by a later one of the same path"
_SPLITS = {"train", "val", "valid", "validation", "test", "dev"}


class Gathered(Generic[P]):
    """The pictures of one source while it is scanned, by composed id, and what was left out.

    Args:
        same: whether the pictures at two paths and places are the same, to the byte.

    Attributes:
        found: the path as it is stored, and its place, by id; in the order of the last addition.
        left_out: what was not taken.
    """

    def __init__(self, same: Callable[[tuple[str, P], tuple[str, P]], bool]) -> None:
        self._same = same
        self.found: dict[str, tuple[str, P]] = {}
        self.left_out: list[LeftOut] = []

    def add(self, path: str, place: P) -> None:
        """Take a picture. Of two with one path the later counts, as when an archive is unpacked.

        Of two whose paths differ only in composition (é as one character or as two), the composed one counts: an id
        can name but one of them.
        """
        id = compose(path)
        earlier = self.found.get(id)
        same = earlier is not None and self._same(earlier, (path, place))
        if earlier is None or earlier[0] == path:
            if earlier is not None:
                reason = "there already: the same picture under the same path" if same else _REPLACED
                self.left_out.append(LeftOut(path, reason, False))
            self.found.pop(id, None)
            self.found[id] = path, place
            return
        loser = path if earlier[0] == id or path != id else earlier[0]
        if same:
            reason, lost = "the same picture under a name that differs only in how its characters are composed", False
        else:
            reason = "another path differs from this one only in how its characters are composed: rename one of them"
            lost = True
        if loser != path:
            self.found[id] = path, place
        self.left_out.append(LeftOut(loser, reason, lost))


def compose(text: str) -> str:
    """Return text in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", text)


def path_labels(paths: Sequence[str], archive: str | None = None) -> Labels | None:
    """Return the labels that folders give, the same for a folder and for an archive of it.

    Folders that all pictures share are passed over. Of what follows, the first level is the label; if all first levels
    are names of splits, such as train and val, it is the second one. A picture that lies outside has no label. If one
    folder holds all pictures directly, it is their label, unless it is a split or the archive has its name.

    Args:
        paths: of the pictures, with slashes.
        archive: the archive's name without its ending.

    Returns:
        None when no picture has a label.
    """
    above = len(_shared(paths))
    if above and not any("/" in path[above:] for path in paths):
        folder = paths[0][: above - 1].rpartition("/")
        if (folder[2] == archive and not folder[0]) or folder[2].lower() in _SPLITS:
            return None
        above = len(folder[0] + folder[1])
    split = {path[above : path.index("/", above)].lower() for path in paths if "/" in path[above:]} <= _SPLITS
    labels = Labels.of(_levels(paths, above, int(split)))
    return labels if labels.names else None


def label_text(text: str) -> str:
    """Return a label as composed text; bytes that are not UTF-8 are shown, as in caf\\xe9."""
    return compose(text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def _levels(paths: Sequence[str], above: int, level: int) -> Iterator[str | None]:
    texts: dict[str, str] = {}
    for path in paths:
        folders = path[above:].split("/", level + 1)
        name = folders[level] if len(folders) > level + 1 else None
        yield None if name is None else texts.setdefault(name, label_text(name))


def _shared(paths: Sequence[str]) -> str:
    """Return the folders that all paths share, with a slash at the end, or an empty text."""
    first, last = min(paths), max(paths)
    same = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return first[: first.rfind("/", 0, same) + 1]
