"""RSMamba: a Mamba of remote-sensing images along three paths, Chen et al. 2024, arXiv:2403.19654.

Overlapping patches become tokens with learned positions. Every layer scans them forwards, backwards and in a random
order with the same Mamba, and adds a weighted sum of the three, with weights from the means of what they gave.

Source: github.com/KyanChen/RSMamba, 3fa3056: `mmpretrain/rsmamba/models/models.py`, `configs/rsmamba/*`; its mixer is
`MambaMixer` of transformers, its patches are mmcv's.
Glossary: N d_state, L tokens.

Departures, paper and official code against each other and against this:
  random order  is drawn anew for every layer and call also at test time in the code, so that results change; here it is
                fixed by `seed` then (`test_shuffle="random"` for the other, `"none"` for no shuffle)
  one norm      before the mixers is shared by all layers, which the paper's figure does not show; so it is here
  Eq. 7         weighs the tokens side by side and takes means after; the code takes means first, which is the same
  projections   are linear and see one token, so they act once on what three paths share; the code has them three times
  middle token  the code inserts it at L // 2 and reads (L + 1) // 2, which is a token of the image where L is odd; here
                it is the class token, and in what `from_official` gives it is the code's
  three paths   without a gate (`paths="shuffle_mean"`) are averaged after the backward one is turned back, as there
  training      is in batches of 1,024 in the paper, of 16 a device in the configurations
  head_tail     as position of the class token fails in the code; it is not built
  start         steps start as Mamba's; with some versions of transformers the official mixer's start as linear maps do
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.drop import DropPath, rising_rates
from selectra.layers.image import (
    PaddedPatchEmbed,
    Size,
    insert_token,
    quarters,
    resize_positions,
    start_linear,
)
from selectra.layers.image_model import Plain
from selectra.mixers import S6
from selectra.mixers.fixed import fixed_order
from selectra.mixers.sizes import require_sizes
from selectra.registry import models

Paths = Literal["forward", "reverse_mean", "reverse_gate", "shuffle_mean", "shuffle_gate"]
Pool = Literal["mean", "middle", "head", "tail"]
TestShuffle = Literal["seeded", "random", "none"]
EPS = 1e-6


class PathMixer(nn.Module):
    """One Mamba along several orders of the same tokens, and the sum of what it gives.

    Args:
        mamba: Shared by all paths.
        paths: "reverse" adds the backward path to the forward one, "shuffle" a given order too; "mean" and "gate" say
            what the sum's weights are.
    """

    def __init__(self, mamba: S6, paths: Paths) -> None:
        super().__init__()
        kind, _, weights = paths.partition("_")
        n_paths = {"forward": 1, "reverse": 2, "shuffle": 3}[kind]
        self.mamba, self.n_paths = mamba, n_paths
        self.gate = nn.Linear(n_paths * mamba.d_model, n_paths, bias=False) if weights == "gate" else None

    def forward(self, x: Float[Tensor, "b l d"], order: Int64[Tensor, " l"] | None = None) -> Float[Tensor, "b l d"]:
        """Mix; the third path visits the tokens in this order."""
        u, z = self.mamba.in_proj(x).chunk(2, dim=-1)
        ys = [self.mamba.mix_whole(u, z)]
        if self.n_paths > 1:
            ys.append(self.mamba.mix_whole(u, z, reverse=True))
        if self.n_paths > 2:
            assert order is not None
            ys.append(self.mamba.mix_whole(u[:, order], z[:, order])[:, torch.argsort(order)])
        if self.gate is None:
            total = sum(ys[1:], ys[0]) / self.n_paths if self.n_paths > 1 else ys[0]
            return self.mamba.out_proj(total)
        means = self.mamba.out_proj(torch.stack([y.mean(1) for y in ys], dim=1))  # b paths d
        weights = self.gate(means.flatten(1)).softmax(-1).to(ys[0].dtype)
        return self.mamba.out_proj(torch.einsum("bk,kbld->bld", weights, torch.stack(ys)))


BASE: dict[str, Any] = {}
LARGE: dict[str, Any] = {"d_model": 256, "depth": 36}
HUGE: dict[str, Any] = {"d_model": 320, "depth": 48}


@models.register(
    "rsmamba",
    kind="image",
    source="arXiv:2403.19654",
    smoke={"d_model": 16, "depth": 2, "d_state": 4, "patch_size": 8, "stride": 4},
    small={"depth": 16},
    base=BASE,
    large=LARGE,
    huge=HUGE,
)
class RSMamba(Plain):
    """RSMamba's classifier; positions are learned for `img_size` and resized for images of another size.

    Args:
        n_classes: Classes.
        in_channels: Channels of the image.
        img_size: Pixels of the images' sides, or height and width.
        patch_size: Pixels of a patch's side.
        stride: Pixels from one patch to the next; images are padded below and on the right.
        d_model: Width of a token.
        depth: Number of layers.
        d_state: State size per channel.
        d_conv: Width of the short convolutions.
        expand: Width between the mixers' projections over `d_model`.
        paths: Forward alone; with the backward path; or with a random order too; and how they are summed.
        pool: What the head reads: the tokens' mean, normalised once more, or a class token at a place among them.
        test_shuffle: Outside of training, an order fixed by `seed`, one drawn anew for every call, or the given one.
        seed: Of the orders outside of training.
        drop_path: Rate at which the last layer's branch is left out in training; earlier ones less often.
    """

    def __init__(
        self,
        *,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: Size = 224,
        patch_size: int = 16,
        stride: int = 8,
        d_model: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int | float = 2,
        paths: Paths = "shuffle_gate",
        pool: Pool = "mean",
        test_shuffle: TestShuffle = "seeded",
        seed: int = 0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        require_sizes(n_classes=n_classes, depth=depth)
        for name, value, allowed in (
            ("paths", paths, Paths),
            ("pool", pool, Pool),
            ("test_shuffle", test_shuffle, TestShuffle),
        ):
            if value not in get_args(allowed):
                raise ConfigError(f"{name}={value!r}: takes {', '.join(map(repr, get_args(allowed)))}")
        self.kind, self.test_shuffle, self.seed, self.depth = pool, test_shuffle, seed, depth
        self.patch_embed = PaddedPatchEmbed(in_channels, d_model, patch_size, stride, bias=False)
        self.grid = self.patch_embed.grid(img_size)
        n_tokens = self.grid[0] * self.grid[1]
        extra = len(self.slots(n_tokens))
        self.no_decay = ("pos_embed", "cls_token")[: 1 + extra]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model)) if extra else None
        self.pos_embed = nn.Parameter(torch.zeros(1, n_tokens + extra, d_model))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.pre_norm = nn.LayerNorm(d_model, eps=EPS)
        self.layers = nn.ModuleList(PathMixer(S6(d_model, d_state, d_conv, expand), paths) for _ in range(depth))
        self.drops = nn.ModuleList(map(DropPath, rising_rates(drop_path, depth)))
        self.ln1 = nn.LayerNorm(d_model, eps=EPS)
        self.ln2 = nn.LayerNorm(d_model, eps=EPS) if pool == "mean" else None
        self.head = nn.Linear(d_model, n_classes)
        start_linear([self.head])
        read = "avg" if pool == "mean" else "token"
        self.describe(in_channels, [d_model] * depth, [stride] * depth, quarters(depth), read)

    norm_name = "ln1"

    def slots(self, n_tokens: int) -> tuple[int, ...]:
        """Where the class token stands among `n_tokens` others."""
        return {"middle": (n_tokens // 2,), "head": (0,), "tail": (n_tokens,)}.get(self.kind, ())

    def pool(self, x: Float[Tensor, "b l d"]) -> Tensor:
        y = super().pool(x)
        return y if self.ln2 is None or not self.global_pool else self.ln2(y)

    def drop_head(self) -> None:
        super().drop_head()
        self.ln2 = None

    def from_official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An official checkpoint's state under our keys."""
        return rename_classifier(state)

    def blocks(self) -> list[nn.Module]:
        """What to shard and to checkpoint."""
        return list(self.layers)

    def run(
        self, x: Float[Tensor, "b c H W"], after: Collection[int], orders: Sequence[Tensor] | None = None
    ) -> tuple[list[Float[Tensor, "b l d"]], tuple[int, int]]:
        """The tokens behind some of the layers, not normalised, and the grid's sides.

        Args:
            x: The images.
            after: Numbers of the layers.
            orders: An order of the tokens, the class token among them, for every layer's third path.
        """
        x = self.patch_embed(x)
        grid, x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        slots = self.slots(x.shape[1])
        if self.cls_token is not None:
            x = insert_token(x, self.cls_token, slots[0])
        x = x + resize_positions(self.pos_embed, self.grid, grid, self.slots(self.grid[0] * self.grid[1]), slots)
        states = []
        for i, (layer, drop) in enumerate(zip(self.layers, self.drops, strict=True)):
            order = self.order(x.shape[1], i, x.device) if orders is None else orders[i]
            x = x + drop(self.through(layer, self.pre_norm(x), order))
            if i in after:
                states.append(x)
            if len(states) == len(after):
                break
        return states, grid

    def order(self, length: int, layer: int, device: torch.device) -> Int64[Tensor, " length"]:
        """In which a layer's third path visits the tokens."""
        if self.training or self.test_shuffle == "random":
            return torch.randperm(length, device=device)
        if self.test_shuffle == "none":
            return torch.arange(length, device=device)
        return fixed_order(length, self.seed * self.depth + layer, device)


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        number, _, last = rest.partition(".")
        if first == "layers":
            ours = f"layers.{number}.mamba.{last}"
        elif first == "gate_layers":
            ours = f"layers.{number}.gate.{last.removeprefix('0.')}"
        elif first == "patch_embed":
            ours = key.replace(".projection.", ".proj.")
        else:
            ours = key
        renamed[f"backbone.{ours}"] = value
    return renamed


def rename_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    body = rename({key.removeprefix("backbone."): value for key, value in state.items()})
    return {key.removeprefix("backbone.").replace("head.fc.", "head."): value for key, value in body.items()}
