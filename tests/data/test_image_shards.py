"""Images in shards: what is read, from where, in which order, and what is said when it cannot be read."""

import importlib
import json
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from selectra.data.command import data_command
from selectra.data.image_shards import ImageShards
from selectra.data.shard_index import DamagedShardError, find_shards, index_of, write_index
from selectra.data.shard_streams import SlowError
from selectra.errors import ConfigError, DataError
from selectra.spec import Train
from selectra.train.batches import every_window_once, training_order
from selectra.train.parallel import World
from tests.data.pictures import pixels
from tests.data.shards import image_of, serving, within, write_shard, write_shards

COUNTS = [9, 4, 12, 5]
N = sum(COUNTS)
TRAIN = Train(steps=1, batch_size=8, seed=5, device="cpu")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "shards", COUNTS)
    return tmp_path / "shards"


def shards(path, **options):
    words = {"img_size": 8, "standard": "half", "lanes": (4, 2), "shuffle": 16, "timeout": 5.0, **options}
    return ImageShards(str(path), **words)


def numbers(batch):
    """Which of the written samples a batch holds, by their pixels."""
    known = {pixels(i).tobytes(): i for i in range(N)}
    shown = ((batch.x * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [known[image.numpy().tobytes()] for image in shown]


def one_pass(data, *, train=TRAIN, world=None, skip=0):
    order = training_order(data.windows("train"), train, world or World())
    batches = order.start_at(skip)
    return [numbers(next(batches)) for _ in range(len(order) - skip)]


def test_a_pass_is_every_image_once_with_its_class(folder):
    data = shards(folder)
    assert data.facts == {"n_classes": 3, "in_channels": 3, "img_size": 8}
    order = training_order(data.windows("train"), TRAIN, World())
    batches = order.start_at(0)
    first = [next(batches) for _ in range(len(order))]
    found = [i for batch in first for i in numbers(batch)]
    assert sorted(found) == list(range(N)) and found != sorted(found)
    assert all(batch.y.tolist() == [i % 3 for i in numbers(batch)] for batch in first)
    second = [i for _ in range(len(order)) for i in numbers(next(batches))]
    assert sorted(second) == list(range(N)) and second != found


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, workers):
    data = shards(folder)
    assert one_pass(data, train=TRAIN.model_copy(update={"workers": workers})) == one_pass(data)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_together_see_the_batches_of_one(folder, size):
    data = shards(folder)
    shares = [one_pass(data, world=World(rank, size)) for rank in range(size)]
    for alone, *parts in zip(one_pass(data), *shares, strict=True):
        assert sorted(i for part in parts for i in part) == sorted(alone)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_mix_what_one_mixes(folder, size):
    """Partners lie in the same lane, which one process has all of."""
    data = shards(folder, mixup=0.4, cutmix=1.0, crop=2)

    def rows(rank, size):
        batches = training_order(data.windows("train"), TRAIN, World(rank, size)).start_at(0)
        made = [next(batches) for _ in range(4)]
        return [[(*x.flatten().tolist(), *t.tolist()) for x, t in zip(b.x, b.target, strict=True)] for b in made]

    shares, whole = [rows(rank, size) for rank in range(size)], rows(0, 1)
    for alone, *parts in zip(whole, *shares, strict=True):
        assert sorted(row for part in parts for row in part) == sorted(alone)
    assert sum(0.01 < row[-3] < 0.99 for batch in whole for row in batch) > 5
    with pytest.raises(ConfigError, match=r"mix images of one lane, of which a batch of 7 over 4 lanes has one.* 8"):
        training_order(data.windows("train"), TRAIN.model_copy(update={"batch_size": 7}), World())


@pytest.mark.parametrize("workers", [0, 2])
def test_any_position_is_gone_on_from(folder, workers):
    data, train = shards(folder), TRAIN.model_copy(update={"workers": workers})
    whole = one_pass(data) + one_pass(data, skip=4)[:0]
    for skip in range(len(whole)):
        assert one_pass(data, train=train, skip=skip) == whole[skip:]


def test_views_do_not_depend_on_who_makes_them(folder):
    options = {"crop": 2, "flip": 0.5, "erase": 0.5}
    data = shards(folder, **options)
    batches = training_order(data.windows("train"), TRAIN, World()).start_at(1)
    others = training_order(data.windows("train"), TRAIN.model_copy(update={"workers": 2}), World()).start_at(1)
    for _ in range(5):
        one, other = next(batches), next(others)
        assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y)


@pytest.mark.parametrize("size", [1, 3, 40])
def test_evaluation_sees_every_image_once_as_it_is(folder, size):
    data = shards(folder, test=str(folder), crop=4)
    shares = [list(every_window_once(data.windows("test"), 4, World(rank, size))) for rank in range(size)]
    assert sorted(i for share in shares for batch in share for i in numbers(batch)) == list(range(N))
    assert len(data.windows("val")) == 0
    with pytest.raises(ConfigError, match=r"no shards are named for 'test'; set data\.test"):
        shards(folder).windows("test")


def test_folder_pattern_index_and_pipe_are_the_same(folder, tmp_path):
    data = shards(folder)
    write_index(data.parts["train"], tmp_path / "index.json")
    expected = one_pass(data)
    assert one_pass(shards(folder / "part-{0000..0003}.tar")) == expected
    assert one_pass(shards(tmp_path / "index.json")) == expected
    rows = [
        {"url": f"pipe:cat {path}", "nsamples": n} for path, n in zip(sorted(folder.iterdir()), COUNTS, strict=True)
    ]
    (tmp_path / "pipes.json").write_text(json.dumps({"shardlist": rows, "classes": 3}))
    assert one_pass(shards(tmp_path / "pipes.json")) == expected


def test_packed_shards_are_read(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / "packed").mkdir(exist_ok=True)
        with tarfile.open(path) as plain, tarfile.open(tmp_path / "packed" / f"{path.name}.gz", "w:gz") as packed:
            for member in plain:
                packed.addfile(member, plain.extractfile(member))
    assert one_pass(shards(tmp_path / "packed")) == one_pass(shards(folder))


def indexed(folder, server, target):
    """An index of a folder's shards at a server."""
    urls = [server.url(path.name) for path in sorted(folder.glob("*.tar"))]
    write_index(index_of(urls, "server", shards(folder).limits), target)
    server.asked.clear()
    return target


@pytest.mark.parametrize("faults", [{}, {"ranges": False}, {"cut": 5000}], ids=["ranges", "no ranges", "cut"])
def test_a_server_gives_the_same(folder, tmp_path, faults):
    with serving(folder, **faults) as server:
        data = shards(indexed(folder, server, tmp_path / "index.json"), attempts=20)
        assert one_pass(data) == one_pass(shards(folder))
        server.asked.clear()
        one_pass(data, skip=3)
        assert faults == {"ranges": False} or any(first > 0 for _, first in server.asked)


def test_the_index_may_lie_beside_the_shards_at_the_server(folder):
    rows = [{"url": path.name, "nsamples": n} for path, n in zip(sorted(folder.iterdir()), COUNTS, strict=True)]
    (folder / "index.json").write_text(json.dumps({"shardlist": rows, "classes": ["a", "b", "c"]}))
    with serving(folder) as server:
        data = shards(server.url("index.json"))
        assert data.classes == ("a", "b", "c")
        assert one_pass(data) == one_pass(shards(folder))


def test_a_server_that_stalls_is_named_in_time(folder, tmp_path):
    with serving(folder) as server:
        index = indexed(folder, server, tmp_path / "index.json")
        server.stall = "part-0002.tar"
        for workers in (0, 2):
            train = TRAIN.model_copy(update={"workers": workers})
            with within(1.0 + 30), pytest.raises(SlowError, match=r"part-0002.tar' .* within the time limit of 1 s"):
                one_pass(shards(index, timeout=1.0), train=train)


def test_a_command_that_stalls_is_named_in_time(folder, tmp_path):
    rows = [{"url": f"pipe:cat {folder}/part-0000.tar; sleep 60", "nsamples": 99}]
    (tmp_path / "index.json").write_text(json.dumps({"shardlist": rows, "classes": 3}))
    with within(1.0 + 30), pytest.raises(SlowError, match=r"sleep 60' .* within the time limit of 1 s"):
        one_pass(shards(tmp_path / "index.json", timeout=1.0))


def test_a_command_that_fails_says_why(folder, tmp_path):
    rows = [{"url": "pipe:echo no such bucket >&2; exit 3", "nsamples": 9}]
    (tmp_path / "index.json").write_text(json.dumps({"shardlist": rows, "classes": 3}))
    with pytest.raises(DamagedShardError, match="the command ended with 3: no such bucket"):
        one_pass(shards(tmp_path / "index.json"))


@pytest.mark.parametrize(("status", "said"), [(404, "answers 404 Not Found"), (503, "answers 503 .*2 connections")])
def test_a_server_that_refuses_is_named(folder, tmp_path, status, said):
    with serving(folder) as server:
        index = indexed(folder, server, tmp_path / "index.json")
        server.status = status
        with within(30), pytest.raises(DataError, match=rf"part-000\d.tar' cannot be read .*{said}"):
            one_pass(shards(index, attempts=2, timeout=2.0))


def truncate(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_a_truncated_shard_is_named_or_left_out_from_the_damage_on(folder):
    truncate(folder / "part-0002.tar")
    with pytest.raises(DataError, match=r"part-0002\.tar' cannot be read to its end: .* \(in sample \d+, 's000\d\d'\)"):
        shards(folder)
    data = shards(folder, corrupt="skip")
    kept = sorted(i for batch in one_pass(data) for i in batch)
    lost = set(range(N)) - set(kept)
    assert len(kept) == len(set(kept)) and 3 < len(lost) < 9 and lost < set(range(13, 25))
    assert any(line.startswith("Left out: the shard '") for line in data.summary())


def test_a_shard_that_ends_before_the_index_does_is_named_or_left_out(folder, tmp_path):
    write_index(find_shards(str(folder), shards(folder).limits), tmp_path / "index.json")
    truncate(folder / "part-0002.tar")
    with pytest.raises(DamagedShardError, match=r"part-0002\.tar'.*\((after|at) sample \d+"):
        one_pass(shards(tmp_path / "index.json"))
    # A cut between two samples looks like the shard's end, were it not for the index.
    write_shards(folder, COUNTS)
    content = (folder / "part-0002.tar").read_bytes()
    offset = json.loads((tmp_path / "index.json").read_text())["shardlist"][2]["offsets"][7]
    (folder / "part-0002.tar").write_bytes(content[:offset])
    with pytest.raises(DamagedShardError, match="ends after 7 samples, and the index says 12"):
        one_pass(shards(tmp_path / "index.json", lanes=(1, 1)))
    for workers in (0, 2):
        windows = shards(tmp_path / "index.json", corrupt="skip").windows("train")
        order = training_order(windows, TRAIN.model_copy(update={"workers": workers}), World())
        batches = order.start_at(0)
        found = [i for _ in range(len(order)) for i in numbers(next(batches))]
        assert sorted(found) == [i for i in range(N) if not 20 <= i < 25]
        assert len(windows.left_out) == 5 and all("part-0002.tar" in each for each in windows.left_out)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_every_sample_of_an_evaluation_once_and_name_what_they_leave_out(tmp_path, workers):
    good = {f"s{i}": {"png": image_of(i), "cls": b"1"} for i in range(16)}
    path = write_shard(tmp_path / "bad.tar", {**good, "broken": {"png": b"no", "cls": b"1"}})
    windows = ImageShards(str(path), val=str(path), n_classes=2, img_size=8, corrupt="skip").windows("val")
    batches = list(every_window_once(windows, 4, World(), workers, 60.0))
    assert [len(batch) for batch in batches] == [4] * 4
    assert len(windows.left_out) == 1 and "'broken'" in windows.left_out[0]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"png": b"no picture", "cls": b"1"}, "cannot be read as an image"),
        ({"png": image_of(3)[:60], "cls": b"1"}, "cannot be read as an image"),
        ({"txt": b"cat", "cls": b"1"}, r"has no image; it has \['cls', 'txt'\]"),
        ({"png": image_of(3), "cls": b"7"}, "has the class '7'.*from 0 to 2"),
        ({"png": image_of(3)}, "has the class ''"),
    ],
)
def test_a_sample_that_cannot_be_read_is_named_or_left_out(tmp_path, files, said):
    good = {f"s{i}": {"png": image_of(i), "cls": str(i % 3).encode()} for i in range(6)}
    path = write_shard(tmp_path / "bad.tar", {**good, "broken": files, "last": good["s0"]})
    with pytest.raises(DataError, match=rf"sample 6 \('broken'\) of .*bad\.tar.*{said}"):
        one_pass(shards(path, n_classes=3))
    data = shards(path, n_classes=3, corrupt="skip")
    for part in ("train", "val"):
        data.parts["val"] = data.parts["train"]
        windows = data.windows(part)
        order = training_order(windows, TRAIN, World())
        batches = order.start_at(0) if part == "train" else every_window_once(windows, 8, World())
        assert Counter(numbers(next(batches))) == Counter([0, 0, 1, 2, 3, 4, 5])
        assert len(windows.left_out) == 1 and "'broken'" in windows.left_out[0]


def test_a_batch_without_a_readable_sample_is_an_error(tmp_path):
    path = write_shard(tmp_path / "bad.tar", {f"s{i}": {"png": b"", "cls": b"0"} for i in range(4)})
    with pytest.raises(DataError, match=r"no sample of batch 0 can be read: .*larger train\.batch_size helps"):
        one_pass(shards(path, corrupt="skip"), train=Train(steps=1, batch_size=2))


def test_what_is_far_needs_an_index_which_a_command_writes(folder, tmp_path):
    from rich.console import Console

    with serving(folder) as server:
        pattern = server.url("part-{0000..0003}.tar")
        with pytest.raises(DataError, match=r"not on this machine.*selectra data shards"):
            shards(pattern)
        data_command("shards", [pattern], tmp_path / "index.json", Console(quiet=True))
        assert one_pass(shards(tmp_path / "index.json")) == one_pass(shards(folder))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "cannot be read as an index"),
        ('{"shardlist": []}', "lists no shards"),
        ("{", "cannot be read as an index"),
    ],
)
def test_what_is_no_index_is_refused(tmp_path, content, said):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match=said):
        shards(tmp_path / "index.json")


def test_settings_that_do_not_fit(folder, tmp_path):
    with pytest.raises(DataError, match="is no file"):
        shards(tmp_path / "none.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no shard"):
        shards(tmp_path / "empty")
    with pytest.raises(ConfigError, match="all are above 0"):
        shards(folder, timeout=0.0)
    with pytest.raises(ConfigError, match=r"data\.lanes=4,2"):
        one_pass(shards(folder), train=Train(steps=1, batch_size=9), world=World(0, 3))


def test_without_the_package_the_extra_is_named(folder, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "webdataset"]:
        monkeypatch.delitem(sys.modules, name)
    real = importlib.import_module

    def without(name, *args):
        if name.partition(".")[0] == "webdataset":
            raise ModuleNotFoundError("No module named 'webdataset'", name="webdataset")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=r"pip install 'selectra\[scale\]'"):
        shards(folder)


def test_other_sizes_are_brought_to_one(tmp_path):
    import io

    samples = {}
    for i, size in enumerate([(8, 8), (20, 10), (9, 30)]):
        buffer = io.BytesIO()
        Image.fromarray(np.full((*size, 3), 40 * i, np.uint8)).save(buffer, "PNG")
        samples[f"s{i}"] = {"png": buffer.getvalue(), "cls": b"0"}
    path = write_shard(tmp_path / "sizes.tar", samples)
    batch = next(every_window_once(shards(path, val=str(path), n_classes=2).windows("val"), 8, World()))
    assert batch.x.shape == (3, 3, 8, 8)
