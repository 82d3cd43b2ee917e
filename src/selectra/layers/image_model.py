"""What every image model can do besides scoring classes, in timm's words: features, a new head, checkpointing, groups.

A model is built of levels: the blocks of a stack at one resolution (`Plain`), or the stages of a pyramid (`Pyramid`).
It says how to run up to some of them; all else follows here. Nothing of it needs timm.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selectra.errors import ConfigError
from selectra.layers.image import remove_tokens

Format = Literal["NCHW", "NHWC", "NLC"]
# A level's tokens or grid, or what is to be added to the residual stream and the stream.
State = Tensor | tuple[Tensor, Tensor]
LAST: tuple[int, ...] = (99999,)


def pooled(x: Float[Tensor, "b l d"], kind: str) -> Float[Tensor, "b d"]:
    """The tokens' mean, their greatest values, or the mean of both."""
    if kind == "avg":
        return x.mean(1)
    return x.amax(1) if kind == "max" else (x.mean(1) + x.amax(1)) / 2


class ImageModel(nn.Module):
    """A classifier of images with timm's verbs; `Plain` and `Pyramid` are its kinds.

    Subclasses build `head`, call `describe` at the end of their constructor, and have `run`, `normed` and `in_grid`.

    Attributes:
        feature_dims: Widths of what `features` gives.
        feature_strides: Pixels from one of its positions to the next.
        feature_info: Of every level, in timm's words: `num_chs`, `reduction`, `module`.
        num_features: Width of what `forward_features` gives and the head reads.
        global_pool: How the head makes one vector of it.
    """

    head: nn.Module
    # Where the levels are, and the norm behind the last of them.
    level_name: ClassVar[str] = "layers"
    norm_name: ClassVar[str] = "norm"
    # Whether `features` are normalised as what the head reads.
    normed_features: ClassVar[bool] = False
    output_fmt: ClassVar[str] = "NCHW"
    # Brings a state, of the model itself and not of what it is a part of, to the model's names and shapes.
    fit: Callable[[nn.Module, Mapping[str, Any], bool], Mapping[str, Any]] | None

    def describe(
        self, in_channels: int, dims: Sequence[int], strides: Sequence[int], seen: Sequence[int], pool: str
    ) -> None:
        """State what was built.

        Args:
            in_channels: Channels of the image.
            dims: Width of every level.
            strides: Pixels from one of its positions to the next.
            seen: Numbers of the levels that `features` gives.
            pool: What the head reads.
        """
        self.in_chans, self.seen, self.global_pool = in_channels, list(seen), pool
        self.feature_info = [
            {"num_chs": d, "reduction": stride, "module": f"{self.level_name}.{i}"}
            for i, (d, stride) in enumerate(zip(dims, strides, strict=True))
        ]
        self._see(self.seen)
        self.num_features = self.head_hidden_size = dims[-1]
        self.head_drop = nn.Dropout(0.0)
        self.grad_checkpointing, self.fit = False, None
        # Names of parameters that were dropped.
        self.pruned: set[str] = set()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of every module; where the model is timm's, of official names and other sizes, too."""
        fitted = state_dict if self.fit is None else self.fit(self, state_dict, strict)
        return super().load_state_dict(fitted, strict, assign)

    def run(self, x: Tensor, after: Collection[int]) -> tuple[list[Any], tuple[int, ...]]:
        """What stands behind some levels, in rising order and not normalised, and the grid of a plain stack's tokens.

        Levels behind the last of them are not run.
        """
        raise NotImplementedError

    def normed(self, state: Any, level: int) -> Tensor:
        """A level's state behind the last norm, where that fits it."""
        raise NotImplementedError

    def in_grid(self, x: Tensor, grid: tuple[int, ...]) -> Float[Tensor, "b *t h w d"]:
        """A state as a grid, without class tokens."""
        raise NotImplementedError

    def out(self, state: Any, level: int) -> Tensor:
        """What `forward_features` gives of a level's state."""
        return self.normed(state, level)

    def pool(self, x: Tensor) -> Tensor:
        """Of what `forward_features` gives, what the head reads."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "b c *T H W"]) -> Tensor:
        """Scores of the classes, before a softmax."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Float[Tensor, "b c *T H W"]) -> Tensor:
        """What the head is given: tokens (b, l, d) of a plain stack, a grid (b, d, h, w) of a pyramid."""
        last = len(self.level_list()) - 1
        (state,), _ = self.run(x, (last,))
        return self.out(state, last)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Scores of the classes from what `forward_features` gives; with `pre_logits`, what the classifier reads."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def embed(self, x: Float[Tensor, "b c *T H W"]) -> Tensor:
        """What the classifier reads."""
        return self.forward_head(self.forward_features(x), pre_logits=True)

    def features(self, x: Float[Tensor, "b c *T H W"]) -> list[Float[Tensor, "b *t h w d"]]:
        """Grids, finest first: behind each stage of a pyramid, behind each quarter of a plain stack's blocks."""
        return self._intermediates(x, self.seen, self.normed_features, max(self.seen))[1]

    def forward_intermediates(
        self,
        x: Float[Tensor, "b c *T H W"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Format = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What stands behind some levels, in rising order; and before that, what `forward_features` gives.

        Args:
            x: The images.
            indices: Numbers of the levels, from the end where negative; or how many of the last; all by default.
            norm: Normalise them as what the head reads: all of a plain stack's, the last of a pyramid's.
            stop_early: Do not run the levels behind the last of them; the first result is that one's, then.
            output_fmt: Grids with channels first or last, or tokens in rows; class tokens are left out.
            intermediates_only: Leave the first result out.

        Raises:
            ConfigError: There is no such level or form.
        """
        if output_fmt not in get_args(Format):
            raise ConfigError(f"output_fmt={output_fmt!r}: takes {', '.join(map(repr, get_args(Format)))}")
        taken = self.taken(indices)
        stop = max(taken) if stop_early or intermediates_only else len(self.level_list()) - 1
        final, grids = self._intermediates(x, taken, norm, stop)
        if output_fmt == "NCHW":
            grids = [grid.movedim(-1, 1) for grid in grids]
        elif output_fmt == "NLC":
            grids = [grid.flatten(1, -2) for grid in grids]
        return grids if intermediates_only else (self.out(final, stop), grids)

    def taken(self, indices: int | Sequence[int] | None) -> list[int]:
        """Numbers of the levels that `indices` asks for, rising.

        Raises:
            ConfigError: There is none with that number.
        """
        n = len(self.level_list())
        if indices is None or isinstance(indices, int):
            count = n if indices is None else indices
            wanted: Sequence[int] = range(n - count, n) if 0 < count <= n else ()
        else:
            wanted = indices
        if not wanted or not all(-n <= i < n for i in wanted):
            raise ConfigError(f"indices={indices}: takes numbers from {-n} to {n - 1}, or how many of the last {n}")
        return sorted({i % n for i in wanted})

    def level_list(self) -> nn.ModuleList:
        """The levels."""
        found = self.get_submodule(self.level_name)
        assert isinstance(found, nn.ModuleList)
        return found

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the given levels do not need, for good; returns their numbers from the start.

        Args:
            indices: As of `forward_intermediates`.
            prune_norm: Drop the last norm too.
            prune_head: Drop the classifier.
        """
        taken, before = self.taken(indices), self.state_dict().keys()
        stop = max(taken)
        is_whole = stop == len(self.level_list()) - 1
        self.cut(stop, prune_norm)
        if prune_head or not is_whole:
            self.drop_head()
        self.num_features = self.head_hidden_size = self.feature_info[stop]["num_chs"]
        self._see([i for i in self.seen if i <= stop] or [stop])
        self.pruned |= before - self.state_dict().keys()
        return taken

    def cut(self, stop: int, prune_norm: bool) -> None:
        """Drop the levels behind `stop`, and the last norm."""
        setattr(self, self.level_name, self.level_list()[: stop + 1])
        if prune_norm:
            leave_out(self, self.norm_name)

    def drop_head(self) -> None:
        """Drop what only scores need."""
        self.reset_classifier(0, "")

    def keep_features(self) -> None:
        """Drop, for good, what `features` does not need."""
        self.prune_intermediate_layers(self.seen, prune_norm=not self.normed_features)

    @property
    def num_classes(self) -> int:
        """Classes; 0 without a classifier."""
        return self.head.out_features if isinstance(self.head, nn.Linear) else 0

    def get_classifier(self) -> nn.Module:
        """The last linear map, or what stands in its place."""
        return self.head

    def pools(self) -> tuple[str, ...]:
        """What `global_pool` may be; "" is for none."""
        return ("avg", "max", "avgmax")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for other classes, or none for 0.

        Args:
            num_classes: Classes.
            global_pool: How the head makes one vector of tokens; "" for not at all, without a classifier.

        Raises:
            ConfigError: The model cannot pool so.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("", *self.pools()) and pool != self.global_pool:
            raise ConfigError(f"global_pool={pool!r}: takes {', '.join(map(repr, ('', *self.pools())))}")
        if num_classes < 0 or (num_classes and not pool):
            raise ConfigError(
                f"num_classes={num_classes}, global_pool={pool!r}: takes 0 without pooling, else at least 0"
            )
        self.global_pool = pool
        self.head = self.new_head(num_classes)

    def new_head(self, num_classes: int) -> nn.Module:
        """A classifier of what the model reads, where its parameters are."""
        like = next(self.parameters())
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute what is inside of blocks once more in the backward pass, instead of keeping it."""
        self.grad_checkpointing = enable

    def through(self, block: nn.Module, *args: Any) -> Any:
        """A block's output, whose inside is not kept under gradient checkpointing."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that do not decay besides biases and norms: recurrences, positions, scales."""
        return {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.named_modules()
            for name in getattr(module, "no_decay", ())
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameters' names in the order of the layers, for learning rates that fall towards the image."""
        raise NotImplementedError

    @classmethod
    def first_conv(cls, **arguments: Any) -> str:
        """Name of the convolution that sees the image, in a model built with these arguments."""
        return "patch_embed.proj"

    def _see(self, seen: Sequence[int]) -> None:
        self.seen = list(seen)
        self.feature_dims: tuple[int, ...] = tuple(self.feature_info[i]["num_chs"] for i in seen)
        self.feature_strides: tuple[int, ...] = tuple(self.feature_info[i]["reduction"] for i in seen)

    def _intermediates(self, x: Tensor, taken: Sequence[int], norm: bool, stop: int) -> tuple[Any, list[Tensor]]:
        """The state behind the level `stop`, and the grids behind some not after it."""
        after = sorted({*taken, stop})
        states, grid = self.run(x, after)
        grids = [
            self.in_grid(self.normed(state, level) if norm else raw(state), grid)
            for level, state in zip(after, states, strict=True)
            if level in taken
        ]
        return states[-1], grids


def leave_out(module: nn.Module, *names: str) -> None:
    """Put nothing in the place of parts of a module."""
    for name in names:
        setattr(module, name, None)


def raw(state: State) -> Tensor:
    """A state that is not normalised, as one tensor."""
    return state[0] + state[1] if isinstance(state, tuple) else state


class Plain(ImageModel):
    """A stack of blocks at one resolution, with class tokens among the others or none."""

    drops: nn.ModuleList
    norm_name: ClassVar[str] = "norm_f"
    normed_features: ClassVar[bool] = True
    output_fmt: ClassVar[str] = "NLC"

    def slots(self, n_tokens: int) -> tuple[int, ...]:
        """Where the class tokens stand among `n_tokens` others, counted with those before them."""
        raise NotImplementedError

    def normed(self, state: State, level: int) -> Tensor:
        norm = getattr(self, self.norm_name)
        if norm is None:
            return raw(state)
        return norm(*state)[0] if isinstance(state, tuple) else norm(state)

    def in_grid(self, x: Float[Tensor, "b l d"], grid: tuple[int, ...]) -> Float[Tensor, "b *t h w d"]:
        return self.without_class_tokens(x).unflatten(1, grid)

    def class_slots(self, x: Float[Tensor, "b l d"]) -> tuple[int, ...]:
        """Where the class tokens stand in all of these."""
        return self.slots(x.shape[1] - len(self.slots(0)))

    def without_class_tokens(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l2 d"]:
        """The others."""
        slots = self.class_slots(x)
        return remove_tokens(x, slots) if slots else x

    def pools(self) -> tuple[str, ...]:
        return (*super().pools(), *(("token",) if self.slots(0) else ()))

    def pool(self, x: Float[Tensor, "b l d"]) -> Tensor:
        if not self.global_pool:
            return x
        if self.global_pool == "token":
            slots = self.class_slots(x)
            return x[:, slots[0]] if len(slots) == 1 else (x[:, slots[0]] + x[:, slots[1]]) / 2
        return pooled(self.without_class_tokens(x), self.global_pool)

    def cut(self, stop: int, prune_norm: bool) -> None:
        super().cut(stop, prune_norm)
        self.drops = self.drops[: stop + 1]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stem = r"^(?:cls_token|pos_embed|time_embed|patch_embed|pre_norm)"
        return {"stem": stem, "blocks": [(rf"^{self.level_name}\.(\d+)", None), (r"^(?:norm_f|ln1|ln2)\.", LAST)]}


class Pyramid(ImageModel):
    """Stages with falling resolution; their states are grids, channels last."""

    def normed(self, state: Float[Tensor, "b h w d"], level: int) -> Float[Tensor, "b h w d"]:
        norm = getattr(self, self.norm_name)
        return state if norm is None or level < len(self.feature_info) - 1 else norm(state)

    def in_grid(self, x: Float[Tensor, "b h w d"], grid: tuple[int, ...]) -> Float[Tensor, "b h w d"]:
        return x

    def out(self, state: Float[Tensor, "b h w d"], level: int) -> Float[Tensor, "b d h w"]:
        return self.normed(state, level).permute(0, 3, 1, 2)

    def pool(self, x: Float[Tensor, "b d h w"]) -> Tensor:
        return pooled(x.flatten(2).transpose(1, 2), self.global_pool) if self.global_pool else x

    def cut(self, stop: int, prune_norm: bool) -> None:
        # The norm is of the last stage's width.
        super().cut(stop, prune_norm or stop < len(self.feature_info) - 1)
        leave_out(self.level_list()[-1], "downsample")
