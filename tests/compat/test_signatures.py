"""Names and defaults of arguments, in their order, as the other packages have them."""

# pyright: reportMissingImports=false

import dataclasses
import importlib
import inspect

import pytest

from selectra.compat.packages import MODULES, homes

pytestmark = pytest.mark.usefixtures("installed")

SCAN = "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False"
WEIGHTS = "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight"
OUT = "out_proj_weight, out_proj_bias"
CHOSEN = "B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True"
NORMS = "b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-06"
STEP = "dt_min=0.001, dt_max=0.1"
AT = "device=None, dtype=None"
ADDED = "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, rowscale=None"
GATED = "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True"
GATED_NORM = f"hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, {AT}"
UPDATE = "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False"
FWD = "u, delta, A, B, C, D_"
CONV_STATES = "initial_states=None, return_final_states=False, final_states_out=None, activation=None"
STACK = "ssm_cfg=None, attn_layer_idx=None, attn_cfg=None, norm_epsilon=1e-05, rms_norm=False"
FILL = "top_k=1, top_p=0.0, min_p=0.0, temperature=1.0"
LIMIT = "dt_limit=(0.0, inf)"

TABLE = {
    "mamba_ssm.ops.selective_scan_interface": {
        "selective_scan_fn": SCAN,
        "selective_scan_ref": SCAN,
        "mamba_inner_fn": f"{WEIGHTS}, {OUT}, A, {CHOSEN}, checkpoint_lvl=1, {NORMS}",
        "mamba_inner_ref": f"{WEIGHTS}, {OUT}, A, {CHOSEN}",
        "mamba_inner_fn_no_out_proj": f"{WEIGHTS}, A, {CHOSEN}",
        "bimamba_inner_fn": f"{WEIGHTS}, {OUT}, A, A_b, {CHOSEN}",
        "bimamba_inner_ref": f"{WEIGHTS}, {OUT}, A, A_b, {CHOSEN}",
    },
    "mamba_ssm.modules.mamba_simple": {
        "Mamba": (
            f"d_model, d_state=16, d_conv=4, expand=2, dt_rank='auto', {STEP}, dt_init='random', dt_scale=1.0, "
            f"dt_init_floor=0.0001, conv_bias=True, bias=False, use_fast_path=True, layer_idx=None, {AT}, "
            # The forks', each of which has a part of these, given by name.
            "bimamba_type='none', if_divide_out=False, init_layer_scale=None, nslices=5, bimamba=None"
        ),
        "Mamba.forward": "self, hidden_states, inference_params=None, T=1",
        "Mamba.step": "self, hidden_states, conv_state, ssm_state",
        "Mamba.allocate_inference_cache": "self, batch_size, max_seqlen, dtype=None, **kwargs",
        "Block": "dim, mixer_cls, norm_cls=LayerNorm, fused_add_norm=False, residual_in_fp32=False",
    },
    "mamba_ssm.modules.mamba2": {
        "Mamba2": (
            "d_model, d_state=128, d_conv=4, conv_init=None, expand=2, headdim=64, d_ssm=None, ngroups=1, "
            "A_init_range=(1, 16), D_has_hdim=False, rmsnorm=True, norm_before_gate=False, "
            f"{STEP}, dt_init_floor=0.0001, {LIMIT}, bias=False, conv_bias=True, chunk_size=256, "
            f"use_mem_eff_path=True, layer_idx=None, process_group=None, sequence_parallel=True, {AT}"
        ),
        "Mamba2.forward": "self, u, seqlen=None, seq_idx=None, cu_seqlens=None, inference_params=None",
        "Mamba2.step": "self, hidden_states, conv_state, ssm_state",
    },
    "mamba_ssm.modules.mamba2_simple": {
        "Mamba2Simple": (
            "d_model, d_state=64, d_conv=4, conv_init=None, expand=2, headdim=128, ngroups=1, A_init_range=(1, 16), "
            f"{STEP}, dt_init_floor=0.0001, {LIMIT}, learnable_init_states=False, activation='swish', bias=False, "
            f"conv_bias=True, chunk_size=256, use_mem_eff_path=True, layer_idx=None, {AT}"
        ),
        "Mamba2Simple.forward": "self, u, seq_idx=None",
    },
    "mamba_ssm.modules.block": {
        "Block": "dim, mixer_cls, mlp_cls, norm_cls=LayerNorm, fused_add_norm=False, residual_in_fp32=False",
        "Block.forward": "self, hidden_states, residual=None, inference_params=None, **mixer_kwargs",
    },
    "mamba_ssm.modules.mlp": {
        "GatedMLP": (
            f"in_features, hidden_features=None, out_features=None, activation=silu, bias=False, multiple_of=128, {AT}"
        ),
    },
    "mamba_ssm.models.config_mamba": {"MambaConfig": None},
    "mamba_ssm.models.mixer_seq_simple": {
        "MixerModel": (
            f"d_model, n_layer, d_intermediate, vocab_size, {STACK}, initializer_cfg=None, fused_add_norm=False, "
            f"residual_in_fp32=False, {AT}"
        ),
        "MixerModel.forward": "self, input_ids, inference_params=None, **mixer_kwargs",
        "MambaLMHeadModel": f"config, initializer_cfg=None, {AT}",
        "MambaLMHeadModel.forward": (
            "self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0, **mixer_kwargs"
        ),
        "create_block": (
            f"d_model, d_intermediate, {STACK}, residual_in_fp32=False, fused_add_norm=False, layer_idx=None, {AT}"
        ),
        "_init_weights": (
            "module, n_layer, initializer_range=0.02, rescale_prenorm_residual=True, n_residuals_per_layer=1"
        ),
    },
    "mamba_ssm.ops.triton.layer_norm": {
        "layer_norm_fn": (
            f"{ADDED}, prenorm=False, residual_in_fp32=False, is_rms_norm=False, return_dropout_mask=False"
        ),
        "rms_norm_fn": f"{ADDED}, prenorm=False, residual_in_fp32=False, return_dropout_mask=False",
        "layer_norm_linear_fn": (
            "x, norm_weight, norm_bias, linear_weight, linear_bias, residual=None, eps=1e-06, prenorm=False, "
            "residual_in_fp32=False, is_rms_norm=False"
        ),
        "layer_norm_ref": None,
        "rms_norm_ref": None,
        "RMSNorm": f"hidden_size, eps=1e-05, dropout_p=0.0, {AT}",
        "RMSNorm.forward": "self, x, residual=None, prenorm=False, residual_in_fp32=False",
    },
    "mamba_ssm.ops.triton.layernorm": {
        "layer_norm_fn": (
            "x, weight, bias, residual=None, eps=1e-06, prenorm=False, residual_in_fp32=False, is_rms_norm=False"
        ),
        "rms_norm_fn": "x, weight, bias, residual=None, prenorm=False, residual_in_fp32=False, eps=1e-06",
        "layer_norm_ref": "x, weight, bias, residual=None, eps=1e-06, prenorm=False, upcast=False",
        "rms_norm_ref": "x, weight, bias, residual=None, eps=1e-06, prenorm=False, upcast=False",
    },
    "mamba_ssm.ops.triton.layernorm_gated": {
        "layernorm_fn": f"{GATED}, is_rms_norm=False",
        "rmsnorm_fn": GATED,
        "LayerNorm": GATED_NORM,
        "RMSNorm": GATED_NORM,
    },
    "mamba_ssm.ops.triton.selective_state_update": {
        "selective_state_update": f"{UPDATE}, state_batch_indices=None",
        "selective_state_update_ref": UPDATE,
    },
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": (
            "x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, "
            f"cu_seqlens=None, dt_softplus=False, {LIMIT}, return_final_states=False, return_varlen_states=False, "
            "state_dtype=None"
        ),
        "mamba_split_conv1d_scan_combined": (
            "zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None, seq_idx=None, "
            f"{LIMIT}, return_final_states=False, activation='silu', rmsnorm_weight=None, rmsnorm_eps=1e-06, "
            "outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True, state_dtype=None"
        ),
    },
    "mamba_ssm.utils.generation": {
        "InferenceParams": (
            "max_seqlen, max_batch_size, seqlen_offset=0, batch_size_offset=0, key_value_memory_dict=dict, "
            "lengths_per_sample=None"
        ),
        "sample": f"logits, {FILL}",
        "decode": (
            f"input_ids, model, max_length, {FILL}, repetition_penalty=1.0, eos_token_id=None, teacher_outputs=None, "
            "vocab_size=None, cg=False, enable_timing=False, output_scores=False, streamer=None"
        ),
        "GenerationMixin.generate": (
            f"self, input_ids, max_length, {FILL}, return_dict_in_generate=False, output_scores=False, **kwargs"
        ),
    },
    "mamba_ssm.utils.hf": {
        "load_config_hf": "model_name",
        "load_state_dict_hf": f"model_name, {AT}",
    },
    "causal_conv1d.causal_conv1d_interface": {
        "causal_conv1d_fn": f"x, weight, bias=None, seq_idx=None, {CONV_STATES}",
        "causal_conv1d_ref": f"x, weight, bias=None, {CONV_STATES}",
        "causal_conv1d_update": (
            "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None"
        ),
        "causal_conv1d_update_ref": "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None",
    },
    "causal_conv1d.causal_conv1d_varlen": {"causal_conv1d_varlen_states": "x, cu_seqlens, state_len"},
    "causal_conv1d.cpp_functions": {
        "causal_conv1d_fwd_function": (
            "x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation"
        ),
        "causal_conv1d_bwd_function": (
            "x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation"
        ),
        "causal_conv1d_update_function": (
            "x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices"
        ),
    },
    # Three generations by the number of arguments: see test_conv.py.
    "causal_conv1d_cuda": dict.fromkeys(("causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update"), "*args"),
    "selective_scan_cuda": {
        "fwd": f"{FWD}, z_, delta_bias_, delta_softplus",
        "bwd": f"{FWD}, z_, delta_bias_, dout, x_, out_, dz_, delta_softplus, recompute_out_z",
    },
    **{
        f"selective_scan_cuda_{name}": {
            "fwd": f"{FWD}, delta_bias_, delta_softplus, nrows{more}",
            "bwd": f"{FWD}, delta_bias_, dout, x_, delta_softplus, nrows",
        }
        for name, more in (("core", ""), ("nrow", ""), ("ndstate", ""), ("oflex", ", out_float"))
    },
}  # fmt: skip
CASES = [(module, name, wanted) for module, names in TABLE.items() for name, wanted in names.items() if wanted]


def written(function: object) -> str:
    """A signature without annotations; a default that has a name by that."""
    assert callable(function)
    shown = []
    for parameter in inspect.signature(function).parameters.values():
        text = parameter.name
        if parameter.kind is parameter.VAR_POSITIONAL:
            text = f"*{text}"
        elif parameter.kind is parameter.VAR_KEYWORD:
            text = f"**{text}"
        elif parameter.default is not parameter.empty:
            default = parameter.default
            factory = "factory" in repr(default)
            text += f"={'dict' if factory else getattr(default, '__name__', None) or repr(default)}"
        shown.append(text)
    return ", ".join(shown)


@pytest.mark.parametrize(("module", "name", "wanted"), CASES)
def test_signature(module: str, name: str, wanted: str) -> None:
    found: object = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert written(found) == wanted


def test_configuration_of_a_language_model() -> None:
    from mamba_ssm.models.config_mamba import MambaConfig

    assert dataclasses.asdict(MambaConfig()) == {
        "d_model": 2560, "d_intermediate": 0, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "attn_layer_idx": [],
        "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 8, "tie_embeddings": True,
    }  # fmt: skip


def test_the_table_holds_every_name() -> None:
    """A name that stands in two modules is written down once."""
    known = {name.split(".")[0] for names in TABLE.values() for name in names}
    shared = {"causal_conv1d_varlen_states_ref", "GenerateDecoderOnlyOutput", "GenerationMixin"}
    assert {name for module in MODULES for name in homes(module)} <= known | shared


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("mamba_ssm", "Mamba Mamba2 MambaLMHeadModel selective_scan_fn mamba_inner_fn bimamba_inner_fn"),
        ("mamba_ssm.models.mixer_seq_simple", "Mamba Mamba2 MixerModel RMSNorm layer_norm_fn rms_norm_fn Block"),
        ("causal_conv1d", "causal_conv1d_fn causal_conv1d_update"),
    ],
)
def test_names_stand_where_repositories_look(module: str, names: str) -> None:
    found = importlib.import_module(module)
    assert all(hasattr(found, name) for name in names.split())
    version = getattr(importlib.import_module(module.split(".", maxsplit=1)[0]), "__version__")  # noqa: B009
    assert version.endswith("+selectra")
