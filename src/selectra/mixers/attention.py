"""Causal self-attention with grouped keys and values, and its memory.

Vaswani et al. 2017, arXiv:1706.03762, Eq. 1; Ainslie et al. 2023, arXiv:2305.13245 (groups of heads that share keys
and values). Parameters carry the names of Hugging Face's Llama and Jamba.
"""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from selectra.errors import ConfigError
from selectra.layers.rotary import rotary_angles, rotate
from selectra.mixers.history import count, require_room, room_for, slots_of, write
from selectra.mixers.packing import by_sequence
from selectra.mixers.s6 import require_input, zero_absent
from selectra.mixers.sizes import require_sizes
from selectra.ops import cached_attention
from selectra.ops.whole import require_whole


class KeyValue(NamedTuple):
    """All earlier keys and values."""

    keys: Float[Tensor, "b m g p"]
    """With their positions turned in, where the model has positions; zeros in free slots."""
    values: Float[Tensor, "b m g p"]
    """As keys."""
    n: Int[Tensor, " b"]
    """Positions of each row; the other slots are free."""

    @property
    def by_slot(self) -> tuple[str, ...]:
        """Of which tensors a step writes nothing but slot n."""
        return ("keys", "values")


class CausalAttention(nn.Module):
    """Multi-head attention of every position to those before it and itself.

    Args:
        d_model: Width.
        n_heads: Query heads, each of `d_model / n_heads` channels.
        n_kv_heads: Key and value heads, each shared by a group of query heads; as many as queries by default.
        rotary_base: Base of rotary positions; None for none.
        dropout: Rate on the attention weights.
    """

    remembers_all: ClassVar[bool] = True
    """The state grows with the length, and `init_state` takes a capacity."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        rotary_base: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        require_sizes(d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads)
        if d_model % n_heads or n_heads % n_kv_heads:
            raise ConfigError(
                f"n_heads={n_heads} must divide d_model={d_model}, and n_kv_heads={n_kv_heads} must divide n_heads"
            )
        self.d_model, self.n_heads, self.n_kv_heads, self.dropout = d_model, n_heads, n_kv_heads, dropout
        self.d_head = d_model // n_heads
        if rotary_base is not None and self.d_head % 2:
            raise ConfigError(f"d_model={d_model} and n_heads={n_heads}: rotary positions need heads of even width")
        self.rotary_base = rotary_base
        self.q_proj = nn.Linear(d_model, n_heads * self.d_head, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.d_head, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.d_head, bias=False)
        self.o_proj = nn.Linear(n_heads * self.d_head, d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "b l d_model"],
        *,
        mask: Bool[Tensor, "b l"] | None = None,
        cu_seqlens: Int32[Tensor, " borders"] | None = None,
    ) -> Float[Tensor, "b l d_model"]:
        """Mix whole sequences. Absent positions (`mask` False) influence nothing and give 0."""
        require_whole("attention")
        require_input(x, self.d_model, mask, cu_seqlens)
        if cu_seqlens is not None:
            return by_sequence(lambda rows, present: self(rows, mask=present), x, cu_seqlens)
        x = zero_absent(x, mask)
        q, k, v = self._heads(x, slots_of(None, x, mask))
        if mask is None:
            return self._attended(q, k, v, None, causal=True)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        # An absent position sees itself: a softmax over nothing is no number.
        seen = (seen & mask[:, None, :]) | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        return zero_absent(self._attended(q, k, v, seen[:, None]), mask)

    def init_state(self, batch: int, capacity: int = 0) -> KeyValue:
        """No positions yet, and room for `capacity`; `scan` makes more where it has to, `step_` does not."""
        weight = self.k_proj.weight
        empty = weight.new_zeros(batch, capacity, self.n_kv_heads, self.d_head)
        return KeyValue(empty, empty.clone(), torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def scan(
        self, x: Float[Tensor, "b l d_model"], state: KeyValue, *, mask: Bool[Tensor, "b l"] | None = None
    ) -> tuple[Float[Tensor, "b l d_model"], KeyValue]:
        """Mix the next chunk, of any length, and return the state to continue from; gradients flow through it."""
        require_input(x, self.d_model, mask)
        n = state.n + count(x, mask)
        state = state._replace(keys=room_for(state.keys, n), values=room_for(state.values, n))
        return self._continue(x, state, n, mask, in_place=False)

    @torch.no_grad()
    def step_(self, x: Float[Tensor, "b l d_model"], state: KeyValue) -> Float[Tensor, "b l d_model"]:
        """Like `scan`, but writes into the state's tensors, which must have room; without gradient.

        Raises:
            ConfigError: The state has no room.
        """
        require_input(x, self.d_model, None)
        require_room(state.keys.shape[1], state.n, x.shape[1])
        y, after = self._continue(x, state, state.n + x.shape[1], None, in_place=True)
        state.n.copy_(after.n)
        return y

    def _continue(
        self, x: Tensor, state: KeyValue, n: Tensor, mask: Tensor | None, in_place: bool
    ) -> tuple[Tensor, KeyValue]:
        x = zero_absent(x, mask)
        slots = slots_of(state.n, x, mask)
        q, k, v = self._heads(x, slots)
        keys, values = (write(old, new, slots, mask, in_place) for old, new in zip(state, (k, v), strict=False))
        if in_place and x.shape[1] == 1 and cached_attention.takes(q[:, 0], keys, values, n):
            return self.o_proj(cached_attention.attend(q[:, 0], keys, values, n).flatten(1)[:, None]), KeyValue(
                keys, values, n
            )
        used = self._same_number(n) if x.is_cuda and x.shape[1] > 1 and mask is None else None
        if used is not None:
            # One kernel that needs no mask in memory.
            y = self._attended(q, keys[:, :used], values[:, :used], causal_lower_right(x.shape[1], used))
        else:
            seen = torch.arange(keys.shape[1], device=x.device) <= slots[..., None]  # b l m
            y = zero_absent(self._attended(q, keys, values, seen[:, None]), mask)
        return y, KeyValue(keys, values, n)

    @staticmethod
    def _same_number(n: Tensor) -> int | None:
        """How many positions all rows have, if it is the same number."""
        least, most = (int(value) for value in n.aminmax())
        return most if least == most else None

    def _heads(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_proj(x).unflatten(2, (self.n_heads, self.d_head))
        k = self.k_proj(x).unflatten(2, (self.n_kv_heads, self.d_head))
        v = self.v_proj(x).unflatten(2, (self.n_kv_heads, self.d_head))
        if self.rotary_base is not None:
            angles = rotary_angles(self.d_head, self.rotary_base, x.device)
            q, k = rotate(q, positions, angles), rotate(k, positions, angles)
        return q, k, v

    def _attended(
        self,
        q: Float[Tensor, "b l h p"],
        k: Float[Tensor, "b m g p"],
        v: Float[Tensor, "b m g p"],
        seen: Tensor | None,
        causal: bool = False,
    ) -> Float[Tensor, "b l d_model"]:
        q, k, v = (tensor.transpose(1, 2).to(q.dtype) for tensor in (q, k, v))
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=seen,
            is_causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.n_heads != self.n_kv_heads,
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))
