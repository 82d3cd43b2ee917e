"""`mamba_ssm.models`: configuration, stack of blocks, language model, with mamba_ssm's parameter names.

Departures: no attention layers and no Mamba-3; both are refused in words.
"""

import copy
import json
import math
from collections import namedtuple
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selectra.compat.block import Block, GatedMLP, add_norm
from selectra.compat.generation import GenerationMixin
from selectra.compat.hub import load_config_hf, load_state_dict_hf
from selectra.compat.mamba import Mamba
from selectra.compat.mamba2 import Mamba2
from selectra.compat.norms import RMSNorm
from selectra.errors import ConfigError

LAYERS = {"Mamba1": Mamba, "Mamba2": Mamba2}
CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


@dataclass
class MambaConfig:
    """What a language model is made from, as in its config.json."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


def create_block(
    d_model: int,
    d_intermediate: int,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: Any = None,
    dtype: Any = None,
) -> Block:
    """One block of the stack; `ssm_cfg` holds the mixer's arguments, and its kind under "layer".

    Raises:
        ConfigError: An attention layer, or a kind of layer that there is not.
    """
    if layer_idx in (attn_layer_idx or []):
        raise ConfigError(f"layer {layer_idx} is an attention layer (attn_layer_idx); selectra.compat has none.")
    options = copy.deepcopy(ssm_cfg) if ssm_cfg else {}
    kind = options.pop("layer", "Mamba1")
    if kind not in LAYERS:
        raise ConfigError(f"ssm_cfg names the layer '{kind}'; selectra.compat has {', '.join(LAYERS)}.")
    at: dict[str, Any] = {"device": device, "dtype": dtype}
    mixer: Any = partial(LAYERS[kind], layer_idx=layer_idx, **options, **at)
    norm: Any = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **at)
    mlp: Any = nn.Identity
    if d_intermediate:
        mlp = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **at)
    block = Block(d_model, mixer, mlp, norm, fused_add_norm, residual_in_fp32)
    block.layer_idx = layer_idx
    return block


@torch.no_grad()
def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """GPT-2's start: maps that end a residual branch shrink with the depth."""
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """Embedding, blocks, last norm; arguments as `create_block`'s.

    Args:
        d_model: Width.
        n_layer: Number of blocks.
        d_intermediate: Inner width of the perceptrons; 0 for none.
        vocab_size: Tokens.
        ssm_cfg: The mixers' arguments.
        attn_layer_idx: Must be empty.
        attn_cfg: Not used.
        norm_epsilon: Of all norms.
        rms_norm: RMSNorm instead of LayerNorm.
        initializer_cfg: Arguments of the initial values.
        fused_add_norm: As `Block`.
        residual_in_fp32: As `Block`.
        device: Where the parameters lie.
        dtype: Their type.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(vocab_size, d_model, **at)
        kinds = (ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm, residual_in_fp32, fused_add_norm)
        blocks = [create_block(d_model, d_intermediate, *kinds, layer_idx=i, **at) for i in range(n_layer)]
        self.layers = nn.ModuleList(blocks)
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **at)
        branches = 2 if d_intermediate else 1
        self.apply(partial(_init_weights, n_layer=n_layer, **(initializer_cfg or {}), n_residuals_per_layer=branches))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Every layer's empty states."""
        layers: Any = self.layers
        caches = (layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs) for layer in layers)
        return dict(enumerate(caches))

    def forward(
        self, input_ids: Int[Tensor, "b l"], inference_params: Any = None, **mixer_kwargs: Any
    ) -> Float[Tensor, "b l d"]:
        """The last norm's output."""
        x, residual = self.embedding(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, inference_params=inference_params, **mixer_kwargs)
        return add_norm(x, residual, self.norm_f, self.fused_add_norm, self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A language model: the stack and a map to the vocabulary.

    Args:
        config: What it is made from.
        initializer_cfg: Arguments of the initial values.
        device: Where the parameters lie.
        dtype: Their type.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.config = config
        vocab = -(-config.vocab_size // config.pad_vocab_size_multiple) * config.pad_vocab_size_multiple
        self.backbone = MixerModel(
            config.d_model,
            config.n_layer,
            config.d_intermediate,
            vocab,
            config.ssm_cfg,
            config.attn_layer_idx,
            config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, vocab, bias=False, device=device, dtype=dtype)
        self.apply(partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """One matrix for the embedding and the map to the vocabulary, where the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Every layer's empty states."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Int[Tensor, "b l"],
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Logits, of the last positions only where `num_last_tokens` is above 0; `position_ids` are not used."""
        x = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(logits=self.lm_head(x[:, -num_last_tokens:] if num_last_tokens > 0 else x))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str, device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> "MambaLMHeadModel":
        """A model from a folder, or from the hub where `huggingface_hub` is installed."""
        config = MambaConfig(**load_config_hf(pretrained_model_name))
        model = cls(config, device=device, dtype=dtype, **kwargs)
        model.load_state_dict(load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype))
        return model

    def save_pretrained(self, save_directory: str) -> None:
        """Weights and configuration into a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=4))
