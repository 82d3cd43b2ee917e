"""RWKV-4: attention without queries, one decay a channel, so that it runs as a recurrence too.

Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048, Sec. 3 and Appendix D.

Source: transformers 5.23.0, `models/rwkv`. A layer is a time mixer and a channel mixer; both look at the position
before through a learned blend. Parameters carry Hugging Face's names; here every mixer is a block of its own, so that
block 2i is the time mixer and block 2i + 1 the channel mixer of layer i.
Glossary: w time_decay, u time_first, mu time_mix (Eq. 11-16).
Departures: at evaluation Hugging Face halves the stream every `rescale_every` layers, for half precision; the last
norm undoes it (but for its epsilon), and it is not rebuilt.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor, nn

from selectra.language.hugging_face import HuggingFace, common, layout, official
from selectra.language.model import LanguageModel, start_weights
from selectra.layers.norm import AddNorm, PreNorm
from selectra.mixers.packing import by_sequence
from selectra.mixers.s6 import at_least_float32, require_input, zero_absent
from selectra.mixers.sizes import require_sizes
from selectra.mixers.wkv import NOTHING, wkv
from selectra.official import Official, reads
from selectra.registry import models


class ShiftState(NamedTuple):
    """What a channel mixer remembers."""

    shift: Float[Tensor, "b d"]
    """Its last input."""


class WKVState(NamedTuple):
    """What a time mixer remembers: the sums are `num * exp(top)` and `den * exp(top)`, at least in float32."""

    shift: Float[Tensor, "b d"]
    num: Float[Tensor, "b d"]
    den: Float[Tensor, "b d"]
    top: Float[Tensor, "b d"]


class Shifted(nn.Module):
    """What both mixers share: a blend of every position with the one before."""

    no_decay: ClassVar[tuple[str, ...]] = ()

    def __init__(self, d_model: int, blends: tuple[str, ...]) -> None:
        super().__init__()
        self.d_model = d_model
        for name in blends:
            setattr(self, f"time_mix_{name}", nn.Parameter(torch.full((1, 1, d_model), 0.5)))

    @staticmethod
    def _before(x: Tensor, shift: Tensor | None) -> Tensor:
        """Every position's predecessor."""
        first = torch.zeros_like(x[:, :1]) if shift is None else shift[:, None].to(x.dtype)
        return torch.cat([first, x[:, :-1]], 1) if x.shape[1] else x

    def _blend(self, name: str, x: Tensor, before: Tensor) -> Tensor:
        share = getattr(self, f"time_mix_{name}")
        return x * share + before * (1 - share)

    def _last(self, x: Tensor, shift: Tensor | None, mask: Tensor | None) -> Tensor:
        """The last present input, or the earlier one where there is none."""
        earlier = x.new_zeros(len(x), self.d_model) if shift is None else shift
        if not x.shape[1]:
            return earlier
        if mask is None:
            return x[:, -1]
        t = torch.arange(1, x.shape[1] + 1, device=x.device)
        place = (mask * t).amax(1)
        found = x.gather(1, (place - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]
        return torch.where((place > 0)[:, None], found, earlier)

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
        return self.scan(x, self.init_state(len(x)), mask=mask)[0]

    def init_state(self, batch: int) -> Any:
        """The state before the first position."""
        raise NotImplementedError

    def scan(self, x: Tensor, state: Any, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Mix the next chunk, of any length, and return the state to continue from; gradients flow through it."""
        raise NotImplementedError

    @torch.no_grad()
    def step_(self, x: Float[Tensor, "b l d_model"], state: Any) -> Float[Tensor, "b l d_model"]:
        """Like `scan`, usually of one position, but overwrites the state's tensors; without gradient."""
        y, after = self.scan(x, state)
        for tensor, value in zip(state, after, strict=True):
            tensor.copy_(value)
        return y


class TimeMix(Shifted):
    """RWKV's mixer of positions: a mean of values, newer ones weighing more, behind a gate.

    Args:
        d_model: Width.
        d_inner: Channels that are averaged.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("time_decay", "time_first", "time_mix_key", "time_mix_value",
                                           "time_mix_receptance")  # fmt: skip
    """Parameters of this module that weight decay leaves out; the optimizer reads it."""

    def __init__(self, d_model: int, d_inner: int) -> None:
        super().__init__(d_model, ("key", "value", "receptance"))
        self.d_inner = d_inner
        self.time_decay = nn.Parameter(torch.zeros(d_inner))
        self.time_first = nn.Parameter(torch.zeros(d_inner))
        self.key = nn.Linear(d_model, d_inner, bias=False)
        self.value = nn.Linear(d_model, d_inner, bias=False)
        self.receptance = nn.Linear(d_model, d_inner, bias=False)
        self.output = nn.Linear(d_inner, d_model, bias=False)

    def init_state(self, batch: int) -> WKVState:
        """The state before the first position."""
        wide = at_least_float32(self.time_decay)
        zeros = wide.new_zeros(batch, self.d_inner)
        shift = self.key.weight.new_zeros(batch, self.d_model)
        return WKVState(shift, zeros, zeros.clone(), torch.full_like(zeros, NOTHING))

    def scan(
        self, x: Float[Tensor, "b l d_model"], state: WKVState, *, mask: Bool[Tensor, "b l"] | None = None
    ) -> tuple[Float[Tensor, "b l d_model"], WKVState]:
        """Mix the next chunk, of any length, and return the state to continue from; gradients flow through it."""
        require_input(x, self.d_model, mask)
        x = zero_absent(x, mask)
        before = self._before(x, state.shift)
        k = at_least_float32(self.key(self._blend("key", x, before)))
        v = at_least_float32(self.value(self._blend("value", x, before)))
        gate = self.receptance(self._blend("receptance", x, before)).sigmoid()
        w, u = at_least_float32(self.time_decay).exp(), at_least_float32(self.time_first)
        y, sums = wkv(k, v, w, u, state[1:], mask)
        y = zero_absent(self.output(gate * y.to(x.dtype)), mask)
        return y, WKVState(self._last(x, state.shift, mask), *sums)


class ChannelMix(Shifted):
    """RWKV's mixer of channels: a gated perceptron with squared ReLU that sees the position before too.

    Args:
        d_model: Width.
        d_ff: Inner width.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("time_mix_key", "time_mix_receptance")
    """Parameters of this module that weight decay leaves out; the optimizer reads it."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__(d_model, ("key", "receptance"))
        self.key = nn.Linear(d_model, d_ff, bias=False)
        self.receptance = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_ff, d_model, bias=False)

    def init_state(self, batch: int) -> ShiftState:
        """The state before the first position."""
        return ShiftState(self.key.weight.new_zeros(batch, self.d_model))

    def scan(
        self, x: Float[Tensor, "b l d_model"], state: ShiftState, *, mask: Bool[Tensor, "b l"] | None = None
    ) -> tuple[Float[Tensor, "b l d_model"], ShiftState]:
        """Mix the next chunk, of any length, and return the state to continue from; gradients flow through it."""
        require_input(x, self.d_model, mask)
        x = zero_absent(x, mask)
        before = self._before(x, state.shift)
        gate = self.receptance(self._blend("receptance", x, before)).sigmoid()
        y = gate * self.value(self.key(self._blend("key", x, before)).relu().square())
        return zero_absent(y, mask), ShiftState(self._last(x, state.shift, mask))


PILE = {"vocab_size": 50277}


SIZES: dict[str, Any] = {
    "169m": {"d_model": 768, "depth": 12, **PILE},
    "430m": {"d_model": 1024, "depth": 24, **PILE},
    "1b5": {"d_model": 2048, "depth": 24, **PILE},
    "3b": {"d_model": 2560, "depth": 32, **PILE},
    "7b": {"d_model": 4096, "depth": 32, **PILE},
    "14b": {"d_model": 5120, "depth": 40, **PILE},
}


@layout("rwkv", "huggingface/transformers:RwkvForCausalLM")
@models.register(
    "rwkv",
    kind="language",
    source="arXiv:2305.13048",
    smoke={"d_model": 16, "depth": 2},
    base={"d_model": 256, "depth": 12},
    **SIZES,
)
class RWKV(LanguageModel):
    """RWKV-4: decaying means of values instead of attention.

    Args:
        vocab_size: Tokens.
        d_model: Width.
        depth: Layers, each of a time mixer and a channel mixer.
        d_inner: Channels that are averaged; `d_model` by default.
        d_ff: Inner width of the channel mixer; four times `d_model` by default.
        eps: Of all norms but the last, which has 1e-5.
        tied: Whether the embedding is the map to the vocabulary too.
        dropout: Rate on what mixers add to the stream.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        depth: int,
        d_inner: int | None = None,
        d_ff: int | None = None,
        eps: float = 1e-5,
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        inner, width = d_model if d_inner is None else d_inner, 4 * d_model if d_ff is None else d_ff
        require_sizes(d_model=d_model, d_inner=inner, d_ff=width)

        def norm() -> AddNorm:
            return AddNorm(d_model, eps, "layer", residual_in_fp32=False)

        blocks = []
        for _ in range(depth):
            blocks += [PreNorm(norm(), TimeMix(d_model, inner)), PreNorm(norm(), ChannelMix(d_model, width))]
        norm_f = AddNorm(d_model, 1e-5, "layer", residual_in_fp32=False)
        super().__init__(vocab_size, d_model, blocks, norm_f, tied=tied, dropout=dropout)
        self.pre_ln = norm()
        self.eps = eps
        start_weights(self, maps=False)
        for i in range(depth):
            _start_layer(self.mixers()[2 * i], self.mixers()[2 * i + 1], i, depth)

    def _embedded(self, tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        return self.pre_ln(super()._embedded(tokens, mask, cu_seqlens))[0]

    def hugging_face(self) -> HuggingFace:
        """Configuration and weights as Hugging Face keeps RWKV-4."""
        time, channel = self.mixers()[:2]
        config = {
            "model_type": "rwkv", "architectures": ["RwkvForCausalLM"], "vocab_size": self.vocab_size,
            "hidden_size": self.d_model, "num_hidden_layers": len(self.layers) // 2, "rescale_every": 0,
            "attention_hidden_size": time.d_inner, "intermediate_size": channel.key.out_features,
            "layer_norm_epsilon": self.eps, "tie_word_embeddings": self.tied,
        }  # fmt: skip
        return HuggingFace(config, {_their_key(key): value for key, value in self.state_dict().items()})


@torch.no_grad()
def _start_layer(time: TimeMix, channel: ChannelMix, layer: int, depth: int) -> None:
    """RWKV's start: decays and blends that differ by channel and by depth (Appendix E)."""
    near, rest = layer / max(depth - 1, 1), 1 - layer / depth
    share = torch.arange(time.d_model) / time.d_model
    blends = share**rest, share**rest + 0.3 * near, share ** (0.5 * rest)
    for name, blend in zip(("key", "value", "receptance"), blends, strict=True):
        time.get_parameter(f"time_mix_{name}").copy_(blend)
    for name in ("key", "receptance"):
        channel.get_parameter(f"time_mix_{name}").copy_(share**rest)
    h = torch.arange(time.d_inner)
    time.time_decay.copy_(-5 + 8 * (h / max(time.d_inner - 1, 1)) ** (0.7 + 1.3 * near))
    time.time_first.copy_(torch.log(torch.tensor(0.3)) + 0.5 * ((h + 1) % 3 - 1))
    for end in (time.output, channel.value):
        end.weight.mul_((2 * depth) ** -0.5)


_TOP = {"embedding": "rwkv.embeddings", "norm_f": "rwkv.ln_out", "lm_head": "head", "pre_ln": "rwkv.blocks.0.pre_ln"}
_PARTS = {"norm": "ln1", "mixer": "attention"}, {"norm": "ln2", "mixer": "feed_forward"}


def _their_key(key: str) -> str:
    first, *rest = key.split(".")
    if first != "layers":
        return ".".join([_TOP[first], *rest])
    number, part, *rest = rest
    layer, which = divmod(int(number), 2)
    return ".".join(["rwkv.blocks", str(layer), _PARTS[which][part], *rest])


def _our_key(key: str) -> str:
    for ours, theirs in _TOP.items():
        if key.startswith(f"{theirs}."):
            return ours + key.removeprefix(theirs)
    parts = key.split(".")
    for which, names in enumerate(_PARTS):
        for ours, theirs in names.items():
            if parts[:2] == ["rwkv", "blocks"] and len(parts) > 3 and parts[2].isdecimal() and parts[3] == theirs:
                return ".".join(["layers", str(2 * int(parts[2]) + which), ours, *parts[4:]])
    return key


def _ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {_our_key(key): value for key, value in state.items()}


@reads("huggingface/transformers:RwkvForCausalLM")
@common
def read_rwkv(
    *,
    vocab_size: int = 50277,
    context_length: int = 1024,
    hidden_size: int = 4096,
    num_hidden_layers: int = 32,
    attention_hidden_size: int | None = None,
    intermediate_size: int | None = None,
    layer_norm_epsilon: float = 1e-5,
    rescale_every: int = 6,
    tie_word_embeddings: bool = False,
    **options: Any,
) -> Official:
    """Hugging Face's RWKV-4. `context_length` has no effect; `rescale_every` changes how numbers are kept alone."""
    model = RWKV(
        vocab_size=vocab_size, d_model=hidden_size, depth=num_hidden_layers, d_inner=attention_hidden_size,
        d_ff=intermediate_size, eps=layer_norm_epsilon, tied=tie_word_embeddings,
    )  # fmt: skip
    return official(model, _ours, options)
