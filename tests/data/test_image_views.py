"""What training shows of images: draws that depend on seed, pass and image alone; each change against a plain one."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta as beta_distribution
from torch.utils.data import DataLoader

from selectra.data.image_draws import beta, beta_table, keys, mixed, uniforms
from selectra.data.image_views import Augment, Held
from selectra.data.images import HeldImages, Images
from selectra.spec import Train
from selectra.train.batches import TrainingOrder
from selectra.train.parallel import World
from tests.data.pictures import names, write_folder

ALL: dict[str, Any] = {"crop": 3, "flip": 0.5, "flip_vertical": 0.5, "erase": 0.7, "mixup": 0.4, "cutmix": 1.0}
MASK = 2**64 - 1


def held(n: int = 40, size: tuple[int, int] = (12, 10), c: int = 3) -> Held:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, c, *size), np.uint8))
    return Held(pixels, torch.arange(n) % 5, torch.zeros(c), torch.ones(c), 5)


def plain_mix(x: int) -> int:
    """SplitMix64's last steps, in Python's whole numbers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_hash_is_splitmix():
    values = [0, 1, 12345, 2**62 + 7, -1, -(2**63)]
    found = [int(v) & MASK for v in mixed(torch.tensor(values))]
    assert found == [plain_mix(v & MASK) for v in values]
    # The generator's first outputs from the seed 0, as published with its source.
    golden = 0x9E3779B97F4A7C15
    assert [plain_mix(golden * i & MASK) for i in (1, 2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_draws_look_uniform_and_independent():
    u = uniforms(keys(3, 1, torch.arange(20_000)), 4)
    assert u.min() >= 0 and u.max() < 1
    assert torch.allclose(u.mean(0), torch.tensor(0.5), atol=0.01) and torch.allclose(
        u.var(0), torch.tensor(1 / 12), atol=0.002
    )
    assert (torch.corrcoef(u.T) - torch.eye(4)).abs().max() < 0.03
    for other in (keys(4, 1, torch.arange(20_000)), keys(3, 2, torch.arange(20_000))):
        assert abs(torch.corrcoef(torch.stack([u[:, 0], uniforms(other, 1)[:, 0]]))[0, 1]) < 0.03


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_beta_quantiles(alpha):
    u = (torch.arange(1000) + 0.5) / 1000
    wanted = beta_distribution(alpha, alpha).ppf(u.numpy())
    assert np.abs(beta(u, beta_table(alpha)).numpy() - wanted).max() < 2e-3


@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_view_depends_on_seed_pass_and_image_alone(scale):
    images, augment = held(), Augment(**ALL, scale=scale)
    images = images.with_tables(augment)
    whole, targets = images.view(torch.arange(40), augment, seed=1, epoch=2)
    alone, target = images.view(torch.tensor([7, 31]), augment, seed=1, epoch=2)
    assert targets is not None and target is not None
    # Interpolation adds in another order in another batch.
    assert torch.allclose(alone, whole[[7, 31]], atol=0 if scale is None else 1e-5)
    assert torch.equal(target, targets[[7, 31]])
    mixed_passes, _ = images.view(torch.tensor([7, 31]), augment, 1, torch.tensor([2, 3]))
    assert torch.allclose(mixed_passes[0], whole[7], atol=0 if scale is None else 1e-5)
    for seed, epoch in ((2, 2), (1, 3)):
        assert not torch.allclose(images.view(torch.arange(40), augment, seed, epoch)[0], whole)


def test_moves_and_flips_against_a_padded_image():
    images, augment = held(), Augment(crop=3, flip=0.5, flip_vertical=0.5)
    views, _ = images.view(torch.arange(40), augment, 0, 0)
    kinds = set()
    for i, view in enumerate(views):
        image = images.pixels[i].float() / 255
        padded = torch.nn.functional.pad(image[None], (3, 3, 3, 3), mode="reflect")[0]
        found = [
            (down, right, up_down, left_right)
            for up_down in (False, True)
            for left_right in (False, True)
            for down in range(7)
            for right in range(7)
            if torch.allclose(_turned(padded, up_down, left_right)[:, down : down + 12, right : right + 10], view)
        ]
        assert len(found) == 1
        kinds.add(found[0])
    assert len(kinds) > 20 and {kind[2] for kind in kinds} == {kind[3] for kind in kinds} == {False, True}
    assert {kind[0] for kind in kinds} == {kind[1] for kind in kinds} == set(range(7))


def _turned(image: torch.Tensor, up_down: bool, left_right: bool) -> torch.Tensor:
    image = image.flip(1) if up_down else image
    return image.flip(2) if left_right else image


def test_erased_boxes_have_the_sizes_asked_for():
    images = held(400, (32, 32))
    shown, _ = images.view(torch.arange(400), Augment(erase=0.5), 0, 0)
    changed = (shown != images.plain(torch.arange(400))).any(1)
    share = changed.float().mean((1, 2))
    assert 0.42 < (share > 0).float().mean() < 0.58
    some = share[share > 0]
    assert 0.01 < some.min() < 0.05 and 0.28 < some.max() < 0.4
    for mask in changed[share > 0][:50]:
        rows, columns = mask.any(1), mask.any(0)
        # What is erased is one box, filled with the mean colour.
        assert mask.float().sum() >= 0.98 * rows.sum() * columns.sum()
    assert (shown[changed[:, None].expand_as(shown)] == 0).all()


def test_mixtures_and_their_targets():
    images, rows = held(60), torch.arange(60)
    plain = images.plain(rows)
    for name in ("mixup", "cutmix"):
        augment = Augment(mixup=float(name == "mixup"), cutmix=float(name == "cutmix"))
        x, target = images.with_tables(augment).view(rows, augment, 0, 0)
        assert target is not None and torch.allclose(target.sum(1), torch.ones(60))
        two = (target > 0).sum(1)
        assert set(two.tolist()) == {1, 2}
        for i in torch.where(two == 2)[0][:10]:
            share = float(target[i, images.labels[i]])
            if name == "cutmix":
                same = (x[i] == plain[i]).all(0).float().mean()
                assert float(same) == pytest.approx(share, abs=1e-6)
            else:
                rest = (x[i] - share * plain[i]) / (1 - share)
                assert (plain - rest).abs().amax((1, 2, 3)).min() < 1e-3


def test_a_crop_of_random_size_keeps_whole_images_at_one():
    images = held(size=(12, 12))
    smooth = torch.linspace(0, 200, 12).round().to(torch.uint8).expand(40, 3, 12, 12).clone()
    images = Held(smooth, images.labels, images.mean, images.std, 5)
    shown, _ = images.view(torch.arange(40), Augment(scale=0.999), 0, 0)
    rows = shown - images.plain(torch.arange(40))
    assert rows.abs().max() < 0.2
    small, _ = images.view(torch.arange(40), Augment(scale=0.05), 0, 0)
    assert (small.amax((1, 2, 3)) - small.amin((1, 2, 3))).min() < 0.4


def test_standardisation_is_that_of_the_training_images():
    images = Images("shapes", val=0.1)
    x = images.windows("train")
    assert isinstance(x, HeldImages)
    batch = x.held.plain(torch.arange(len(x))).double()
    assert batch.mean((0, 2, 3)).abs().max() < 1e-5
    assert (batch.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_evaluation_sees_images_as_they_are():
    images = Images("shapes", crop=4, flip=1.0, erase=1.0, cutmix=1.0)
    val = images.windows("val")
    first, again = val[[0, 1]].to("cpu"), val[[0, 1]].to("cpu")
    assert torch.equal(first.x, again.x) and first.target is None
    pixels, labels = images.hold("val")
    mean, std = images.mean_std
    wanted = (pixels[:2].float() / 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(first.x, wanted, atol=1e-5) and torch.equal(first.y, labels[:2])


def test_images_in_memory_are_the_same_from_other_processes():
    windows: Any = Images("shapes", **ALL).windows("train")
    windows.at_pass(1, 0)
    loader = DataLoader(windows, batch_size=None, sampler=[[0, 1]], collate_fn=lambda b: b, num_workers=1)  # pyright: ignore[reportArgumentType]
    (there,), here = list(loader), windows[[0, 1]].to("cpu")
    assert torch.equal(there.x, here.x) and torch.equal(there.target, here.target)


def from_disk(tmp_path, **changes) -> Images:
    root = write_folder(tmp_path / "set", names("train", 6) | names("test", 2, first=50))
    settings = {"crop": 2, "flip": 0.5, "randaugment": (2, 9), "erase": 0.5, "mixup": 0.4, "cutmix": 1.0, **changes}
    return Images(str(root), val=0, keep="disk", standard="half", **settings)


@pytest.mark.parametrize("scale", [None, 0.2])
def test_images_from_disk_are_drawn_alike_in_any_process(scale, tmp_path):
    windows: Any = from_disk(tmp_path, scale=scale).windows("train")
    windows.at_pass(3, 11)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    batches = [windows[[0, 4, 9]], windows[[1, 2, 3]]]
    assert torch.equal(torch.get_rng_state(), before)
    loader = DataLoader(windows, batch_size=None, sampler=[[0, 4, 9], [1, 2, 3]], collate_fn=lambda b: b, num_workers=2)  # pyright: ignore[reportArgumentType]
    for here, there in zip(batches, loader, strict=True):
        assert torch.equal(here.x, there.x) and torch.equal(here.target, there.target)
    windows.at_pass(4, 11)
    assert not torch.equal(windows[[0, 4, 9]].x, batches[0].x)


def test_images_from_disk_without_mixing_do_not_see_their_batch(tmp_path):
    windows: Any = from_disk(tmp_path, mixup=0.0, cutmix=0.0).windows("train")
    assert torch.equal(windows[[0, 4, 9]].x[1], windows[[4]].x[0])
    off = {"crop": 0, "flip": 0.0, "randaugment": None, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0}
    plain: Any = from_disk(tmp_path, **off).windows("train")
    assert torch.allclose(plain[[2]].x[0] / 2 + 0.5, plain.images.read(int(plain.rows[2])).float() / 255, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_from_disk_are_mixed_with_the_next_of_their_batch(kind, tmp_path):
    amounts = {"mixup": 0.0, "cutmix": 0.0, kind: 1.0}
    windows: Any = from_disk(tmp_path, **amounts).windows("train")
    plain: Any = from_disk(tmp_path / "plain", mixup=0.0, cutmix=0.0).windows("train")
    for split in (windows, plain):
        split.at_pass(3, 11)
    rows = list(range(len(windows)))
    batch, own, other = windows[rows], plain[rows], plain[[*rows[1:], 0]]
    differ = [i for i in rows if own.y[i] != other.y[i]]
    assert len(differ) >= 1
    for i in differ:
        share = batch.target[i, own.y[i]]
        assert float(batch.target[i, other.y[i]]) == pytest.approx(1 - float(share), abs=1e-6)
        if kind == "mixup":
            assert torch.allclose(batch.x[i], torch.lerp(other.x[i], own.x[i], share), atol=1e-5)
        else:
            kept, cut = ((batch.x[i] == each.x[i]).all(0) for each in (own, other))
            assert (kept | cut).all() and float((~cut).float().mean()) <= float(share) + 1e-6
            assert float((~kept).float().mean()) <= 1 - float(share) + 1e-6
    assert 0 < float(batch.target.max(1).values.min()) < 0.95
    # Of a part of a batch images and partners are named.
    pieces = [windows[[(0, 1)]], windows[[(1, 2), (2, 3)]]]
    assert torch.equal(torch.cat([each.x for each in pieces]), batch.x[:3])
    assert torch.equal(torch.cat([each.target for each in pieces]), batch.target[:3])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_processes_mix_what_one_mixes(size, tmp_path):
    """12 images in batches of seven: the last one has five, and the images that follow lie in other shares, too."""
    train = Train(steps=1, batch_size=7, seed=5)

    def rows(rank: int, size: int) -> list[list[Any]]:
        batches = TrainingOrder(windows, train, World(rank, size)).start_at(0)
        return [[(*x.flatten().tolist(), *t.tolist()) for x, t in zip(b.x, b.target, strict=True)]
                for b in (next(batches) for _ in range(4))]  # fmt: skip

    windows: Any = from_disk(tmp_path).windows("train")
    shares = [rows(rank, size) for rank in range(size)]
    for alone, *parts in zip(rows(0, 1), *shares, strict=True):
        assert [row for part in parts for row in part] == alone


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_on_a_gpu_are_those_of_a_cpu():
    augment = Augment(**ALL)
    images, rows = held().with_tables(augment), torch.arange(40)
    here, target = images.view(rows, augment, 1, 2)
    there, other = images.to("cuda").view(rows.cuda(), augment, 1, 2)
    assert target is not None and other is not None
    assert torch.allclose(there.cpu(), here, atol=1e-5) and torch.allclose(other.cpu(), target, atol=1e-5)
