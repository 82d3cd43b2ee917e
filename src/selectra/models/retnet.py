"""RetNet: attention whose weights decay with distance instead of passing a softmax, so that it is a recurrence too.

Sun et al. 2023, "Retentive Network", arXiv:2307.08621, Sec. 2.

Source: github.com/microsoft/torchscale, 05a9628: `torchscale/component/multiscale_retention.py`.
Glossary: gamma decay of a head (Eq. 8), Q, K, V with rotary positions (Eq. 5).
Departures:
  scales  torchscale divides scores, sums and states by numbers that keep half precision in range, differently in each
          of its three forms; the norm of every head makes them void, and here sums and states are float32
  norms   RMS norms without mean, as torchscale; the paper has LayerNorm and GroupNorm
  FFN     two maps with GELU between, as the paper; torchscale has a gate too
Retention is Mamba-2's recurrence with a decay that does not depend on the input, and runs on the same operator.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.language.hugging_face import HuggingFace, own_layout
from selectra.language.model import Block, LanguageModel, start_weights
from selectra.layers.feed_forward import GELUMLP
from selectra.layers.norm import AddNorm
from selectra.layers.rotary import rotate
from selectra.mixers.history import count, slots_of
from selectra.mixers.packing import by_sequence
from selectra.mixers.s6 import at_least_float32, require_input, zero_absent
from selectra.mixers.sizes import require_sizes
from selectra.ops.ssd import ssd
from selectra.ops.whole import require_whole
from selectra.registry import models

Form = Literal["chunked", "parallel", "recurrent"]
FORMS = ("chunked", "parallel", "recurrent")


class RetentionState(NamedTuple):
    """What a retention remembers."""

    n: Int[Tensor, " b"]
    """Positions so far."""
    kv: Float[Tensor, "b h p n"]
    """The decayed sum of values times keys, at least in float32."""


def retention(
    q: Float[Tensor, "b l h n"],
    k: Float[Tensor, "b l h n"],
    v: Float[Tensor, "b l h p"],
    decay: Float[Tensor, " h"],
    state: Float[Tensor, "b h p n"] | None = None,
    mask: Bool[Tensor, "b l"] | None = None,
    form: Form = "chunked",
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """`y_t = S_t q_t` with `S_t = gamma S_{t-1} + v_t k_t'`, in one of three equal forms; at least in float32.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        decay: Logarithm of gamma.
        state: S before the first position.
        mask: True where a position is present; others pass the state on unchanged.
        form: "parallel" (Eq. 5: all scores at once, memory with the square of the length), "recurrent" (Eq. 6: position
            by position) or "chunked" (Eq. 7: chunks of scores).
    """
    require_whole("retention")
    present = torch.ones(q.shape[:2], device=q.device) if mask is None else mask
    steps = at_least_float32(present.to(v.dtype)[..., None].expand(*v.shape[:3]))
    if form == "chunked":
        # Factors keep the values' precision, as attention's do; sums and states are the operator's, float32 at least.
        return ssd(v, steps, decay, k.to(v.dtype), q.to(v.dtype), initial_state=state)
    q, k, v = (at_least_float32(tensor) for tensor in (q, k, v))
    state = v.new_zeros(*v.shape[0::2], v.shape[3], k.shape[3]) if state is None else state
    if form == "recurrent":
        outputs = []
        for t in range(v.shape[1]):
            step = steps[:, t, :, None, None]
            update = torch.einsum("bhp,bhn->bhpn", v[:, t], k[:, t])
            state = state * (decay[:, None, None] * step).exp() + step * update
            outputs.append(torch.einsum("bhpn,bhn->bhp", state, q[:, t]))
        return torch.stack(outputs, 1) if outputs else v, state
    age = (steps * decay).cumsum(1).transpose(1, 2)  # b h l
    apart = age[..., :, None] - age[..., None, :]
    causal = torch.ones(apart.shape[-2:], dtype=torch.bool, device=q.device).tril()
    weights = apart.masked_fill(~causal, -torch.inf).exp() * steps.transpose(1, 2)[..., None, :]
    y = torch.einsum("bihn,bjhn,bhij,bjhp->bihp", q, k, weights, v)
    y = y + torch.einsum("bihn,bhpn,bhi->bihp", q, state, age.exp())
    if not v.shape[1]:
        return y, state
    last = age[..., -1]
    after = torch.einsum("bjhp,bjhn,bhj->bhpn", v, k, weights[..., -1, :])
    return y, state * last.exp()[..., None, None] + after


class Retention(nn.Module):
    """Multi-scale retention, `(b, l, d_model) -> (b, l, d_model)`, causal along the length.

    Args:
        d_model: Width.
        n_heads: Heads, each with a decay of its own.
        d_value: Width of all values together.
        eps: Of the heads' norms.
        form: Which form `forward` and `scan` take.
    """

    def __init__(self, d_model: int, n_heads: int, d_value: int, eps: float = 1e-6, form: Form = "chunked") -> None:
        super().__init__()
        require_sizes(d_model=d_model, n_heads=n_heads, d_value=d_value)
        if d_model % (2 * n_heads) or d_value % n_heads:
            raise ConfigError(
                f"n_heads={n_heads} must divide d_model={d_model} into heads of even width, and d_value={d_value}"
            )
        if form not in FORMS:
            raise ConfigError(f"form={form!r}: takes {', '.join(map(repr, FORMS))}")
        self.d_model, self.n_heads, self.d_value, self.eps = d_model, n_heads, d_value, eps
        self.form: Form = form
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_value, bias=False)
        self.g_proj = nn.Linear(d_model, d_value, bias=False)
        self.out_proj = nn.Linear(d_value, d_model, bias=False)

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

    def init_state(self, batch: int) -> RetentionState:
        """The state before the first position."""
        weight = self.q_proj.weight
        n = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        sizes = self.n_heads, self.d_value // self.n_heads, self.d_model // self.n_heads
        return RetentionState(n, at_least_float32(weight).new_zeros(batch, *sizes))

    def scan(
        self, x: Float[Tensor, "b l d_model"], state: RetentionState, *, mask: Bool[Tensor, "b l"] | None = None
    ) -> tuple[Float[Tensor, "b l d_model"], RetentionState]:
        """Mix the next chunk, of any length, and return the state to continue from; gradients flow through it."""
        require_input(x, self.d_model, mask)
        x = zero_absent(x, mask)
        q, k, v = (p(x).unflatten(2, (self.n_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        width = self.d_model // self.n_heads
        positions = slots_of(state.n, x, mask)
        angles = 10_000 ** -torch.linspace(0, 1, width // 2, dtype=torch.float64, device=x.device)
        q, k = (rotate(tensor, positions, angles, interleaved=True) for tensor in (q, k * width**-0.5))
        powers = -5 - torch.arange(self.n_heads, dtype=state.kv.dtype, device=x.device)
        y, kv = retention(q, k, v, torch.log1p(-(2**powers)), state.kv, mask, self.form)
        y = F.rms_norm(y, y.shape[-1:], None, self.eps).flatten(2).to(x.dtype)
        return self.out_proj(F.silu(self.g_proj(x)) * y), RetentionState(state.n + count(x, mask), kv)

    @torch.no_grad()
    def step_(self, x: Float[Tensor, "b l d_model"], state: RetentionState) -> Float[Tensor, "b l d_model"]:
        """Like `scan`, usually of one position, but overwrites the state's tensors; without gradient."""
        y, after = self.scan(x, state)
        for tensor, value in zip(state, after, strict=True):
            tensor.copy_(value)
        return y


SIZES: dict[str, Any] = {
    "1b3": {"d_model": 2048, "depth": 24, "n_heads": 8},
    "2b7": {"d_model": 2560, "depth": 32, "n_heads": 10},
    "6b7": {"d_model": 4096, "depth": 32, "n_heads": 16},
}


@own_layout("selectra_retnet")
@models.register(
    "retnet",
    kind="language",
    source="arXiv:2307.08621",
    smoke={"d_model": 16, "depth": 2, "n_heads": 2},
    base={"d_model": 256, "depth": 12, "n_heads": 2},
    # Table 2: heads of 256 channels.
    **SIZES,
)
class RetNet(LanguageModel):
    """RetNet: multi-scale retention and perceptrons.

    Args:
        vocab_size: Tokens.
        d_model: Width.
        depth: Layers.
        n_heads: Heads.
        d_value: Width of the values; twice `d_model` by default.
        d_ff: Inner width of a perceptron; twice `d_model` by default.
        eps: Of all norms.
        form: Which of the equal forms of retention is computed, but for single steps.
        tied: Whether the embedding is the map to the vocabulary too.
        dropout: Rate on what layers add to the stream.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        depth: int,
        n_heads: int,
        d_value: int | None = None,
        d_ff: int | None = None,
        eps: float = 1e-6,
        form: Form = "chunked",
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        value, width = (2 * d_model if size is None else size for size in (d_value, d_ff))
        require_sizes(d_model=d_model, n_heads=n_heads, d_value=value, d_ff=width)

        def norm() -> AddNorm:
            return AddNorm(d_model, eps, residual_in_fp32=False)

        def block() -> Block:
            mixer = Retention(d_model, n_heads, value, eps, form)
            return Block(norm(), mixer, norm(), GELUMLP(d_model, width))

        blocks = (block() for _ in range(depth))
        super().__init__(vocab_size, d_model, blocks, norm(), tied=tied, dropout=dropout)
        self._config = {
            "vocab_size": vocab_size, "d_model": d_model, "depth": depth, "n_heads": n_heads, "d_value": d_value,
            "d_ff": d_ff, "eps": eps, "form": form, "tied": tied, "dropout": dropout,
        }  # fmt: skip
        start_weights(self, ends=("out_proj", "fc2"))

    def hugging_face(self) -> HuggingFace:
        """The constructor's arguments and the weights under their own names."""
        return HuggingFace({"model_type": "selectra_retnet", **self._config}, dict(self.state_dict()))
