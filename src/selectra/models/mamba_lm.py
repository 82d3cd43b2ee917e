"""Mamba language models: a plain stack of Mamba or Mamba-2 blocks.

Gu and Dao 2023, arXiv:2312.00752, Sec. 3.4 and Table 12 (Mamba); Dao and Gu 2024, arXiv:2405.21060, Table 9 (Mamba-2).

Source: github.com/state-spaces/mamba, e9594ce: `mamba_ssm/models/mixer_seq_simple.py`; transformers 5.23.0:
`models/mamba`, `models/mamba2`.
Glossary: D d_model, N d_state, P d_head (Mamba-2).
Departures:
  layers  no attention and no perceptrons between blocks (`attn_layer_idx`, `d_intermediate`)
  bias    where projections have a bias, Hugging Face's convolution sees it at padding, so that a padded row is not what
          it is alone; here it is
"""

from typing import Any, Literal

import torch
from torch import Tensor

from selectra.errors import ConfigError
from selectra.language.hugging_face import HuggingFace, Names, common, layout, official
from selectra.language.model import LanguageModel, require_rows, start_weights
from selectra.language.stream import Stream
from selectra.layers.norm import AddNorm, PreNorm
from selectra.mixers import S6, SSD, step_blocks_
from selectra.official import Official, reads
from selectra.registry import models

Mixer = Literal["mamba", "mamba2"]
PADDED = {"vocab_size": 50280}
MAMBA2 = {"mixer": "mamba2", "vocab_size": 50288}
NAMES = Names(
    ("embedding.weight", "backbone.embeddings.weight"),
    ("embedding.weight", "backbone.embedding.weight"),
    ("layers.", "backbone.layers."),
    ("norm_f.", "backbone.norm_f."),
)


SIZES: dict[str, Any] = {
    "130m": {"d_model": 768, "depth": 24, **PADDED},
    "370m": {"d_model": 1024, "depth": 48, **PADDED},
    "790m": {"d_model": 1536, "depth": 48, **PADDED},
    "1b4": {"d_model": 2048, "depth": 48, **PADDED},
    "2b8": {"d_model": 2560, "depth": 64, **PADDED},
    "mamba2_130m": {"d_model": 768, "depth": 24, **MAMBA2},
    "mamba2_370m": {"d_model": 1024, "depth": 48, **MAMBA2},
    "mamba2_780m": {"d_model": 1536, "depth": 48, **MAMBA2},
    "mamba2_1b3": {"d_model": 2048, "depth": 48, **MAMBA2},
    "mamba2_2b7": {"d_model": 2560, "depth": 64, **MAMBA2},
}


@layout("mamba", "huggingface/transformers:MambaForCausalLM")
@layout("mamba2", "huggingface/transformers:Mamba2ForCausalLM")
@models.register(
    "mamba_lm",
    kind="language",
    source="arXiv:2312.00752",
    smoke={"d_model": 16, "depth": 2, "d_state": 8},
    base={"d_model": 384, "depth": 10},
    **SIZES,
)
class MambaLM(LanguageModel):
    """Mamba: a stack of Mamba or Mamba-2 blocks over tokens.

    Args:
        vocab_size: Tokens.
        d_model: Width.
        depth: Blocks.
        mixer: "mamba" (one decay for each channel and state) or "mamba2" (one for each head).
        d_state: State size; 16 for "mamba" and 128 for "mamba2" by default.
        d_conv: Width of the short convolution.
        expand: Inner width over `d_model`.
        dt_rank: Rank of the step's projection ("mamba").
        d_head: Channels of a head ("mamba2").
        n_groups: Groups of heads that share B and C ("mamba2").
        dt_limit: Bounds of the step ("mamba2").
        bias: Whether projections have a bias.
        conv_bias: Whether the convolution has one.
        norm: "rms" or "layer".
        eps: Of all norms.
        tied: Whether the embedding is the map to the vocabulary too.
        residual_in_fp32: Whether the stream is float32 in a model of half precision.
        dropout: Rate on what blocks add to the stream.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        depth: int,
        mixer: Mixer = "mamba",
        d_state: int | None = None,
        d_conv: int = 4,
        expand: int | float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        d_head: int = 64,
        n_groups: int = 1,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        norm: Literal["rms", "layer"] = "rms",
        eps: float = 1e-5,
        tied: bool = True,
        residual_in_fp32: bool = True,
        dropout: float = 0.0,
    ) -> None:
        states = (128 if mixer == "mamba2" else 16) if d_state is None else d_state

        def block() -> PreNorm:
            if mixer == "mamba2":
                inner: Any = SSD(
                    d_model, states, d_conv, expand, d_head, n_groups,
                    bias=bias, conv_bias=conv_bias, dt_limit=dt_limit, eps=eps,
                )  # fmt: skip
            else:
                inner = S6(d_model, states, d_conv, expand, dt_rank, bias=bias, conv_bias=conv_bias)
            return PreNorm(AddNorm(d_model, eps, norm, residual_in_fp32), inner)

        norm_f = AddNorm(d_model, eps, norm, residual_in_fp32)
        super().__init__(vocab_size, d_model, [block() for _ in range(depth)], norm_f, tied=tied, dropout=dropout)
        self.mixer: Mixer = mixer
        self.start()

    def start(self) -> None:
        """Draw the embedding, and scale what ends a branch; the maps keep the mixers' own start, as in mamba_ssm."""
        start_weights(self, ends=("out_proj",), maps=False)

    def _stepped(self, x: Tensor, state: Stream) -> Tensor:
        if self.mixer != "mamba" or self.training:
            return super()._stepped(x, state)
        require_rows(x, state)
        y, residual = step_blocks_(self.layers, x, None, state.layers)
        with torch.no_grad():
            return self.norm_f(y, residual)[0]

    def hugging_face(self) -> HuggingFace:
        """Configuration and weights as Hugging Face's Mamba or Mamba-2 keeps them.

        Raises:
            ConfigError: It has no place for what this model has.
        """
        first: Any = self.mixers()[0]
        norm: Any = self.norm_f
        if norm.kind != "rms":
            raise ConfigError("Hugging Face's Mamba has RMS norms alone; this model has layer norms.")
        config: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "num_hidden_layers": len(self.layers),
            "state_size": first.d_state,
            "conv_kernel": first.d_conv,
            "expand": first.d_inner / self.d_model if first.d_inner % self.d_model else first.d_inner // self.d_model,
            "use_bias": first.in_proj.bias is not None,
            "use_conv_bias": first.conv1d.bias is not None,
            "layer_norm_epsilon": norm.eps,
            "residual_in_fp32": norm.residual_in_fp32,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
        }
        if self.mixer == "mamba":
            config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "time_step_rank": first.dt_rank}
            config["intermediate_size"] = first.d_inner
        else:
            config |= {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}
            config |= {"head_dim": first.d_head, "num_heads": first.n_heads, "n_groups": first.n_groups}
            config["time_step_limit"] = list(first.dt_limit)
        return HuggingFace(config, NAMES.theirs(self.state_dict()))


@reads("huggingface/transformers:MambaForCausalLM")
@common
def read_mamba(
    *,
    vocab_size: int = 50280,
    hidden_size: int = 768,
    state_size: int = 16,
    num_hidden_layers: int = 32,
    layer_norm_epsilon: float = 1e-5,
    expand: int | float = 2,
    conv_kernel: int = 4,
    use_bias: bool = False,
    use_conv_bias: bool = True,
    hidden_act: Literal["silu"] = "silu",
    residual_in_fp32: bool = True,
    time_step_rank: int | Literal["auto"] = "auto",
    tie_word_embeddings: bool = True,
    intermediate_size: int | None = None,
    time_step_scale: float = 1.0,
    time_step_min: float = 0.001,
    time_step_max: float = 0.1,
    time_step_init_scheme: Literal["random", "constant"] = "random",
    time_step_floor: float = 1e-4,
    rescale_prenorm_residual: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = True,
    d_model: int | None = None,
    d_inner: int | None = None,
    n_layer: int | None = None,
    rms_norm: Literal[True] = True,
    fused_add_norm: bool = True,
    ssm_cfg: dict[str, Any] | None = None,
    pad_vocab_size_multiple: int = 8,
    **options: Any,
) -> Official:
    """Hugging Face's Mamba. How steps and weights start and which kernel is taken has no effect on a loaded model;
    `d_model`, `d_inner`, `n_layer` and what follows them stand in converted checkpoints beside Hugging Face's names.
    """
    _require_equal("intermediate_size", intermediate_size, int(expand * hidden_size))
    _require_equal("d_inner", d_inner, int(expand * hidden_size))
    _require_equal("d_model", d_model, hidden_size)
    _require_equal("n_layer", n_layer, num_hidden_layers)
    _require_equal("ssm_cfg", ssm_cfg or None, {})
    model = MambaLM(
        vocab_size=vocab_size, d_model=hidden_size, depth=num_hidden_layers, d_state=state_size, d_conv=conv_kernel,
        expand=expand, dt_rank=time_step_rank, bias=use_bias, conv_bias=use_conv_bias, eps=layer_norm_epsilon,
        tied=tie_word_embeddings, residual_in_fp32=residual_in_fp32,
    )  # fmt: skip
    return official(model, NAMES.ours, options)


def _require_equal(name: str, got: Any, expected: Any) -> None:
    if got is not None and got != expected:
        raise ConfigError(f"option '{name}' is {got!r} where the other options give {expected!r}.")


@reads("huggingface/transformers:Mamba2ForCausalLM")
@common
def read_mamba2(
    *,
    num_heads: int = 128,
    head_dim: int = 64,
    vocab_size: int = 32768,
    hidden_size: int = 4096,
    state_size: int = 128,
    num_hidden_layers: int = 64,
    layer_norm_epsilon: float = 1e-5,
    expand: int | float = 2,
    conv_kernel: int = 4,
    n_groups: int = 8,
    use_bias: bool = False,
    use_conv_bias: bool = True,
    hidden_act: Literal["silu"] = "silu",
    residual_in_fp32: bool = True,
    time_step_rank: int | Literal["auto"] = "auto",
    time_step_min: float = 0.001,
    time_step_max: float = 0.1,
    time_step_floor: float = 1e-4,
    time_step_limit: tuple[float, float] = (0.0, float("inf")),
    rescale_prenorm_residual: bool = False,
    chunk_size: int = 256,
    tie_word_embeddings: bool = False,
    norm_before_gate: bool | None = None,
    rms_norm: Literal[True] = True,
    **options: Any,
) -> Official:
    """Hugging Face's Mamba-2. Its rank of steps, how they and the weights start, and the size of chunks have no effect
    on a loaded model, nor has `norm_before_gate`, which Hugging Face does not read.
    """
    _require_equal("num_heads * head_dim", num_heads * head_dim, int(expand * hidden_size))
    model = MambaLM(
        vocab_size=vocab_size, d_model=hidden_size, depth=num_hidden_layers, mixer="mamba2", d_state=state_size,
        d_conv=conv_kernel, expand=expand, d_head=head_dim, n_groups=n_groups, dt_limit=time_step_limit, bias=use_bias,
        conv_bias=use_conv_bias, eps=layer_norm_epsilon, tied=tie_word_embeddings, residual_in_fp32=residual_in_fp32,
    )  # fmt: skip
    # Codestral's own checkpoint has one more prefix.
    return official(model, lambda state: NAMES.ours({k.removeprefix("model."): v for k, v in state.items()}), options)


# What mamba_ssm's options for its mixers are called here, by the layer's kind; others say how weights start or which
# kernel is taken.
SSM_OPTIONS = {
    "Mamba1": {"d_state": "d_state", "d_conv": "d_conv", "expand": "expand", "dt_rank": "dt_rank", "bias": "bias",
               "conv_bias": "conv_bias"},
    "Mamba2": {"d_state": "d_state", "d_conv": "d_conv", "expand": "expand", "headdim": "d_head", "bias": "bias",
               "ngroups": "n_groups", "conv_bias": "conv_bias", "dt_limit": "dt_limit"},
}  # fmt: skip
SSM_STARTS = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "chunk_size", "use_fast_path")


@reads("state-spaces/mamba:MambaLMHeadModel")
def read_mamba_ssm(
    *,
    d_model: int = 2560,
    d_intermediate: Literal[0] = 0,
    n_layer: int = 64,
    vocab_size: int = 50277,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    rms_norm: bool = True,
    residual_in_fp32: bool = True,
    fused_add_norm: bool = True,
    pad_vocab_size_multiple: int = 8,
    tie_embeddings: bool = True,
    dtype: str | torch.dtype | None = None,
) -> Official:
    """mamba_ssm's language model, from what its config.json holds; `fused_add_norm` only chooses a kernel."""
    if attn_layer_idx or attn_cfg:
        raise ConfigError("option 'attn_layer_idx': attention layers between Mamba's are not supported; it takes [].")
    given = dict(ssm_cfg or {})
    layer = given.pop("layer", "Mamba1")
    if layer not in SSM_OPTIONS:
        raise ConfigError(f"option 'ssm_cfg' has the layer {layer!r}; it takes {', '.join(SSM_OPTIONS)}.")
    unknown = given.keys() - SSM_OPTIONS[layer].keys() - set(SSM_STARTS)
    if unknown:
        takes = ", ".join((*SSM_OPTIONS[layer], *SSM_STARTS))
        raise ConfigError(f"option 'ssm_cfg' has {sorted(unknown)[0]!r}; for {layer} it takes {takes}.")
    mixing = {SSM_OPTIONS[layer][name]: value for name, value in given.items() if name in SSM_OPTIONS[layer]}
    model = MambaLM(
        vocab_size=-(-vocab_size // pad_vocab_size_multiple) * pad_vocab_size_multiple,
        d_model=d_model,
        depth=n_layer,
        mixer="mamba" if layer == "Mamba1" else "mamba2",
        norm="rms" if rms_norm else "layer",
        tied=tie_embeddings,
        residual_in_fp32=residual_in_fp32,
        **mixing,
    )
    return official(model, NAMES.ours, {"dtype": dtype})
