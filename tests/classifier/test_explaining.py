"""What models look at: directions left out, gradients and fields where they are known, and the picture."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.text import Text
from PIL import Image
from torch import Tensor, nn

from selectra.classifier import explain, explaining, from_run
from selectra.classifier.explaining import class_map, field_map
from selectra.classifier.routes import GRID, sites, without_everywhere
from selectra.errors import ConfigError
from selectra.mixers import S6, Bidirectional, CrossPaths, SelectiveChannel
from selectra.models.rsmamba import PathMixer
from selectra.registry import models
from selectra.report.explanation import explanation_figure, save_explanation
from selectra.spec import Spec
from tests.classifier.conftest import CLASSES, SIZE

Make = Callable[..., Path]
FAMILIES = {
    "vmamba_smoke": 4,
    "vim2_smoke": 4,
    "vim_smoke": 2,
    "videomamba_smoke": 2,
    "rsmamba_smoke": 3,
    "xt_smoke": 4,
}


def test_what_the_routes_of_a_grid_add_makes_up_the_whole() -> None:
    torch.manual_seed(0)
    path, u = CrossPaths(12, d_state=4), torch.randn(2, 5, 7, 12)
    (site,) = sites(nn.Sequential(path))
    with torch.no_grad():
        whole, left = path.mix(u), []
        for i in range(4):
            with site.without(i):
                left.append(path.mix(u))
        assert torch.equal(path.mix(u), whole)
    torch.testing.assert_close(sum(whole - part for part in left), whole)
    # By rows, both ways, the first row's output knows nothing of columns: the routes are the ones that are named.
    assert [route[0] for route in site.routes] == ["→", "↓", "←", "↑"]


@pytest.mark.parametrize("route", range(4))
def test_a_route_left_out_is_the_one_of_its_name(route: int) -> None:
    torch.manual_seed(1)
    path, u = CrossPaths(6, d_state=3, d_conv=1).double(), torch.randn(1, 4, 5, 6).double()
    (site,) = sites(nn.Sequential(path))
    moved = u.clone()
    moved[0, 1, 2] += 1
    with torch.no_grad():
        changed = path.mix(moved) - path.mix(u)
        with site.without(route):
            changed = changed - (path.mix(moved) - path.mix(u))
    seen = changed[0].abs().sum(-1) > 1e-13
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    places = (rows * 5 + columns, columns * 4 + rows, -(rows * 5 + columns), -(columns * 4 + rows))[route]
    assert torch.equal(seen, places >= places[1, 2])


@pytest.mark.parametrize("routes", [("right",), ("right", "left"), ("up", "down", "right")])
def test_fewer_routes_have_their_own_names(routes: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    path, u = CrossPaths(6, d_state=3, d_conv=1, routes=routes), torch.randn(1, 4, 5, 6)
    found = sites(nn.Sequential(path))
    assert [site.routes for site in found] == ([] if len(routes) == 1 else [tuple(GRID[name] for name in routes)])
    for site in found:
        with torch.no_grad():
            whole = path.mix(u)
            for i, name in enumerate(routes):
                # What is missing is what a mixer with this route alone gives.
                alone = CrossPaths(6, d_state=3, d_conv=1, routes=(name,))
                for key, value in path.named_parameters():
                    alone.get_parameter(key).copy_(value if key.startswith("conv2d") else value[i : i + 1])
                with site.without(i):
                    torch.testing.assert_close(whole - path.mix(u), alone.mix(u))


@pytest.mark.parametrize("routes", [("right",), ("right", "left")])
def test_models_of_fewer_routes_are_explained(routes: tuple[str, ...], make_run: Make, make_image: Make) -> None:
    found = explain(from_run(make_run(routes=routes)), make_image())
    names = None if found.routes is None else found.routes.names
    assert names == (None if len(routes) == 1 else (GRID["right"], GRID["left"]))
    explanation_figure(found)


@pytest.mark.parametrize("kind", [Bidirectional, SelectiveChannel])
def test_two_directions_are_the_sum_of_one_and_the_other(kind: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    mixer, x = kind(8), torch.randn(2, 9, 8)
    (site,) = sites(nn.Sequential(mixer))
    with torch.no_grad():
        whole = mixer(x)
        with site.without(0):
            back = mixer(x)
        with site.without(1):
            ahead = mixer(x)
        assert torch.equal(mixer(x), whole)
    torch.testing.assert_close(ahead + back, whole)
    x[:, 5] += 1
    with torch.no_grad(), site.without(1):
        assert torch.equal(mixer(x)[:, :5], ahead[:, :5])


def test_paths_of_one_mamba_are_left_out_one_by_one() -> None:
    torch.manual_seed(0)
    mixer, x, order = PathMixer(S6(8), "shuffle_mean"), torch.randn(2, 9, 8), torch.randperm(9)
    (site,) = sites(nn.Sequential(mixer))
    with torch.no_grad():
        whole, left = mixer(x, order), []
        for i in range(3):
            with site.without(i):
                left.append(mixer(x, order))
        assert torch.equal(mixer(x, order), whole)
    torch.testing.assert_close(sum(left[1:], left[0]), 2 * whole)


def test_a_block_that_fails_leaves_the_model_whole() -> None:
    model: Any = models.build(Spec("vim2_smoke"), {})
    x, found = torch.randn(1, 3, SIZE, SIZE), sites(model)
    with torch.no_grad():
        whole = model(x)
        with pytest.raises(KeyError), without_everywhere(found, found[0].routes[2]):
            assert not torch.equal(model(x), whole)
            raise KeyError
        assert torch.equal(model(x), whole)


class Linear(nn.Module):
    """Scores and features that are known: each feature is a patch under one filter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 1, 4, 4), nn.Linear(3 * 64, 5)

    def features(self, x: Tensor) -> list[Tensor]:
        return [self.conv(x).permute(0, 2, 3, 1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def test_maps_of_a_linear_model_are_its_weights() -> None:
    model, x = Linear(), torch.randn(1, 3, 8, 8)
    found = class_map(model, x, 2, torch.Generator())
    torch.testing.assert_close(found, model.head.weight[2].view(3, 8, 8).square().sum(0).sqrt())
    field = field_map(model, x, torch.Generator())
    torch.testing.assert_close(field[4:, 4:], model.conv.weight[0].square().sum(0).sqrt())
    assert field[:4].abs().max() == 0 and field[:, :4].abs().max() == 0


@pytest.mark.parametrize("model", [*FAMILIES, "simba_smoke"])
def test_every_family_is_explained(model: str, make_run: Make, make_image: Make, tmp_path: Path) -> None:
    trained, image = from_run(make_run(model)), make_image(width=50, height=40)
    found = explain(trained, image, "ship")
    again = explain(trained, image, "ship")
    assert np.array_equal(found.class_map, again.class_map) and np.array_equal(
        found.field.strength, again.field.strength
    )
    assert found.target == "ship" and found.image.shape == (SIZE, SIZE, 3)
    assert found.class_map.shape == found.field.strength.shape == (SIZE, SIZE)
    assert 0 < found.field.areas[0.5] <= found.field.areas[0.95] <= 1
    if model in FAMILIES:
        assert found.routes is not None and found.routes.maps is not None
        assert len(found.routes.names) == len(found.routes.left) == FAMILIES[model]
        np.testing.assert_allclose(found.routes.shares.sum(1), 1, rtol=1e-4)
        assert found.routes.maps.shape == (FAMILIES[model], SIZE, SIZE) and (found.routes.maps >= 0).all()
        assert found.routes.full == pytest.approx(found.probability, abs=1e-5)
    else:
        assert found.routes is None
    save_explanation(found, tmp_path / "out" / "picture.png")
    with Image.open(tmp_path / "out" / "picture.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000


@pytest.mark.parametrize("backbone", ["vmamba_smoke", "vim_smoke"])
def test_maps_of_regions_lie_where_the_regions_are(backbone: str) -> None:
    torch.manual_seed(0)
    spec = Spec("xt_smoke", backbone=Spec(backbone), region=16)
    model: Any = models.build(spec, {"n_classes": 5}).eval()
    x = torch.randn(1, 3, 28, 40)
    found = [site for site in sites(model) if site.kind == "tokens"]
    with torch.no_grad():
        inputs = explaining._inputs(model, found, x)
        for site, calls in zip(found, inputs, strict=True):
            parts = explaining._change(site, 0, calls)[None]
            placed = explaining._placed(model, parts, x)
            assert placed is not None and placed.shape == (1, 28, 40)
            # The map of a region alone; away from its border neighbours mix nothing in.
            alone = torch.nn.functional.pad(x, (0, 8, 0, 4))[:, :, 16:, 16:32]
            grid = explaining._on_grid(
                model.backbone,
                explaining._change(site, 0, explaining._inputs(model, found, alone)[found.index(site)]),
                (16, 16),
            )
            assert grid is not None
            inner = torch.nn.functional.interpolate(grid[None], (16, 16), mode="bilinear")[0]
            edge = 8 // min(8, grid.shape[1])
            torch.testing.assert_close(placed[:, 16 + edge :, 16 + edge : 32 - edge], inner[:, edge:12, edge:-edge])
        model.at_once = 4
        for calls, others in zip(inputs, explaining._inputs(model, found, x), strict=True):
            assert len(others) == 2
            torch.testing.assert_close(torch.cat([args[0] for args, _ in others]), calls[0][0][0])


def test_the_picture_says_what_it_shows(make_run: Make, make_image: Make) -> None:
    found = explain(from_run(make_run()), make_image())
    figure = explanation_figure(found)
    texts: Any = figure.findobj(Text)
    words = " ".join(text.get_text() for text in texts)
    for wanted in ("vmamba_smoke", "photo.png", "The image", found.target, "row by row", "left out", "share", "grid"):
        assert wanted in words


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_an_image_of_many_bands_is_shown_by_the_mean_of_all(make_run: Make, tmp_path: Path, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, channels), dtype=np.uint8)
    np.save(tmp_path / "bands.npy", pixels)
    found = explain(from_run(make_run(channels=channels)), tmp_path / "bands.npy")
    mean = pixels if channels == 3 else pixels.mean(2, keepdims=True).repeat(3, 2)
    np.testing.assert_allclose(found.image, mean / 255, atol=1e-5)
    texts: Any = explanation_figure(found).findobj(Text)
    said = "the mean of its 5 channels" in " ".join(text.get_text().replace("\n", " ") for text in texts)
    assert said == (channels == 5)


def test_figures_of_directions_stand_beside_their_bars(make_run: Make, make_image: Make) -> None:
    found = explain(from_run(make_run()), make_image())
    assert found.routes is not None
    sure = replace(found, routes=replace(found.routes, full=1.0, left=(0.93,) * len(found.routes.left)))
    figure: Any = explanation_figure(sure)
    figure.savefig(BytesIO(), format="png")
    ax = next(each for each in figure.findobj(Axes) if "left out everywhere" in each.get_title())
    for bar, text in zip(ax.patches, ax.texts, strict=True):
        drawn = text.get_window_extent()
        assert drawn.x0 > bar.get_window_extent().x1 and drawn.x1 < ax.get_window_extent().x1


def test_unknown_classes_and_other_files_are_refused(make_run: Make, make_image: Make, tmp_path: Path) -> None:
    trained, image = from_run(make_run()), make_image()
    with pytest.raises(ConfigError, match=rf"there are {len(CLASSES)}: {', '.join(CLASSES)}. Did you mean 'ship'"):
        explain(trained, image, "shp")
    found = explain(trained, image)
    with pytest.raises(ConfigError, match="is a PNG file; give a name that ends in"):
        save_explanation(found, tmp_path / "picture.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        save_explanation(found, tmp_path / "file" / "picture.png")
