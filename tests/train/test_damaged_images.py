"""A training that meets an image that cannot be read."""

import json
from pathlib import Path

import pytest
import torch

from selectra.cli import main
from selectra.data import image_check
from selectra.data.images import Images
from selectra.spec import Train
from selectra.train.batches import TrainingOrder
from selectra.train.parallel import World
from tests.data.pictures import names, write_folder


def command(*words: str) -> object:
    torch.set_num_threads(1)
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code


def test_a_training_that_met_a_damaged_file_goes_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """As its error advises; what it has learned is not lost."""
    files = names("train", 12) | names("val", 3, 40) | names("test", 3, 50)
    root, out = write_folder(tmp_path / "set", files), tmp_path / "out"
    words = ["train", "vmamba_smoke", "data=images", f"data.path={root}", "data.keep=disk", "data.standard=half"]
    words += ["model.dims=8,16", "model.depths=1,1", "model.patch_size=2", "model.d_state=2", "train.steps=15"]
    words += ["train.batch_size=4", "train.eval_every=2", "train.device=cpu", "--out", str(out)]
    # The image that comes in the eighth of nine steps of the first pass; a header check would find it before.
    images = Images(str(root))
    sampler = TrainingOrder(images.windows("train"), Train(steps=15, batch_size=4), World()).sampler
    sampler.set_epoch(0)
    late = images.listing.names[int(images.rows["train"][int(list(sampler)[29])])]
    (root / late).write_bytes(b"no picture")
    assert command(*words) == 2 and not (out / "record.jsonl").exists()
    assert f"'{late}' in" in (said := capsys.readouterr().err) and "data.corrupt=skip" in said
    monkeypatch.setattr(image_check, "MOST_CHECKED", 0)
    assert command(*words) == 2
    assert f"'{late}' in" in capsys.readouterr().err

    def steps() -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]

    before = [each for each in steps() if each[0] <= 6]
    assert before
    assert command(*words, "data.corrupt=skip") == 0
    after = steps()
    assert after[: len(before)] == before and after[-1][0] == 15
    # Another change is another training.
    assert command(*words, "data.corrupt=skip", "data.flip=0.5") == 2
    assert "holds another training: data.args.flip" in capsys.readouterr().err
