"""Trainings of clips in use, from the command line."""

import pytest
import torch
from typer.testing import CliRunner

from selectra.cli import app
from selectra.data.clip_files import write_clip
from selectra.data.moving_shapes import MEAN, STD, MovingShapes

pytest.importorskip("av")
RUN = CliRunner()
SMALL = ["model=videomamba_clip_smoke", "data.train=12", "data.val=6", "data.test=12", "train.steps=2"]
PLAIN = ["train.batch_size=6", "train.precision=float32", "train.device=cpu", "train.threads=1"]


def call(*words):
    found = RUN.invoke(app, [str(word) for word in words])
    return found.exit_code, " ".join(f"{found.output} {found.exception!r}".split())


def test_a_recipe_trains_is_evaluated_and_tells_clips(tmp_path):
    run = tmp_path / "run"
    assert call("train", "videomamba_shapes", *SMALL, *PLAIN, "--out", run)[0] == 0
    code, said = call("eval", run)
    assert code == 0 and "top1" in said
    clip = MovingShapes().windows("test").make([0], 0, "cpu").x[0]
    frames = ((clip * STD + MEAN) * 255).round().to(torch.uint8).transpose(0, 1)
    for name in ("clip.npy", "clip.avi"):
        write_clip(tmp_path / name, frames)
    write_clip(tmp_path / "short.npy", frames[:3])
    code, said = call(
        "predict", tmp_path / "clip.npy", tmp_path / "clip.avi", "--run", run, "--top", 6, "--device", "cpu"
    )
    assert code == 0 and "clockwise" in said and "video" in said
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    code, said = call("predict", broken, tmp_path / "clip.npy", tmp_path / "short.npy", "--run", run, "--skip-corrupt")
    assert code == 0 and "left out" in said and "broken.mp4" in said and "has 3 frames" in said
    assert "data." not in said
    for name in ("broken.mp4", "short.npy"):
        code, said = call("predict", tmp_path / name, "--run", run)
        # The settings of a training are no way out here.
        assert code != 0 and "--skip-corrupt" in said and "data." not in said
    code, said = call("predict", tmp_path / "absent.mp4", "--run", run)
    assert code != 0
    code, said = call("predict", tmp_path / "clip.npy", "--run", run, "--window", 64)
    assert code != 0


def test_a_folder_of_videos_trains(tmp_path):
    clips = MovingShapes(train=24).windows("train").make(list(range(24)), 0, "cpu")
    for i, (clip, label) in enumerate(zip(clips.x, clips.y.tolist(), strict=True)):
        path = tmp_path / "set" / str(label) / f"{i}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, ((clip * STD + MEAN) * 255).round().to(torch.uint8).transpose(0, 1))
    data = ["data=clips", f"data.path={tmp_path / 'set'}", "data.n_frames=4", "data.img_size=16", "data.views=2"]
    split = ["data.val=0.25", "data.test=0.25"]
    run = tmp_path / "run"
    words = ["model=videomamba_clip_smoke", "train.steps=2", *data, *split, *PLAIN]
    code, said = call("train", "videomamba_shapes", *words, "--out", run)
    assert code == 0, said
    assert call("eval", run)[0] == 0
    code, said = call("predict", next((tmp_path / "set" / "3").iterdir()), "--run", run, "--top", 2)
    assert code == 0, said
