"""SOURCE → pixel canvas → batches. The service's own function decodes a picture when a batch first needs it."""

import os
import shutil
import sys
import zlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from tqdm import tqdm

from service import IntArray, PixelArray, cores
from service.account import Failure, printable
from service.encoding.card import Preprocessing
from service.encoding.images import decode_pixels
from service.encoding.limits import OWN_FILES, Limits
from service.errors import InvalidRequest, InvalidSource, LookalikeError, NoEmbedding, kept
from service.files import write_file
from service.sources import open_source
from service.sources.source import Source, from_arrays, slice_source
from training.checkpoint import Cursor
from training.distributed import count, exchange, own, rank

if TYPE_CHECKING:
    # A machine that only trains has no onnxruntime.
    from service.encoding.encoder import Encoder

# Pixels or an embedding.
_Values = np.ndarray[Any, Any]
Residence = Literal["memory", "disk", "nowhere"]

_MOST_BAD = 0.05
# The share of bad pictures is judged as if at least so many had been decoded.
_JUDGED = 1000
_CHUNK = 64
# Pictures that are decoded before their pixels are stored.
_AT_ONCE = 64 * _CHUNK
# The same with a locked encoder, whose pixels are larger.
_ENCODED_AT_ONCE = 256
# A canvas of up to so many bytes needs no file, because it is decoded again quickly.
_SMALL = 256 * 2**20
# Bytes of disk that stay free for checkpoints.
_DISK_LEFT = 2**30
_BLOCKS_MIXED = 16
# Seen: the picture was good when it was decoded, but its pixels are no longer kept.
_UNKNOWN, _GOOD, _BAD, _SEEN = 0, 1, 2, 3


def open_training_source(name: str, data_root: Path, image_key: str | None = None) -> Source:
    """Open a SOURCE for training: as open_source, plus cifar10/train and cifar10/test, and downloads.

    Raises:
        InvalidSource: as open_source, or the download failed.
    """
    set_name, bracket, slicing = name.partition("[")
    known = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}.get(set_name.split("/")[0])
    if known is None or set_name.split("/")[1:] not in (["train"], ["test"]):
        return open_source(name, data_root, image_key)
    train = set_name.endswith("/train")
    try:
        data = known(str(data_root), train=train)
    # torchvision raises it if the set is missing.
    except RuntimeError:
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
    """Return a checksum of the source's ids, by which a resumed run recognises its source."""
    checksum = 0
    for name in source.ids:
        checksum = zlib.crc32(name.encode("utf-8", "surrogateescape"), checksum)
    return checksum


class Canvas:
    """The source's pixels, (count, C, S, S) uint8: each picture decoded once, when it is first taken.

    With a locked encoder it holds embeddings (count, D) float32 in their place: each picture is encoded once.

    Attributes:
        source: the pictures.
        residence: "memory"; "disk", a file in the run's folder; or "nowhere": each take decodes again.
        on_device: whether the pixels are kept on the device as well.
        bad: what is wrong with a picture that cannot be used, by position.
        device: on which take returns pixels.

    Cost: count · C · S · S bytes where the pixels reside, or 4 · count · D; and 1 byte of memory a picture.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        channels: int,
        folder: Path,
        device: torch.device,
        limits: Limits = OWN_FILES,
        encoder: "Encoder | None" = None,
    ) -> None:
        """Choose by size where the pixels reside, and report it in one line on stderr.

        Args:
            source: the pictures.
            preprocessing: gives S.
            channels: 1 keeps luminance only, 3 keeps RGB.
            folder: of the run; a canvas on disk is its canvas.bin.
            device: on which batches are needed.
            limits: of a picture.
            encoder: the locked one.
        """
        self.source = source
        self.bad: dict[int, Failure] = {}
        self.device = device
        self._preprocessing, self._channels = preprocessing, channels
        self._limits, self._encoder = limits, encoder
        self._state = np.zeros(len(source), np.uint8)
        side = preprocessing.side
        self._shape = (channels, side, side) if encoder is None else (encoder.dimension,)
        self._type = np.dtype(np.uint8 if encoder is None else np.float32)
        shape = (len(source), *self._shape)
        size = int(np.prod(shape)) * self._type.itemsize
        self._path = folder / "canvas.bin"
        self._kept_file = self._path.exists() and self._path.stat().st_size == size
        self.residence, self._pixels = _allocate(shape, self._type, self._path)
        self._resident: Tensor | None = None
        if self._pixels is not None and device.type == "cuda" and size < 0.4 * torch.cuda.mem_get_info(device)[0]:
            self._resident = torch.from_numpy(self._pixels[:0]).new_empty(shape, device=device)
            self._uploaded = np.zeros(len(source), bool)
        self.on_device = self._resident is not None
        self._pool = ThreadPoolExecutor(cores())
        where = {"memory": "in memory", "disk": f"in {self._path}", "nowhere": "kept nowhere: decoded at each epoch"}
        print(
            f"{source.name}: {len(source)} pictures, {size / 2**20:.0f} MiB "
            f"{'decoded' if encoder is None else 'of embeddings'}, {where[self.residence]}"
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

    def load_all(self) -> None:
        """Decode all pictures now and keep all pixels on the device, for `resident`.

        Raises:
            InvalidSource: more than 5 % of the pictures are bad.
            InvalidRequest: the pixels do not fit.
        """
        if self._pixels is None or (self.device.type == "cuda" and self._resident is None):
            size = len(self.source) * int(np.prod(self._shape)) * self._type.itemsize
            raise InvalidRequest(
                f"{self.source.name}: {size / 2**30:.1f} GiB of pixels do not fit on the device; set resident=false"
            )
        self._fill(np.flatnonzero(self._missing(slice(None))))
        # On a CPU this is the same memory.
        self._resident = torch.from_numpy(self._pixels).to(self.device)
        self._uploaded = np.ones(len(self.source), bool)
        self.on_device = True

    def resident(self, positions: Tensor) -> Tensor:
        """Return pixels (n, C, S, S) of good pictures after load_all; positions (n,) are on the device."""
        assert self._resident is not None
        return self._resident[positions]

    def is_good(self, positions: IntArray) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Return for each of the positions whether its pixels are decoded and usable."""
        good: np.ndarray[Any, np.dtype[np.bool_]] = self._state[positions] == _GOOD
        return good

    def learn(self, positions: IntArray, bad: dict[int, Failure]) -> None:
        """Take over what other processes found out: the bad ones among these positions; the others are good."""
        unknown = positions[self._state[positions] == _UNKNOWN]
        self._state[unknown] = _SEEN
        self._state[list(bad)] = _BAD
        self.bad |= bad

    def untouched(self) -> int:
        """Return how many pictures have not been decoded yet and will be kept once they are."""
        return 0 if self._pixels is None else int(self._missing(slice(None)).sum())

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs. Pixels that it marks as good are on disk by then."""
        state = self._state.copy()
        if isinstance(self._pixels, np.memmap):
            self._pixels.flush()
        else:
            state[state == _GOOD] = _SEEN
        bad = {position: (failure.error, failure.code) for position, failure in self.bad.items()}
        return {"state": torch.from_numpy(state), "bad": bad, "residence": self.residence}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from the state of an earlier session of the run."""
        # Checkpoints of earlier versions have no codes of errors.
        told = {position: (one, "") if isinstance(one, str) else one for position, one in state["bad"].items()}
        self.bad = {position: Failure(self.source.ids[position], *one) for position, one in told.items()}
        self._state = state["state"].numpy().copy()
        if self.residence != "disk" or state["residence"] != "disk" or not self._kept_file:
            self._state[self._state == _GOOD] = _SEEN

    def list_bad(self, path: Path) -> None:
        """Write ids and reasons of the bad pictures, a line each; without bad pictures, write nothing."""
        if self.bad:
            lines = [
                f"{printable(failure.id)}\t{printable(failure.error)}\n" for _, failure in sorted(self.bad.items())
            ]
            write_file(path, "".join(lines).encode())

    def close(self) -> None:
        """Release memory and threads. A canvas on disk stays for a resumed run."""
        self._pool.shutdown()
        self._pixels = self._resident = None

    def remove(self) -> None:
        """Close it and remove its file."""
        self.close()
        self._path.unlink(missing_ok=True)

    def _whole_blocks(self, positions: IntArray) -> IntArray:
        """Return all missing positions of the blocks that these lie in, since reading one picture reads its block."""
        if self.source.blocks is None:
            return np.unique(positions)
        starts = np.asarray(self.source.blocks)
        touched = np.unique(np.searchsorted(starts, positions, side="right") - 1)
        ends = np.append(starts[1:], len(self.source))
        every = np.concatenate([np.arange(starts[block], ends[block]) for block in touched])
        missing: IntArray = every[self._missing(every)]
        return missing

    def _missing(self, positions: IntArray | slice) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Return for each position whether its pixels have yet to be decoded."""
        return np.isin(self._state[positions], (_UNKNOWN, _SEEN))

    def _fill(self, positions: IntArray) -> None:
        assert self._pixels is not None
        what, at_once = ("decoding", _AT_ONCE) if self._encoder is None else ("embedding", _ENCODED_AT_ONCE)
        bar = tqdm(total=len(positions), desc=what, unit=" pictures", leave=False, delay=3)
        with bar:
            for start in range(0, len(positions), at_once):
                part = positions[start : start + at_once]
                pixels, good = self._decode(part)
                self._pixels[part[good]] = pixels
                # The pixels come first, because a checkpoint may read the state between the two lines.
                self._state[part[good]] = _GOOD
                self._check_share()
                bar.update(len(part))

    def _decode(self, positions: IntArray) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, np.dtype[np.bool_]]]":
        """Decode pictures; return the pixels of the good ones and a mask of them, and record the bad ones.

        With a locked encoder they are the embeddings.
        """
        # Threads take chunks, because handing over one picture of a few pixels costs more than decoding it.
        chunks = [positions[start : start + _CHUNK].tolist() for start in range(0, len(positions), _CHUNK)]
        results = [result for chunk in self._pool.map(self._read_chunk, chunks) for result in chunk]
        if self._encoder is not None:
            results = _encode(self._encoder, results)
        good = np.array([not isinstance(result, LookalikeError) for result in results], bool)
        for position, result in zip(positions.tolist(), results, strict=True):
            if isinstance(result, LookalikeError):
                self.bad[position] = Failure.of(self.source.ids[position], result)
                self._state[position] = _BAD
        pixels = [result for result in results if not isinstance(result, LookalikeError)]
        return np.stack(pixels) if pixels else np.empty((0, *self._shape), self._type), good

    def _read_chunk(self, positions: list[int]) -> list[_Values | LookalikeError]:
        return [self._read(position) for position in positions]

    def _read(self, position: int) -> _Values | LookalikeError:
        try:
            pixels = decode_pixels(self.source.entry(position).data, self._preprocessing, self._limits)  # (S, S, 3)
        except LookalikeError as error:
            return error
        if self._encoder is not None:
            return pixels
        return to_luminance(pixels)[None] if self._channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _check_share(self) -> None:
        if not self.bad:
            return
        touched = int((self._state != _UNKNOWN).sum())
        if len(self.bad) > _MOST_BAD * max(touched, min(len(self.source), _JUDGED)):
            first = next(iter(self.bad.values()))
            raise InvalidSource(
                f"{self.source.name}: {len(self.bad)} of {touched} pictures are bad, more than {_MOST_BAD:.0%}; mend "
                f"or remove them. The first: {first.id}: {first.error}"
            )


def _encode(encoder: "Encoder", read: list[_Values | LookalikeError]) -> list[_Values | LookalikeError]:
    """Return what was read with an embedding (D,) in the place of pixels (S, S, 3), or why there is none."""
    found, good = list(read), [at for at, one in enumerate(read) if not isinstance(one, LookalikeError)]
    for start in range(0, len(good), encoder.max_batch):
        places = good[start : start + encoder.max_batch]
        batch = [one for one in (read[at] for at in places) if not isinstance(one, LookalikeError)]
        try:
            rows: list[_Values | LookalikeError] = list(encoder.encode(batch))
        except NoEmbedding:
            # One picture without an embedding fails its batch, so each is tried alone.
            rows = [_encode_one(encoder, pixels) for pixels in batch]
        for at, row in zip(places, rows, strict=True):
            found[at] = row
    return found


def _encode_one(encoder: "Encoder", pixels: _Values) -> _Values | LookalikeError:
    try:
        embedding: _Values = encoder.encode([pixels])[0]
        return embedding
    except NoEmbedding as error:
        return kept(error)


def to_luminance(pixels: PixelArray) -> PixelArray:
    """Return (..., S, S) uint8 luminance of (..., S, S, 3) uint8; grey pixels stay exactly as they are."""
    r, g, b = (pixels[..., channel].astype(np.uint32) for channel in range(3))
    return ((299 * r + 587 * g + 114 * b + 500) // 1000).astype(np.uint8)


def sample(source: Source, count: int) -> IntArray:
    """Return up to `count` positions spread over a source, or over a few blocks of one that is read in blocks."""
    if source.blocks is None:
        return spread(np.arange(len(source)), count)
    ends = [*source.blocks[1:], len(source)]
    chosen = spread(np.arange(len(ends)), _BLOCKS_MIXED)
    return spread(np.concatenate([np.arange(source.blocks[block], ends[block]) for block in chosen]), count)


def spread(positions: IntArray, count: int) -> IntArray:
    """Return up to `count` of the positions, evenly spread."""
    chosen: IntArray = np.linspace(0, len(positions) - 1, min(count, len(positions))).astype(np.int64)
    return positions[chosen]


class Loaded(NamedTuple):
    """A batch on the device: pixels (N, C, S, S) uint8, positions (N,) int64; and the place in the order after it.

    Of several processes each has the pixels of its share, and the positions of the whole batch.
    """

    pixels: Tensor
    positions: Tensor
    cursor: Cursor


def batches(canvas: Canvas, among: IntArray, size: int, seed: int, cursor: Cursor) -> Generator[Loaded]:
    """Yield batches without end: a new random order each epoch, without the short last batch.

    Bad pictures are skipped, so each batch is whole. The order depends on seed and epoch alone.

    Args:
        canvas: gives the pixels.
        among: positions to train on.
        size: N.
        seed: of the order.
        cursor: where to continue.

    Raises:
        InvalidSource: more than 5 % of the pictures are bad, or an epoch has fewer pictures than a batch.
    """
    epoch, offset = cursor
    while True:
        order = epoch_order(among, seed, epoch, canvas)
        while (loaded := _whole_batch(canvas, order, offset, size)) is not None:
            pixels, positions, offset = loaded
            chosen = torch.from_numpy(positions).to(canvas.device, non_blocking=True)
            yield Loaded(pixels, chosen, Cursor(epoch, offset))
        if offset == 0:
            usable = len(among) - len(canvas.bad)
            raise InvalidSource(f"{canvas.source.name}: {usable} pictures can be used, a batch needs {size}")
        epoch, offset = epoch + 1, 0


def resident_batches(canvas: Canvas, among: IntArray, size: int, seed: int, cursor: Cursor) -> Generator[Loaded]:
    """Yield the same batches as `batches` from a canvas whose load_all was called: each is an index on the device.

    The cursor counts good pictures alone, so a run does not change between the two.
    """
    epoch, offset = cursor
    while True:
        order = epoch_order(among, seed, epoch, canvas)
        good = torch.from_numpy(order[canvas.is_good(order)]).to(canvas.device)
        if len(good) < size:
            raise InvalidSource(f"{canvas.source.name}: {len(good)} pictures can be used, a batch needs {size}")
        for end in range(offset + size, len(good) + 1, size):
            chosen = good[end - size : end]
            yield Loaded(canvas.resident(chosen.tensor_split(count())[rank()]), chosen, Cursor(epoch, end))
        epoch, offset = epoch + 1, 0


def epoch_order(among: IntArray, seed: int, epoch: int, canvas: Canvas) -> IntArray:
    """Return the positions in the random order of an epoch, which depends on nothing else.

    As long as pictures are read in blocks (Parquet), a few random blocks at a time are shuffled together. From the
    second epoch on the canvas holds all pictures, and all of them are shuffled together.
    """
    generator = np.random.default_rng((seed, epoch))
    blocks = canvas.source.blocks
    if blocks is None or (epoch and canvas.residence != "nowhere"):
        return among[generator.permutation(len(among))]
    # Each block's place in the order of blocks.
    rank = generator.permutation(len(blocks))
    window = rank[np.searchsorted(np.asarray(blocks), among, side="right") - 1] // _BLOCKS_MIXED
    return among[np.lexsort((generator.random(len(among)), window))]


def _whole_batch(canvas: Canvas, order: IntArray, offset: int, size: int) -> tuple[Tensor, IntArray, int] | None:
    """Return the pixels of this process's share, the positions of the batch, and the offset after it; None at the end.

    Each process decodes its share. Where a picture is bad, the shares of all shift.
    """
    pixels: list[Tensor] = []
    positions: list[IntArray] = []
    needed = size
    while needed:
        part = order[offset : offset + needed]
        if len(part) < needed:
            return None
        offset += needed
        taken, good = _shared(canvas, part)
        pixels.append(taken)
        positions.append(good)
        needed -= len(good)
    chosen = np.concatenate(positions)
    if count() > 1 and len(pixels) > 1:
        return canvas.take(own(chosen))[0], chosen, offset
    return torch.cat(pixels), chosen, offset


def _shared(canvas: Canvas, positions: IntArray) -> tuple[Tensor, IntArray]:
    """Decode pictures, each process its share; return the share's pixels, and which of all positions are good."""
    share = own(positions)
    taken, good = canvas.take(share)
    if count() == 1:
        return taken, good
    bad = {at: canvas.bad[at] for at in positions.tolist() if at in canvas.bad}
    for found in exchange(bad):
        bad |= found
    canvas.learn(positions, bad)
    return taken, positions[~np.isin(positions, list(bad))]


def ahead(items: Iterator[Loaded]) -> Generator[Loaded]:
    """Yield the items; a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, items)
        while True:
            item = upcoming.result()
            upcoming = pool.submit(next, items)
            yield item


def _allocate(
    shape: tuple[int, ...], type: "np.dtype[Any]", path: Path
) -> "tuple[Residence, np.ndarray[Any, Any] | None]":
    size = int(np.prod(shape)) * type.itemsize
    if size <= _SMALL:
        return "memory", np.empty(shape, type)
    have = path.stat().st_size if path.exists() else 0
    if size - have < shutil.disk_usage(path.parent).free - _DISK_LEFT:
        try:
            with path.open("ab") as file:
                file.truncate(size)
                # Without reserved disk space, a later write to the mapped file could end in SIGBUS.
                os.posix_fallocate(file.fileno(), 0, size)
            return "disk", np.memmap(path, type, "r+", shape=shape)
        except OSError:
            path.unlink(missing_ok=True)
    if size < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4:
        return "memory", np.empty(shape, type)
    return "nowhere", None
