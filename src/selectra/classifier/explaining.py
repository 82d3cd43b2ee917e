"""What a model looks at: pixels that move a class's score, the field of one feature, the directions of its scans."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.classifier.predicting import prepared
from selectra.classifier.routes import Site, sites, without_everywhere
from selectra.classifier.trained import Trained
from selectra.errors import ConfigError
from selectra.models.xt import XT, side_by_side
from selectra.report.explanation import Explanation, Field, Routes
from selectra.spec import nearest

TOP = 5
# Copies under noise for the class's map, and random directions of the feature for the field's.
SAMPLES, NOISE = 16, 0.15
# Shares of all gradient whose pixels are counted.
SHARES = (0.5, 0.95)
# Classes that an error lists.
MOST_NAMED = 20


def explain(trained: Trained, path: Path, target: str | None = None, seed: int = 0) -> Explanation:
    """Everything that the picture shows, as arrays. Runs on a CPU.

    Args:
        trained: The model.
        path: The image.
        target: The class that is explained; the likeliest one without.
        seed: Of the noise and of the random directions.

    Raises:
        DataError: The file cannot be read, or does not fit the model.
        ConfigError: There is no such class, or the model gives no features.
    """
    model, x = trained.model.cpu(), prepared(trained, path)
    if not hasattr(model, "features"):
        raise ConfigError(f"'{trained.name}' gives no features, so there is nothing whose field could be drawn.")
    with torch.no_grad():
        probabilities = model(x).float().softmax(1)[0]
    chosen = int(probabilities.argmax()) if target is None else _number(trained.classes, target)
    values, places = probabilities.topk(min(TOP, len(trained.classes)))
    generator = torch.Generator().manual_seed(seed)
    return Explanation(
        model=trained.name,
        file=path.name,
        image=_shown(trained, x),
        classes=tuple(trained.classes[i] for i in places.tolist()),
        probabilities=tuple(values.tolist()),
        target=trained.classes[chosen],
        probability=probabilities[chosen].item(),
        class_map=class_map(model, x, chosen, generator).numpy(),
        field=_field(model, x, generator),
        routes=_routes(model, x, chosen),
        channels=x.shape[1],
    )


def _number(classes: Sequence[str], name: str) -> int:
    if name not in classes:
        known = f": {', '.join(classes)}" if len(classes) <= MOST_NAMED else ""
        raise ConfigError(f"there is no class '{name}'; there are {len(classes)}{known}.{nearest(name, classes)}")
    return list(classes).index(name)


def _shown(trained: Trained, x: Float[Tensor, "1 c h w"]) -> np.ndarray[Any, Any]:
    """The image as the model gets it, (h, w, 3) from 0 to 1; of other than 3 channels the mean of all, in grey."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (trained.mean, trained.std))
    pixels = (x[0] * std + mean).clamp(0, 1)
    pixels = pixels if len(pixels) == 3 else pixels.mean(0, keepdim=True).expand(3, -1, -1)
    return pixels.permute(1, 2, 0).numpy()


def class_map(
    model: nn.Module, x: Float[Tensor, "1 c h w"], chosen: int, generator: torch.Generator
) -> Float[Tensor, "h w"]:
    """How far each pixel moves a class's score: root mean square of the gradient over copies with noise.

    Smilkov et al. 2017, "SmoothGrad", arXiv:1706.03825, with squares.
    """
    total = torch.zeros_like(x)
    for _ in range(SAMPLES):
        noisy = (x + NOISE * torch.randn(x.shape, generator=generator)).requires_grad_()
        (gradient,) = torch.autograd.grad(model(noisy)[0, chosen], noisy)
        total += gradient.square()
    return (total.sum(1)[0] / SAMPLES).sqrt()


def field_map(model: Any, x: Float[Tensor, "1 c h w"], generator: torch.Generator) -> Float[Tensor, "h w"]:
    """How far each pixel moves the feature in the middle of the last grid, whatever its direction.

    Luo et al. 2016, "Understanding the effective receptive field", arXiv:1701.04128; here the norm of the feature's
    whole Jacobian, estimated by random signs, since the sum of a normalised feature's channels has no gradient.
    """
    pixels, total = x.clone().requires_grad_(), torch.zeros_like(x)
    grid = model.features(pixels)[-1]
    feature = grid[0, grid.shape[1] // 2, grid.shape[2] // 2]
    for i in range(SAMPLES):
        signs = torch.randint(2, feature.shape, generator=generator) * 2.0 - 1
        (gradient,) = torch.autograd.grad(feature @ signs, pixels, retain_graph=i < SAMPLES - 1)
        total += gradient.square()
    return (total.sum(1)[0] / SAMPLES).sqrt()


def _field(model: Any, x: Float[Tensor, "1 c h w"], generator: torch.Generator) -> Field:
    found = field_map(model, x, generator)
    with torch.no_grad():
        height, width = model.features(x)[-1].shape[1:3]
    middle = tuple((side // 2 + 0.5) * pixels / side for side, pixels in zip((height, width), x.shape[2:], strict=True))
    ordered = found.flatten().sort(descending=True).values
    passed = ordered.cumsum(0) / ordered.sum().clamp_min(1e-30)
    counts = [int((passed < share).sum()) + 1 for share in SHARES]
    areas = {share: min(1.0, count / found.numel()) for share, count in zip(SHARES, counts, strict=True)}
    levels = {share: ordered[min(count, len(ordered)) - 1].item() for share, count in zip(SHARES, counts, strict=True)}
    return Field(found.numpy(), (middle[0], middle[1]), (height, width), areas, levels)


@torch.no_grad()
def _routes(model: nn.Module, x: Float[Tensor, "1 c h w"], chosen: int) -> Routes | None:
    """What each direction of the token mixers contributes; None where they have one only."""
    found = [site for site in sites(model) if site.kind == "tokens"]
    if not found:
        return None
    names = tuple(dict.fromkeys(route for site in found for route in site.routes))
    full = model(x).float().softmax(1)[0, chosen].item()
    left = []
    for name in names:
        with without_everywhere(found, name):
            left.append(model(x).float().softmax(1)[0, chosen].item())
    shares, maps = [], torch.zeros(len(names), *x.shape[2:])
    for site, inputs in zip(found, _inputs(model, found, x), strict=True):
        parts = torch.stack([_change(site, i, inputs) for i in range(len(site.routes))])
        norms = parts.square().flatten(1).sum(1).sqrt()
        shares.append((norms / norms.sum().clamp_min(1e-30)).tolist())
        placed = _placed(model, parts, x)
        if placed is not None:
            maps += placed / placed.sum().clamp_min(1e-30)
    drawn = maps.numpy() if maps.any() else None
    return Routes(names, full, tuple(left), tuple(site.layer for site in found), np.array(shares), drawn)


def _inputs(model: nn.Module, found: list[Site], x: Tensor) -> list[list[tuple[Any, Any]]]:
    """What each mixer is called with when the model sees the image; several times where regions go one by one."""
    kept: dict[int, list[tuple[Any, Any]]] = {id(site.mixer): [] for site in found}

    def keep(module: nn.Module, args: Any, options: Any) -> None:
        kept[id(module)].append((args, options))

    handles = [site.mixer.register_forward_pre_hook(keep, with_kwargs=True) for site in found]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return [kept[id(site.mixer)] for site in found]


def _change(site: Site, route: int, calls: list[tuple[Any, Any]]) -> Float[Tensor, " n *places"]:
    """How far a mixer's output moves at every position, of the image or of each region, without a direction."""
    changes = []
    for args, options in calls:
        whole = site.mixer(*args, **options)
        with site.without(route):
            part = site.mixer(*args, **options)
        changes.append((whole - part).norm(dim=-1))
    return torch.cat(changes)


def _placed(model: Any, parts: Float[Tensor, "k n *places"], x: Tensor) -> Float[Tensor, "k h w"] | None:
    """Values of a grid, or of a line of its tokens with class tokens among them, at the image's size.

    Those of xT's regions lie side by side, as the regions do, and reach over the image's border as they do.
    """
    size = (x.shape[2], x.shape[3])
    rows, columns = model.counts(size) if isinstance(model, XT) else (1, 1)
    encoder: Any = model.backbone if isinstance(model, XT) else model
    covered = (rows * model.region, columns * model.region) if isinstance(model, XT) else size
    if parts.shape[1] != rows * columns:
        return None
    grids = _on_grid(encoder, parts.flatten(0, 1), (covered[0] // rows, covered[1] // columns))
    if grids is None:
        return None
    whole = side_by_side(grids[..., None], rows, columns)[..., 0]
    return F.interpolate(whole[None], covered, mode="bilinear", align_corners=False)[0, :, : size[0], : size[1]]


def _on_grid(model: Any, parts: Float[Tensor, " n *places"], size: tuple[int, int]) -> Float[Tensor, "n h w"] | None:
    """Values of positions on the grid of an image of this size, class tokens left out; None if they have no place."""
    if parts.dim() != 2:
        return parts
    height, width = model.patch_embed.grid(size)
    extra = parts.shape[1] - height * width
    if extra not in (0, 1):
        return None
    if extra:
        at = model.slots(height * width)[0] if hasattr(model, "slots") else 0
        parts = torch.cat([parts[:, :at], parts[:, at + 1 :]], 1)
    return parts.unflatten(1, (height, width))
