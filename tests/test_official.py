"""Official weights compute what the official code computes, and what does not fit is said in words."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.errors import ConfigError, DataError
from selectra.mixers import S6, EinFFT
from selectra.official import OfficialMamba, from_official, readers, reads
from tests.golden import PRECISIONS, Golden

NAMES = ["mamba1_n16", "mamba1_n8", "mamba1_bias_k2"]
SOURCE = "state-spaces/mamba:Mamba"


class Stored(Golden):
    """One of a Mamba."""

    def module(self) -> OfficialMamba:
        module = super().module()
        assert isinstance(module, OfficialMamba)
        return module


@pytest.fixture(params=[(name, dtype) for name in NAMES for dtype in PRECISIONS], ids=str)
def stored(request: pytest.FixtureRequest, golden: Path) -> Stored:
    return Stored(*Golden.read(golden, *request.param))


def test_outputs_and_every_gradient(stored: Stored):
    stored.check_all()


def test_steps(stored: Stored):
    module, (x,) = stored.module(), stored.inputs()
    conv, ssm = module.allocate_inference_cache(len(x), x.shape[1])
    ys = [module.step(x[:, t : t + 1], conv, ssm)[0] for t in range(x.shape[1])]
    stored.check("out", "step_y", torch.cat(ys, 1))
    stored.check("out", "step_conv_state", conv)
    stored.check("out", "step_ssm_state", ssm)


def test_prefill_then_decode(stored: Stored):
    module, (x,) = stored.module(), stored.inputs()
    module.layer_idx = 3
    n_prefill = stored.tensors["out.prefill_y"].shape[1]
    params = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    stored.check("out", "prefill_y", module(x[:, :n_prefill], params)[0])
    conv, ssm = params.key_value_memory_dict[3]
    stored.check("out", "prefill_conv_state", conv)
    stored.check("out", "prefill_ssm_state", ssm)
    ys = []
    for t in range(n_prefill, x.shape[1]):
        params.seqlen_offset = t
        ys.append(module(x[:, t : t + 1], params)[0])
    stored.check("out", "decode_y", torch.cat(ys, 1))
    stored.check("out", "decode_conv_state", conv)
    stored.check("out", "decode_ssm_state", ssm)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_einfft(dtype: torch.dtype, golden: Path):
    Golden.read(golden, "simba_einfft", dtype).check_all()


def test_einfft_is_called_with_the_grid_too():
    official, x = from_official("badripatro/simba:EinFFT", {"dim": 8}, EinFFT(8).state_dict()), torch.randn(1, 6, 8)
    assert torch.equal(official(x, 2, 3)[0], official(x)[0])


CONFIG: dict[str, Any] = {"d_model": 6, "d_state": 4}


def state(**changes: Any) -> dict[str, Tensor]:
    return S6(**{**CONFIG, **changes}).state_dict()


def test_every_official_keyword_is_taken():
    config = {
        **{"d_model": 6, "d_state": 4, "d_conv": 3, "expand": 2, "dt_rank": 2, "dt_min": 0.01, "dt_max": 0.1},
        **{"dt_init": "constant", "dt_scale": 2.0, "dt_init_floor": 1e-3, "conv_bias": False, "bias": True},
        **{"use_fast_path": False, "layer_idx": 0, "device": "cpu", "dtype": "float64"},
    }
    module = from_official(SOURCE, config, state(d_conv=3, dt_rank=2, conv_bias=False, bias=True))
    assert not module.training
    assert all(p.dtype == torch.float64 for p in module.parameters())
    (y,) = module(torch.randn(1, 5, 6, dtype=torch.float64))
    assert y.shape == (1, 5, 6)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64])
def test_the_state_decides_the_precision(given):
    weights = {key: value.to(given) for key, value in state().items()}
    expected = torch.float64 if given == torch.float64 else torch.float32
    assert {p.dtype for p in from_official(SOURCE, CONFIG, weights).parameters()} == {expected}


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        ("state-spaces/mamba:Mambo", CONFIG, r"'state-spaces/mamba:Mambo' is not known.*Did you mean '.*:Mamba'"),
        (SOURCE, {**CONFIG, "dstate": 4}, "no supported option 'dstate'.*Did you mean 'd_state'"),
        (SOURCE, {**CONFIG, "if_cls_token": True}, "no supported option 'if_cls_token'"),
        (SOURCE, {**CONFIG, "d_state": "many"}, "option 'd_state' is 'many'"),
        (SOURCE, {**CONFIG, "dt_init": "normal"}, "option 'dt_init' is 'normal'.*'random'.*'constant'"),
        (SOURCE, {**CONFIG, "dtype": "float23"}, "option 'dtype' is 'float23'.*bfloat16"),
        (SOURCE, {**CONFIG, "dtype": torch.int64}, "option 'dtype' is 'torch.int64'.*bfloat16"),
        (SOURCE, {**CONFIG, "device": "cuba"}, "option 'device' is 'cuba', which cannot be used here"),
        (SOURCE, {**CONFIG, "device": "cuda:99"}, "option 'device' is 'cuda:99', which cannot be used here"),
        (SOURCE, {**CONFIG, "d_state": 0}, "d_state=0: needs at least 1"),
        (SOURCE, {}, "needs 'd_model'"),
    ],
)
def test_what_is_not_supported_is_named(source, config, message):
    with pytest.raises(ConfigError, match=message):
        from_official(source, config, state())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (state(d_state=5), r"'A_log' has the shape \(12, 5\) where the configuration gives \(12, 4\)"),
        (state(bias=True), "the state has 'in_proj.bias', 'out_proj.bias', which this configuration has no place for"),
        (state(conv_bias=False), "the state lacks 'conv1d.bias'"),
        ({**state(), "D": 1.0}, "state 'D' is float; it must be a tensor"),
        ({**state(), "D": torch.ones(12) * 1j}, "'D' is torch.complex64 where the model has torch.float32"),
        ({**state(), "D": torch.ones(12, dtype=torch.int64)}, "'D' is torch.int64 where the model has torch.float32"),
        ({key: value.bool() for key, value in state().items()}, "'out_proj.weight' is torch.bool.*; and 1 more"),
    ],
)
def test_a_state_that_does_not_fit_is_described(weights, message):
    with pytest.raises(DataError, match=message):
        from_official(SOURCE, CONFIG, weights)


def test_a_step_takes_one_position_and_a_cache_needs_its_key():
    module = from_official(SOURCE, CONFIG, state())
    assert isinstance(module, OfficialMamba)
    cache = module.allocate_inference_cache(1, 10, dtype=torch.float32)
    with pytest.raises(ConfigError, match="2 positions; a step takes 1"):
        module.step(torch.randn(1, 2, 6), *cache)
    with pytest.raises(ConfigError, match="layer_idx"):
        module(torch.randn(1, 2, 6), SimpleNamespace(seqlen_offset=0, key_value_memory_dict={}))


def test_a_reader_is_registered_under_its_source():
    @reads("somebody/something:Else")
    def read_else(*, width: int) -> OfficialMamba:
        return OfficialMamba(S6(width), None)

    try:
        assert readers["somebody/something:Else"] is read_else
        assert from_official("somebody/something:Else", {"width": 4}, S6(4).state_dict()).model is not None
    finally:
        del readers["somebody/something:Else"]
