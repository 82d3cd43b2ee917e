"""A Transformer language model: the baseline, with rotary positions, RMS norms and gated perceptrons.

Touvron et al. 2023, "LLaMA", arXiv:2302.13971, Sec. 2.2: the recipe that Mamba's paper calls Transformer++.

Source: transformers 5.23.0, `models/llama`; logits and checkpoints are Llama's.
Departures: none of Llama's later kinds of rotary positions (`rope_scaling`).
"""

from typing import Any, Literal

from selectra.errors import ConfigError
from selectra.language.hugging_face import HuggingFace, Names, common, layout, official
from selectra.language.model import Block, LanguageModel, start_weights
from selectra.layers.feed_forward import SwiGLU
from selectra.layers.norm import AddNorm
from selectra.mixers import CausalAttention
from selectra.mixers.sizes import require_sizes
from selectra.official import Official, reads
from selectra.registry import models

NAMES = Names(
    ("embedding.", "model.embed_tokens."),
    ("norm_f.", "model.norm."),
    ("layers.{}.norm.", "model.layers.{}.input_layernorm."),
    ("layers.{}.norm2.", "model.layers.{}.post_attention_layernorm."),
    ("layers.{}.mixer.", "model.layers.{}.self_attn."),
    ("layers.{}.mlp.", "model.layers.{}.mlp."),
)


SIZES: dict[str, Any] = {
    "125m": {"d_model": 768, "depth": 12, "n_heads": 12, "tied": True},
    "350m": {"d_model": 1024, "depth": 24, "n_heads": 16, "tied": True},
    "760m": {"d_model": 1536, "depth": 24, "n_heads": 16, "tied": True},
    "1b3": {"d_model": 2048, "depth": 24, "n_heads": 32, "tied": True},
}


@layout("llama", "huggingface/transformers:LlamaForCausalLM")
@models.register(
    "gpt",
    kind="language",
    source="arXiv:2302.13971",
    smoke={"d_model": 16, "depth": 2, "n_heads": 4, "n_kv_heads": 2},
    base={"d_model": 256, "depth": 12, "n_heads": 4},
    # The sizes that Mamba's paper compares with: Brown et al. 2020, Table 2.1.
    **SIZES,
)
class GPT(LanguageModel):
    """A Transformer with rotary positions and gated perceptrons (Llama's form).

    Args:
        vocab_size: Tokens.
        d_model: Width.
        depth: Layers.
        n_heads: Query heads.
        n_kv_heads: Key and value heads; as many as queries by default.
        d_ff: Inner width of a perceptron; by default 8/3 of `d_model`, rounded up to a multiple of 8.
        rotary_base: Base of the positions.
        eps: Of all norms.
        tied: Whether the embedding is the map to the vocabulary too.
        dropout: Rate on attention weights and on what layers add to the stream.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        depth: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        d_ff: int | None = None,
        rotary_base: float = 10_000.0,
        eps: float = 1e-5,
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        require_sizes(d_model=d_model)
        width = -(-8 * d_model // 24) * 8 if d_ff is None else d_ff
        require_sizes(d_ff=width)

        def norm() -> AddNorm:
            return AddNorm(d_model, eps, residual_in_fp32=False)

        def block() -> Block:
            attention = CausalAttention(d_model, n_heads, n_kv_heads, rotary_base, dropout)
            return Block(norm(), attention, norm(), SwiGLU(d_model, width))

        blocks = (block() for _ in range(depth))
        super().__init__(vocab_size, d_model, blocks, norm(), tied=tied, dropout=dropout)
        self._config = {
            "num_attention_heads": n_heads, "num_key_value_heads": n_kv_heads or n_heads, "intermediate_size": width,
            "rms_norm_eps": eps, "rope_theta": rotary_base,
        }  # fmt: skip
        start_weights(self, ends=("o_proj", "down_proj"))

    def hugging_face(self) -> HuggingFace:
        """Configuration and weights as Hugging Face keeps Llama."""
        config = {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": self.vocab_size,
            "hidden_size": self.d_model, "num_hidden_layers": len(self.layers), "tie_word_embeddings": self.tied,
            "hidden_act": "silu", **self._config,
        }  # fmt: skip
        return HuggingFace(config, NAMES.theirs(self.state_dict()))


@reads("huggingface/transformers:LlamaForCausalLM")
@common
def read_llama(
    *,
    vocab_size: int = 32000,
    hidden_size: int = 4096,
    intermediate_size: int = 11008,
    num_hidden_layers: int = 32,
    num_attention_heads: int = 32,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    hidden_act: Literal["silu"] = "silu",
    max_position_embeddings: int = 2048,
    rms_norm_eps: float = 1e-6,
    pretraining_tp: Literal[1] = 1,
    tie_word_embeddings: bool = False,
    rope_theta: float = 10_000.0,
    rope_scaling: None = None,
    rope_parameters: dict[str, Any] | None = None,
    attention_bias: Literal[False] = False,
    attention_dropout: float = 0.0,
    mlp_bias: Literal[False] = False,
    **options: Any,
) -> Official:
    """Hugging Face's Llama; the longest position has no effect."""
    rope = dict(rope_parameters or {})
    base = rope.pop("rope_theta", rope_theta)
    if rope.pop("rope_type", "default") != "default" or rope:
        raise ConfigError(f"option 'rope_parameters' is {rope_parameters!r}; it takes a 'rope_theta' alone.")
    require_sizes(num_attention_heads=num_attention_heads)
    if head_dim not in (None, hidden_size // num_attention_heads):
        raise ConfigError(f"option 'head_dim' is {head_dim}; it takes hidden_size / num_attention_heads.")
    model = GPT(
        vocab_size=vocab_size, d_model=hidden_size, depth=num_hidden_layers, n_heads=num_attention_heads,
        n_kv_heads=num_key_value_heads, d_ff=intermediate_size, rotary_base=base, eps=rms_norm_eps,
        tied=tie_word_embeddings,
    )  # fmt: skip
    return official(model, NAMES.ours, options)
