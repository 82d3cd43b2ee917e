"""Hyena: gates and long convolutions whose filters are the output of a small network of the position.

Poli et al. 2023, "Hyena Hierarchy", arXiv:2302.10866, Sec. 3.

Source: github.com/HazyResearch/safari, c1b5c7b: `src/models/sequence/hyena.py`, `configs/experiment/pile/hyena.yaml`.
Glossary: N order (Def. 3.1), h filters, decay window (Eq. 7).
Departures: one head, one block of the length, no dropout on the embedding.
The convolution is a product of spectra; a state has to keep all inputs, as attention does, and a step is one row of the
convolution.
"""

import math
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.language.hugging_face import HuggingFace, own_layout
from selectra.language.model import Block, LanguageModel, start_weights
from selectra.layers.feed_forward import GELUMLP
from selectra.layers.norm import AddNorm
from selectra.mixers.history import count, require_room, room_for, slots_of, write
from selectra.mixers.packing import by_sequence
from selectra.mixers.s6 import at_least_float32, require_input, zero_absent
from selectra.mixers.sizes import require_sizes
from selectra.ops import causal_conv1d
from selectra.ops.whole import require_whole
from selectra.registry import models

# Up to how many new positions rows of the convolution are summed directly.
FEW = 4


class HyenaState(NamedTuple):
    """What a Hyena mixer remembers."""

    conv: Float[Tensor, "b c k"]
    """The last inputs of the short convolution."""
    past: Float[Tensor, "b m o d"]
    """All inputs of every long convolution; zeros in free slots."""
    n: Int[Tensor, " b"]
    """Positions of each row."""

    @property
    def by_slot(self) -> tuple[str, ...]:
        """Of which tensors a step writes nothing but slot n."""
        return ("past",)


class Sine(nn.Module):
    """A sine with a learned frequency for each channel.

    Args:
        d: Channels.
        frequency: Its start.
    """

    def __init__(self, d: int, frequency: float) -> None:
        super().__init__()
        self.freq = nn.Parameter(torch.full((1, d), frequency))

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """sin(freq x), in float32 at least."""
        return torch.sin(at_least_float32(self.freq) * x)


class ImplicitFilter(nn.Module):
    """Long filters: a network of the position's sines and cosines, times a decaying window.

    Args:
        n_filters: How many.
        seq_len: The longest filter; times are fractions of it.
        n_features: Odd: the time, and as many cosines as sines.
        d_hidden: Width of the network.
        frequency: Of its sines, at the start.
    """

    def __init__(self, n_filters: int, seq_len: int, n_features: int, d_hidden: int, frequency: float) -> None:
        super().__init__()
        if n_features % 2 == 0 or n_features < 3:
            raise ConfigError(f"n_features={n_features}: needs an odd number of at least 3")
        self.n_filters, self.seq_len, self.n_features = n_filters, seq_len, n_features
        sizes = [n_features, d_hidden, d_hidden, d_hidden]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        # One sine for all layers of the network, as in the official code.
        self.sine = Sine(d_hidden, frequency)
        self.last = nn.Linear(d_hidden, n_filters, bias=False)

    def forward(self, length: int) -> Float[Tensor, "length n_filters"]:
        """The first `length` taps; in float32 at least, since half precision would bend sines of large angles."""
        weight = self.last.weight
        x = self._features(length, weight.device).to(at_least_float32(weight).dtype)
        # The window falls to 1 % after between 0.3 and 1.5 of the longest length.
        slow, fast = -math.log(1e-2) / 1.5, -math.log(1e-2) / 0.3
        window = (-x[:, :1] * torch.linspace(slow, fast, self.n_filters, dtype=x.dtype, device=x.device)).exp()
        with torch.autocast(x.device.type, enabled=False):
            for layer in self.hidden:
                x = self.sine(F.linear(x, *map(at_least_float32, layer.parameters())))
            x = F.linear(x, at_least_float32(weight))
        return x * window

    def _features(self, length: int, device: torch.device) -> Float[Tensor, "length n_features"]:
        """The time as a fraction of the longest length, cosines, sines."""
        bands = (self.n_features - 1) // 2
        at = torch.arange(length, dtype=torch.float64, device=device)[:, None]
        bands = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64, device=device)
        angles = 2 * math.pi / self.seq_len * at * bands
        return torch.cat([at / max(self.seq_len - 1, 1), angles.cos(), -angles.sin()], 1)


def long_convolution(u: Float[Tensor, "b l d"], h: Float[Tensor, "m d"]) -> Float[Tensor, "b l d"]:
    """`y_t = sum_j h_j u_{t-j}` over all earlier positions, by FFT of twice the length; at least in float32."""
    require_whole("Hyena's long convolution")
    length = u.shape[1]
    if not length:
        return u
    size = 2 * length
    spectrum = torch.fft.rfft(at_least_float32(u), size, dim=1) * torch.fft.rfft(h[:length], size, dim=0)
    return torch.fft.irfft(spectrum, size, dim=1)[:, :length]


class HyenaMixer(nn.Module):
    """The Hyena operator, `(b, l, d_model) -> (b, l, d_model)`, causal along the length.

    Args:
        d_model: Width.
        seq_len: The longest sequence.
        order: Gates; one long convolution lies between each two.
        d_conv: Width of the short convolution.
        n_features: Of the position, for the filters' network.
        d_hidden: Width of that network.
        frequency: Of its sines, at the start.
    """

    remembers_all: ClassVar[bool] = True
    """The state grows with the length, and `init_state` takes a capacity."""

    def __init__(
        self,
        d_model: int,
        seq_len: int,
        order: int = 2,
        d_conv: int = 3,
        n_features: int = 33,
        d_hidden: int = 64,
        frequency: float = 14.0,
    ) -> None:
        super().__init__()
        require_sizes(d_model=d_model, seq_len=seq_len, d_conv=d_conv, d_hidden=d_hidden)
        if order < 2:
            raise ConfigError(f"order={order}: needs at least 2")
        self.d_model, self.seq_len, self.order = d_model, seq_len, order
        width = (order + 1) * d_model
        self.in_proj = nn.Linear(d_model, width)
        self.short_filter = nn.Conv1d(width, width, d_conv, groups=width, padding=d_conv - 1)
        self.filter = ImplicitFilter((order - 1) * d_model, seq_len, n_features, d_hidden, frequency)
        self.filter_bias = nn.Parameter(torch.randn((order - 1) * d_model))
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(
        self,
        x: Float[Tensor, "b l d_model"],
        *,
        mask: Bool[Tensor, "b l"] | None = None,
        cu_seqlens: Int32[Tensor, " borders"] | None = None,
    ) -> Float[Tensor, "b l d_model"]:
        """Mix whole sequences. Absent positions (`mask` False) influence nothing and give 0."""
        require_input(x, self.d_model, mask, cu_seqlens)
        if cu_seqlens is not None:
            return by_sequence(lambda rows, present: self(rows, mask=present), x, cu_seqlens)
        if mask is not None:
            return self.scan(x, self.init_state(len(x)), mask=mask)[0]
        self._require_length(x.shape[1])
        *gates, v = self._short(x, None, None)[0]
        for o, h in enumerate(self._filters(x.shape[1])):
            v = v * gates[-1 - o]
            v = (long_convolution(v, h) + v * self._bias(o)).to(x.dtype)
        return self.out_proj(v * gates[0])

    def init_state(self, batch: int, capacity: int = 0) -> HyenaState:
        """No positions yet, and room for `capacity`; `scan` makes more where it has to, `step_` does not.

        Raises:
            ConfigError: The filters are shorter than the capacity.
        """
        self._require_length(capacity)
        weight = self.in_proj.weight
        conv = weight.new_zeros(batch, self.short_filter.in_channels, self.short_filter.kernel_size[0])
        past = weight.new_zeros(batch, capacity, self.order - 1, self.d_model)
        return HyenaState(conv, past, torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def scan(
        self, x: Float[Tensor, "b l d_model"], state: HyenaState, *, mask: Bool[Tensor, "b l"] | None = None
    ) -> tuple[Float[Tensor, "b l d_model"], HyenaState]:
        """Mix the next chunk, of any length, and return the state to continue from; gradients flow through it."""
        require_input(x, self.d_model, mask)
        past = room_for(state.past, state.n + count(x, mask))
        self._require_length(past.shape[1])
        return self._continue(x, state._replace(past=past), mask)

    @torch.no_grad()
    def step_(self, x: Float[Tensor, "b l d_model"], state: HyenaState) -> Float[Tensor, "b l d_model"]:
        """Like `scan`, but writes into the state's tensors, which must have room; without gradient.

        Raises:
            ConfigError: The state has no room.
        """
        require_input(x, self.d_model, None)
        require_room(state.past.shape[1], state.n, x.shape[1])
        y, after = self._continue(x, state, None, in_place=True)
        state.conv.copy_(after.conv)
        state.n.copy_(after.n)
        return y

    def _continue(
        self, x: Tensor, state: HyenaState, mask: Tensor | None, in_place: bool = False
    ) -> tuple[Tensor, HyenaState]:
        (*gates, v), conv = self._short(x, state.conv, mask)
        slots, past = slots_of(state.n, x, mask), state.past
        inputs = []
        for o, h in enumerate(self._filters(past.shape[1])):
            v = v * gates[-1 - o]
            inputs.append(write(past[:, :, o], v, slots, mask, in_place))
            v = (self._rows(inputs[-1], h, slots) + v * self._bias(o)).to(x.dtype)
        y = zero_absent(self.out_proj(v * gates[0]), mask)
        past = past if in_place else torch.stack(inputs, 2)
        return y, HyenaState(conv, past, state.n + count(x, mask))

    @staticmethod
    def _rows(u: Float[Tensor, "b m d"], h: Float[Tensor, "m d"], slots: Int[Tensor, "b l"]) -> Tensor:
        """The long convolution's outputs at some positions."""
        if slots.shape[1] > FEW:
            return long_convolution(u, h).gather(1, slots[..., None].expand(-1, -1, u.shape[2]))
        apart = slots[..., None] - torch.arange(u.shape[1], device=u.device)  # b l m
        taps = h[apart.clamp(min=0)].masked_fill((apart < 0)[..., None], 0)
        return torch.einsum("blmd,bmd->bld", taps, u.to(h.dtype))

    def _short(self, x: Tensor, state: Tensor | None, mask: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Projected and convolved with the short filters: gates first, values last."""
        u, conv = causal_conv1d(
            zero_absent(self.in_proj(zero_absent(x, mask)), mask),
            self.short_filter.weight[:, 0],
            self.short_filter.bias,
            initial_state=state,
            return_final_state=True,
            mask=mask,
        )
        return u.chunk(self.order + 1, -1), conv

    def _filters(self, length: int) -> tuple[Tensor, ...]:
        """The first taps of every long filter."""
        return self.filter(length).unflatten(1, (self.d_model, self.order - 1)).unbind(2)

    def _bias(self, o: int) -> Tensor:
        return at_least_float32(self.filter_bias).unflatten(0, (self.d_model, self.order - 1))[:, o]

    def _require_length(self, length: int) -> None:
        if length > self.seq_len:
            raise ConfigError(
                f"{length} positions; the filters of this model reach over seq_len={self.seq_len}, no sequence may be "
                "longer."
            )


SIZES: dict[str, Any] = {"153m": {"vocab_size": 50264, "d_model": 864, "depth": 18, "tied": True}}


@own_layout("selectra_hyena")
@models.register(
    "hyena",
    kind="language",
    source="arXiv:2302.10866",
    smoke={"d_model": 16, "depth": 2, "seq_len": 256, "n_features": 5, "d_hidden": 8},
    base={"d_model": 256, "depth": 14, "seq_len": 1024},
    **SIZES,
)
class Hyena(LanguageModel):
    """Hyena: gated long convolutions and perceptrons.

    Args:
        vocab_size: Tokens.
        d_model: Width.
        depth: Layers.
        seq_len: The longest sequence, prompt and answer together.
        order: Gates of an operator.
        d_ff: Inner width of a perceptron; twice `d_model` by default.
        d_conv: Width of the short convolution.
        n_features: Of the position, for the filters' network.
        d_hidden: Width of that network.
        frequency: Of its sines, at the start.
        eps: Of all norms.
        tied: Whether the embedding is the map to the vocabulary too.
        dropout: Rate on what layers add to the stream.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        depth: int,
        seq_len: int = 2048,
        order: int = 2,
        d_ff: int | None = None,
        d_conv: int = 3,
        n_features: int = 33,
        d_hidden: int = 64,
        frequency: float = 14.0,
        eps: float = 1e-5,
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        filters: dict[str, Any] = {
            "seq_len": seq_len, "order": order, "d_conv": d_conv, "n_features": n_features, "d_hidden": d_hidden,
            "frequency": frequency,
        }  # fmt: skip

        width = 2 * d_model if d_ff is None else d_ff
        require_sizes(d_model=d_model, d_ff=width)

        def norm() -> AddNorm:
            return AddNorm(d_model, eps, "layer")

        def block() -> Block:
            return Block(norm(), HyenaMixer(d_model, **filters), norm(), GELUMLP(d_model, width))

        blocks = (block() for _ in range(depth))
        super().__init__(vocab_size, d_model, blocks, norm(), tied=tied, dropout=dropout)
        self.seq_len = seq_len
        self._config = {
            "vocab_size": vocab_size, "d_model": d_model, "depth": depth, "d_ff": d_ff, "eps": eps, "tied": tied,
            "dropout": dropout, **filters,
        }  # fmt: skip
        # The filters' networks keep PyTorch's start.
        start_weights(self, ends=("out_proj", "fc2"), maps=False)

    def hugging_face(self) -> HuggingFace:
        """The constructor's arguments and the weights under their own names."""
        return HuggingFace({"model_type": "selectra_hyena", **self._config}, dict(self.state_dict()))
