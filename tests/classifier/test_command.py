"""`selectra predict` and `selectra explain` as they are typed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from selectra.cli import main
from tests.data.pictures import deep

Make = Callable[..., Path]


def _run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code if isinstance(stop.value.code, int) else -1


def test_predict_shows_the_likeliest_classes(
    make_run: Make, make_image: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    words = ["predict", make_image(), bad, "--run", make_run(), "--device", "cpu"]
    assert _run(*words) == 2
    assert "bad.png' cannot be read as an image" in capsys.readouterr().err
    assert _run(*words, "--skip-corrupt", "--top", 3) == 0
    shown = capsys.readouterr().out
    assert "6 classes" in shown and "probability" in shown and shown.count("%") == 3
    assert "left out" in shown
    assert _run("predict", bad, "--run", tmp_path / "vmamba_smoke", "--device", "cpu", "--skip-corrupt") == 2
    assert "none of the files could be read" in capsys.readouterr().err


def test_files_that_the_model_cannot_take_are_left_out_like_damaged_ones(
    make_run: Make, make_image: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, deep_, run = make_image("small.png", 9, 3), tmp_path / "deep.png", make_run()
    deep_.write_bytes(deep())
    np.save(tmp_path / "five.npy", np.zeros((16, 16, 5), np.uint8))
    bad = {small: "9 x 3 pixels (width x height), smaller than the 4 x 4", deep_: "has more than 8 bits a channel",
           tmp_path / "five.npy": "has 5 channels, and in_channels is 3"}  # fmt: skip
    for path, said in bad.items():
        assert _run("predict", path, make_image(), "--run", run, "--device", "cpu") == 2
        shown = " ".join(capsys.readouterr().err.split())
        assert said in shown and "go on without such files: --skip-corrupt." in shown
    assert _run("predict", *bad, make_image(), "--run", run, "--device", "cpu", "--skip-corrupt", "--top", 3) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("left out: ") == 3 and all(said in shown for said in bad.values()) and shown.count("%") == 3
    # A file that is not there is a slip of the pen.
    assert _run("predict", tmp_path / "absent.png", make_image(), "--run", run, "--skip-corrupt") == 2


def test_explain_draws_a_picture(
    make_run: Make, make_image: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "what.png"
    assert _run("explain", make_image(), "--run", make_run(), "--class", "frog", "--out", out) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "“frog”" in shown and "without one scan direction" in shown and str(out) in shown.replace("\n", "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "name a trained model: --run FOLDER"),
        (["--model", "vim_smoke"], "name a trained model"),
        (["--run", "x", "--model", "vim_smoke", "--img-size", "32"], "leave --model and --img-size out"),
        (["--run", "nowhere"], "there is no 'nowhere"),
        (["--model", "vim_smok", "--weights", "w.pth"], "Did you mean 'vim_smoke'"),
        (["--model", "vim_smoke", "--weights", "w.pth"], "there is no file 'w.pth'"),
    ],
)
def test_a_model_must_be_named(
    options: list[str], words: str, make_image: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("predict", "explain"):
        assert _run(command, make_image(), *options) == 2
        assert words in capsys.readouterr().err
