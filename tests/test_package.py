"""The package as a whole: its public names, and what importing it costs."""

import subprocess
import sys

import pytest

import selectra

EXTRAS = ("timm", "torchvision", "torchmetrics", "sklearn", "tokenizers", "optuna", "webdataset", "tensorboard")


@pytest.mark.parametrize("name", selectra.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(selectra, name) is not None
    assert name in dir(selectra)


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(AttributeError, match="it has S6, Bidirectional"):
        selectra.no_such_name  # noqa: B018


def test_importing_everything_public_brings_no_extra_and_no_warning() -> None:
    program = (
        "import sys, selectra\n"
        "for name in selectra.__all__: getattr(selectra, name)\n"
        f"print([m for m in {EXTRAS} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], check=True, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
