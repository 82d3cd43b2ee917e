"""Which names stand where: every module of other packages that we stand in for, and where its names come from."""

from typing import NamedTuple

MAMBA_SSM, CAUSAL_CONV1D = "mamba_ssm", "causal_conv1d"
VERSIONS = {MAMBA_SSM: "2.3.2+selectra", CAUSAL_CONV1D: "1.6.1+selectra"}

_SCAN = {
    "scan": "selective_scan_fn selective_scan_ref",
    "inner": "mamba_inner_fn mamba_inner_ref mamba_inner_fn_no_out_proj bimamba_inner_fn bimamba_inner_ref",
}
_MAMBA = {"mamba": "Mamba", "block": "Block=Block2024", **_SCAN}
_CONV = {"conv": "causal_conv1d_fn causal_conv1d_update"}
_CORE = {"scan_kernels": "fwd=core_fwd bwd=core_bwd"}

MODULES: dict[str, dict[str, str]] = {
    "mamba_ssm": {
        **_SCAN,
        "mamba": "Mamba",
        "mamba2": "Mamba2",
        "language": "MambaLMHeadModel",
    },
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": _MAMBA,
    "mamba_ssm.modules.mamba2": {"mamba2": "Mamba2"},
    "mamba_ssm.modules.mamba2_simple": {"mamba2": "Mamba2Simple"},
    "mamba_ssm.modules.block": {"block": "Block"},
    "mamba_ssm.modules.mlp": {"block": "GatedMLP"},
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": {"language": "MambaConfig"},
    "mamba_ssm.models.mixer_seq_simple": {
        "language": "MambaConfig MambaLMHeadModel MixerModel create_block _init_weights",
        "mamba": "Mamba",
        "mamba2": "Mamba2",
        "block": "Block GatedMLP",
        "norms": "RMSNorm layer_norm_fn rms_norm_fn",
        "generation": "GenerationMixin",
        "hub": "load_config_hf load_state_dict_hf",
    },
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": _SCAN,
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": {
        "norms": "RMSNorm layer_norm_fn rms_norm_fn layer_norm_linear_fn layer_norm_ref rms_norm_ref",
    },
    "mamba_ssm.ops.triton.layernorm": {
        "norms": (
            "RMSNorm layer_norm_fn=layer_norm_fn_2024 rms_norm_fn=rms_norm_fn_2024 layer_norm_linear_fn "
            "layer_norm_ref rms_norm_ref"
        ),
    },
    "mamba_ssm.ops.triton.layernorm_gated": {"gated_norms": "LayerNorm RMSNorm layernorm_fn rmsnorm_fn"},
    "mamba_ssm.ops.triton.selective_state_update": {
        "state_update": "selective_state_update selective_state_update_ref",
    },
    "mamba_ssm.ops.triton.ssd_combined": {"ssd": "mamba_chunk_scan_combined mamba_split_conv1d_scan_combined"},
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": {
        "generation": "GenerateDecoderOnlyOutput GenerationMixin InferenceParams decode sample",
    },
    "mamba_ssm.utils.hf": {"hub": "load_config_hf load_state_dict_hf"},
    "causal_conv1d": _CONV,
    "causal_conv1d.causal_conv1d_interface": {
        "conv": "causal_conv1d_fn causal_conv1d_ref causal_conv1d_update causal_conv1d_update_ref",
    },
    "causal_conv1d.causal_conv1d_varlen": {
        "conv": "causal_conv1d_varlen_states causal_conv1d_varlen_states_ref=causal_conv1d_varlen_states",
    },
    "causal_conv1d.cpp_functions": {
        "conv_kernels": "causal_conv1d_fwd_function causal_conv1d_bwd_function causal_conv1d_update_function",
    },
    "causal_conv1d_cuda": {"conv_kernels": "causal_conv1d_fwd causal_conv1d_bwd causal_conv1d_update"},
    "selective_scan_cuda": {"scan_kernels": "fwd bwd"},
    "selective_scan_cuda_core": _CORE,
    "selective_scan_cuda_nrow": _CORE,
    "selective_scan_cuda_oflex": {"scan_kernels": "fwd=oflex_fwd bwd=oflex_bwd"},
    "selective_scan_cuda_ndstate": {"scan_kernels": "fwd=ndstate_fwd bwd=ndstate_bwd"},
}
"""For every module the names it has, by our module; `theirs=ours` where ours is called otherwise."""


class Package(NamedTuple):
    """One package of others."""

    name: str
    kernel: str
    """The compiled module without which it does not work."""
    needs_kernel: tuple[str, ...]
    """Its modules that use the kernel; the others may stay where the package is installed and a GPU is there."""


PACKAGES = (
    Package(
        MAMBA_SSM,
        "selective_scan_cuda",
        ("mamba_ssm.ops.selective_scan_interface", "mamba_ssm.modules.mamba_simple"),
    ),
    Package(
        CAUSAL_CONV1D,
        "causal_conv1d_cuda",
        tuple(name for name in MODULES if name.split(".")[0] == CAUSAL_CONV1D),
    ),
)
KERNELS = tuple(name for name in MODULES if "_cuda" in name)


def modules_of(package: str) -> tuple[str, ...]:
    """A package's modules that we stand in for, itself among them."""
    return tuple(name for name in MODULES if name == package or name.startswith(f"{package}."))


def homes(module: str) -> dict[str, tuple[str, str]]:
    """For each name of a module our module that has it, and how it is called there."""
    found = {}
    for home, names in MODULES[module].items():
        for name in names.split():
            theirs, _, ours = name.partition("=")
            found[theirs] = (f"selectra.compat.{home}", ours or theirs)
    return found
