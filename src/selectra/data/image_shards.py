"""Images and their classes in webdataset shards, read as a stream: on a disk, a web server or an object store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from selectra.data.download import Limits
from selectra.data.image_decode import CorruptError, decode, fitted
from selectra.data.image_files import SUFFIXES
from selectra.data.image_listing import Listing
from selectra.data.image_one import OneByOne, paired
from selectra.data.image_views import Augment, ImageBatch
from selectra.data.images import IMAGENET
from selectra.data.shard_index import CLASS, Index, find_shards
from selectra.data.shard_lanes import LaneReader, Read, Reader
from selectra.data.shard_order import Pass, check_lanes, n_batches
from selectra.data.shard_streams import webdataset
from selectra.errors import ConfigError, DataError
from selectra.registry import datasets


class Present:
    """The samples that are in memory now, by number, as a source of images."""

    def __init__(self) -> None:
        self.content: dict[int, bytes] = {}

    def read(self, i: int) -> bytes:
        return self.content[i]


class Names(Sequence[str]):
    """The shard and number of each sample, for messages; keys are known once they are read."""

    def __init__(self, index: Index) -> None:
        self.shards, self.starts = index.shards, np.concatenate([[0], np.cumsum(index.counts)])
        self.keys: dict[int, str] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: Any) -> Any:
        shard = int(np.searchsorted(self.starts, i, "right")) - 1
        key = f" ('{self.keys[i]}')" if i in self.keys else ""
        return f"sample {i - self.starts[shard]}{key} of {self.shards[shard].url}"


@datasets.register("image_shards", kind="image")
class ImageShards:
    """Images in webdataset shards: tar files in which KEY.jpg (or png, webp, ...) stands beside KEY.cls, its class.

    Shards are named by a folder, a pattern such as "train-{0000..0146}.tar", or an index in JSON; they lie on a disk,
    behind http(s), s3 or gs, or are what a command writes ("pipe:COMMAND"). What is not on this machine needs an index,
    which `selectra data shards` writes. Nothing is kept on the disk.

    Args:
        path: Training shards.
        val: Validation shards; None for no validation.
        test: Test shards.
        n_classes: How many classes there are; None as the index says, or one more than the greatest found.
        img_size: Pixels of the sides, or height and width, to which every image is brought.
        in_channels: 1 for grey, 3 for colour.
        corrupt: What to do with samples and shards that cannot be read: name the first and stop, or leave them out,
            count them and write their names into the record. Batches are smaller then; the order is the same.
        standard: Mean and deviation by which channels are standardised: ImageNet's, or 1/2 and 1/2.
        shuffle: Samples that are held in memory, encoded, over all processes, to mix them; shards are shuffled whole.
        lanes: Places of the shards that are read at once for one batch (a multiple of the processes), and sets of them
            that batches take in turn (a multiple of `train.workers`). The order depends on them, on `train.seed` and on
            the pass, and on nothing else.
        timeout: Seconds that a sample may take to come, further attempts included.
        attempts: Connections in a row that may bring nothing.
        crop: As in `images`, and all that follow.
        scale: ...
        flip: ...
        flip_vertical: ...
        randaugment: ...
        erase: ...
        mixup: ...
        cutmix: ...
    """

    def __init__(
        self,
        path: str,
        *,
        val: str | None = None,
        test: str | None = None,
        n_classes: int | None = None,
        img_size: int | tuple[int, int] = 224,
        in_channels: Literal[1, 3] = 3,
        corrupt: Literal["refuse", "skip"] = "refuse",
        standard: Literal["imagenet", "half"] = "imagenet",
        shuffle: int = 8192,
        lanes: tuple[int, int] = (8, 4),
        timeout: float = 60.0,
        attempts: int = 5,
        crop: int = 0,
        scale: float | None = None,
        flip: float = 0.0,
        flip_vertical: float = 0.0,
        randaugment: tuple[int, int] | None = None,
        erase: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        # At once, and not in the middle of a pass.
        webdataset()
        if timeout <= 0 or attempts < 1 or shuffle < 1:
            raise ConfigError(f"timeout={timeout}, attempts={attempts}, shuffle={shuffle}: all are above 0")
        if standard == "imagenet" and in_channels != 3:
            raise ConfigError(f"standard='imagenet' is for 3 channels, not {in_channels}; take 'half'.")
        self.size = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(self.size) < 1:
            raise ConfigError(f"img_size={img_size}: needs at least 1 pixel")
        self.limits = Limits(stall=timeout, total=timeout, attempts=attempts, pause=min(1.0, timeout / 10))
        named = {"train": path, "val": val, "test": test}
        self.in_channels, self.standard, self.skip = in_channels, standard, corrupt == "skip"
        self.parts = {
            part: find_shards(where, self.limits, self.skip) for part, where in named.items() if where is not None
        }
        self.classes = self._classes(n_classes)
        self.shuffle, self.lanes = shuffle, lanes
        self.augment = Augment(crop, scale, flip, flip_vertical, randaugment, erase, mixup, cutmix)

    def _classes(self, n_classes: int | None) -> tuple[str, ...]:
        known = [index.classes for index in self.parts.values() if index.classes is not None]
        found = max(known, key=len, default=None)
        if n_classes is not None:
            return found if found is not None and len(found) == n_classes else tuple(map(str, range(n_classes)))
        if found is None:
            raise ConfigError(f"nothing says how many classes '{self.parts['train'].where}' has; set data.n_classes.")
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """What models are built from."""
        size = self.size[0] if self.size[0] == self.size[1] else self.size
        return {"n_classes": len(self.classes), "in_channels": self.in_channels, "img_size": size}

    @property
    def mean_std(self) -> tuple[Tensor, Tensor]:
        """By which channels are standardised, in shares of 255."""
        if self.standard == "imagenet":
            return torch.tensor(IMAGENET["mean"]), torch.tensor(IMAGENET["std"])
        return torch.full((self.in_channels,), 0.5), torch.full((self.in_channels,), 0.5)

    def windows(self, part: str) -> ShardWindows:
        """A part, read as a stream; the training part shuffled and with augmentation.

        Raises:
            ConfigError: There are no test shards, or there is no such part.
        """
        if part == "val" and part not in self.parts:
            return ShardWindows(self, Index("", (), None), None)
        if part not in self.parts:
            raise ConfigError(f"no shards are named for '{part}'; set data.{part}. There are {sorted(self.parts)}.")
        return ShardWindows(self, self.parts[part], self.augment if part == "train" else None)

    def summary(self) -> list[str]:
        """The set in a few lines."""
        counts = "; ".join(
            f"{part} {int(index.counts.sum()):,} in {len(index.shards):,} shards of {index.where}"
            for part, index in self.parts.items()
        )
        shape = f"{self.in_channels} x {self.size[0]} x {self.size[1]}"
        damage = [f"Left out: {each}" for index in self.parts.values() for each in index.damage]
        return [f"{len(self.classes)} classes, {shape}; images: {counts}", *damage]

    def describe(self) -> dict[str, Any]:
        """What identifies the data, and what using a trained model on new images needs, in JSON's types."""
        mean, std = (each.tolist() for each in self.mean_std)
        return {
            "fingerprint": "-".join(index.digest for index in self.parts.values()),
            "images": int(sum(index.counts.sum() for index in self.parts.values())),
            "classes": list(self.classes), "img_size": list(self.size), "in_channels": self.in_channels,
            "mean": mean, "std": std,
        }  # fmt: skip


class ShardWindows:
    """A part of shards: batches in the order of a pass, or all samples once.

    Args:
        data: Sizes, limits and lanes.
        index: The part's shards.
        augment: How training sees images; None shows them as they are.
    """

    def __init__(self, data: ImageShards, index: Index, augment: Augment | None) -> None:
        self.data, self.index = data, index
        self.present, self.names = Present(), Names(index)
        self.size, self.mean_std = data.size, data.mean_std
        labels = np.zeros(len(self.names), np.int64)
        self.listing = Listing(index.where, data.classes, self.names, labels, None, self.present, index.digest)
        self.views = OneByOne(self, np.arange(len(labels)), augment, ImageBatch)
        self.reader = Reader(index, data.limits, data.skip)
        self.left_out: list[str] = []

    def __len__(self) -> int:
        return len(self.names)

    def read(self, row: int) -> UInt8[Tensor, "c h w"]:
        """One image that is in memory, in the set's size."""
        return fitted(self.raw(row), self.size)

    def raw(self, row: int) -> UInt8[Tensor, "c h w"]:
        """One image that is in memory, in its own size."""
        return decode(self.listing, row, self.data.in_channels)

    def batches_in_pass(self, batch_size: int, size: int, workers: int) -> int:
        """Batches of a pass for each of `size` processes, `batch_size` over all of them."""
        across = self.data.lanes[0]
        check_lanes(self.data.lanes, size, workers, batch_size, len(self))
        if self.views.mixes and batch_size < 2 * across:
            raise ConfigError(
                f"data.mixup and data.cutmix mix images of one lane, of which a batch of {batch_size} over {across} "
                f"lanes has one: take train.batch_size of at least {2 * across}, or fewer lanes with data.lanes."
            )
        return n_batches(len(self), batch_size, size)

    def one_pass(
        self, batch_size: int, share: tuple[int, int], seed: int, epoch: int, skip: int
    ) -> IterableDataset[ImageBatch]:
        """This process's batches of a pass, without the first `skip`.

        Args:
            batch_size: Over all processes.
            share: This process's number, and how many there are.
            seed: Of the order, and with the pass and the image of each image's view.
            epoch: Number of the pass.
            skip: Batches that were taken before.
        """
        order = Pass(self.index.counts, batch_size, self.data.lanes, self.data.shuffle, seed, epoch, share[1])
        self.views.at_pass(epoch, seed)
        return _InOrder(self, order, share[0], skip)

    def once(self, batch_size: int, share: tuple[int, int]) -> Iterator[ImageBatch]:
        """This process's part of all samples, as they lie in the shards."""
        rank, size = share
        begin, end = (len(self) * part // size for part in (rank, rank + 1))
        waiting: list[Read] = []
        for read in self.reader.span(begin, end):
            waiting.append(read)
            if len(waiting) == batch_size:
                yield from self.some(waiting)
                waiting = []
        yield from self.some(waiting)

    def some(self, reads: Sequence[Read], lanes: Sequence[int] | None = None) -> Iterator[ImageBatch]:
        """A batch of what can be read of some samples; none where nothing can.

        Args:
            lanes: Where each comes from: images are mixed with the next of their lane, which one process has all of.
        """
        kept = [(number, lane) for read, lane in zip(reads, lanes or [0] * len(reads), strict=True)
                if (number := self._keep(read)) is not None]  # fmt: skip
        by_lane = {lane: [number for number, other in kept if other == lane] for _, lane in kept}
        following = {pair[0]: pair for numbers in by_lane.values() for pair in paired(numbers)}
        try:
            if kept:
                yield self.views[[following[number] for number, _ in kept]]
        finally:
            self.present.content.clear()
            self.names.keys.clear()

    def _keep(self, read: Read) -> int | None:
        """Take a sample into memory; with corrupt="skip" only one that can be decoded."""
        if read.sample is None:
            self.left_out.append(f"{self.names[read.number]}: {read.reason}")
            return None
        self.names.keys[read.number] = read.sample.key
        try:
            self.present.content[read.number] = self._image(read)
            self.listing.labels[read.number] = self._label(read)
            if self.data.skip:
                self.raw(read.number)
        except CorruptError as error:
            if not self.data.skip:
                raise
            self.left_out.append(str(error))
            return None
        return read.number

    def _image(self, read: Read) -> bytes:
        assert read.sample is not None
        files = read.sample.files
        found = next((name for name in files if f".{name.rpartition('.')[2]}" in SUFFIXES), None)
        if found is None:
            raise CorruptError(f"{self.names[read.number]} has no image; it has {sorted(files)}.")
        return files[found]

    def _label(self, read: Read) -> int:
        assert read.sample is not None
        said = read.sample.files.get(CLASS, b"").decode(errors="replace").strip()
        if not said.isdigit() or int(said) >= len(self.listing.classes):
            raise CorruptError(
                f"{self.names[read.number]} has the class {said!r} (file .{CLASS}); "
                f"it must be a number from 0 to {len(self.listing.classes) - 1}."
            )
        return int(said)


class _InOrder(IterableDataset[ImageBatch]):
    """One process's batches of a pass; a loader's worker makes every so manieth of them."""

    def __init__(self, windows: ShardWindows, order: Pass, rank: int, skip: int) -> None:
        super().__init__()
        self.windows, self.order, self.rank, self.skip = windows, order, rank, skip

    def __iter__(self) -> Iterator[ImageBatch]:
        worker = get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        readers: dict[tuple[int, int], LaneReader] = {}
        try:
            for number in range(self.skip + first, self.order.batches, every):
                yield self._batch(number, readers)
        finally:
            for reader in readers.values():
                reader.close()

    def _batch(self, number: int, readers: dict[tuple[int, int], LaneReader]) -> ImageBatch:
        turn, wanted = self.order.share(number, self.rank)
        reads = []
        for across, begin in wanted:
            reader = readers.get((turn, across))
            if reader is None:
                lane = self.order.lane(turn, across)
                reader = readers[turn, across] = LaneReader(self.windows.reader, self.order, lane, begin)
            assert reader.given == begin
            reads.append(reader.take())
        for batch in self.windows.some(reads, [across for across, _ in wanted]):
            return batch
        reason = self.windows.left_out[-1]
        raise DataError(f"no sample of batch {number} can be read: {reason} Only a larger train.batch_size helps.")
