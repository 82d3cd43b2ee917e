"""Semantic segmentation: a backbone of ours, four grids of it, a decoder of segmentation-models-pytorch, and a head.

UPerNet (Xiao et al. 2018, arXiv:1807.10221), FPN (Kirillov et al. 2019, "Panoptic Feature Pyramid Networks",
arXiv:1901.02446) and SegFormer's MLPs (Xie et al. 2021, arXiv:2105.15203) are the package's own decoders. The auxiliary
head is OpenMMLab's FCNHead on the third grid.

Departures: `normed` puts a layer norm before each grid that UPerNet reads, as segmentation-models-pytorch does and
OpenMMLab does not; it is on by default, but not for Samba, whose grids are normalised.
"""

import importlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers.levels import FourLevels
from selectra.layers.norm import alone
from selectra.mixers.sizes import require_sizes
from selectra.registry import models
from selectra.spec import Spec

# FPN's group norms have so many groups.
GROUPS = 32


def smp(module: str) -> Any:
    """A module of segmentation-models-pytorch, which is imported when the first decoder is built.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(f"segmentation_models_pytorch.{module}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"decoders are segmentation-models-pytorch's, and {error.name} is not installed: "
            "pip install 'selectra[vision]'."
        ) from error


class Segmenter(nn.Module):
    """A backbone, a decoder and a classifier of every pixel, for images of any size.

    Subclasses make the decoder in `make_decoder` and call it in `decode`.

    Args:
        backbone: An image model; its classifier is dropped.
        n_classes: Classes.
        d_decoder: Width of the decoder.
        d_aux: Width of the auxiliary head on the third grid, which helps in training alone; 0 for none.
        dropout: Share of channels that training leaves out before the classifier.
    """

    def __init__(self, backbone: Any, n_classes: int, d_decoder: int, d_aux: int, dropout: float) -> None:
        super().__init__()
        require_sizes(n_classes=n_classes, d_decoder=d_decoder)
        if not 0 <= dropout < 1 or d_aux < 0:
            raise ConfigError(f"dropout={dropout}, d_aux={d_aux}: needs a share below 1, and a width or 0")
        if not hasattr(backbone, "keep_features"):
            raise ConfigError(f"backbone is a {type(backbone).__name__}; it must be an image model, such as samba_base")
        backbone.keep_features()
        self.backbone, self.n_classes = backbone, n_classes
        self.levels = FourLevels(backbone.feature_dims, backbone.feature_strides)
        self.decoder = self.make_decoder(d_decoder)
        self.drop, self.head = nn.Dropout2d(dropout), nn.Conv2d(d_decoder, n_classes, 1)
        start = smp("base.initialization")
        start.initialize_decoder(self.decoder)
        start.initialize_head(self.head)
        self.aux_head: nn.Sequential | None = None
        if d_aux:
            conv = nn.Conv2d(self.levels.dims[2], d_aux, 3, padding=1, bias=False)
            shared = [conv, nn.BatchNorm2d(d_aux), nn.ReLU(), nn.Dropout2d(dropout)]
            self.aux_head = nn.Sequential(*shared, nn.Conv2d(d_aux, n_classes, 1))
            start.initialize_head(self.aux_head)

    def make_decoder(self, d_decoder: int) -> nn.Module:
        """The decoder, for the widths of `levels`."""
        raise NotImplementedError

    def decode(self, grids: list[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b d h w"]:
        """What the classifier reads."""
        raise NotImplementedError

    def forward(
        self, x: Float[Tensor, "b c H W"]
    ) -> Float[Tensor, "b k H W"] | tuple[Float[Tensor, "b k H W"], Float[Tensor, "b k H W"]]:
        """Scores of every pixel's classes, before a softmax; in training also those of the auxiliary head."""
        if self.training and alone(x):
            # Batch norms of what is pooled to one position need two of them; an image twice has its own statistics.
            return _first(self._scores(x.expand(2, -1, -1, -1)))
        return self._scores(x)

    def _scores(self, x: Tensor) -> Any:
        height, width = x.shape[-2:]
        step = self.levels.strides[-1]
        # Whole positions of the coarsest grid; zeros are the mean colour.
        below, right = -height % step, -width % step
        x = F.pad(x, (0, right, 0, below)) if below or right else x
        grids = self.levels(self.backbone.features(x))
        size = (height + below, width + right)
        main = self._sized(self.head(self.drop(self.decode(grids))), size)[..., :height, :width]
        if not self.training or self.aux_head is None:
            return main
        return main, self._sized(self.aux_head(grids[2]), size)[..., :height, :width]

    @staticmethod
    def _sized(scores: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(scores, size, mode="bilinear", align_corners=False)

    def blocks(self) -> list[nn.Module]:
        """What to shard and to checkpoint."""
        return self.backbone.blocks()

    def units(self) -> list[nn.Module]:
        """The backbone's stages, or its blocks where all have one resolution."""
        return list(self.backbone.units() if hasattr(self.backbone, "units") else self.backbone.level_list())


def _first(scores: Any) -> Any:
    return tuple(each[:1] for each in scores) if isinstance(scores, tuple) else scores[:1]


@models.register(
    "upernet",
    kind="segmentation",
    source="arXiv:1807.10221",
    smoke={"backbone": Spec("samba_smoke"), "d_decoder": 8, "d_aux": 4},
    samba={"backbone": Spec("samba_base"), "normed": False},
    base={"backbone": Spec("vmamba_tiny_s1l8")},
)
class UPerNet(Segmenter):
    """UPerNet: pooled pyramid on the coarsest grid, then sums from coarse to fine.

    Args:
        backbone: An image model; its classifier is dropped.
        n_classes: Classes.
        d_decoder: Width of the decoder.
        normed: Normalise each grid before the decoder.
        d_aux: Width of the auxiliary head on the third grid, which helps in training alone; 0 for none.
        dropout: Share of channels that training leaves out before the classifier.
    """

    def __init__(
        self, *, backbone: nn.Module, n_classes: int, d_decoder: int = 512, normed: bool = True, d_aux: int = 256,
        dropout: float = 0.1,
    ) -> None:  # fmt: skip
        self.normed = normed
        super().__init__(backbone, n_classes, d_decoder, d_aux, dropout)

    def make_decoder(self, d_decoder: int) -> nn.Module:
        # The package counts from the image on: two resolutions before the first grid.
        decoder = smp("decoders.upernet.decoder").UPerNetDecoder((0, 0, *self.levels.dims), 5, d_decoder)
        if not self.normed:
            decoder.feature_norms = nn.ModuleList(nn.Identity() for _ in self.levels.dims)
        return decoder

    def decode(self, grids: list[Tensor]) -> Tensor:
        return self.decoder([grids[0], grids[0], *grids])


@models.register(
    "fpn",
    kind="segmentation",
    source="arXiv:1901.02446",
    smoke={"backbone": Spec("samba_smoke"), "d_decoder": 32, "d_pyramid": 8, "d_aux": 0},
    base={"backbone": Spec("vmamba_tiny_s1l8")},
)
class FPN(Segmenter):
    """FPN: a pyramid of sums from coarse to fine, its grids brought to one size and added.

    Args:
        backbone: An image model; its classifier is dropped.
        n_classes: Classes.
        d_decoder: Width of what is added, a multiple of 32.
        d_pyramid: Width of the pyramid.
        d_aux: Width of the auxiliary head on the third grid, which helps in training alone; 0 for none.
        dropout: Share of channels that training leaves out before the classifier.
    """

    def __init__(
        self, *, backbone: nn.Module, n_classes: int, d_decoder: int = 128, d_pyramid: int = 256, d_aux: int = 0,
        dropout: float = 0.1,
    ) -> None:  # fmt: skip
        require_sizes(d_pyramid=d_pyramid)
        if d_decoder % GROUPS:
            raise ConfigError(f"d_decoder={d_decoder}: FPN's group norms need a multiple of {GROUPS}")
        self.d_pyramid = d_pyramid
        super().__init__(backbone, n_classes, d_decoder, d_aux, dropout)

    def make_decoder(self, d_decoder: int) -> nn.Module:
        decoder = smp("decoders.fpn.decoder").FPNDecoder
        return decoder([0, 0, *self.levels.dims], 5, self.d_pyramid, d_decoder, dropout=0.0)

    def decode(self, grids: list[Tensor]) -> Tensor:
        return self.decoder(grids)


@models.register(
    "segformer",
    kind="segmentation",
    source="arXiv:2105.15203",
    smoke={"backbone": Spec("samba_smoke"), "d_decoder": 8, "d_aux": 0},
    base={"backbone": Spec("vmamba_tiny_s1l8")},
)
class Segformer(Segmenter):
    """SegFormer's decoder: each grid through a linear map, brought to one size, side by side through another.

    Args:
        backbone: An image model; its classifier is dropped.
        n_classes: Classes.
        d_decoder: Width of the decoder.
        d_aux: Width of the auxiliary head on the third grid, which helps in training alone; 0 for none.
        dropout: Share of channels that training leaves out before the classifier.
    """

    def __init__(
        self, *, backbone: nn.Module, n_classes: int, d_decoder: int = 256, d_aux: int = 0, dropout: float = 0.1
    ) -> None:
        super().__init__(backbone, n_classes, d_decoder, d_aux, dropout)

    def make_decoder(self, d_decoder: int) -> nn.Module:
        return smp("decoders.segformer.decoder").SegformerDecoder([0, 0, *self.levels.dims], 5, d_decoder)

    def decode(self, grids: list[Tensor]) -> Tensor:
        # The package asks an image for four times the finest grid's size, and knows a grid of no channels as absent.
        height, width = grids[0].shape[2:]
        image = torch.zeros((), device=grids[0].device).expand(1, 1, 4 * height, 4 * width)
        return self.decoder([image, image[:, :0], *grids])
