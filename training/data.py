"""SOURCE → pixel canvas → batches: a picture is decoded by the service's own function when a batch first touches it."""

import os
import shutil
import sys
import zlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from tqdm import tqdm

from service import IntArray, PixelArray, cores
from service.encoding.card import Preprocessing
from service.encoding.images import Limits, decode_pixels
from service.errors import InvalidSource, LookalikeError
from service.files import write_file
from service.sources import open_source
from service.sources.source import Source, from_arrays, slice_source

Residence = Literal["memory", "disk", "nowhere"]

_MOST_BAD = 0.05
_JUDGED = 1000  # pictures looked at before a share of bad ones says anything
_CHUNK = 64
_AT_ONCE = 64 * _CHUNK  # pictures decoded before they are put away
_SMALL = 256 * 2**20  # a canvas of so many bytes is decoded again in no time: not worth a file
_DISK_LEFT = 2**30  # bytes that stay free for checkpoints
_BLOCKS_MIXED = 16
_UNKNOWN, _GOOD, _BAD, _SEEN = 0, 1, 2, 3  # seen: good when it was decoded, and its pixels are not there any more


def open_training_source(name: str, data_root: Path) -> Source:
    """Open a SOURCE for training: as in serving, plus cifar10/train and cifar10/test, and downloads.

    Raises:
        InvalidSource: as open_source, or the download failed.
    """
    set_name, bracket, slicing = name.partition("[")
    known = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}.get(set_name.split("/")[0])
    if known is None or set_name.split("/")[1:] not in (["train"], ["test"]):
        return open_source(name, data_root)
    train = set_name.endswith("/train")
    try:
        data = known(str(data_root), train=train)
    except RuntimeError:  # torchvision's word for: not there
        try:
            data = known(str(data_root), train=train, download=True)
        except Exception as error:
            raise InvalidSource(
                f"{set_name} is not under {data_root} and cannot be downloaded: {' '.join(str(error).split())}; "
                f"name the folder that has it, in torchvision's layout, with --data-root"
            ) from error
    if set_name.startswith("mnist"):
        return open_source(name, data_root)
    labels = [data.classes[label] for label in data.targets]
    source = from_arrays(name, np.asarray(data.data), labels, set_name)
    return slice_source(source, bracket + slicing)


def names_checksum(source: Source) -> int:
    """Return a checksum of the source's ids, to know it again by."""
    checksum = 0
    for name in source.ids:
        checksum = zlib.crc32(name.encode("utf-8", "surrogateescape"), checksum)
    return checksum


class Canvas:
    """The source's pixels, (count, C, S, S) uint8: each picture decoded once, when it is first taken.

    Attributes:
        source: the pictures.
        residence: "memory"; "disk", a file of the run's folder; or "nowhere": decoded at every take.
        on_device: whether the pixels are kept on the device as well.
        bad: why pictures cannot be used, by position.
        device: where taken pixels are.

    Cost: count · C · S · S bytes where they reside, 1 byte of memory a picture beside that.
    """

    def __init__(
        self, source: Source, preprocessing: Preprocessing, channels: int, folder: Path, device: torch.device
    ) -> None:
        """Choose where the pixels reside, by their size, and say so in one line.

        Args:
            source: the pictures.
            preprocessing: gives S.
            channels: 1 keeps luminance only, 3 keeps RGB.
            folder: of the run; a canvas on disk is its canvas.bin.
            device: where batches are wanted.
        """
        self.source = source
        self.bad: dict[int, str] = {}
        self.device = device
        self._preprocessing, self._channels = preprocessing, channels
        self._limits = Limits()
        self._state = np.zeros(len(source), np.uint8)
        shape = (len(source), channels, preprocessing.side, preprocessing.side)
        self._path = folder / "canvas.bin"
        self._kept_file = self._path.exists() and self._path.stat().st_size == int(np.prod(shape))
        self.residence, self._pixels = _allocate(shape, self._path)
        size = int(np.prod(shape))
        self._resident: Tensor | None = None
        if self._pixels is not None and device.type == "cuda" and size < 0.4 * torch.cuda.mem_get_info(device)[0]:
            self._resident = torch.empty(shape, dtype=torch.uint8, device=device)
            self._uploaded = np.zeros(len(source), bool)
        self.on_device = self._resident is not None
        self._pool = ThreadPoolExecutor(cores())
        where = {"memory": "in memory", "disk": f"in {self._path}", "nowhere": "kept nowhere: decoded at each epoch"}
        print(
            f"{source.name}: {len(source)} pictures, {size / 2**20:.0f} MiB decoded, {where[self.residence]}"
            f"{' and on the GPU' if self.on_device else ''}",
            file=sys.stderr,
        )

    def take(self, positions: IntArray) -> tuple[Tensor, IntArray]:
        """Return the pixels (n, C, S, S) of the good pictures among these, on the device, and their positions.

        Raises:
            InvalidSource: more than 5 % of the pictures are bad.
        """
        if self._pixels is None:
            known = positions[self._state[positions] != _BAD]
            pixels, good = self._decode(known)
            self._state[known[good]] = _GOOD
            self._check_share()
            return torch.from_numpy(pixels).to(self.device), known[good]
        missing = positions[self._missing(positions)]
        if len(missing):
            self._fill(self._whole_blocks(missing))
        good_positions = positions[self._state[positions] == _GOOD]
        if self._resident is None:
            return torch.from_numpy(self._pixels[good_positions]).to(self.device), good_positions
        new = good_positions[~self._uploaded[good_positions]]
        if len(new):
            self._resident[torch.from_numpy(new).to(self.device)] = torch.from_numpy(self._pixels[new]).to(self.device)
            self._uploaded[new] = True
        return self._resident[torch.from_numpy(good_positions).to(self.device)], good_positions

    def untouched(self) -> int:
        """Return how many pictures have not been decoded yet and will be kept once they are."""
        return 0 if self._pixels is None else int(self._missing(slice(None)).sum())

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs; after it the pixels that it speaks of are on the disk."""
        state = self._state.copy()
        if isinstance(self._pixels, np.memmap):
            self._pixels.flush()
        else:
            state[state == _GOOD] = _SEEN
        return {"state": torch.from_numpy(state), "bad": dict(self.bad), "residence": self.residence}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with what an earlier run has decoded."""
        self.bad = dict(state["bad"])
        self._state = state["state"].numpy().copy()
        if self.residence != "disk" or state["residence"] != "disk" or not self._kept_file:
            self._state[self._state == _GOOD] = _SEEN

    def list_bad(self, path: Path) -> None:
        """Write ids and reasons of the bad pictures, a line each; nothing where there are none."""
        if self.bad:
            lines = [f"{self.source.ids[position]}\t{reason}\n" for position, reason in sorted(self.bad.items())]
            write_file(path, "".join(lines).encode("utf-8", "surrogateescape"))

    def close(self) -> None:
        """Give memory and threads back; a canvas on disk stays for a resumed run."""
        self._pool.shutdown()
        self._pixels = self._resident = None

    def remove(self) -> None:
        """Close it and remove its file."""
        self.close()
        self._path.unlink(missing_ok=True)

    def _whole_blocks(self, positions: IntArray) -> IntArray:
        """All missing pictures of the blocks that these lie in: where reading one means reading its block."""
        if self.source.blocks is None:
            return np.unique(positions)
        starts = np.asarray(self.source.blocks)
        touched = np.unique(np.searchsorted(starts, positions, side="right") - 1)
        ends = np.append(starts[1:], len(self.source))
        every = np.concatenate([np.arange(starts[block], ends[block]) for block in touched])
        missing: IntArray = every[self._missing(every)]
        return missing

    def _missing(self, positions: IntArray | slice) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Whether the pixels of these have yet to be decoded."""
        return np.isin(self._state[positions], (_UNKNOWN, _SEEN))

    def _fill(self, positions: IntArray) -> None:
        assert self._pixels is not None
        bar = tqdm(total=len(positions), desc="decoding", unit=" pictures", leave=False, delay=3)
        with bar:
            for start in range(0, len(positions), _AT_ONCE):
                part = positions[start : start + _AT_ONCE]
                pixels, good = self._decode(part)
                self._pixels[part[good]] = pixels
                self._state[part[good]] = _GOOD  # after its pixels: a checkpoint may look between the two
                self._check_share()
                bar.update(len(part))

    def _decode(self, positions: IntArray) -> tuple[PixelArray, "np.ndarray[Any, np.dtype[np.bool_]]"]:
        """Decode pictures; returns the pixels of the good ones and which those are, and notes the bad ones."""
        # Threads hand over chunks: for pictures of a few pixels, passing each by itself costs more than decoding it.
        chunks = [positions[start : start + _CHUNK].tolist() for start in range(0, len(positions), _CHUNK)]
        results = [result for chunk in self._pool.map(self._read_chunk, chunks) for result in chunk]
        good = np.array([not isinstance(result, LookalikeError) for result in results], bool)
        for position, result in zip(positions.tolist(), results, strict=True):
            if isinstance(result, LookalikeError):
                self.bad[position] = str(result)
                self._state[position] = _BAD
        side = self._preprocessing.side
        pixels = [result for result in results if not isinstance(result, LookalikeError)]
        return np.stack(pixels) if pixels else np.empty((0, self._channels, side, side), np.uint8), good

    def _read_chunk(self, positions: list[int]) -> list[PixelArray | LookalikeError]:
        return [self._read(position) for position in positions]

    def _read(self, position: int) -> PixelArray | LookalikeError:
        try:
            pixels = decode_pixels(self.source.entry(position).data, self._preprocessing, self._limits)  # (S, S, 3)
        except LookalikeError as error:
            return error
        return to_luminance(pixels)[None] if self._channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _check_share(self) -> None:
        if not self.bad:
            return
        touched = int((self._state != _UNKNOWN).sum())
        if len(self.bad) > _MOST_BAD * max(touched, min(len(self.source), _JUDGED)):
            position, reason = next(iter(self.bad.items()))
            raise InvalidSource(
                f"{self.source.name}: {len(self.bad)} of {touched} pictures are bad, more than {_MOST_BAD:.0%}; mend "
                f"or remove them. The first: {self.source.ids[position]}: {reason}"
            )


def to_luminance(pixels: PixelArray) -> PixelArray:
    """Return (..., S, S) uint8 luminance of (..., S, S, 3) uint8; grey stays exactly what it was."""
    r, g, b = (pixels[..., channel].astype(np.uint32) for channel in range(3))
    return ((299 * r + 587 * g + 114 * b + 500) // 1000).astype(np.uint8)


def sample(source: Source, count: int) -> IntArray:
    """Return up to `count` positions spread over a source; of one that is read in blocks, over a few of them."""
    if source.blocks is None:
        return spread(np.arange(len(source)), count)
    ends = [*source.blocks[1:], len(source)]
    chosen = spread(np.arange(len(ends)), _BLOCKS_MIXED)
    return spread(np.concatenate([np.arange(source.blocks[block], ends[block]) for block in chosen]), count)


def spread(positions: IntArray, count: int) -> IntArray:
    """Return up to `count` of the positions, evenly spread."""
    chosen: IntArray = np.linspace(0, len(positions) - 1, min(count, len(positions))).astype(np.int64)
    return positions[chosen]


class Cursor(NamedTuple):
    """A place in the order of the pictures: what an epoch has given out already."""

    epoch: int = 0
    offset: int = 0


class Loaded(NamedTuple):
    """A batch: pixels (N, C, S, S) uint8 on the device, positions (N,), and the place in the order after it."""

    pixels: Tensor
    positions: IntArray
    cursor: Cursor


def batches(canvas: Canvas, among: IntArray, size: int, seed: int, cursor: Cursor) -> Generator[Loaded]:
    """Yield batches without end: a new random order each epoch, the short last batch left out.

    Bad pictures are passed over, so each batch is whole; the order depends on seed and epoch alone.

    Args:
        canvas: gives the pixels.
        among: positions to train on.
        size: N.
        seed: of the order.
        cursor: where to go on.

    Raises:
        InvalidSource: more than 5 % of the pictures are bad, or an epoch has not pictures enough for one batch.
    """
    epoch, offset = cursor
    while True:
        order = epoch_order(among, seed, epoch, canvas)
        while (loaded := _whole_batch(canvas, order, offset, size)) is not None:
            pixels, positions, offset = loaded
            yield Loaded(pixels, positions, Cursor(epoch, offset))
        if offset == 0:
            usable = len(among) - len(canvas.bad)
            raise InvalidSource(f"{canvas.source.name}: {usable} pictures can be used, a batch needs {size}")
        epoch, offset = epoch + 1, 0


def epoch_order(among: IntArray, seed: int, epoch: int, canvas: Canvas) -> IntArray:
    """Return the positions in the random order of an epoch, the same whenever it is asked for.

    While pictures come in blocks that are read whole (Parquet), a few blocks at a time are shuffled together, drawn
    from all over the source; once the canvas holds them all, in the second epoch, any picture may follow any other.
    """
    random = np.random.default_rng((seed, epoch))
    blocks = canvas.source.blocks
    if blocks is None or (epoch and canvas.residence != "nowhere"):
        return among[random.permutation(len(among))]
    turn = random.permutation(len(blocks))  # of each block
    window = turn[np.searchsorted(np.asarray(blocks), among, side="right") - 1] // _BLOCKS_MIXED
    return among[np.lexsort((random.random(len(among)), window))]


def _whole_batch(canvas: Canvas, order: IntArray, offset: int, size: int) -> tuple[Tensor, IntArray, int] | None:
    pixels: list[Tensor] = []
    positions: list[IntArray] = []
    needed = size
    while needed:
        part = order[offset : offset + needed]
        if len(part) < needed:
            return None
        offset += needed
        taken, good = canvas.take(part)
        pixels.append(taken)
        positions.append(good)
        needed -= len(good)
    return torch.cat(pixels), np.concatenate(positions), offset


def ahead(items: Iterator[Loaded]) -> Generator[Loaded]:
    """Yield the items, the next one being made in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, items)
        while True:
            item = upcoming.result()
            upcoming = pool.submit(next, items)
            yield item


def _allocate(shape: tuple[int, ...], path: Path) -> tuple[Residence, PixelArray | None]:
    size = int(np.prod(shape))
    if size <= _SMALL:
        return "memory", np.empty(shape, np.uint8)
    have = path.stat().st_size if path.exists() else 0
    if size - have < shutil.disk_usage(path.parent).free - _DISK_LEFT:
        try:
            with path.open("ab") as file:
                file.truncate(size)
                # Now, not by a bus error when a page finds no room; a few file systems cannot and need not.
                os.posix_fallocate(file.fileno(), 0, size)
            return "disk", np.memmap(path, np.uint8, "r+", shape=shape)
        except OSError:
            path.unlink(missing_ok=True)
    if size < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4:
        return "memory", np.empty(shape, np.uint8)
    return "nowhere", None
