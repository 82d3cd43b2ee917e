"""`selectra predict` and `selectra explain` as they are typed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from selectra.cli import main

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
