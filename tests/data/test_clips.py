"""Videos in folders: frames, sampling, crops, and files that are damaged, cut off or too short."""

import importlib
import zipfile
from fractions import Fraction

import numpy as np
import pytest
import torch

from selectra.data.clip_batches import Sampling
from selectra.data.clip_files import FaultyClipError, Video, write_clip
from selectra.data.clips import Clips, covering_crops, random_crop
from selectra.errors import ConfigError, DataError
from selectra.registry import datasets
from selectra.spec import Spec

pytest.importorskip("av")


def ramp(length, height=32, width=48, first=0):
    """Frame i has the grey 10 i + first, and brighter columns on the right."""
    level = torch.arange(length)[:, None, None, None] * 10 + first
    return (level + torch.linspace(0, 20, width)).expand(length, 3, height, width).to(torch.uint8)


def write_late(path, frames, codec, b_frames=0, first=0):
    """With frames that are stored before those that they follow, or a first one that is not shown at once."""
    av = importlib.import_module("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt, stream.bit_rate, stream.codec_context.max_b_frames = "yuv420p", 400_000, b_frames
        for i, each in enumerate(frames.permute(0, 2, 3, 1).contiguous().numpy()):
            frame = av.VideoFrame.from_ndarray(each, format="rgb24")
            frame.pts, frame.time_base = first + i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("name", "codec", "b_frames"),
    [
        ("a.avi", "mpeg4", 0), ("a.mkv", "ffv1", 0), ("a.mp4", "mpeg4", 0), ("a.npy", "", 0), ("a.wmv", "wmv2", 0),
        ("a.mpg", "mpeg1video", 0), ("a.mpg", "mpeg2video", 0), ("a.avi", "mpeg4", 2), ("a.mp4", "mpeg4", 2),
        ("a.mpg", "mpeg1video", 2), ("a.mpg", "mpeg2video", 2),
    ],
)  # fmt: skip
def test_frames_are_those_that_were_written(tmp_path, name, codec, b_frames):
    frames = ramp(20)
    if b_frames:
        write_late(tmp_path / name, frames, codec, b_frames)
    else:
        write_clip(tmp_path / name, frames, rate=25, codec=codec)
    video = Video(tmp_path / name, name)
    assert len(video) == 20
    wanted = [0, 19, 7, 7, 12]
    found = video.frames(wanted)
    assert found.shape == (5, 3, 32, 48) and found.dtype == torch.uint8
    tolerance = 0 if codec in ("ffv1", "") else 4
    assert (found.int() - frames[wanted].int()).abs().max() <= tolerance
    # Of bytes, as from a zip file, and from the middle on.
    assert torch.equal(Video((tmp_path / name).read_bytes(), name).frames([12]), found[4:])


@pytest.mark.parametrize(
    ("length", "sampling", "expected"),
    [
        (16, Sampling("uniform", 4), [[2, 6, 10, 14]]),
        (16, Sampling("uniform", 4, views=2), [[1, 5, 9, 13], [3, 7, 11, 15]]),
        (10, Sampling("uniform", 4), [[1, 3, 6, 8]]),
        (4, Sampling("uniform", 4), [[0, 1, 2, 3]]),
        (20, Sampling("dense", 4, 3), [[5, 8, 11, 14]]),
        (20, Sampling("dense", 4, 3, views=3), [[0, 3, 6, 9], [5, 8, 11, 14], [10, 13, 16, 19]]),
        (10, Sampling("dense", 4, 3, views=2), [[0, 3, 6, 9], [0, 3, 6, 9]]),
    ],
)
def test_clips_of_a_test_video(length, sampling, expected):
    assert sampling.views_of(length) == expected


@pytest.mark.parametrize("kind", ["uniform", "dense"])
def test_training_clips_never_fall_and_reach_all_frames(kind):
    sampling, draw = Sampling(kind, 4, 3), np.random.default_rng(0)
    clips = [sampling.training(13, draw.random(4)) for _ in range(200)]
    assert {frame for clip in clips for frame in clip} == set(range(13))
    steps = np.diff(clips, axis=1)
    assert (steps == 3).all() if kind == "dense" else (steps >= 0).all()


def clips_of(path, **options) -> Clips:
    return datasets.build(Spec("clips", path=str(path), **options))


def write_set(root, length=12, each=4, suffix="npy"):
    for label, name in enumerate(("dark", "light")):
        for i in range(each):
            path = root / name / f"{i}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_clip(path, ramp(length, first=100 * label + i))
    return root


def test_a_folder_becomes_clips(tmp_path):
    clips = Clips(str(write_set(tmp_path)), n_frames=4, img_size=16, val=0.25, test=0.25, views=2, crops=3)
    assert clips.facts == {"n_classes": 2, "in_channels": 3, "img_size": 16, "n_frames": 4}
    assert clips.summary()[0].endswith("uniform clips of 4 x 16 x 16; videos: train 4, val 2, test 2")
    train, test = clips.windows("train"), clips.windows("test")
    batch = train[[0, 3]]
    assert batch.x.shape == (2, 3, 4, 16, 16) and batch.y.tolist() == [0, 1]
    train.at_pass(1, 0)
    assert not torch.equal(train[[0, 3]].x, batch.x)
    train.at_pass(0, 0)
    assert torch.equal(train[[3]].x[0], batch.x[1])
    # Six clips of each video, its crops from left to right.
    seen = test[[0, 1]]
    assert seen.x.shape == (12, 3, 4, 16, 16) and seen.y.tolist() == [0, 1]
    means = seen.x.mean((1, 2, 3, 4)).view(2, 2, 3)
    assert (means.diff(dim=2) > 0).all() and (means[:, 1] > means[:, 0]).all() and (means[1] > means[0]).all()
    assert clips.describe()["views"] == 2


def test_a_zip_file_of_videos_is_read_too(tmp_path):
    root = write_set(tmp_path / "set", suffix="avi")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in root.rglob("*.avi"):
            archive.write(path, path.relative_to(root))
    sizes = {"n_frames": 3, "img_size": 16}
    both = [clips_of(each, **sizes).windows("train")[[0]].x for each in (root, tmp_path / "set.zip")]
    assert torch.equal(*both)


def cut(path, share=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


@pytest.mark.parametrize(
    ("suffix", "reason"),
    [("mp4", "dark/0.mp4"), ("avi", "cut off|dark/0.avi"), ("mkv", "cut off"), ("npy", "dark/0.npy")],
)
def test_cut_off_files_are_named_and_left_out_where_asked(tmp_path, suffix, reason):
    root = write_set(tmp_path, length=30, suffix=suffix)
    cut(root / "dark" / f"0.{suffix}")
    sizes = {"n_frames": 4, "img_size": 16, "test": 0.25, "val": 0}
    clips = clips_of(root, **sizes)
    with pytest.raises(FaultyClipError, match=reason):
        [clips.windows(part)[[i]] for part in ("train", "test") for i in range(len(clips.windows(part)))]
    kept = clips_of(root, faulty="skip", **sizes)
    assert sum(len(kept.windows(part)) for part in ("train", "test")) == 7
    assert "left out" in kept.summary()[-1]
    (root / "dark" / f"0.{suffix}").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=f"dark/0.{suffix}"):
        clips_of(root, **sizes).video(0)


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize(("suffix", "codec"), [("gif", "gif"), ("webm", "libvpx"), ("mkv", "ffv1"), ("mp4", "mpeg4")])
def test_short_files_that_are_cut_off_are_refused(tmp_path, suffix, codec, share):
    path = tmp_path / f"a.{suffix}"
    write_clip(path, ramp(20), rate=25, codec=codec)
    assert len(Video(path, path.name)) == 20
    cut(path, share)
    for content in (path, path.read_bytes()):
        with pytest.raises(FaultyClipError, match=rf"'a.{suffix}' cannot be read"):
            Video(content, path.name)


def test_a_file_that_begins_late_is_whole(tmp_path):
    for name, codec in (("a.mkv", "libvpx"), ("a.mp4", "mpeg4")):
        write_late(tmp_path / name, ramp(20), codec, first=30)
        assert (Video(tmp_path / name, name).frames([13]).int() - ramp(20)[[13]].int()).abs().max() <= 4


def test_short_videos_are_named_left_out_or_held(tmp_path):
    root = write_set(tmp_path)
    write_clip(root / "dark" / "0.npy", ramp(3))
    sizes = {"n_frames": 4, "img_size": 16, "test": 0.25, "val": 0, "sampling": "dense", "stride": 2}
    with pytest.raises(DataError, match=r"dark/0.npy' has 3 frames, and a dense clip of 4 needs 7"):
        clips_of(root, **sizes).video(0)
    left = clips_of(root, short_clips="skip", **sizes)
    assert sum(len(left.windows(part)) for part in ("train", "test")) == 7
    holding = clips_of(root, short_clips="hold", **sizes)
    row = next((part, i) for part in ("train", "test") for i, r in enumerate(holding.rows[part]) if r == 0)
    x = holding.windows(row[0])[[row[1]]].x
    assert torch.equal(x[0, :, 2], x[0, :, 3]) and not torch.equal(x[0, :, 0], x[0, :, 1])


def test_crops_cover_and_keep_their_shape():
    frames = ramp(2, 20, 40)
    crops = covering_crops(frames, (10, 10), 3)
    assert [crop.shape for crop in crops] == [(2, 3, 10, 10)] * 3
    assert torch.equal(covering_crops(frames, (20, 20), 1)[0], frames[..., 10:30])
    whole = random_crop(frames, (20, 40), np.array([1.0, 0.5, 0, 0, 0.9]), 1.0, 0.5)
    mirrored = random_crop(frames, (20, 40), np.array([1.0, 0.5, 0, 0, 0.1]), 1.0, 0.5)
    assert torch.equal(mirrored, whole.flip(-1))


def test_what_is_no_set_of_videos_is_refused(tmp_path):
    with pytest.raises(DataError, match="no folder or zip"):
        Clips(str(tmp_path / "none"))
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"outside of a class's folder, 'a.mp4'"):
        Clips(str(tmp_path))
    write_set(tmp_path / "set")
    for wrong in ({"n_frames": 0}, {"scale": 0}, {"stride": 0}, {"img_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            clips_of(tmp_path / "set", **wrong)
    np.save(tmp_path / "set" / "dark" / "0.npy", np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(DataError, match=r"shape \(t, h, w, 3\)"):
        Clips(str(tmp_path / "set"), n_frames=2).video(0)


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    write_clip(tmp_path / "a.avi", ramp(4))

    def absent(name):
        raise ModuleNotFoundError(name="av")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"selectra\[video\]"):
        Video(tmp_path / "a.avi", "a.avi")
