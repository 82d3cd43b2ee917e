"""Models whose weights are spread over processes: here one process, whose group is made as that of several."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import selectra.models  # noqa: F401
from selectra.models.detector import Detector
from selectra.registry import models
from selectra.spec import Spec
from selectra.train.batch_norms import has_batch_norms
from selectra.train.parallel import World, recomputed
from selectra.train.sharding import is_part, shard, whole

FACTS: dict[str, dict[str, Any]] = {
    "series": {"seq_len": 24, "horizon": 8, "n_series": 3, "season": 4},
    "image": {"n_classes": 5, "in_channels": 3, "img_size": (32, 32)},
    "video": {"n_classes": 5, "in_channels": 3, "img_size": (32, 32)},
    "language": {"vocab_size": 40},
    "detection": {"n_classes": 3, "in_channels": 3},
    "segmentation": {"n_classes": 3, "in_channels": 3, "img_size": (32, 32)},
}
# Whose gradients jump: a token may take another expert, sines of many periods turn, and PyTorch's own of the last
# filters of FCOS and RetinaNet, under autocast on a CPU and in either gather, is what stood in memory.
JUMPS = {"jamba_smoke", "hyena_smoke", "fcos_smoke", "retinanet_smoke"}
NAMES = [name for name in models.names() if name.endswith("_smoke")]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=20))
    yield World(sharded=True, files=distributed.group.WORLD)
    distributed.destroy_process_group()


def build(name: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return models.build(Spec(name, **arguments), FACTS[models.entry(name).kind])


def inputs(kind: str) -> Tensor:
    shapes = {"series": (4, 24, 3), "video": (2, 3, 4, 32, 32)}
    if kind == "language":
        return torch.randint(40, (2, 12))
    return torch.randn(shapes.get(kind, (2, 3, 32, 32)))


def gradients(model: nn.Module, x: Tensor, rounded: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=rounded, cache_enabled=False):
        return _gradients(model, x)


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    if isinstance(model, Detector):
        boxes, masks = torch.tensor([[2.0, 3.0, 20.0, 25.0]]), torch.ones(1, 32, 32, dtype=torch.uint8)
        y = list(model(list(x), [{"boxes": boxes, "labels": torch.tensor([1]), "masks": masks}] * len(x)).values())
    else:
        y = model(x)
    sum(part.float().square().sum() for part in (y if isinstance(y, (tuple, list)) else [y])).backward()  # pyright: ignore[reportAttributeAccessIssue]
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_model_can_be_spread(name, world, again):
    """Blocks are called as wholes, so that their weights are gathered when they are needed, also for doing it again."""
    plain, model, x = build(name), build(name), inputs(models.entry(name).kind)
    if not any(p.requires_grad for p in plain.parameters()):
        pytest.skip("nothing to learn")
    if again and not hasattr(plain, "blocks"):
        pytest.skip("no blocks")
    expected = gradients(plain.train(), x)
    shard(model.train(), world)
    assert all(is_part(p) for p in model.parameters())
    with recomputed(model, again):
        found = gradients(model, x)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max())), key


@pytest.mark.parametrize("name", NAMES)
def test_every_model_can_be_gathered_in_bfloat16(name, world):
    """Its parts and their gradients stay float32, and rounded weights give about the same gradients."""
    exact, model, x = build(name), build(name), inputs(models.entry(name).kind)
    if has_batch_norms(model):
        pytest.skip("refused")
    if not any(p.requires_grad for p in model.parameters()):
        pytest.skip("nothing to learn")
    shard(exact.train(), world)
    shard(model.train(), world, "bfloat16")
    expected, found = gradients(exact, x, rounded=True), gradients(model, x, rounded=True)
    assert found.keys() == expected.keys()
    assert all(value.dtype == torch.float32 for value in found.values())
    if name not in JUMPS:
        norm, away = (
            torch.cat([value.flatten() for value in each]).norm()
            for each in (expected.values(), [value - expected[key] for key, value in found.items()])
        )
        assert away <= 0.04 * norm
