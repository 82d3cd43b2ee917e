"""Mamba-2: the chunked operator against a loop, the blocks against that and step by step, stored official models."""

# pyright: reportMissingImports=false

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.ops.ssd import CHUNK, ssd
from tests.compat import references
from tests.compat.references import assert_same, random

pytestmark = pytest.mark.usefixtures("installed")


def ssd_inputs(length: int, heads: int = 4, groups: int = 2) -> dict[str, Any]:
    """Random arguments in float64."""
    return {
        "x": random(2, length, heads, 3, seed=1),
        "dt": random(2, length, heads, seed=2).abs(),
        "A": -random(heads, seed=3).abs(),
        "B": random(2, length, groups, 5, seed=4),
        "C": random(2, length, groups, 5, seed=5),
        "initial_state": random(2, heads, 3, 5, seed=6),
    }


@pytest.mark.parametrize("length", [1, 7, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize("packed", [False, True])
def test_operator_by_call(length: int, packed: bool) -> None:
    inputs = ssd_inputs(length)
    idx = (torch.arange(length)[None] // torch.tensor([[5], [29]])) if packed else None

    def loop(initial_state: Tensor, **given: Tensor) -> Any:
        return references.ssd(**given, first=initial_state, idx=idx)

    assert_same(lambda **given: ssd(**given, sequence=idx), loop, inputs, 1e-9)


def test_operator_refuses_what_does_not_fit() -> None:
    inputs = ssd_inputs(3)
    with pytest.raises(ConfigError, match="B has 2 groups; they must divide the 3 heads"):
        ssd(inputs["x"][:, :, :3], *[inputs[name] for name in ("dt", "A", "B", "C")])
    with pytest.raises(ConfigError, match="dt has shape"):
        ssd(inputs["x"], inputs["dt"][:, :2], *[inputs[name] for name in ("A", "B", "C")])


@pytest.mark.parametrize("wide_skip", [False, True])
def test_combined_scan_by_call(wide_skip: bool) -> None:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    inputs = ssd_inputs(9)
    inputs |= {"D": random(4, 3, seed=7) if wide_skip else random(4, seed=7), "z": random(2, 9, 4, 3, seed=8)}
    inputs["dt_bias"] = random(4, seed=9)

    def ours(initial_state: Tensor, **given: Any) -> Any:
        flags = {"dt_softplus": True, "dt_limit": (0.3, 1.0), "return_final_states": True}
        return mamba_chunk_scan_combined(**given, chunk_size=4, initial_states=initial_state, **flags)

    def formula(initial_state: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, **given: Any) -> Any:
        given["dt"] = F.softplus(given["dt"] + dt_bias).clamp(0.3, 1.0)
        y, state = references.ssd(**given, first=initial_state, idx=None)
        y = y + given["x"] * (D if wide_skip else D[:, None])
        return y * F.silu(z), state

    assert_same(ours, formula, inputs, 1e-9)
    with pytest.raises(ConfigError, match="states of packed sequences"):
        mamba_chunk_scan_combined(*[inputs[n] for n in ("x", "dt", "A", "B", "C")], 4, return_varlen_states=True)


def block_by_loop(block: Any, u: Tensor, idx: Tensor | None = None, first: Tensor | None = None) -> Tensor:
    """A Mamba-2 block by loops."""
    n, g, p = block.d_state, block.ngroups, block.headdim
    d_mlp = block.d_inner - block.d_ssm
    parts = [d_mlp, d_mlp, block.d_ssm, block.d_ssm + 2 * g * n, block.nheads]
    z0, x0, z, xBC, dt = block.in_proj(u).split(parts, -1)
    conv = block.conv1d
    mixed = references.convolve(xBC.transpose(1, 2), conv.weight[:, 0], conv.bias, seq_idx=idx).transpose(1, 2)
    x, B, C = mixed.split([block.d_ssm, g * n, g * n], -1)
    x = x.unflatten(-1, (-1, p))
    step = F.softplus(dt + block.dt_bias).clamp(*block.dt_limit)
    A = -torch.exp(block.A_log)
    y, _ = references.ssd(x, step, A, B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n)), first, idx)
    D = block.D.unflatten(0, (-1, p)) if block.D_has_hdim else block.D[:, None]
    y = (y + D * x).flatten(-2)
    if block.rmsnorm:
        y = y if block.norm_before_gate else y * F.silu(z)
        groups = y.unflatten(-1, (g, -1))
        y = references.norm(groups, torch.ones((), dtype=y.dtype), None, 1e-5, True).flatten(-2) * block.norm.weight
        y = y * F.silu(z) if block.norm_before_gate else y
    else:
        y = y * F.silu(z)
    return block.out_proj(torch.cat([F.silu(z0) * x0, y], -1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ngroups": 2, "dt_limit": (0.3, 1.0), "norm_before_gate": True},
        {"rmsnorm": False, "D_has_hdim": True, "bias": True},
        {"d_ssm": 8, "conv_init": 0.1},
    ],
)
def test_block_by_call_and_step_by_step(options: dict[str, Any]) -> None:
    from mamba_ssm import Mamba2
    from mamba_ssm.utils.generation import InferenceParams

    block = Mamba2(8, d_state=5, headdim=4, layer_idx=0, **options).double()
    u = random(2, 7, 8, seed=1)
    assert_same(block, lambda u: block_by_loop(block, u), {"u": u}, 1e-9)
    idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2]] * 2)
    torch.testing.assert_close(block(u, seq_idx=idx), block_by_loop(block, u, idx))
    torch.testing.assert_close(block(u.flatten(0, 1), seqlen=7), block(u).flatten(0, 1))
    cache = InferenceParams(7, 2)
    found = [block(u[:, :3], inference_params=cache)]
    for t in range(3, 7):
        cache.seqlen_offset = t
        found.append(block(u[:, t, None], inference_params=cache))
    torch.testing.assert_close(torch.cat(found, 1), block(u))


def test_simple_block() -> None:
    from mamba_ssm.modules.mamba2_simple import Mamba2Simple

    block = Mamba2Simple(8, d_state=5, headdim=4, learnable_init_states=True).double()
    with torch.no_grad():
        block.init_states.copy_(random(*block.init_states.shape, seed=3))
    first = block.init_states.expand(2, -1, -1, -1)
    assert_same(block, lambda u: block_by_loop(block, u, first=first), {"u": random(2, 6, 8, seed=1)}, 1e-9)
    assert "init_states" in block.state_dict()


def test_what_is_not_covered_is_said() -> None:
    from mamba_ssm import Mamba2

    with pytest.raises(ConfigError, match="process_group must be None"):
        Mamba2(8, headdim=4, process_group=object())
    with pytest.raises(ConfigError, match="headdim=5 must divide"):
        Mamba2(8, headdim=5)
    block = Mamba2(8, headdim=4)
    with pytest.raises(ConfigError, match="one position at a time"):
        block.step(torch.zeros(1, 2, 8), *block.allocate_inference_cache(1, 2))


@pytest.mark.parametrize("name", ["hf_mamba2_lm", "hf_mamba2_lowvar"])
@pytest.mark.parametrize("double", [False, True])
def test_stored_official_language_model(name: str, double: bool, golden: Path) -> None:
    """transformers' Mamba-2 by mamba_ssm's names: weights renamed, logits equal."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    facts = json.loads((golden / f"{name}.json").read_text())["config"]
    stored = load_file(golden / f"{name}.safetensors")
    mixer = {"layer": "Mamba2", "d_state": facts["state_size"], "headdim": facts["head_dim"]}
    mixer |= {"ngroups": facts["n_groups"], "d_conv": facts["conv_kernel"], "expand": facts["expand"]}
    config = MambaConfig(
        facts["hidden_size"], 0, facts["num_hidden_layers"], facts["vocab_size"], mixer, pad_vocab_size_multiple=1,
        tie_embeddings=facts["tie_word_embeddings"],
    )  # fmt: skip
    model = MambaLMHeadModel(config)
    state = {key[6:].replace("embeddings", "embedding"): x for key, x in stored.items() if key.startswith("state.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    model = model.double() if double else model
    want = stored["out64.logits" if double else "out.logits"]
    # transformers computes a part in float32 for itself, also in a float64 run.
    assert (model(stored["in.input_ids"]).logits - want).abs().max() <= 1e-5 * want.abs().max()
