"""Jamba: Mamba blocks, an attention layer now and then, and mixtures of experts.

Lieber et al. 2024, arXiv:2403.19887; Jamba Team 2024, arXiv:2408.12570 (Jamba-1.5).

Source: transformers 5.23.0, `models/jamba`. Layer i is attention where `i % attn_period == attn_offset`, else Mamba;
its feed-forward layer is a mixture where `i % moe_period == moe_offset`, else dense. There are no positions.
Glossary: l layers of a block, a:m attention to Mamba, e how often experts, n experts, K of them a token (Sec. 2).
Departures: none known. Jamba-1.5's loss on the size of activations is not built.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.language.hugging_face import HuggingFace, Names, common, layout, official
from selectra.language.model import Block, LanguageModel, start_weights
from selectra.layers.feed_forward import SwiGLU
from selectra.layers.moe import MoE
from selectra.layers.norm import AddNorm
from selectra.mixers import S6, CausalAttention, State
from selectra.mixers.s6 import at_least_float32
from selectra.mixers.sizes import require_sizes
from selectra.official import Official, reads
from selectra.ops import selective_scan
from selectra.registry import models

NAMES = Names(
    ("embedding.", "model.embed_tokens."),
    ("norm_f.", "model.final_layernorm."),
    ("layers.{}.norm.", "model.layers.{}.input_layernorm."),
    ("layers.{}.norm2.", "model.layers.{}.pre_ff_layernorm."),
    ("layers.{}.mlp.", "model.layers.{}.feed_forward."),
)


class RMSNorm(nn.RMSNorm):
    """Computed in float32 at least, and given in the input's type, also under autocast."""

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        weight = at_least_float32(self.weight)
        return nn.functional.rms_norm(at_least_float32(x), self.normalized_shape, weight, self.eps).to(x.dtype)


class NormedS6(S6):
    """Mamba with an RMS norm on the step's low rank, on B and on C, which keeps large models from diverging.

    Args, beside those of `S6`:
        eps: Of these norms.
    """

    def __init__(self, d_model: int, *sizes: Any, eps: float = 1e-6, **options: Any) -> None:
        super().__init__(d_model, *sizes, **options)
        self.dt_layernorm = RMSNorm(self.dt_rank, eps)
        self.b_layernorm = RMSNorm(self.d_state, eps)
        self.c_layernorm = RMSNorm(self.d_state, eps)

    def mix(
        self,
        u: Float[Tensor, "b l d_inner"],
        z: Float[Tensor, "b l d_inner"] | None = None,
        state: State | None = None,
        *,
        reverse: bool = False,
        mask: Bool[Tensor, "b l"] | None = None,
        cu_seqlens: Int32[Tensor, " borders"] | None = None,
    ) -> tuple[Float[Tensor, "b l d_inner"], State]:
        """As `SelectivePath.mix`, with the norms between projection and scan."""
        where: Any = {"reverse": reverse, "mask": mask, "cu_seqlens": cu_seqlens}
        u, conv = self.convolve(u, None if state is None else state.conv, **where)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, ssm = selective_scan(
            u,
            nn.functional.linear(self.dt_layernorm(dt), self.dt_proj.weight),
            -at_least_float32(self.A_log).exp(),
            self.b_layernorm(B),
            self.c_layernorm(C),
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            initial_state=None if state is None else state.ssm,
            return_final_state=True,
            **where,
        )
        return y, State(conv, ssm)


@layout("jamba", "huggingface/transformers:JambaForCausalLM")
@models.register(
    "jamba",
    kind="language",
    source="arXiv:2403.19887",
    smoke={
        "d_model": 16, "depth": 4, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24, "n_experts": 4, "attn_period": 4,
        "attn_offset": 2, "d_state": 8,
    },
    base={"d_model": 256, "depth": 8, "n_heads": 8, "n_kv_heads": 4, "d_ff": 512, "n_experts": 4},
    v01={"vocab_size": 65536, "d_model": 4096, "depth": 32},
    mini={"vocab_size": 65536, "d_model": 4096, "depth": 32},
    large={"vocab_size": 65536, "d_model": 8192, "depth": 72, "n_heads": 64, "d_ff": 24576},
    block={"vocab_size": 65536, "d_model": 4096, "depth": 8},
)  # fmt: skip
class Jamba(LanguageModel):
    """Jamba: attention every 8 layers, Mamba elsewhere, experts every 2 layers.

    Args:
        vocab_size: Tokens.
        d_model: Width.
        depth: Layers.
        n_heads: Query heads.
        n_kv_heads: Key and value heads.
        d_ff: Inner width of a feed-forward layer and of each expert.
        n_experts: Experts of a mixture.
        top_k: Experts that a token goes through.
        attn_period: Every so many layers one is attention.
        attn_offset: Which one.
        moe_period: Every so many layers one has experts.
        moe_offset: Which one.
        d_state: State size of Mamba.
        d_conv: Width of its short convolution.
        expand: Its inner width over `d_model`.
        dt_rank: Rank of its step's projection.
        conv_bias: Whether its convolution has a bias.
        bias: Whether its projections have one.
        eps: Of all norms.
        tied: Whether the embedding is the map to the vocabulary too.
        dropout: Rate on what layers add to the stream.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int = 4096,
        depth: int = 32,
        n_heads: int = 32,
        n_kv_heads: int = 8,
        d_ff: int = 14336,
        n_experts: int = 16,
        top_k: int = 2,
        attn_period: int = 8,
        attn_offset: int = 4,
        moe_period: int = 2,
        moe_offset: int = 1,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int | float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        conv_bias: bool = True,
        bias: bool = False,
        eps: float = 1e-6,
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        for what, offset, period in (("attn", attn_offset, attn_period), ("moe", moe_offset, moe_period)):
            if not 0 <= offset < period:
                raise ConfigError(f"{what}_offset={offset}: needs at least 0 and less than {what}_period={period}")
        require_sizes(d_ff=d_ff)

        def norm() -> AddNorm:
            return AddNorm(d_model, eps, residual_in_fp32=False)

        def block(i: int) -> Block:
            if i % attn_period == attn_offset:
                mixer: nn.Module = CausalAttention(d_model, n_heads, n_kv_heads)
            else:
                mixer = NormedS6(d_model, d_state, d_conv, expand, dt_rank, conv_bias=conv_bias, bias=bias, eps=eps)
            if n_experts > 1 and i % moe_period == moe_offset:
                return Block(norm(), mixer, norm(), MoE(d_model, d_ff, n_experts, top_k))
            return Block(norm(), mixer, norm(), SwiGLU(d_model, d_ff))

        super().__init__(vocab_size, d_model, map(block, range(depth)), norm(), tied=tied, dropout=dropout)
        self._config = {
            "intermediate_size": d_ff, "num_attention_heads": n_heads, "num_key_value_heads": n_kv_heads,
            "num_experts": n_experts, "num_experts_per_tok": top_k, "attn_layer_period": attn_period,
            "attn_layer_offset": attn_offset, "expert_layer_period": moe_period, "expert_layer_offset": moe_offset,
            "mamba_d_state": d_state, "mamba_d_conv": d_conv, "mamba_expand": expand, "mamba_dt_rank": dt_rank,
            "mamba_conv_bias": conv_bias, "mamba_proj_bias": bias, "rms_norm_eps": eps,
        }  # fmt: skip
        start_weights(self, ends=("o_proj", "out_proj", "down_proj"), maps=False)

    def hugging_face(self) -> HuggingFace:
        """Configuration and weights as Hugging Face keeps Jamba on disk: a matrix of its own for every expert."""
        config = {
            "model_type": "jamba", "architectures": ["JambaForCausalLM"], "vocab_size": self.vocab_size,
            "hidden_size": self.d_model, "num_hidden_layers": len(self.layers), "tie_word_embeddings": self.tied,
            "hidden_act": "silu", **self._config,
        }  # fmt: skip
        return HuggingFace(config, split_experts(_theirs(self.state_dict())))


def _theirs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mamba and attention stand under names of their own there."""
    attention = {key.split(".")[1] for key in state if key.endswith(".mixer.q_proj.weight")}
    named = {}
    for key, value in NAMES.theirs(state).items():
        parts = key.split(".")
        if parts[0] == "layers":
            parts[2] = "self_attn" if parts[1] in attention else "mamba"
            parts.insert(0, "model")
        named[".".join(parts)] = value
    return named


def _ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """From keys with experts fused or one by one."""
    named = {}
    for key, value in NAMES.ours(fuse_experts(state)).items():
        parts = key.split(".")
        if parts[:2] == ["model", "layers"] and len(parts) > 4 and parts[3] in ("mamba", "self_attn"):
            parts = ["layers", parts[2], "mixer", *parts[4:]]
        named[".".join(parts)] = value
    return named


def split_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A fused state with every expert's matrices by themselves, as released checkpoints hold them."""
    found = {}
    for key, value in state.items():
        before, _, name = key.rpartition(".experts.")
        if name == "gate_up_proj":
            for e, fused in enumerate(value):
                gate, up = fused.chunk(2)
                found[f"{before}.experts.{e}.gate_proj.weight"] = gate
                found[f"{before}.experts.{e}.up_proj.weight"] = up
        elif name == "down_proj":
            found |= {f"{before}.experts.{e}.down_proj.weight": down for e, down in enumerate(value)}
        else:
            found[key] = value
    return found


def fuse_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state with the experts of each layer in one tensor; experts that are fused already stay.

    An expert that lacks a matrix stays as it is, and is named as unknown by whoever loads the state.
    """
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for key, value in state.items():
        before, found, after = key.partition(".experts.")
        parts = after.split(".")
        if found and len(parts) == 3 and parts[0].isdecimal():
            experts.setdefault(before, {}).setdefault(int(parts[0]), {})[parts[1]] = value
    fused = dict(state)
    for before, each in experts.items():
        numbers = range(len(each))
        if set(each) != set(numbers) or any(set(each[e]) != {"gate_proj", "up_proj", "down_proj"} for e in each):
            continue
        for e in numbers:
            for name in each[e]:
                del fused[f"{before}.experts.{e}.{name}.weight"]
        both = [torch.cat([each[e]["gate_proj"], each[e]["up_proj"]]) for e in numbers]
        fused[f"{before}.experts.gate_up_proj"] = torch.stack(both)
        fused[f"{before}.experts.down_proj"] = torch.stack([each[e]["down_proj"] for e in numbers])
    return fused


@reads("huggingface/transformers:JambaForCausalLM")
@common
def read_jamba(
    *,
    vocab_size: int = 65536,
    tie_word_embeddings: bool = False,
    hidden_size: int = 4096,
    intermediate_size: int = 14336,
    num_hidden_layers: int = 32,
    num_attention_heads: int = 32,
    num_key_value_heads: int | None = 8,
    hidden_act: Literal["silu"] = "silu",
    rms_norm_eps: float = 1e-6,
    output_router_logits: bool = False,
    router_aux_loss_coef: float = 0.001,
    max_position_embeddings: int = 262144,
    attention_dropout: float = 0.0,
    num_experts_per_tok: int = 2,
    num_experts: int = 16,
    expert_layer_period: int = 2,
    expert_layer_offset: int = 1,
    attn_layer_period: int = 8,
    attn_layer_offset: int = 4,
    use_mamba_kernels: bool = True,
    mamba_d_state: int = 16,
    mamba_d_conv: int = 4,
    mamba_expand: int | float = 2,
    mamba_dt_rank: int | Literal["auto"] = "auto",
    mamba_conv_bias: bool = True,
    mamba_proj_bias: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = True,
    mamba_inner_layernorms: Literal[True] = True,
    sliding_window: None = None,
    num_logits_to_keep: int | None = 1,
    calc_logits_for_entire_prompt: bool = False,
    **options: Any,
) -> Official:
    """Hugging Face's Jamba. What is said of its loss, of positions, of kernels and of how many logits generation keeps
    has no effect on the logits of a loaded model.
    """
    model = Jamba(
        vocab_size=vocab_size, d_model=hidden_size, depth=num_hidden_layers, n_heads=num_attention_heads,
        n_kv_heads=num_key_value_heads or num_attention_heads, d_ff=intermediate_size, n_experts=num_experts,
        top_k=num_experts_per_tok, attn_period=attn_layer_period, attn_offset=attn_layer_offset,
        moe_period=expert_layer_period, moe_offset=expert_layer_offset, d_state=mamba_d_state, d_conv=mamba_d_conv,
        expand=mamba_expand, dt_rank=mamba_dt_rank, conv_bias=mamba_conv_bias, bias=mamba_proj_bias, eps=rms_norm_eps,
        tied=tie_word_embeddings,
    )  # fmt: skip
    return official(model, _ours, options)
