"""The videos of each class of which a trained model of clips is surest and least sure."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from selectra.classifier.clip_cases import clip_cases_of, strip_of
from selectra.classifier.clips import clip_model_from_run, predict_clips
from selectra.cli import app
from selectra.data.clip_files import write_clip
from selectra.data.moving_shapes import CLASSES, MEAN, STD, MovingShapes
from selectra.report.clip_cases import ClipCase, ClipCases, page

RUN = CliRunner()
PLAIN = ["train.batch_size=6", "train.precision=float32", "train.device=cpu", "train.threads=1", "train.steps=2"]


def call(*words):
    found = RUN.invoke(app, [str(word) for word in words])
    return found.exit_code, " ".join(f"{found.output} {found.exception!r}".split())


def in_folders(root: Path, count: int) -> Path:
    """Drawn clips as files: CLASS/NUMBER.npy."""
    clips = MovingShapes(train=count).windows("train").make(list(range(count)), 0, "cpu")
    for i, (clip, label) in enumerate(zip(clips.x, clips.y.tolist(), strict=True)):
        path = root / CLASSES[label] / f"{i}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, ((clip * STD + MEAN) * 255).round().to(torch.uint8).transpose(0, 1))
    return root


def test_a_strip_is_of_the_middle_clip_from_first_to_last_frame():
    """Two places of three crops; each frame of a clip has a value of its own."""
    clips = torch.arange(6.0)[:, None, None, None, None] * 10 + torch.arange(8.0)[:, None, None]
    pixels, numbers = strip_of((clips.expand(6, 3, 8, 2, 4) / 255 - 0.5) / 0.25, 2, (0.5,) * 3, (0.25,) * 3)
    assert numbers == (1, 3, 6, 8) and pixels.shape == (4, 2, 4, 3) and pixels.dtype == np.uint8
    assert pixels[:, 0, 0, 0].tolist() == [40, 42, 45, 47]
    assert strip_of(clips[:1, :, :2].expand(1, 3, 2, 2, 4), 1, (0.0,) * 3, (1.0,) * 3)[1] == (1, 2)


def test_the_page_holds_everything_and_escapes_names():
    frames = np.full((4, 16, 16, 3), 90, np.uint8)
    right = ClipCase("a/b.mp4", frames, (1, 3, 6, 8), "a<b", 0.9, 0.9)
    wrong = ClipCase("c.mp4", frames, (1, 3, 6, 8), "other", 0.75, 0.125)
    confusion = np.array([[1, 2, 0], [0, 1, 0], [0, 0, 0]])
    found = ClipCases("run", "m", "d/set", "test", 8, ("a<b", "other", "absent"), confusion,
                      (((right,), (wrong,)), ((), ()), ((), ())))  # fmt: skip
    text = page(found)
    assert text.count("data:image/jpeg;base64,") == 8 and "a&lt;b" in text and "a<b" not in text
    assert "Correct on 50.0% of 4 videos: best at “other” (100%), worst at “a&lt;b” (33%)." in text
    assert "correct: “a&lt;b” (90.0%)" in text
    assert "wrong: taken for “other” (75.0%)" in text and "“a&lt;b” itself: 12.5%" in text
    assert "other (2)" in text and "does not occur" in text and "No video of this part is of this class." in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)


def test_drawn_clips_get_their_page(tmp_path):
    run = tmp_path / "run"
    words = ["model=videomamba_clip_smoke", "data.train=12", "data.val=6", "data.test=31", *PLAIN]
    assert call("train", "videomamba_shapes", *words, "--out", run)[0] == 0
    code, said = call("eval", run, "--page")
    assert code == 0 and "test_cases.html" in said
    text = (run / "test_cases.html").read_text("utf-8")
    assert "of 31 videos" in text and text.count("<h3>Best</h3>") == text.count("<h3>Worst</h3>") == 6
    assert text.count("data:image/jpeg;base64,") == 6 * 4 * 4
    found = clip_cases_of(run, "test", torch.device("cpu"))
    metrics = json.loads((run / "test.json").read_text())["metrics"]
    assert np.trace(found.confusion) / found.confusion.sum() == pytest.approx(metrics["top1"])
    assert found.confusion.sum(1).tolist() == [6, 5, 5, 5, 5, 5]
    for number, (best, worst) in enumerate(found.cases):
        assert best[0].own >= best[1].own >= worst[1].own >= worst[0].own
        for case in (*best, *worst):
            # Its number is that of a clip of this class, whose frames are shown.
            i = int(case.name.removeprefix("clip ")) - 1
            assert i % len(CLASSES) == number
            clip = MovingShapes(test=31).windows("test").make([i], 0, "cpu").x[0]
            shown = ((clip * STD + MEAN) * 255).round().clamp(0, 255).numpy()[:, [0, 2, 5, 7]]
            assert (case.frames == shown.transpose(1, 2, 3, 0)).all() and case.numbers == (1, 3, 6, 8)


def test_a_folder_of_videos_gets_its_page(tmp_path):
    folder, run = in_folders(tmp_path / "set", 48), tmp_path / "run"
    data = ["data=clips", f"data.path={folder}", "data.n_frames=4", "data.img_size=16", "data.views=2", "data.crops=3"]
    words = ["model=videomamba_clip_smoke", *data, "data.val=0.25", "data.test=0.5", *PLAIN]
    code, said = call("train", "videomamba_shapes", *words, "--out", run)
    assert code == 0, said
    assert call("eval", run, "--page")[0] == 0
    text = (run / "test_cases.html").read_text("utf-8")
    assert "on the test part of set." in text and ".npy" in text
    found = clip_cases_of(run, "test", torch.device("cpu"))
    trained = clip_model_from_run(run)
    for number, (best, worst) in enumerate(found.cases):
        for case in (*best, *worst):
            path = folder / found.classes[number] / Path(case.name).name
            (told,) = predict_clips(trained, [path], top=6)
            assert told.classes[0] == case.found and told.probabilities[0] == pytest.approx(case.probability, rel=1e-4)
            own = dict(zip(told.classes, told.probabilities, strict=True))[found.classes[number]]
            assert own == pytest.approx(case.own, rel=1e-4)
    # Training's random views are none of evaluation's: two looks at the part are the same.
    once, again = (clip_cases_of(run, "train", torch.device("cpu")) for _ in range(2))
    assert (once.cases[0][0][0].frames == again.cases[0][0][0].frames).all()
