"""Videos in folders of classes: clips of their frames for training, and several of each video at test time."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from selectra.data.clip_batches import ClipBatch, Sampling, SamplingKind
from selectra.data.clip_files import SUFFIXES, Clock, FaultyClipError, ShortClipError, Video
from selectra.data.image_draws import keys, uniforms
from selectra.data.image_files import Mixed, list_folder
from selectra.data.image_split import Rows, split_images
from selectra.data.image_views import CROP_RATIO
from selectra.data.images import IMAGENET
from selectra.errors import ConfigError, DataError
from selectra.registry import datasets

Crops = Literal[1, 3]
Short = Literal["refuse", "skip", "hold"]
# Draws of a training clip beside one for each frame: size, shape and place of its crop, and whether it is mirrored.
N_VIEW = 5


@datasets.register("clips", kind="video")
class Clips:
    """Videos in folders of classes, or in zip files of such; frames are decoded by PyAV when they are asked for.

    Layouts: CLASS/NAME.mp4, or PART/CLASS/NAME.mp4 with the parts train, val and test. Arrays (t, h, w, 3) of bytes in
    .npy files are taken as they are.

    Args:
        path: A folder or zip file.
        n_frames: Frames of a clip.
        img_size: Pixels of a clip's sides, or height and width.
        sampling: "uniform": frames from all of a video; "dense": frames at a fixed distance from somewhere in it.
        stride: Frames of the video from one of a dense clip to the next.
        views: Clips of each video in validation and test; their probabilities are averaged.
        crops: Of each of these the middle, or three crops along the longer side.
        scale: Training: least share of a frame that a crop of random size and shape keeps.
        flip: Training: share of clips that are mirrored left to right; 0 where a class is a direction.
        val: Share of the training videos of each class that validate, where the set has no part for that; 0 for none.
        test: Share of the videos of each class that test, where the set has no part for that.
        split_seed: Of these draws.
        faulty: What to do with damaged files: name the first and stop, or leave them out and count them.
        short_clips: What to do with videos of fewer frames than a clip needs: name the first and stop, leave them out
            and count them, or hold their last frame.
        standard: Mean and deviation by which channels are standardised: ImageNet's, or 1/2 and 1/2.
    """

    in_channels = 3

    def __init__(
        self,
        path: str,
        *,
        n_frames: int = 8,
        img_size: int | tuple[int, int] = 224,
        sampling: SamplingKind = "uniform",
        stride: int = 4,
        views: int = 1,
        crops: Crops = 1,
        scale: float = 0.5,
        flip: float = 0.0,
        val: float = 0.1,
        test: float = 0.2,
        split_seed: int = 0,
        faulty: Literal["refuse", "skip"] = "refuse",
        short_clips: Short = "refuse",
        standard: Literal["imagenet", "half"] = "imagenet",
    ) -> None:
        self.size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        if min(self.size) < 1 or not 0 < scale <= 1 or not 0 <= flip <= 1 or not (0 <= val < 1 and 0 < test < 1):
            raise ConfigError(
                f"img_size={img_size}, scale={scale}, flip={flip}, val={val}, test={test}: at least 1 pixel, shares "
                "from 0 to 1, scale and test above 0, val and test below 1"
            )
        root = Path(path).expanduser()
        if not root.is_dir() and root.suffix != ".zip":
            raise DataError(f"there are no videos at '{path}': it is no folder or zip file.")
        self.listing = list_folder(root, SUFFIXES, "video", "mp4")
        self.rows = split_images(self.listing, val, test, None, split_seed)
        self.sampling = Sampling(sampling, n_frames, stride, views)
        self.crops: Crops = crops
        self.short_clips: Short = short_clips
        self.scale, self.flip, self.faulty = scale, flip, faulty
        self.mean_std = tuple(
            torch.tensor(IMAGENET[name] if standard == "imagenet" else (0.5,) * 3) for name in ("mean", "std")
        )
        self._clocks: dict[int, Clock] = {}
        self._readable: dict[str, Rows] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of labels."""
        return self.listing.classes

    @property
    def facts(self) -> dict[str, Any]:
        """What models are built from."""
        size = self.size[0] if self.size[0] == self.size[1] else self.size
        return {
            "n_classes": len(self.classes), "in_channels": self.in_channels, "img_size": size,
            "n_frames": self.sampling.n_frames,
        }  # fmt: skip

    def video(self, row: int) -> Video:
        """One video; how many frames it has is looked up once.

        Raises:
            FaultyClipError: It is damaged.
            ShortClipError: It has too few frames, and the last one is not to be held.
        """
        source = self.listing.source
        assert isinstance(source, Mixed)
        content = source.files.paths[int(source.at[row])] if source.kinds[row] else source.read(row)
        video = Video(content, self.listing.names[row], self._clocks.get(row))
        self._clocks[row] = video.clock
        require_length(video, self.sampling, self.short_clips)
        return video

    def readable(self, part: str) -> Rows:
        """The numbers of a part's videos; where some are to be left out, a clip of each is tried once."""
        if part not in self._readable:
            rows = self.rows[part]
            some = self.faulty == "skip" or self.short_clips == "skip"
            kept = [row for row in rows if self._serves(int(row))] if some else rows
            self._readable[part] = np.asarray(kept, np.int64)
        return self._readable[part]

    def _serves(self, row: int) -> bool:
        try:
            video = self.video(row)
            video.frames(held(self.sampling.views_of(max(len(video), self.sampling.least))[0], len(video)))
        except ShortClipError:
            if self.short_clips == "refuse":
                raise
            return False
        except FaultyClipError:
            if self.faulty == "refuse":
                raise
            return False
        return True

    def windows(self, part: str) -> ReadClips:
        """A part, in batches by lists of numbers; the training part with random frames and crops."""
        if part not in self.rows:
            raise ConfigError(f"there is no part '{part}'; there are {sorted(self.rows)}.")
        return ReadClips(self, self.readable(part), part == "train")

    def summary(self) -> list[str]:
        """The set in a few lines."""
        counts = ", ".join(f"{part} {len(self.rows[part]):,}" for part in ("train", "val", "test"))
        seen = " x ".join(map(str, (self.sampling.n_frames, *self.size)))
        lines = [
            f"{self.listing.where}: {len(self.classes)} classes, {self.sampling.kind} clips of {seen}; videos: {counts}"
        ]
        if self.listing.ignored:
            lines.append(f"{self.listing.ignored} other files are not read.")
        if "skip" in (self.faulty, self.short_clips):
            count = sum(len(self.rows[part]) - len(self.readable(part)) for part in ("train", "val"))
            lines.append(f"{count} damaged or short videos of the training and validation parts are left out.")
        return lines

    def describe(self) -> dict[str, Any]:
        """What identifies the data, and what using a trained model on new clips needs, in JSON's types."""
        rows = hashlib.sha256(b"".join(self.rows[part].tobytes() for part in ("train", "val", "test")))
        mean, std = (each.tolist() for each in self.mean_std)
        return {
            "fingerprint": f"{self.listing.digest}-{rows.hexdigest()[:8]}",
            "clips": len(self.listing.labels),
            "classes": list(self.classes),
            "n_frames": self.sampling.n_frames,
            "sampling": self.sampling.kind,
            "stride": self.sampling.stride,
            "views": self.sampling.views,
            "crops": self.crops,
            "short_clips": self.short_clips,
            "img_size": list(self.size),
            "in_channels": self.in_channels,
            "mean": mean,
            "std": std,
        }


class ReadClips:
    """A part whose videos are opened every time; draws depend on the seed, the pass and the video alone.

    Args:
        clips: Where from.
        rows: The part's videos.
        training: Random frames and crops; otherwise every clip of each video.
    """

    def __init__(self, clips: Clips, rows: Rows, training: bool) -> None:
        self.clips, self.rows, self.training = clips, rows, training
        self.epoch, self.seed = 0, 0

    def __len__(self) -> int:
        return len(self.rows)

    def at_pass(self, number: int, seed: int) -> None:
        """Views of pass `number` of a training with this seed come next."""
        self.epoch, self.seed = number, seed

    def __getitem__(self, indices: list[int]) -> ClipBatch:
        found = [self._one(i) for i in indices]
        labels: Int64[Tensor, " b"] = torch.from_numpy(self.clips.listing.labels[self.rows[indices]])
        return ClipBatch(torch.cat(found), labels)

    def _one(self, i: int) -> Float[Tensor, "v c t h w"]:
        clips, video = self.clips, self.clips.video(int(self.rows[i]))
        mean, std = clips.mean_std
        if not self.training:
            return test_views(video, clips.sampling, clips.size, clips.crops, (mean, std))
        u = (
            uniforms(keys(self.seed, self.epoch, torch.tensor([i])), clips.sampling.n_frames + N_VIEW)[0]
            .double()
            .numpy()
        )
        length = max(len(video), clips.sampling.least)
        frames = video.frames(held(clips.sampling.training(length, u[N_VIEW:]), len(video)))
        return standardised(random_crop(frames, clips.size, u[:N_VIEW], clips.scale, clips.flip), mean, std)[None]


def require_length(video: Video, sampling: Sampling, short: Short) -> None:
    """Refuse a video that is too short for a clip.

    Raises:
        ShortClipError: It has too few frames, and the last one is not to be held.
    """
    if len(video) < sampling.least and short != "hold":
        raise ShortClipError(
            f"'{video.name}' has {len(video)} frames, and a {sampling.kind} clip of {sampling.n_frames} needs "
            f"{sampling.least}: ask for fewer frames (data.n_frames, data.stride), leave such videos out "
            "(data.short_clips=skip), or hold their last frame (data.short_clips=hold)."
        )


def held(numbers: list[int], length: int) -> list[int]:
    """The last frame in place of those that a video has not."""
    return [min(number, length - 1) for number in numbers]


def test_views(
    video: Video, sampling: Sampling, size: tuple[int, int], crops: Crops, mean_std: Any
) -> Float[Tensor, "v c t h w"]:
    """All clips of a video as evaluation sees them: each of its crops, standardised."""
    numbers = [held(each, len(video)) for each in sampling.views_of(max(len(video), sampling.least))]
    every = sorted({number for each in numbers for number in each})
    frames, place = video.frames(every), {number: i for i, number in enumerate(every)}
    views = [frames[[place[number] for number in each]] for each in numbers]
    cut = [crop for view in views for crop in covering_crops(view, size, crops)]
    return torch.stack([standardised(each, *mean_std) for each in cut])


def covering_crops(frames: UInt8[Tensor, "t c H W"], size: tuple[int, int], crops: Crops) -> list[Tensor]:
    """The middle of frames that just cover a size, or three crops along the side that is longer than it."""
    height, width = frames.shape[2:]
    ratio = max(size[0] / height, size[1] / width)
    sides = (max(size[0], round(height * ratio)), max(size[1], round(width * ratio)))
    if sides != (height, width):
        frames = F.interpolate(frames, sides, mode="bilinear", antialias=True)
    rest = (sides[0] - size[0], sides[1] - size[1])
    shares = (0.5,) if crops == 1 else (0.0, 0.5, 1.0)
    places = [(round(rest[0] * share), round(rest[1] * share)) for share in shares]
    return [frames[..., top : top + size[0], left : left + size[1]] for top, left in places]


def random_crop(
    frames: UInt8[Tensor, "t c H W"], size: tuple[int, int], u: np.ndarray[Any, Any], scale: float, flip: float
) -> UInt8[Tensor, "t c h w"]:
    """One crop of random size, shape (3:4 to 4:3) and place, the same in all frames, mirrored or not."""
    height, width = frames.shape[2:]
    area = (scale + (1 - scale) * u[0]) * height * width
    ratio = math.exp((2 * u[1] - 1) * math.log(CROP_RATIO))
    tall, wide = min(height, max(1, round(math.sqrt(area / ratio)))), min(width, max(1, round(math.sqrt(area * ratio))))
    top, left = int(u[2] * (height - tall + 1)), int(u[3] * (width - wide + 1))
    cut = F.interpolate(frames[..., top : top + tall, left : left + wide], size, mode="bilinear", antialias=True)
    return cut.flip(-1) if u[4] < flip else cut


def standardised(frames: UInt8[Tensor, "t c h w"], mean: Tensor, std: Tensor) -> Float[Tensor, "c t h w"]:
    """Frames as a clip, by channel."""
    clip = (frames.float() / 255 - mean[:, None, None]) / std[:, None, None]
    return clip.transpose(0, 1)
