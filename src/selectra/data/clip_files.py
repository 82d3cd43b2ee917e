"""Frames of video files, by PyAV (FFmpeg), and of arrays; what is damaged, cut off or too short is named."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from selectra.errors import ConfigError, DataError

SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".gif", ".npy"))
ARRAY = ".npy"
# By FFmpeg's names, containers that hold the time of every frame and are searched by it. In others (AVI, ASF, MPEG
# program streams) times are guessed or are those of decoding, so their frames are counted from the first on.
BY_TIME = frozenset(("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "gif"))
# Containers that hold no length of themselves: FFmpeg estimates one from what there is.
SILENT = frozenset(("gif", "mpeg", "mpegvideo", "mpegts"))
# By how much the last frame may end before the time that a file says of itself: frames, but at least so many seconds;
# and seconds where the time between frames is not known, or the length said is that of another stream, too.
SLACK_FRAMES, LEAST_SLACK, SLACK = 2, 0.05, 0.5
GIF_END = b"\x3b"
REMEDY = "Remove or replace it, or leave such files out with data.faulty=skip."
Content = Path | bytes


class FaultyClipError(DataError):
    """A file that is damaged, cut off, or no video."""


class ShortClipError(DataError):
    """A video of fewer frames than a clip needs."""


def pyav() -> Any:
    """PyAV.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("av")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"video files need {error.name}, which is not installed: pip install 'selectra[video]'."
        ) from error


@dataclass(frozen=True)
class Clock:
    """When the frames of a video are shown.

    Args:
        times: Of every frame, in the stream's ticks, rising; numbers where frames are counted.
        seekable: Of the frames that can be decoded without those before them, rising.
    """

    times: np.ndarray[Any, np.dtype[np.int64]]
    seekable: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.times)


class _Packets:
    """What the packets of a stream say, in its ticks."""

    def __init__(self) -> None:
        self.times: list[int] = []
        self.alone: list[int] = []
        self.ends, self.count, self.decoded = 0, 0, 0

    def add(self, packet: Any, decode: bool) -> None:
        self.decoded += len(packet.decode()) if decode else 0
        if packet.size == 0:
            return
        self.count += 1
        if packet.pts is None:
            return
        self.times.append(packet.pts)
        self.ends = max(self.ends, packet.pts + (packet.duration or 0))
        if packet.is_keyframe:
            self.alone.append(packet.pts)


class Video:
    """One video: how many frames it has, and those of them that are wanted.

    Args:
        content: A file, or its bytes.
        name: For messages.
        clock: Of an earlier look at the same file; None looks.

    Raises:
        FaultyClipError: It is damaged, cut off or no video.
    """

    def __init__(self, content: Content, name: str, clock: Clock | None = None) -> None:
        self.content, self.name = content, name
        self.array: np.ndarray[Any, Any] | None = _array(content, name) if _is_array(content) else None
        if self.array is not None:
            every = np.arange(len(self.array))
            self.clock = Clock(every, every)
        else:
            self.clock = self._looked() if clock is None else clock

    def __len__(self) -> int:
        return len(self.clock)

    def frames(self, numbers: Sequence[int]) -> UInt8[Tensor, "t c h w"]:
        """Frames by number, in colour.

        Raises:
            FaultyClipError: One of them cannot be decoded.
        """
        if self.array is not None:
            return torch.from_numpy(np.ascontiguousarray(self.array[list(numbers)])).permute(0, 3, 1, 2)
        wanted = sorted(set(numbers))
        found = self._decoded(wanted)
        missing = next((number for number in wanted if number not in found), None)
        if missing is not None:
            raise self._faulty(f"frame {missing} of {len(self)} cannot be decoded")
        return torch.from_numpy(np.stack([found[number] for number in numbers])).permute(0, 3, 1, 2)

    def _decoded(self, wanted: list[int]) -> dict[int, np.ndarray[Any, Any]]:
        av = pyav()
        try:
            with self._open() as container:
                read = self._by_time if container.format.name in BY_TIME else self._by_order
                return read(container, wanted)
        except (av.error.FFmpegError, EOFError) as error:
            raise self._faulty(str(error)) from error

    def _by_order(self, container: Any, wanted: list[int]) -> dict[int, np.ndarray[Any, Any]]:
        """Counted from the first frame on."""
        found: dict[int, np.ndarray[Any, Any]] = {}
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if number in wanted and not frame.is_corrupt:
                found[number] = frame.to_ndarray(format="rgb24")
            if number >= wanted[-1]:
                break
        return found

    def _by_time(self, container: Any, wanted: list[int]) -> dict[int, np.ndarray[Any, Any]]:
        """Forwards from a frame that can be decoded alone, and on to the next such one where there is a gap."""
        numbers = {int(time): i for i, time in enumerate(self.clock.times)}
        found: dict[int, np.ndarray[Any, Any]] = {}
        stream = container.streams.video[0]
        while len(found) < len(wanted):
            first = next(number for number in wanted if number not in found)
            time = int(self.clock.times[first])
            place = int(np.searchsorted(self.clock.seekable, time, side="right")) - 1
            start = int(self.clock.seekable[max(0, place)])
            container.seek(start, stream=stream)
            before = len(found)
            for frame in container.decode(stream):
                number = numbers.get(frame.pts) if frame.pts is not None else None
                if number in wanted and number not in found and not frame.is_corrupt:
                    found[number] = frame.to_ndarray(format="rgb24")
                if frame.pts is not None and self._beyond(frame.pts, wanted, found):
                    break
            if len(found) == before:
                break
        return found

    def _beyond(self, time: int, wanted: list[int], found: dict[int, Any]) -> bool:
        """Whether nothing more is wanted, or a jump to what is wanted next skips frames."""
        left = [number for number in wanted if number not in found]
        if not left:
            return True
        jump = int(np.searchsorted(self.clock.seekable, self.clock.times[left[0]], side="right")) - 1
        return self.clock.times[left[0]] > time and self.clock.seekable[max(0, jump)] > time

    def _looked(self) -> Clock:
        """Reads all packets; decodes them only where frames are counted."""
        av = pyav()
        try:
            with self._open() as container:
                if not container.streams.video:
                    raise self._faulty("it has no pictures")
                stream, by_time, seen = container.streams.video[0], container.format.name in BY_TIME, _Packets()
                said = _said(container, stream)
                for packet in container.demux(stream):
                    if packet.is_corrupt:
                        raise self._faulty("a part of it is damaged")
                    seen.add(packet, decode=not by_time)
                self._require_whole(container, stream, seen, said)
        except (av.error.FFmpegError, EOFError) as error:
            raise self._faulty(str(error)) from error
        if not (seen.alone if by_time else seen.decoded):
            raise self._faulty("it has no frame")
        if not by_time:
            return Clock(np.arange(seen.decoded), np.zeros(1, np.int64))
        return Clock(np.unique(np.array(seen.times, np.int64)), np.unique(np.array(seen.alone, np.int64)))

    def _require_whole(self, container: Any, stream: Any, seen: _Packets, said: float | None) -> None:
        if container.format.name == "gif":
            if not self._tail().rstrip(b"\0").endswith(GIF_END):
                raise self._faulty("it is cut off: a GIF's last byte is missing")
            return
        if stream.frames > seen.count:
            raise self._faulty(f"it is cut off: it says {stream.frames} frames and holds {seen.count}")
        # Matroska's time, which is text, counts from zero, others' from the first frame.
        began = 0 if stream.duration is None else min(seen.times, default=0)
        held = float((seen.ends - began) * (stream.time_base or Fraction(1)))
        if said is not None and held < said - _slack(container, stream):
            raise self._faulty(f"it is cut off: it says {said:.2f} s and holds {held:.2f} s")

    def _tail(self, size: int = 4096) -> bytes:
        if not isinstance(self.content, Path):
            return self.content[-size:]
        with self.content.open("rb") as file:
            file.seek(max(0, self.content.stat().st_size - size))
            return file.read()

    def _open(self) -> Any:
        source = str(self.content) if isinstance(self.content, Path) else io.BytesIO(self.content)
        return pyav().open(source)

    def _faulty(self, reason: str) -> FaultyClipError:
        return FaultyClipError(f"'{self.name}' cannot be read as a video: {reason}. {REMEDY}")


def _slack(container: Any, stream: Any) -> float:
    """Seconds."""
    shared = container.format.name == "asf" and len(container.streams) > 1
    if shared or not stream.average_rate:
        return SLACK
    return max(SLACK_FRAMES / float(stream.average_rate), LEAST_SLACK)


def _said(container: Any, stream: Any) -> float | None:
    """Seconds that the file says of this stream; Matroska has them as text."""
    if container.format.name in SILENT:
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    text = {key.upper(): value for key, value in stream.metadata.items()}.get("DURATION")
    if text is None or text.count(":") != 2:
        return None
    try:
        hours, minutes, seconds = (float(part) for part in text.split(":"))
    except ValueError:
        return None
    return 3600 * hours + 60 * minutes + seconds


def _is_array(content: Content) -> bool:
    return content.suffix.lower() == ARRAY if isinstance(content, Path) else content.startswith(b"\x93NUMPY")


def _array(content: Content, name: str) -> np.ndarray[Any, Any]:
    try:
        source = content if isinstance(content, Path) else io.BytesIO(content)
        pixels = np.load(source, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise FaultyClipError(f"'{name}' cannot be read as an array: {reason}. {REMEDY}") from error
    if pixels.ndim != 4 or pixels.dtype != np.uint8 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise DataError(
            f"'{name}' holds {pixels.dtype} of shape {pixels.shape}; clips are of uint8 and of shape (t, h, w, 3)."
        )
    return pixels


def write_clip(path: Path, frames: UInt8[Tensor, "t c h w"], rate: int = 10, codec: str = "mpeg4") -> None:
    """Write frames as a video file, or as an array where the name ends in .npy.

    Args:
        path: Its suffix says the container.
        frames: In colour; for most codecs of an even height and width.
        rate: Frames a second.
        codec: FFmpeg's name of the encoder, such as "mpeg4", "libx264", or "ffv1", which loses nothing.
    """
    pixels = np.ascontiguousarray(frames.permute(0, 2, 3, 1).numpy())
    if path.suffix.lower() == ARRAY:
        np.save(path, pixels)
        return
    av = pyav()
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = {"ffv1": "bgr0", "gif": "rgb8"}.get(codec, "yuv420p")
        stream.bit_rate = max(400_000, 8 * pixels[0].size)
        for each in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(each, format="rgb24")))
        container.mux(stream.encode())
