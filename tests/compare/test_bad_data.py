"""Data by which nothing can be decided, files that cannot be read, and data that changes on the way."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from selectra.cli import main
from selectra.compare.conduct import Wish, conduct, open_study
from selectra.compare.store import Store
from selectra.compare.study import Study, Variant
from selectra.compare.worker import load
from selectra.data import image_check
from selectra.data.images import Images
from selectra.errors import DataError
from selectra.spec import Optim, Run, Spec, Train
from tests.compare.small import write_series
from tests.compare.studies import make_study as make_study_of_series

QUIET = Console(quiet=True)


def write_images(folder: Path, each: int, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    random = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = random.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def make_study(folder: Path, **data: Any) -> Study:
    """Two models on a folder of images, two steps each."""
    base = Run(
        name="pets", model=Spec("vit_smoke"), data=Spec("images", path=str(folder), **data),
        task=Spec("classification"), optim=Optim(lr=1e-3), train=Train(steps=2, batch_size=8, eval_every=1),
    )  # fmt: skip
    shape = {"patch_size": 4}
    variants = (
        Variant(name="vim", model=Spec("vim_smoke", **shape), kind="mamba"),
        Variant(name="vit", model=Spec("vit_smoke", **shape), kind="attention"),
    )
    return Study(name="pets", question="Which?", bases=(base,), variants=variants, subject="mamba", metric="top1",
                 higher_is_better=True)  # fmt: skip


def refused(study: Study, path: Path) -> str:
    """Why a study is not begun; nothing of it is stored."""
    with pytest.raises(DataError) as caught:
        conduct(study, Wish(path, device="cpu"), QUIET)
    store = Store(path)
    assert store.recall("study") is None and not any(store.counts().values())
    store.close()
    return str(caught.value)


def test_a_validation_part_without_an_image_is_refused(tmp_path: Path) -> None:
    text = refused(make_study(write_images(tmp_path / "few", 3)), tmp_path / "a.sqlite")
    assert "the validation part of 'pets' is empty" in text and "give it more data" in text


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    text = refused(make_study(write_images(tmp_path / "one", 12, ("cat",))), tmp_path / "a.sqlite")
    assert "are of one class, 'cat', so there is nothing to tell apart" in text


def test_a_damaged_training_image_on_disk_is_found_before_the_first_training(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pets", 12)
    data = Images(str(folder))
    name = data.listing.names[int(data.rows["train"][-1])]
    (folder / name).write_bytes(b"no image")
    text = refused(make_study(folder, keep="disk", standard="half"), tmp_path / "a.sqlite")
    assert f"'{name}' in" in text and "leave such files out with data.corrupt=skip" in text


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_a_damaged_image_of_the_test_part_is_found_before_the_first_training(tmp_path: Path, keep: str) -> None:
    folder = write_images(tmp_path / "pets", 12)
    data = Images(str(folder))
    name = data.listing.names[int(data.rows["test"][0])]
    (folder / name).write_bytes(b"no image")
    text = refused(make_study(folder, keep=keep), tmp_path / "a.sqlite")
    assert f"'{name}' in" in text and "cannot be read as an image" in text


def test_what_failed_by_a_damaged_file_is_done_once_it_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = write_images(tmp_path / "pets", 12), tmp_path / "pets.sqlite"
    data = Images(str(folder))
    # Not the first one, which says what size all have.
    damaged = [folder / data.listing.names[int(row)] for row in data.rows["train"][1:]]
    whole = [file.read_bytes() for file in damaged]
    for file, content in zip(damaged, whole, strict=True):
        file.write_bytes(bytes(len(content)))
    # As damage that no header shows.
    monkeypatch.setattr(image_check, "MOST_CHECKED", 0)
    study = make_study(folder, keep="disk")
    assert conduct(study, Wish(path, device="cpu"), QUIET) == {"open": 0, "taken": 0, "done": 0, "failed": 6}
    # The command says so, too, and does not end as if all were well.
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\nfrom tests.compare.test_bad_data import make_study\n"
        f"study = make_study(Path({str(folder)!r}), keep='disk')\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["compare", "own.py", "--store", str(path), "--device", "cpu", "--workers", "1"])
    found = capsys.readouterr()
    assert ended.value.code == 2
    assert "no training of 'pets' succeeded" in found.out + found.err
    assert "cannot be read as an image" in found.out + found.err
    for file, content in zip(damaged, whole, strict=True):
        file.write_bytes(content)
    assert conduct(study, Wish(path, device="cpu"), QUIET) == {"open": 0, "taken": 0, "done": 6, "failed": 0}


def test_data_that_changes_on_the_way_is_refused(tmp_path: Path) -> None:
    series, path = write_series(tmp_path), tmp_path / "a.sqlite"
    study = make_study_of_series(series)
    store = Store(path)
    open_study(store, study, torch.device("cpu"), QUIET)
    store.close()
    kept = tmp_path / "kept.csv"
    shutil.copy(series, kept)
    lines = series.read_text().splitlines()
    series.write_text("\n".join([*lines[:-1], lines[-1].rpartition(",")[0] + ",9.5"]) + "\n")
    load.cache_clear()
    with pytest.raises(DataError, match=r"the data has changed since the training in .*a.sqlite.*--store"):
        conduct(study, Wish(path, device="cpu"), QUIET)
    shutil.copy(kept, series)
    load.cache_clear()
    assert conduct(study, Wish(path, device="cpu"), QUIET)["done"] > 0
