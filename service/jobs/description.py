"""The columns of embedded parts that need no decoding: ids, labels, and what else a source tells of its pictures."""

import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from service.errors import InvalidSource
from service.sources.source import Source


class Description:
    """Describes the pictures of a source in columns: id, label, in the format npy image_path, and the source's own.

    A column of the source that has the name of one of ours gets `source_` before it. Captions that lie beside a
    folder's pictures become the column caption, several of one picture a line each.

    Attributes:
        schema: the columns of `all`.
        notes: sentences on columns that are not kept.
    """

    def __init__(self, source: Source, reserved: Sequence[str], npy: bool = False) -> None:
        """Prepare the columns.

        Args:
            source: the pictures.
            reserved: names of columns that the parts have besides.
            npy: adds image_path, by which clip-retrieval shows a picture: the path of its file, else the id.
        """
        self._source, self._npy = source, npy
        self.notes: list[str] = []
        self._captions = None if source.columns else self._read_captions()
        own = self.own([])
        others = source.columns.read([]).schema if source.columns else pa.schema([])
        if source.columns and source.columns.left_out:
            names = ", ".join(source.columns.left_out)
            self.notes.append(f"{source.name}: not kept beside the embeddings, bytes or of several types: {names}")
        taken = {*own.schema.names, *reserved}
        self._names = [f"source_{name}" if name in taken else name for name in others.names]
        self.schema = pa.schema(
            [*own.schema, *(pa.field(name, field.type) for name, field in zip(self._names, others, strict=True))]
        )

    def own(self, positions: Sequence[int]) -> Any:
        """Return those columns, of pictures at ascending positions, that cost no reading of the source."""
        source, text = self._source, pa.string()
        labels = source.labels
        columns = {
            "id": pa.array([source.ids[at] for at in positions], text),
            "label": pa.array([labels[at] if labels else None for at in positions], text),
        }
        if self._npy:
            columns["image_path"] = pa.array([self._image_path(at) for at in positions], text)
        if self._captions is not None:
            columns["caption"] = pa.array(["\n".join(self._captions[at]) or None for at in positions], text)
        return pa.table(columns)

    def all(self, positions: Sequence[int]) -> Any:
        """Return all columns of pictures at ascending positions. Raises InvalidSource if they cannot be read."""
        table = self.own(positions)
        if self._source.columns:
            others = self._source.columns.read(positions)
            for name, column in zip(self._names, others.columns, strict=True):
                table = table.append_column(name, column)
        return table

    def _image_path(self, position: int) -> str:
        if not self._source.in_files or self._source.place is None:
            return self._source.ids[position]
        # Arrow holds no bytes that are not UTF-8.
        return os.fsencode(self._source.place(position).absolute()).decode("utf-8", "replace")

    def _read_captions(self) -> Sequence[Sequence[str]] | None:
        if self._source.captions is None:
            return None
        try:
            captions = self._source.captions()
        except InvalidSource as error:
            self.notes.append(f"{error}; the embeddings have no captions")
            return None
        return captions if any(captions) else None
