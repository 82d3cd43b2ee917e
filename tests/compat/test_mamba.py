"""The Mamba blocks by mamba_ssm's and its forks' names: against loops, step by step, against stored official runs."""

# pyright: reportMissingImports=false

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from selectra.errors import ConfigError
from tests.compat import references
from tests.compat.references import assert_same, random

pytestmark = pytest.mark.usefixtures("installed")


def mamba(**options: Any) -> Any:
    """A small block in float64 with random parameters."""
    from mamba_ssm import Mamba

    block = Mamba(6, d_state=3, expand=2, d_conv=3, **options).double()
    with torch.no_grad():
        for i, parameter in enumerate(block.parameters()):
            parameter.copy_(random(*parameter.shape, seed=100 + i, scale=0.5))
    return block


def path_of(block: Any, xz: Tensor, suffix: str) -> Tensor:
    """One direction by loops, (b, d, l)."""
    conv, x_proj, dt_proj = (getattr(block, f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj"))
    A = -torch.exp(getattr(block, f"A{suffix}_log" if suffix else "A_log"))
    D = getattr(block, f"D{suffix}")
    return references.inner(xz, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, A, D=D, delta_bias=dt_proj.bias)


def loop(block: Any, x: Tensor) -> Tensor:
    """The whole block by loops, as the forks' sources flip, interleave and add."""
    xz = block.in_proj(x).transpose(1, 2)
    kind, y = block.bimamba_type, path_of(block, xz, "")
    if kind in ("v2", "v3"):
        y = y + path_of(block, xz.flip(-1), "_b").flip(-1)
    if kind == "v3":
        n, length = block.nslices, xz.shape[-1]
        order = [j * (length // n) + i for i in range(length // n) for j in range(n)]
        y_s = path_of(block, xz[..., order], "_s")
        y = y + torch.stack([y_s[..., order.index(t)] for t in range(length)], -1)
    if kind == "v2" and block.if_divide_out:
        y = y / 2
    y = block.out_proj(y.transpose(1, 2))
    return y if block.init_layer_scale is None else y * block.gamma


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "conv_bias": False},
        {"bimamba_type": "v2"},
        {"bimamba_type": "v2", "if_divide_out": True, "init_layer_scale": 0.5},
        {"bimamba": True},
        {"bimamba_type": "v3", "nslices": 3},
        {"bimamba_type": "v2", "use_fast_path": False},
    ],
)
def test_block_by_call(options: dict[str, Any]) -> None:
    block = mamba(**options)
    if options.get("use_fast_path") is False:
        # As in the forks, the slow path goes one way.
        other = mamba()
        other.load_state_dict(block.state_dict(), strict=False)
        assert_same(
            block.forward, lambda hidden_states: loop(other, hidden_states), {"hidden_states": random(2, 6, 6, seed=1)}
        )
        return
    assert_same(lambda x: block(x, T=2), lambda x: loop(block, x), {"x": random(2, 6, 6, seed=1)})
    used = torch.autograd.grad(loop(block, random(1, 6, 6, seed=2)).sum(), list(block.parameters()))
    got = torch.autograd.grad(block(random(1, 6, 6, seed=2)).sum(), list(block.parameters()))
    for a, b in zip(got, used, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_step_by_step_equals_the_whole(prefix: int) -> None:
    from mamba_ssm.utils.generation import InferenceParams

    block, x = mamba(layer_idx=0), random(2, 9, 6, seed=1)
    want, cache = block(x), InferenceParams(9, 2)
    block._get_states_from_cache(cache, 2)
    found = []
    if prefix:
        found.append(block(x[:, :prefix], inference_params=cache))
    for t in range(prefix, 9):
        # Without a prefix the first step, too, is a step: what came before is zeros.
        cache.seqlen_offset = max(t, 1)
        found.append(block(x[:, t, None], inference_params=cache))
    torch.testing.assert_close(torch.cat(found, 1), want)
    y, conv, ssm = block.step(x[:, :1], *block.allocate_inference_cache(2, 9))
    torch.testing.assert_close(y, want[:, :1])
    assert conv.shape == (2, 12, 3) and ssm.shape == (2, 12, 3)
    block._get_states_from_cache(cache, 2, initialize_states=True)
    assert all((state == 0).all() for state in cache.key_value_memory_dict[0])


def test_what_is_wrong_is_said() -> None:
    from mamba_ssm import Mamba

    with pytest.raises(ConfigError, match="bimamba_type='v4': takes none, v1, v2, v3"):
        Mamba(4, bimamba_type="v4")
    with pytest.raises(ConfigError, match="dt_init='zero'"):
        Mamba(4, dt_init="zero")
    with pytest.raises(ConfigError, match="nslices=5 must divide the length 6"):
        Mamba(4, bimamba_type="v3")(torch.zeros(1, 6, 4))
    with pytest.raises(ConfigError, match="one position at a time, got 2"):
        mamba().step(random(1, 2, 6, seed=1), *mamba().allocate_inference_cache(1, 1))


def test_parameters_carry_what_initialisers_and_optimizers_look_for() -> None:
    from mamba_ssm import Mamba

    block = Mamba(8, d_state=4, bimamba_type="v2", dtype=torch.bfloat16, dt_init="constant")
    assert block.dt_proj.bias._no_reinit and (block.dt_proj.weight == 1).all()
    undecayed = {name for name, p in block.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert undecayed == {"A_log", "D", "A_b_log", "D_b"}
    wide = {name for name, p in block.named_parameters() if p.dtype == torch.float32}
    assert wide == undecayed
    torch.testing.assert_close(block.A_log.exp()[3], torch.arange(1.0, 5.0))
    assert block(torch.randn(1, 3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["mamba1_n16", "mamba1_n8", "mamba1_bias_k2", "vim_mixer_v1", "vim_mixer_v2"])
@pytest.mark.parametrize("double", [False, True])
def test_stored_official_runs(name: str, double: bool, golden: Path) -> None:
    from mamba_ssm.modules.mamba_simple import Mamba

    facts = json.loads((golden / f"{name}.json").read_text())
    stored = {key: x.double() if double else x for key, x in load_file(golden / f"{name}.safetensors").items()}
    block = Mamba(**facts["config"])
    block = block.double() if double else block
    block.load_state_dict({key[6:]: x for key, x in stored.items() if key.startswith("state.")})
    y = block(stored["in.x"])
    end = "64" if double else ""
    grad = torch.autograd.grad((y * stored["lossw.y"]).sum(), block.x_proj.weight, retain_graph=True)[0]
    pairs = [(y, stored[f"out{end}.y"]), *[(grad, g) for k, g in stored.items() if k == f"grad{end}.x_proj.weight"]]
    for got, want in pairs:
        assert (got - want).abs().max() <= (1e-9 if double else 1e-5) * want.abs().max()


@pytest.mark.parametrize("heads", [False, True])
def test_state_update_by_call(heads: bool) -> None:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update, selective_state_update_ref

    of_d, of_n = ((4, 3), (2, 5)) if heads else ((6,), (5,))
    inputs = {
        "x": random(2, *of_d, seed=1),
        "dt": random(2, *of_d, seed=2),
        "A": -random(*of_d, 5, seed=3).abs(),
        "B": random(2, *of_n, seed=4),
        "C": random(2, *of_n, seed=5),
        "D": random(*of_d, seed=6),
        "z": random(2, *of_d, seed=7),
        "dt_bias": random(*of_d, seed=8),
    }
    state = random(2, *of_d, 5, seed=9)

    def formula(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Any:
        if heads:
            B, C = (t.repeat_interleave(2, 1)[:, :, None] for t in (B, C))
        else:
            B, C = B[:, None], C[:, None]
        step = torch.nn.functional.softplus(dt + dt_bias)[..., None]
        after = torch.exp(step * A) * state + step * B * x[..., None]
        return ((after * C).sum(-1) + D * x) * z * torch.sigmoid(z)

    for function in (selective_state_update, selective_state_update_ref):
        assert_same(lambda f=function, **given: f(state.clone(), **given, dt_softplus=True), formula, inputs)
    larger = torch.cat([random(3, *of_d, 5, seed=10), state])
    rows, kept = torch.tensor([3, 4], dtype=torch.int32), larger[:3].clone()
    y = selective_state_update(larger, **inputs, dt_softplus=True, state_batch_indices=rows)
    once = state.clone()
    torch.testing.assert_close(y, selective_state_update(once, **inputs, dt_softplus=True))
    torch.testing.assert_close(larger, torch.cat([kept, once]))
    assert not torch.equal(once, state)
