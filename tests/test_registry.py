"""Names, and the road of an argument from the run to the constructor."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.registry import Registry, Resolved
from selectra.spec import Spec


@pytest.fixture
def models() -> Registry:
    registry = Registry("model")

    @registry.register("net", kind="series", source="arXiv:1", takes=("observed",), smoke={"d_model": 8}, base={})
    class Net(nn.Module):
        """A net."""

        def __init__(
            self,
            *,
            horizon: int,
            d_model: int = 16,
            dt_rank: int | Literal["auto"] = "auto",
            norm: Literal["layer", "batch"] = "layer",
            dims: tuple[int, ...] = (1, 2),
            rate: float | None = 0.5,
            flag: bool = False,
            weights: Float[Tensor, "b l"] | None = None,
        ) -> None:
            super().__init__()
            self.values = (horizon, d_model, dt_rank, norm, dims, rate, flag)

    @registry.register("head", kind="image", tiny={"backbone": Spec("net_smoke", rate=0.1)}, large={})
    class Head(nn.Module):
        def __init__(self, *, backbone: nn.Module, k: int = 1) -> None:
            super().__init__()
            self.backbone = backbone

    @registry.register("recipe")
    def recipe(k: int = 3) -> int:
        return k

    return registry


def test_names(models):
    assert models.names() == ["head_large", "head_tiny", "net_base", "net_smoke", "recipe"]
    assert models.names("series") == ["net_base", "net_smoke"]
    assert models.families() == ["head", "net", "recipe"]
    entry = models.entry("net")
    assert (entry.name, entry.size, entry.takes, entry.summary) == ("net_base", "base", ("observed",), "A net.")


def test_precedence_and_origin(models):
    resolved = models.resolve(Spec("net_smoke", rate="none"), {"horizon": 96, "season": 24, "n_series": None})
    assert resolved["horizon"] == Resolved(96, "data")
    assert resolved["d_model"] == Resolved(8, "size")
    assert resolved["norm"] == Resolved("layer", "default")
    assert resolved["rate"] == Resolved(None, "run")
    assert "season" not in resolved


def test_values_are_read_by_the_annotations(models):
    spec = Spec("net", horizon="3", dt_rank="4", norm="batch", dims="(3, 4)", rate="1e-3", flag="true")
    assert models.build(spec).values == (3, 16, 4, "batch", (3, 4), 1e-3, True)
    assert models.typed(spec).args["dims"] == (3, 4)
    assert models.build(spec.replace(dt_rank="auto", dims="7")).values[2:5] == ("auto", "batch", (7,))


@pytest.mark.parametrize(
    ("spec", "facts", "message"),
    [
        (Spec("nte"), {}, r"there is no model 'nte'; there are .*Did you mean 'net'\?"),
        (Spec("head"), {}, r"several sizes; choose one of \['head_tiny', 'head_large'\]"),
        (Spec("net", dmodel=3), {}, r"'net' takes no argument 'dmodel'; it takes .*Did you mean 'd_model' \(int\)\?"),
        (Spec("net"), {}, "net needs 'horizon'; neither the run nor the data says it"),
        (Spec("net", horizon=7), {"horizon": 8}, "'horizon' is 7 in the run, and the data says 8"),
        (Spec("net", d_model="wide"), {"horizon": 8}, "net: 'd_model' is 'wide', which is no int"),
        (Spec("net", dims="1,x"), {"horizon": 8}, r"no tuple\[int, ...\]"),
        (Spec("net", dt_rank="aut"), {"horizon": 8}, r"no int \| 'auto'"),
        (Spec("net", rate="nan"), {"horizon": 8}, "net: 'rate' is nan; it must be a finite number"),
        (Spec("net", rate=float("-inf")), {"horizon": 8}, "net: 'rate' is -inf; it must be a finite number"),
        (Spec("net", flag="maybe"), {"horizon": 8}, "no bool"),
        (Spec("head_tiny", backbone=Spec("net", dmodel=3)), {"horizon": 8}, "head_tiny.backbone: 'net' takes no"),
        (Spec("head_large", backbone=Spec("", k=3)), {}, "'backbone' has no arguments of its own"),
    ],
)
def test_errors(models, spec, facts, message):
    with pytest.raises(ConfigError, match=message):
        models.resolve(spec, facts)


def test_run_may_repeat_what_the_data_says(models):
    assert models.resolve(Spec("net", horizon="8"), {"horizon": 8})["horizon"] == Resolved(8, "data")


def test_inner_specs_are_built_first(models):
    inner = models.build(Spec("head_tiny", backbone=Spec("", d_model=4)), {"horizon": 2}).backbone
    assert (inner.values[1], inner.values[5]) == (4, 0.1)
    assert models.build(Spec("head_large", backbone="net_smoke"), {"horizon": 2}).backbone.values[1] == 8
    assert models.typed(Spec("head_tiny", backbone=Spec("net", d_model="5"))).args["backbone"].args["d_model"] == 5


def test_partial_marks_what_is_missing(models):
    assert models.resolve(Spec("net"), partial=True)["horizon"].origin == "missing"


def test_functions_too(models):
    assert models.build(Spec("recipe", k="5")) == 5


def test_names_are_taken_once(models):
    with pytest.raises(AssertionError):
        models.register("recipe")(torch.nn.Identity)
